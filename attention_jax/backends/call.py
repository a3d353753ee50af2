"""From the arguments of a call to a ``Call``: checked, and brought into one form.

``attention`` and those mechanisms whose logits are those of softmax attention take the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from attention_jax import masks
from attention_jax.core.axes import (
    AnyArray,
    Sizes,
    accumulation_dtype,
    check_broadcastable,
    check_float_array,
    check_query_key_value,
    is_array,
)
from attention_jax.core.dropout import Dropout
from attention_jax.core.pytree import full_rank
from attention_jax.masks import Mask
from attention_jax.scores import Score

MaskLike = Mask | Bool[AnyArray, "..."] | None
ScoreLike = Score | Sequence[Score]
Sinks = Float[AnyArray, " N"] | None
Scale = float | Float[AnyArray, ""] | None


class Call(NamedTuple):
    """The arguments of one call, checked: what every implementation is given."""

    query: Any  # [*B T N H]
    key: Any  # [*B S K H]
    value: Any  # [*B S K D]
    mask: Mask | None
    score: tuple[Score, ...]
    sinks: Any  # [N] or None
    scale: Any  # scalar
    dropout: Dropout | None  # of scalars


class Head(NamedTuple):
    """The same for one head of one example."""

    query: Any  # [T H]
    key: Any  # [S H]
    value: Any  # [S D]
    mask: Mask | None
    score: tuple[Score, ...]
    sink: Any  # scalar or None
    scale: Any  # scalar
    dropout: Dropout | None  # of scalars
    b: Any  # int32 scalar
    n: Any  # int32 scalar


class Spec(NamedTuple):
    """Everything about a call but the numbers in its arrays.

    Mask and scores are resolved and their arrays, if any, at full rank (see ``pytree.full_rank``).
    """

    sizes: Sizes
    dtype: Any
    mask: Mask | None
    score: tuple[Score, ...]
    scale: float | None  # None: an array, whose value is not known while tracing
    sinks: bool  # are there any
    dropout: bool  # is the dropout rate above 0
    return_lse: bool  # is the lse asked for
    platform: str  # "cpu", "gpu" or "tpu"
    partitioned: bool = False  # does the compiler split the program over a mesh of devices


def checked(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sinks: Sinks = None,
    scale: Scale = None,
) -> tuple[Call, Sizes]:
    """A call and its sizes.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
    """
    mask, score = as_mask(mask), as_scores(score)
    arrays = {"query": query, "key": key, "value": value, "sinks": sinks, "scale": scale}
    check_types(arrays)
    sizes = check_query_key_value(query, key, value)
    arrays["scale"], _ = scale_of(scale, query)
    mask, score = hoisted(mask, score, (query, key, value))
    return call_of(arrays, mask, score, None, sizes), sizes


def call_of(
    arrays: dict[str, Any],
    mask: Mask | None,
    score: tuple[Score, ...],
    dropout: Dropout | None,
    sizes: Sizes,
) -> Call:
    """The call; what it checks needs shapes only, so that it can be traced."""
    sinks, scale = arrays["sinks"], arrays["scale"]
    check_scalars_and_sinks(sinks, scale, sizes)
    mask, score = resolve(mask, score, sizes)
    return Call(
        query=jnp.asarray(arrays["query"]),
        key=jnp.asarray(arrays["key"]),
        value=jnp.asarray(arrays["value"]),
        mask=mask,
        score=score,
        sinks=sinks,
        scale=jnp.asarray(scale).astype(accumulation_dtype(arrays["query"].dtype)),
        dropout=dropout,
    )


def hoisted(
    mask: Mask | None,
    score: tuple[Score, ...],
    arrays: tuple[Any, ...],
    *,
    numbers: bool = True,
) -> tuple[Mask | None, tuple[Score, ...]]:
    """Mask and scores with arrays in place of what need not be part of the program.

    Args:
      arrays: query, key and value.
      numbers: False keeps Python numbers static, as some kernels require.
    """
    dtype = jax.dtypes.canonicalize_dtype(accumulation_dtype(arrays[0].dtype))
    mask = None if mask is None else mask.hoisted(dtype, numbers)
    score = tuple(x.hoisted(dtype, numbers) for x in score)
    tracing = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((arrays, mask, score)))
    return jax.tree.map(_not_folded, (mask, score)) if tracing else (mask, score)


LARGE_CONSTANT = 2**12  # entries


def _not_folded(x: Any) -> Any:
    """Hides a large constant of the program from XLA's constant folding.

    A causal mask of 4096 x 4096 in NumPy took 30 s to compile, in place of 0.5.
    """
    constant = is_array(x) and not isinstance(x, jax.core.Tracer) and np.size(x) >= LARGE_CONSTANT
    return jax.lax.optimization_barrier(jnp.asarray(x)) if constant else x


def resolve(
    mask: Mask | None, score: tuple[Score, ...], sizes: Sizes
) -> tuple[Mask | None, tuple[Score, ...]]:
    """Mask and scores with offsets known, and their arrays checked and at full rank."""
    T, S, N = sizes.T, sizes.S, sizes.N
    if isinstance(mask, masks.Dense):
        check_broadcastable("mask", mask.array.shape, sizes)
    if mask is not None:
        mask = full_rank(mask.resolve(T, S, N), sizes, "mask")
    return mask, tuple(full_rank(x.resolve(T, S, N), sizes, "score") for x in score)


def as_mask(mask: Any) -> Mask | None:
    """A mask, with a bool array as ``masks.dense``."""
    if mask is None or isinstance(mask, Mask):
        return mask
    if is_array(mask):
        if mask.dtype != np.bool_:
            raise TypeError(
                f"mask must be a Mask or a bool array (True = visible), got dtype {mask.dtype}; a "
                f"bias on the logits is score=scores.bias(array)"
            )
        return masks.dense(mask)
    raise TypeError(f"mask must be a Mask, a bool array or None, got {type(mask).__name__}")


def as_scores(score: Any) -> tuple[Score, ...]:
    """Scores as a tuple."""
    scores = (score,) if isinstance(score, Score) else score
    if not isinstance(scores, (tuple, list)) or not all(isinstance(x, Score) for x in scores):
        got = type(score).__name__
        if isinstance(scores, (tuple, list)):
            got += " of " + ", ".join(type(x).__name__ for x in scores)
        raise TypeError(
            f"score must be a Score or a sequence of them, got {got}; a bias is scores.bias(array)"
        )
    return tuple(scores)


def check_types(arrays: dict[str, Any]) -> None:
    """What must be known before tracing: that everything is an array or a number."""
    for name, x in arrays.items():
        if x is None and name in ("sinks", "scale"):
            continue
        if name == "scale" and is_number(x):
            continue
        check_float_array(name, x)
        if isinstance(x, jax.ShapeDtypeStruct):
            raise TypeError(f"{name} must be an array, got ShapeDtypeStruct: only explain takes it")


def check_flag(name: str, x: Any) -> None:
    """Raises unless ``x`` is True or False."""
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r}")


def is_number(x: Any) -> bool:
    """True for a Python number, which a bool is not."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def scale_of(scale: Any, query: Any) -> tuple[Any, float | None]:
    """The scale, and the number that it is where that is known; None is ``1 / sqrt(H)``."""
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1] or 1) if query.shape else 1.0
    return (float(scale), float(scale)) if is_number(scale) else (scale, None)


def check_scalars_and_sinks(sinks: Any, scale: Any, sizes: Sizes) -> None:
    """Raises unless there is a sink per query head, and the scale is one number."""
    if sinks is not None:
        check_float_array("sinks", sinks)
        if sinks.shape != (sizes.N,):
            raise ValueError(
                f"sinks has shape {tuple(sinks.shape)}, expected [N] = ({sizes.N},), one per query "
                f"head"
            )
    if scale is not None:
        if not is_number(scale):
            check_float_array("scale", scale)
        if np.ndim(scale) != 0:
            raise ValueError(f"scale must be a number, got shape {np.shape(scale)}")
