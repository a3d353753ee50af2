"""Arrays that hold an entry for each position of a sequence, cut to the queries and keys of a call.

A mask such as ``segments(ids)`` holds the ids of the whole sequence. Where the queries and keys of
a call are some of its tokens, in an order of their own, those are the entries it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from attention_jax.core.pytree import Leaf, Value, leaves, map_leaves
from attention_jax.masks.base import Mask, parts

V = TypeVar("V", bound=Value)


def of_positions(value: V, queries: Any, keys: Any, *, in_order: bool) -> V:
    """``value`` with the entries of its arrays along ``T`` and ``S`` for these queries and keys.

    Args:
      value: a mask or score of a whole sequence.
      queries, keys: their positions, int32 ``[*B T]`` and ``[*B S]``; those of keys that are not
        there may be any.
      in_order: key ``j`` is at position ``j`` where it is there: a slice, and no gather.

    Raises:
      ValueError: an array whose batch axes do not fit.
      NotImplementedError: an array of positions that has no batch axes.
    """
    batch = queries.shape[:-1]

    def cut(x: Any, leaf: Leaf) -> Any:
        core = [a for a in leaf.axes if a != "B"]
        counted = [a for a in core if a in ("T", "S")]
        missing = len(batch) + len(core) - x.ndim
        if not counted or missing < 0:  # too many axes: the call says so
            return x
        if "B" not in leaf.axes and batch:
            raise NotImplementedError(f"{leaf.name} has no batch axes to be cut along with a cache")
        x = jnp.asarray(x).reshape((1,) * missing + tuple(x.shape))
        if any(n not in (1, b) for n, b in zip(x.shape, batch, strict=False)):
            raise ValueError(
                f"{leaf.name} has batch axes {x.shape[: len(batch)]}, expected {batch} (*B)"
            )
        for letter in counted:
            axis = core.index(letter) - len(core)
            if leaf.broadcast and x.shape[axis] == 1:
                continue
            if letter == "S" and in_order:
                x = _first(x, keys.shape[-1], axis)
            else:
                x = _taken(x, queries if letter == "T" else keys, axis)
        return x

    return map_leaves(cut, value)


def _first(x: jax.Array, size: int, axis: int) -> jax.Array:
    """The first ``size`` entries; zeros where there are fewer."""
    axis %= x.ndim
    x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pad)


def _taken(x: jax.Array, at: jax.Array, axis: int) -> jax.Array:
    """The entries at ``at [*B n]``, example by example; ``x`` may have size 1 along ``*B``."""

    def take(x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take(x, at, axis=axis, mode="clip")

    shared = [d for d in range(at.ndim - 1) if x.shape[d] == 1]
    for d in reversed(range(at.ndim - 1)):
        take = jax.vmap(take, in_axes=(None if d in shared else 0, 0))
    return take(x.squeeze(shared), at)


def whole_lengths(value: Value) -> Iterator[tuple[str, int]]:
    """For how many positions each part of a mask or score has entries, and the part's name."""
    for x, leaf in zip(jax.tree.leaves(value), leaves(value), strict=True):
        for letter in ("T", "S"):
            if letter in leaf.axes:
                axis = leaf.axes.index(letter) - len(leaf.axes)
                # An array that broadcasts may lack its first axes.
                size = x.shape[axis] if -axis <= x.ndim else 1
                if not (leaf.broadcast and size == 1):
                    yield leaf.name, size
    for part in parts(value) if isinstance(value, Mask) else ():
        if not part.AXES:  # a grid, or a layout of blocks
            for size in part.natural_size():
                if size is not None:
                    yield type(part).__name__.lower(), size


def check_lengths(
    argument: str, value: Value, length: Any, capacity: int, *, rolling: bool
) -> None:
    """Raises where a mask or score has entries for fewer positions than the sequence.

    Args:
      argument: what the value is called in messages.
      value: the mask or score.
      length: int ``[*B]``, how long the sequence is by now; where it is traced, ``capacity`` is the
        most it can be.
      capacity, rolling: of the cache.

    Raises:
      ValueError: too few entries.
      NotImplementedError: lengths are traced and nothing bounds them.
    """
    traced = isinstance(length, jax.core.Tracer)
    for name, size in whole_lengths(value):
        if traced and rolling:
            raise NotImplementedError(
                f"{argument}: {name} has entries for {size} positions, and how long the sequence "
                f"in a rolling cache is cannot be known while tracing: take a plain cache"
            )
        needed = capacity if traced else int(length.max(initial=0))
        if size < needed:
            raise ValueError(
                f"{argument}: {name} has entries for {size} positions, but the sequence may have "
                f"{needed}: with a cache it must be of the whole sequence"
            )
