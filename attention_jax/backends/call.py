"""The input of a backend: the checked arguments of one call of ``attention``.

``bind`` converts public arguments to a ``Call``, ``complete`` fills in what depends on shapes, and
``spec_of`` summarizes the call without the values of its arrays as a ``Spec``, from which a backend
is chosen. A ``Backend`` has two methods, ``why_unsupported(spec)`` and ``run(call, spec)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attention_jax import masks
from attention_jax import scores as all_scores
from attention_jax.core import dropout
from attention_jax.core.axes import (
    AnyArray,
    Shape,
    Sizes,
    accumulation_dtype,
    check_broadcastable,
    check_float_array,
    check_query_key_value,
    is_array,
    kind,
)
from attention_jax.core.positions import Positioned, checked_positions, positioned
from attention_jax.core.pytree import full_rank
from attention_jax.masks import Mask
from attention_jax.masks.at_positions import placed as placed_mask
from attention_jax.scores import Score
from attention_jax.scores.at_positions import placed as placed_score

MaskLike = Mask | Bool[AnyArray, "..."] | None
ScoreLike = Score | Sequence[Score]
Sinks = Float[AnyArray, " N"] | None
Scale = float | Float[AnyArray, ""] | None


class Call(NamedTuple):
    """The arguments of one call."""

    query: Float[Array, "*B T N H"]
    key: Float[Array, "*B S K H"]
    value: Float[Array, "*B S K D"]
    mask: Mask | None
    score: tuple[Score, ...]
    sinks: Float[Array, " N"] | None
    scale: Float[Array, ""]
    dropout: dropout.Dropout | None


class Head(NamedTuple):
    """The arguments of one call for one head of one example."""

    query: Float[Array, "T H"]
    key: Float[Array, "S H"]
    value: Float[Array, "S D"]
    mask: Mask | None
    score: tuple[Score, ...]
    sink: Float[Array, ""] | None
    scale: Float[Array, ""]
    dropout: dropout.Dropout | None
    b: Int[AnyArray, ""]  # the example, counted over the flattened *B
    n: Int[AnyArray, ""]  # the query head


class Results(NamedTuple):
    """Output and normalizer, which are those of the visible keys only: ``lse = m + log_l``.

    The two parts of the lse stay apart, because their sum rounds ``log_l`` where logits are large.
    """

    out: Float[Array, "*B T N D"]
    m: Float[Array, "*B T N"]  # finite, also without visible keys
    log_l: Float[Array, "*B T N"]  # -inf without visible keys


class Spec(NamedTuple):
    """Everything about a call except the values of its arrays.

    Mask and scores are resolved, and their arrays have full rank (see ``pytree.full_rank``).
    """

    sizes: Sizes
    dtype: Any
    mask: Mask | None
    score: tuple[Score, ...]
    scale: float | None  # None if it is an array, whose value is not known while tracing
    sinks: bool  # whether there are sinks
    dropout: bool  # whether the dropout rate is above 0
    return_lse: bool  # whether the lse is returned
    platform: str  # "cpu", "gpu" or "tpu"
    partitioned: bool = False  # whether the compiler partitions the program over a mesh


class Backend:
    """One way to compute attention.

    A subclass is a frozen dataclass whose fields configure it (block sizes, tiles). ``attention``
    takes such a value as ``implementation``; ``backends.IMPLEMENTATIONS`` gives some of them names.
    """

    # Whether the kernel needs ``scale`` and Python numbers in scores as constants of the program.
    STATIC_NUMBERS: ClassVar[bool] = False
    # ``chunk`` and ``chunk_cotangents`` compute with some of the keys at a time.
    CHUNKS: ClassVar[bool] = False

    def __str__(self) -> str:
        """The class, with the fields that differ from their defaults."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # of a subclass
        given = [f.name for f in fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{x}={getattr(self, x)}' for x in given)})"

    def why_unsupported(self, spec: Spec) -> str | None:
        """Why this backend does not support a call, in words; None if it does."""
        raise NotImplementedError(f"{type(self).__name__} must define why_unsupported(spec)")

    def run(self, call: Call, spec: Spec) -> tuple[jax.Array, jax.Array]:
        """Output ``[*B T N D]`` and lse ``[*B T N]``, arbitrary unless ``spec.return_lse``."""
        raise NotImplementedError(f"{type(self).__name__} must define run(call, spec)")

    def chunk(self, call: Call, spec: Spec) -> Results:
        """``Results`` of a chunk of the keys, in at least float32, for ``parallel``'s ring."""
        raise NotImplementedError(f"{type(self).__name__} has no chunk(call, spec)")

    def chunk_cotangents(
        self, call: Call, spec: Spec, results: Results, wrt: Sequence[int], cotangents: Any
    ) -> list[jax.Array]:
        """What a chunk of the keys contributes to the cotangents of operands.

        Args:
          call, spec: of the chunk, without sinks.
          results: of all keys.
          wrt: which operands, by number: query, key, value, the arrays of the scores, the scale.
          cotangents: of the output and the lse, of all keys.
        """
        raise NotImplementedError(f"{type(self).__name__} has no chunk_cotangents(call, ...)")

    def extra_bytes(self, spec: Spec) -> int:
        """Memory of the forward pass in bytes, not counting arguments and results."""
        raise NotImplementedError(f"{type(self).__name__} must define extra_bytes(spec)")

    def block(self, spec: Spec) -> tuple[int, int] | None:
        """Queries and keys per block; None if the cost does not follow the mask's blocks."""
        return None


def symbolic_lengths_refused(sizes: Sizes) -> str | None:
    """Why a backend whose blocks depend on the lengths does not support these sizes; else None."""
    if sizes.symbolic_lengths:
        return "T or S is symbolic, and its blocks depend on lengths that are known while tracing"
    return None


def symbolic_sizes_refused(sizes: Sizes) -> str | None:
    """The same for a backend whose grid also depends on the batch size."""
    if sizes.symbolic_batch:
        return "B is symbolic, and its kernel is launched for a batch size known while tracing"
    return symbolic_lengths_refused(sizes)


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
      abstract: query, key and value may be ``jax.ShapeDtypeStruct``.

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
    queries = checked_positions("query_positions", query_positions, _row_shape(query))
    keys = checked_positions("key_positions", key_positions, _row_shape(key))
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
    return call if queries is None and keys is None else place(call, queries, keys)


def place(call: Call, queries: Any, keys: Any, *, resolved: bool = False, **numbers: Any) -> Call:
    """The call with these positions of queries and keys, and numbers of examples and heads.

    Args:
      call: from ``bind``.
      queries, keys: int32 arrays, ``Contiguous``, or None: 0, 1, 2, ... Both None: as before.
      resolved: mask and scores are resolved for the whole sequence, with all its heads.
      **numbers: ``examples`` and ``head_numbers``, see ``positioned``.
    """
    mask = call.mask
    if mask is None and (is_array(queries) or is_array(keys) or call.dropout is not None):
        # Negative keys are masked, and a kernel sees from the mask that there are positions.
        mask = masks.window(None, None)
    options: dict[str, Any] = {"resolved": resolved, **numbers}
    drop = call.dropout
    if drop is not None:
        unmoved = queries is None and keys is None
        drop = dataclasses.replace(
            drop, **(numbers if unmoved else positioned(queries, keys, **numbers))
        )
    return call._replace(
        mask=None if mask is None else placed_mask(mask, queries, keys, **options),
        score=tuple(placed_score(x, queries, keys, **options) for x in call.score),
        dropout=drop,
    )


def _row_shape(x: Any) -> Shape | None:
    """``(*B, T)`` of a query ``[*B T N H]``; None if it has too few axes, which is found later."""
    return tuple(x.shape[:-2]) if len(x.shape) >= 3 else None


def has_positions(spec: Spec) -> bool:
    """Whether queries or keys have positions that are not their indices."""
    values = spec.score if spec.mask is None else (spec.mask, *spec.score)
    return any(isinstance(x, Positioned) for x in values)


def positions_refused(spec: Spec) -> str | None:
    """The refusal of a kernel that counts queries and keys from 0."""
    if has_positions(spec):
        return "query_positions or key_positions: its kernel counts queries and keys from 0"
    return None


def complete(call: Call) -> tuple[Call, Sizes]:
    """The call with its shapes checked, offsets resolved, masks and scores at full rank.

    It depends on shapes only, so ``attention`` runs it while tracing, once per shape.

    Raises:
      TypeError, ValueError: shapes or dtypes that do not fit together; the message names the
        argument.
    """
    sizes = check_query_key_value(call.query, call.key, call.value)
    T, S, N = sizes.T, sizes.S, sizes.N
    _check_sinks(call.sinks, sizes)
    _check_scale(call.scale)
    mask, score = call.mask, call.score
    plain = mask.mask_ if isinstance(mask, masks.Placed) else mask
    if isinstance(plain, masks.Dense):
        check_broadcastable("mask", plain.array.shape, sizes)
    if mask is not None:
        mask = full_rank(mask.resolve(T, S, N), sizes, "mask")
    return (
        call._replace(
            query=_as_array(call.query),
            key=_as_array(call.key),
            value=_as_array(call.value),
            mask=mask,
            score=tuple(full_rank(x.resolve(T, S, N), sizes, "score") for x in score),
            scale=_as_scale(call),
            dropout=full_rank(call.dropout, sizes, "dropout"),
        ),
        sizes,
    )


def spec_of(
    call: Call,
    sizes: Sizes,
    *,
    platform: str,
    scale: float | None = None,
    return_lse: bool = False,
    partitioned: bool = False,
) -> Spec:
    """The ``Spec`` of a complete call.

    Args:
      scale: the scale of the call, if it is known while tracing.
      The rest as in ``Spec``.
    """
    return Spec(
        sizes=sizes,
        dtype=call.query.dtype,
        mask=call.mask,
        score=call.score,
        scale=scale,
        sinks=call.sinks is not None,
        dropout=call.dropout is not None,
        return_lse=return_lse,
        platform=platform,
        partitioned=partitioned,
    )


def _as_array(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)


def _as_scale(call: Call) -> Any:
    if isinstance(call.query, jax.ShapeDtypeStruct):  # nothing is computed for explain
        return call.scale
    return jnp.asarray(call.scale).astype(accumulation_dtype(call.query.dtype))


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
    """Raises unless all are floating arrays; ``scale`` may also be a number.

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
            continue
        check_float_array(name, x)
        if isinstance(x, jax.ShapeDtypeStruct) and not abstract:
            raise TypeError(f"{name} must be an array, got ShapeDtypeStruct: only explain takes it")


def check_flag(name: str, x: Any) -> None:
    """Raises unless ``x`` is True or False."""
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r}")


def is_number(x: Any) -> bool:
    """True for a Python number, which a bool is not."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _check_sinks(sinks: Any, sizes: Sizes) -> None:
    if sinks is not None and sinks.shape != (sizes.N,):
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}, expected [N] = ({sizes.N},), one per query head"
        )


def _check_scale(scale: Any) -> None:
    if np.ndim(scale) != 0:
        raise ValueError(f"scale must be a number, got shape {np.shape(scale)}")
