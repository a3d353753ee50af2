"""Several documents in one row of a mechanism with a state: it is forgotten where one begins."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.core.axes import Sizes, broadcasts_to, check_positions
from attention_jax.mechanisms.causal_padding import Seen


class PackedState(NamedTuple):
    """The state after tokens of several documents, and which document it is of."""

    state: Any
    """As without ``segments``."""
    segment: Any
    """int32 ``[*B]``, the id of the last token that is no padding; -1 where there was none."""


class Packed(NamedTuple):
    """A call with ``segments``: padding taken out, and where documents begin."""

    found: Seen
    starts: Any
    """bool ``[*B T 1 1]``, the first token of a document; None without ``segments``."""
    state: Any
    """Of the tokens before, or None."""
    segment: Any
    """The id of the last token, for ``PackedState``; None without ``segments``."""

    def result(self, result: Any, return_state: bool) -> Any:
        """Output, or output and state, as the call returns them."""
        if self.segment is None or not return_state:
            return result
        out, state = result
        return out, PackedState(state, self.segment)


def packed(segments: Any, state: Any, found: Seen, sizes: Sizes) -> Packed:
    """Where the documents of a call begin.

    A token begins one where its id is not that of the last token before it that is no padding.
    The first of a call goes on with the state if it has the id that the state is of.

    Args:
      segments: integers that broadcast to ``[*B T]``, negative for padding; or None.
      state: of the call.
      found: what the mask says.
      sizes: of the call.

    Raises:
      TypeError: ``segments`` are not integers; a state without the id that goes with it, or with
        one that nothing asks for.
      ValueError: shapes that do not fit.
    """
    if (segments is None and isinstance(state, PackedState)) or (
        segments is not None and state is not None and not isinstance(state, PackedState)
    ):
        raise TypeError(
            f"state must be a PackedState with segments, and an array without, got "
            f"{type(state).__name__} and segments {'None' if segments is None else 'given'}: make "
            f"one of an array and the id of its last token, PackedState(state, segment)"
        )
    if segments is None:
        return Packed(found, None, state, None)
    ids = _ids("segments", segments, (*sizes.B, sizes.T), "[*B T]")
    before = jnp.full(sizes.B, -1, jnp.int32)
    if state is not None:
        before = _ids("segment of state", state.segment, sizes.B, "[*B]")
    real = ids >= 0
    for flags in (found.queries, found.keys):
        real = real if flags is None else real & flags
    # The id of the last real token up to each, first that of the state.
    ids = jnp.concatenate([before[..., None], jnp.where(real, ids, -1)], axis=-1)
    place = jax.lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1)
    index = jax.lax.cummax(jnp.where(ids >= 0, place, 0), axis=ids.ndim - 1)
    last = jnp.take_along_axis(ids, index, axis=-1)
    starts = real & (last[..., :-1] >= 0) & (ids[..., 1:] != last[..., :-1])
    return Packed(
        Seen(found.causal, real, real),
        starts[..., None, None],
        None if state is None else state.state,
        last[..., -1],
    )


def _ids(name: str, ids: Any, shape: tuple[int, ...], axes: str) -> jax.Array:
    ids = check_positions(ids, name)
    if not broadcasts_to(ids.shape, shape):
        raise ValueError(f"{name} must broadcast to {shape}, {axes}, got {ids.shape}")
    return jnp.broadcast_to(jnp.asarray(ids, jnp.int32), shape)


class Runs(NamedTuple):
    """Which tokens of a piece belong together."""

    same: Any  # [C C]: both are of one document
    first: Any  # [C 1]: of the document that the state before is of
    last: Any  # [C 1]: of the document that the state after is of

    def kept(self, state: jax.Array) -> jax.Array:
        """The state before, as far as it is part of that after."""
        return jnp.where(self.first[-1], state, jnp.zeros_like(state))


def runs(starts: jax.Array) -> Runs:
    """From ``starts [C 1]``, 1 where a document begins and else 0."""
    run = jnp.cumsum(starts, axis=0)
    return Runs(run == run.T, run == 0, run == run[-1:])


def of(rows: jax.Array, x: jax.Array) -> jax.Array:
    """``x [C .]`` with zeros in other rows."""
    return jnp.where(rows, x, jnp.zeros_like(x))
