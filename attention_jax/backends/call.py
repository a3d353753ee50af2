"""The input of a backend: the checked arguments of one call of ``attention``.

``arguments.bind`` converts public arguments to a ``Call``, ``complete`` fills in what depends on
shapes, and ``spec_of`` summarizes the call without the values of its arrays as a ``Spec``, from
which a backend is chosen. A ``Backend`` has two methods, ``why_unsupported(spec)`` and
``run(call, spec)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attention_jax import masks
from attention_jax.core import dropout
from attention_jax.core.axes import (
    AnyArray,
    Sizes,
    accumulation_dtype,
    check_broadcastable,
    check_query_key_value,
)
from attention_jax.core.positions import AtPositions, Contiguous, position_fields
from attention_jax.core.pytree import full_rank
from attention_jax.masks import Mask
from attention_jax.masks.at_positions import mask_at_positions
from attention_jax.scores import Score
from attention_jax.scores.at_positions import score_at_positions


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
    """Output and normalizer ``lse = m + log_l``.

    The two terms of the lse are kept separate, because their sum loses digits of ``log_l`` when
    logits are large.
    """

    out: Float[Array, "*B T N D"]
    m: Float[Array, "*B T N"]  # always finite, also for a query with no visible key
    log_l: Float[Array, "*B T N"]  # -inf for a query with no visible key


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
    # Whether it has ``chunk`` and ``chunk_cotangents``, which compute with some of the keys.
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
        """The contribution of a chunk of the keys to the cotangents of operands.

        Args:
          call, spec: of the chunk, without sinks.
          results: of all keys.
          wrt: which operands, as indices into query, key, value, arrays of the scores, scale.
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
    """``symbolic_lengths_refused`` for a backend whose grid also depends on the batch size."""
    if sizes.symbolic_batch:
        return "B is symbolic, and its kernel is launched for a batch size known while tracing"
    return symbolic_lengths_refused(sizes)


def call_at_positions(
    call: Call, queries: Any, keys: Any, *, resolved: bool = False, **numbers: Any
) -> Call:
    """The call with its mask, scores and dropout evaluated at explicit positions.

    Args:
      call: from ``bind``.
      queries, keys: int32 arrays, ``Contiguous``, or None: 0, 1, 2, ... If both are None, positions
        that the call already has are kept.
      resolved: whether mask and scores are already resolved for the whole sequence and all heads.
      **numbers: ``examples`` and ``head_numbers``, see ``position_fields``.
    """
    mask = call.mask
    contiguous = all(x is None or isinstance(x, Contiguous) for x in (queries, keys))
    if mask is None and (not contiguous or call.dropout is not None):
        # Even without a mask, keys at negative positions are masked; and has_positions looks for
        # positions in the mask.
        mask = masks.window(None, None)
    options: dict[str, Any] = {"resolved": resolved, **numbers}
    drop = call.dropout
    if drop is not None:
        keep_positions = queries is None and keys is None
        drop = dataclasses.replace(
            drop, **(numbers if keep_positions else position_fields(queries, keys, **numbers))
        )
    return call._replace(
        mask=None if mask is None else mask_at_positions(mask, queries, keys, **options),
        score=tuple(score_at_positions(x, queries, keys, **options) for x in call.score),
        dropout=drop,
    )


def has_positions(spec: Spec) -> bool:
    """Whether the call has explicit positions of queries or keys."""
    values = spec.score if spec.mask is None else (spec.mask, *spec.score)
    return any(isinstance(x, AtPositions) for x in values)


def positions_refused(spec: Spec) -> str | None:
    """Why a kernel that uses indices as positions does not support a call; else None."""
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
    plain = mask.mask_ if isinstance(mask, masks.MaskAtPositions) else mask
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


def _check_sinks(sinks: Any, sizes: Sizes) -> None:
    if sinks is not None and sinks.shape != (sizes.N,):
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}, expected [N] = ({sizes.N},), one per query head"
        )


def _check_scale(scale: Any) -> None:
    if np.ndim(scale) != 0:
        raise ValueError(f"scale must be a number, got shape {np.shape(scale)}")
