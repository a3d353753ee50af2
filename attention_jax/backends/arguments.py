"""Converts public arguments to a ``Call``: ``bind``, and the checks that need no shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from attention_jax import masks
from attention_jax import scores as all_scores
from attention_jax.backends.call import Call, call_at_positions
from attention_jax.core import dropout
from attention_jax.core.axes import (
    AnyArray,
    Shape,
    accumulation_dtype,
    check_finite,
    check_float_array,
    is_array,
    kind,
)
from attention_jax.core.positions import checked_positions
from attention_jax.masks import Mask
from attention_jax.scores import Score

MaskLike = Mask | Bool[AnyArray, "..."] | None
ScoreLike = Score | Sequence[Score]
Sinks = Float[AnyArray, " N"] | None
Scale = float | Float[AnyArray, ""] | None


def bind(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sinks: Sinks = None,
    scale: Scale = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    static_numbers: bool = False,
    abstract: bool = False,
) -> Call:
    """Public arguments as a ``Call``, a pytree of arrays that can be passed to ``jax.jit``.

    A bool array becomes ``masks.dense``, a single score a tuple, a dropout rate and key a
    ``Dropout``, and arrays that functions close over become leaves. Positions become part of the
    mask, the scores and the dropout. Shapes are not checked yet.

    Args:
      query, key, value, mask, score, sinks, scale, dropout_rate, dropout_key: as for ``attention``.
      query_positions, key_positions: as for ``attention``, or ``Contiguous``.
      static_numbers: keep Python numbers of scores as constants of the program.
      abstract: query, key, value and positions may be ``jax.ShapeDtypeStruct``.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
    """
    mask, score = as_mask(mask), as_scores(score)
    check_types(
        {"query": query, "key": key, "value": value, "sinks": sinks, "scale": scale},
        abstract=abstract,
    )
    dropout.check(dropout_rate, dropout_key)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1] or 1) if query.shape else 1.0
    mask, score = _hoisted(mask, score, (query, key, value), numbers=not static_numbers)
    queries, keys = (
        checked_positions(name, x, _row_shape(rows), abstract=abstract)
        for name, x, rows in (
            ("query_positions", query_positions, query),
            ("key_positions", key_positions, key),
        )
    )
    call = Call(
        query=query,
        key=key,
        value=value,
        mask=mask,
        score=score,
        sinks=sinks,  # type: ignore[arg-type]  # the arrays of JAX once complete
        scale=float(scale) if is_number(scale) else scale,  # type: ignore[arg-type]
        dropout=dropout.of_rate(
            dropout_rate, None if abstract else dropout_key, accumulation_dtype(query.dtype)
        ),
    )
    return call if queries is None and keys is None else call_at_positions(call, queries, keys)


def _row_shape(x: Any) -> Shape | None:
    """``(*B, T)`` of a query ``[*B T N H]``; None if it has too few axes, which is found later."""
    return tuple(x.shape[:-2]) if len(x.shape) >= 3 else None


def _hoisted(
    mask: Mask | None,
    score: tuple[Score, ...],
    arrays: tuple[Any, ...],
    *,
    numbers: bool,
) -> tuple[Mask | None, tuple[Score, ...]]:
    """Mask and scores with arrays in place of values that need not be constants of the program.

    Args:
      arrays: query, key and value.
      numbers: also replace Python numbers; False for kernels that need them as constants.
    """
    dtype = jax.dtypes.canonicalize_dtype(accumulation_dtype(arrays[0].dtype))
    mask = None if mask is None else mask.hoisted(dtype, numbers)
    score = tuple(x.hoisted(dtype, numbers) for x in score)
    tracing = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((arrays, mask, score)))
    return jax.tree.map(_not_folded, (mask, score)) if tracing else (mask, score)


# A NumPy mask of 4096 x 4096 takes 30 s to compile as a constant, and 0.5 s behind a barrier.
LARGE_CONSTANT = 2**12  # entries


def _not_folded(x: Any) -> Any:
    """Hides a large constant of the program from XLA's constant folding."""
    constant = is_array(x) and not isinstance(x, jax.core.Tracer) and np.size(x) >= LARGE_CONSTANT
    return jax.lax.optimization_barrier(jnp.asarray(x)) if constant else x


