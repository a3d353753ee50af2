"""Masks and scores of a whole sequence, for the queries and keys of a call with a cache.

A mask such as ``segments(ids)`` holds the ids of the whole sequence. A call has only some of the
tokens, in any order, and ``of_positions`` selects their entries. The ``check_*`` functions raise
errors for masks and scores that a cache does not support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from attention_jax.core.pytree import Leaf, Value, leaves, map_leaves
from attention_jax.masks.base import Mask, parts

V = TypeVar("V", bound=Value)


def of_positions(value: V, queries: Any, keys: Any, *, in_order: bool) -> V:
    """``value`` with its arrays cut to the entries of these queries and keys.

    Args:
      value: a mask or score of a whole sequence.
      queries, keys: positions, int32 ``[*B T]`` and ``[*B S]``; arbitrary for empty slots.
      in_order: whether key ``j`` is at position ``j``, so that a slice replaces the gather.

    Raises:
      ValueError: the batch axes of an array do not fit.
      NotImplementedError: an array along ``T`` or ``S`` has no batch axes to cut it along.
    """
    batch = queries.shape[:-1]

    def cut(x: Any, leaf: Leaf) -> Any:
        core = [a for a in leaf.axes if a != "B"]
        lengths = [a for a in core if a == "S" or (a == "T" and not leaf.new_tokens)]
        missing = len(batch) + len(core) - x.ndim
        if not lengths or missing < 0:  # too many axes: the call raises an error later
            return x
        if "B" not in leaf.axes and batch:
            raise NotImplementedError(
                f"{leaf.name} has no batch axes, but with a cache each example needs other entries "
                f"of it"
            )
        x = jnp.asarray(x).reshape((1,) * missing + tuple(x.shape))
        if any(n not in (1, b) for n, b in zip(x.shape, batch, strict=False)):
            raise ValueError(
                f"{leaf.name} has batch axes {x.shape[: len(batch)]}, expected {batch} (*B)"
            )
        for letter in lengths:
            axis = core.index(letter) - len(core)
            if leaf.broadcast and x.shape[axis] == 1:
                continue
            if letter == "S" and in_order:
                x = _first(x, keys.shape[-1], axis)
            else:
                x = _take(x, queries if letter == "T" else keys, axis)
        return x

    return map_leaves(cut, value)


def _first(x: jax.Array, size: int, axis: int) -> jax.Array:
    """The first ``size`` entries, padded with zeros."""
    axis %= x.ndim
    x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pad)


def _take(x: jax.Array, at: jax.Array, axis: int) -> jax.Array:
    """The entries at ``at [*B n]``, example by example; ``x`` may have size 1 along ``*B``."""

    def take(x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take(x, at, axis=axis, mode="clip")

    shared = [d for d in range(at.ndim - 1) if x.shape[d] == 1]
    for d in reversed(range(at.ndim - 1)):
        take = jax.vmap(take, in_axes=(None if d in shared else 0, 0))
    return take(x.squeeze(shared), at)


def covered_lengths(value: Value) -> Iterator[tuple[str, int]]:
    """How many positions each part of a mask or score has entries for, with the part's name."""
    for x, leaf in zip(jax.tree.leaves(value), leaves(value), strict=True):
        for letter in ("S",) if leaf.new_tokens else ("T", "S"):
            if letter in leaf.axes:
                axis = leaf.axes.index(letter) - len(leaf.axes)
                # An array that broadcasts may lack its first axes.
                size = x.shape[axis] if -axis <= x.ndim else 1
                if not (leaf.broadcast and size == 1):
                    yield leaf.name, size
    for part in parts(value) if isinstance(value, Mask) else ():
        for natural in part.natural_size():  # a grid, or a layout of blocks
            if natural is not None:
                yield part.public_name, natural


def check_lengths(
    argument: str, value: Value, length: Any, capacity: int, *, rolling: bool
) -> None:
    """Raises if a mask or score has entries for fewer positions than the sequence.

    Args:
      argument: its name in messages.
      value: the mask or score.
      length: int ``[*B]``, the length of the sequence so far; if it is traced, ``capacity`` is
        taken as its bound.
      capacity, rolling: of the cache.

    Raises:
      ValueError: too few entries.
      NotImplementedError: the length is traced and the cache is rolling, so nothing bounds it.
    """
    traced = isinstance(length, jax.core.Tracer)
    for name, size in covered_lengths(value):
        if traced and rolling:
            raise NotImplementedError(
                f"{argument}: {name} has entries for {size} positions, and the length of the "
                f"sequence in a rolling cache is not known while tracing: use a plain cache"
            )
        needed = capacity if traced else int(length.max(initial=0))
        if size < needed:
            raise ValueError(
                f"{argument}: {name} has entries for {size} positions, but the sequence may have "
                f"{needed}: with a cache it must be of the whole sequence"
            )


def check_ahead(mask: Mask, start: Any, end: Any) -> None:
    """Raises if the mask lets a query attend to later tokens that are not in the cache yet.

    Args:
      mask: of positions in the whole sequence.
      start, end: int ``[*B]``: the new tokens are at positions ``start`` to ``end``, exclusive. If
        they are traced, checks that depend on them are skipped.

    Raises:
      ValueError: the mask does not bound how far queries look ahead; or the tokens of its prefix,
        which attend to each other, do not come in one call.
    """
    ahead = mask.reach().ahead
    if ahead is None:
        raise ValueError(
            f"mask may let a query attend to later tokens, which are not in the cache yet: use "
            f"mask & masks.causal(), got {mask!r}"
        )
    if isinstance(ahead, int) and ahead == 0:
        return
    if any(isinstance(x, jax.core.Tracer) for x in (start, end, ahead)):
        return
    if bool(((end > start) & (start < ahead) & ((start > 0) | (end < ahead))).any()):
        raise ValueError(
            f"mask lets all tokens before position {ahead} attend to each other: with a cache they "
            f"must come in one call, the first, got tokens {start} to {end} of {mask!r}"
        )


def check_back(mask: Mask, capacity: int, intact: Callable[[int], Any]) -> None:
    """Raises if the mask lets a query attend to a token that a rolling cache no longer holds.

    Args:
      mask: of positions in the whole sequence.
      capacity: how many tokens the cache holds.
      intact: ``KVCache.intact``.

    Raises:
      ValueError: the mask looks back at tokens that were overwritten.
    """
    back = mask.reach().back
    if back is None or back >= capacity:
        raise ValueError(
            f"mask may look back further than the {capacity} tokens of the rolling cache "
            f"(capacity): use mask & masks.window({capacity - 1}, None), or a larger or a plain "
            f"cache, got {mask!r}"
        )
    found = intact(back + 1)
    if not isinstance(found, jax.core.Tracer) and not bool(found.all()):
        raise ValueError(
            f"mask looks back at tokens that were overwritten before the cache was rolled back: a "
            f"rolling cache of capacity {capacity} must be larger, got {mask!r}"
        )
