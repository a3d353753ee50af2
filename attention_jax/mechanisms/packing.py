"""Packed sequences for causal mechanisms: the state is reset where a document begins."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attention_jax.core.axes import (
    Sizes,
    brief_fields,
    broadcasts_to,
    check_positions,
    kind,
    with_sizes,
)
from attention_jax.mechanisms.causal_padding import CausalPadding, keep_rows


class PackedState(NamedTuple):
    """The state after the tokens of packed documents, and the document it belongs to.

    Attributes:
      state: as without ``segments``.
      segment: int32 ``[*B]``, the id of the last token that is not padding; -1 if there was none.
    """

    state: Any
    segment: Any

    def __repr__(self) -> str:
        return brief_fields(self, self._fields)


class Packing(NamedTuple):
    """Where the documents of a call begin, and the state before it."""

    padding: CausalPadding
    """The padding of the mask, joined with that of negative segment ids."""
    starts: Bool[Array, "*B T 1 1"] | None
    """True for the first token of a document; None without ``segments``."""
    state: Any
    """The state after the previous tokens, or None."""
    segment: Int[Array, "*B"] | None
    """The id of the last token, for ``PackedState``; None without ``segments``."""

    def with_segment(self, state: jax.Array) -> Any:
        """The state as the call returns it: a ``PackedState`` if there are ``segments``."""
        return state if self.segment is None else PackedState(state, self.segment)


def document_starts(segments: Any, state: Any, padding: CausalPadding, sizes: Sizes) -> Packing:
    """Finds where the documents of a call begin.

    A document begins at each token whose id differs from that of the previous token, padding
    skipped. The first token of a call continues the document of the state if their ids are equal.

    Args:
      segments: integers that broadcast to ``[*B T]``, negative for padding; or None.
      state: of the call.
      padding: of the mask.
      sizes: of the call.

    Raises:
      TypeError: ``segments`` are not integers; ``segments`` with a state that is not a
        ``PackedState``, or the other way round.
      ValueError: shapes that do not fit.
    """
    if (segments is None and isinstance(state, PackedState)) or (
        segments is not None and state is not None and not isinstance(state, PackedState)
    ):
        raise TypeError(
            f"state must be a PackedState with segments, and an array without, got "
            f"{kind(state)} {'without' if segments is None else 'with'} segments: "
            f"PackedState(state, segment) joins an array and the id of its last token"
        )
    if segments is None:
        return Packing(padding, None, state, None)
    ids = _ids("segments", segments, (*sizes.B, sizes.T), "[*B T]")
    previous = jnp.full(sizes.B, -1, jnp.int32)
    if state is not None:
        previous = _ids("segment of state", state.segment, sizes.B, "[*B]")
    real = ids >= 0
    for flags in (padding.queries, padding.keys):
        real = real if flags is None else real & flags
    # The id of the last real token up to each position, beginning with the segment of the state.
    ids = jnp.concatenate([previous[..., None], jnp.where(real, ids, -1)], axis=-1)
    position = jax.lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1)
    index = jax.lax.cummax(jnp.where(ids >= 0, position, 0), axis=ids.ndim - 1)
    last = jnp.take_along_axis(ids, index, axis=-1)
    starts = real & (last[..., :-1] >= 0) & (ids[..., 1:] != last[..., :-1])
    return Packing(
        CausalPadding(padding.causal, real, real),
        starts[..., None, None],
        None if state is None else state.state,
        last[..., -1],
    )


def _ids(name: str, ids: Any, shape: tuple[int, ...], axes: str) -> jax.Array:
    ids = check_positions(ids, name)
    if not broadcasts_to(ids.shape, shape):
        sizes = {"*B": shape[:-1], "T": shape[-1]} if axes == "[*B T]" else {"*B": shape}
        raise ValueError(f"{name} must broadcast to {with_sizes(axes, sizes)}, got {ids.shape}")
    return jnp.broadcast_to(jnp.asarray(ids, jnp.int32), shape)


class Documents(NamedTuple):
    """Which tokens of a chunk belong to one document."""

    same: Bool[Array, "C C"]
    """Whether both tokens are of the same document."""
    first: Bool[Array, "C 1"]
    """Whether a token is of the document that the state before the chunk belongs to."""
    last: Bool[Array, "C 1"]
    """Whether a token is of the document that the state after the chunk belongs to."""

    def carry(self, state: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """The state if its document continues to the end of the chunk, else 0."""
        return keep_rows(self.first[-1], state)


def documents_of(starts: Float[Array, "C 1"]) -> Documents:
    """The documents of a chunk.

    Args:
      starts: 1 where a document begins and 0 elsewhere.
    """
    number = jnp.cumsum(starts, axis=0)
    return Documents(number == number.T, number == 0, number == number[-1:])