def as_mask(mask: Any) -> Mask | None:
    """A mask, with a bool array as ``masks.dense``."""
    if mask is None or isinstance(mask, Mask):
        return mask
    if isinstance(mask, (tuple, list)) and any(isinstance(x, Mask) for x in mask):
        raise TypeError(f"mask must be one Mask, got a {kind(mask)}: join them with & or |")
    if is_array(mask):
        if mask.dtype != np.bool_:
            raise TypeError(
                f"mask must be a Mask or a bool array (True = visible), got dtype {mask.dtype}: "
                f"convert it with .astype(bool), or add it to the logits by "
                f"score=scores.bias(array)"
            )
        return masks.dense(mask)
    raise TypeError(
        f"mask must be a Mask, a bool array or None, got {kind(mask)}"
        f"{_hint(mask, masks, 'mask', 'mask_fn(fn)')}"
    )


def as_scores(score: Any) -> tuple[Score, ...]:
    """Scores as a tuple."""
    scores = (score,) if isinstance(score, Score) else score
    if not isinstance(scores, (tuple, list)) or not all(isinstance(x, Score) for x in scores):
        several = scores if isinstance(scores, (tuple, list)) else (scores,)
        wrong = next(x for x in several if not isinstance(x, Score))
        got = kind(wrong) if several is not scores else f"a sequence with {kind(wrong)}"
        raise TypeError(
            f"score must be a Score or a sequence of them, got {got}"
            f"{_hint(wrong, all_scores, 'score', 'score_fn(fn)')}"
        )
    return tuple(scores)


def _hint(x: Any, namespace: Any, argument: str, wrapped: str) -> str:
    """A suggestion for a wrong mask or score; empty if there is none.

    Args:
      x: the argument.
      namespace: ``masks`` or ``scores``.
      argument: its name.
      wrapped: how to make a mask or score of a function.
    """
    module = namespace.__name__.rpartition(".")[2]
    name = x if isinstance(x, str) else getattr(x, "__name__", "")
    if name in namespace.__all__ and (isinstance(x, str) or getattr(namespace, name) is x):
        return f": call {module}.{name}(...)"
    if isinstance(x, (Mask, Score)):
        other = "mask" if isinstance(x, Mask) else "score"
        return f": pass it as {other}="
    if callable(x):
        return f": wrap it, {module}.{wrapped}"
    if isinstance(x, (bool, int)) and argument == "mask":
        return ": pass None to attend to every key, or masks.causal() to mask those that follow"
    if isinstance(x, (list, tuple)):
        return ": convert it with np.asarray" if argument == "mask" else ""
    if x is None:
        return ": leave it out, or pass ()"
    return ": a bias is scores.bias(array)" if is_array(x) and argument == "score" else ""


def check_types(arrays: dict[str, Any], *, abstract: bool = False) -> None:
    """Raises unless all are floating arrays; ``scale`` may also be a finite number.

    Args:
      arrays: by argument name.
      abstract: allow ``jax.ShapeDtypeStruct``.
    """
    for name, x in arrays.items():
        if x is None and name in ("sinks", "scale"):
            continue
        if name == "scale" and not is_array(x):
            if not is_number(x):
                raise TypeError(
                    f"scale must be a number, a floating array of shape [] or None, got {kind(x)}"
                )
            check_finite(name, x)
            continue
        check_float_array(name, x)
        check_finite(name, x)
        if isinstance(x, jax.ShapeDtypeStruct) and not abstract:
            raise TypeError(f"{name} must be an array, got ShapeDtypeStruct: only explain takes it")


def check_flag(name: str, x: Any) -> None:
    """Raises unless ``x`` is True or False."""
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r}")


def is_number(x: Any) -> bool:
    """True for a Python number, which a bool is not."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)
