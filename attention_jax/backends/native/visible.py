"""Masks in the forms that the kernel supports: row bounds, positions, ids, or a table and bits.

With causal masks, windows, lengths, prefixes and chunks a query attends to an interval of keys, so
each row has two bounds. With ``key_positions``, as in a cache, they bound the positions of the
keys. Segments compare ids. Any of these joined by ``&`` need no memory in ``T x S``. For other
masks, ``block_map`` finds the units of 48 x 32 pairs that are empty or full, and the mask's rule is
evaluated on the others and packed into bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.backends.call import Head, Spec
from attention_jax.backends.tile import whole
from attention_jax.core.pytree import leaves
from attention_jax.masks import Mask, block_map
from attention_jax.masks.at_positions import MaskAtPositions
from attention_jax.masks.bands import Band
from attention_jax.masks.base import And, Or, conjuncts, parts
from attention_jax.masks.explicit import MaskFn
from attention_jax.masks.grid import Grid
from attention_jax.masks.sequence import Chunked, Lengths, Segments
from attention_jax.scores import tile_indices

UNIT_Q, UNIT_K = 48, 32  # as TABLE_ROWS and UNIT in visible.h
FULL, FIRST_BITS = 1, 2  # in the table; 0 is empty
MOST_BITS = 2**28  # bytes
FAR = 2**30  # beyond any key


class Visible(NamedTuple):
    """The mask of one head in the kernel's form; None for a field that restricts nothing.

    Attributes:
      bounds: int32 ``[T 2]``: the first position that a query attends to, and the end, exclusive.
      positions: int32 ``[S]``: positions of the keys, masked if negative; None is 0 to S - 1.
      query_ids, key_ids: int32 ``[T]`` and ``[S]``: visible if equal and not negative.
      kinds: int32 ``[T/48 S/32]``: 0 empty, 1 full, or 2 + the index of the unit's first bits.
      bits: uint32 ``[rows words]``: a unit has a word for each query, from row to row.
    """

    bounds: Any = None
    positions: Any = None
    query_ids: Any = None
    key_ids: Any = None
    kinds: Any = None
    bits: Any = None


class Interval(NamedTuple):
    """``lo <= k < hi`` for each query, int arrays ``[T]``; None is no bound on that side."""

    lo: Any
    hi: Any


def visible(head: Head) -> Visible:
    """The mask of one head for the kernel."""
    T, S = head.query.shape[0], head.key.shape[0]
    if head.mask is None:
        return Visible()
    if is_direct(head.mask):
        return _direct(head.mask, T)
    return _by_bits(head.mask, T, S, head.b, head.n)


def why_unsupported(spec: Spec) -> str | None:
    """Why the bits of a mask take too much memory, in words; None if they do not."""
    size = bits_bytes(spec)
    if size <= MOST_BITS:
        return None
    return f"the pairs of this mask would take {size >> 20} MiB as bits"


def bits_bytes(spec: Spec) -> int:
    """An upper bound on the memory of a mask's bits, in bytes."""
    z, mask = spec.sizes, spec.mask
    if mask is None or is_direct(mask):
        return 0
    axes = {a for leaf in leaves(mask) for a in leaf.axes}
    if any(isinstance(part, MaskFn) for part in parts(mask)):
        axes |= {"B", "N"}  # it may use them
    heads = (math.prod(z.B) if "B" in axes else 1) * (z.N if "N" in axes else 1)
    return heads * z.T * 4 * -(-z.S // UNIT_K)


# --- Intervals, positions and ids.


def is_direct(mask: Mask) -> bool:
    """Whether the kernel supports the mask without bits."""
    inner = mask.mask_ if isinstance(mask, MaskAtPositions) else mask
    segments = [x for x in conjuncts(inner) if isinstance(x, Segments)]
    others = (x for x in conjuncts(inner) if not isinstance(x, Segments))
    narrow = all(jnp.iinfo(x.key_ids.dtype).bits <= 32 for x in segments)
    return len(segments) <= 1 and narrow and all(map(_is_interval, others))


def _is_interval(mask: Mask) -> bool:
    """Whether each query attends to an interval of keys."""
    if isinstance(mask, And):
        return _is_interval(mask.left) and _is_interval(mask.right)
    if isinstance(mask, Or):
        return _from_first(mask.left) and _from_first(mask.right)
    return isinstance(mask, Band | Lengths | Chunked)


def _from_first(mask: Mask) -> bool:
    """Whether the interval begins at the first key."""
    if isinstance(mask, And | Or):
        return _from_first(mask.left) and _from_first(mask.right)
    return isinstance(mask, Lengths) or (isinstance(mask, Band) and mask.left is None)


def _direct(mask: Mask, T: int) -> Visible:
    q: Any = np.arange(T, dtype=np.int32)
    positions = query_ids = key_ids = lo = hi = None
    first: Any = 0  # position of the first key, where they count up one by one
    if isinstance(mask, MaskAtPositions):
        q, positions, first = mask.queries(q), mask.key_positions, mask.key_start
        mask = mask.mask_
    for each in conjuncts(mask):
        if isinstance(each, Segments):
            query_ids, key_ids = each.query_ids, each.key_ids
        else:
            interval = _interval(each, q)
            lo, hi = _both(np.maximum, lo, interval.lo), _both(np.minimum, hi, interval.hi)
    bounds = None
    if lo is not None or hi is not None:
        bounds = _stacked(0 if lo is None else lo - first, FAR if hi is None else hi - first, T)
    return Visible(bounds, *map(_int32, (positions, query_ids, key_ids)))


def _interval(mask: Mask, q: Any) -> Interval:
    """The keys that queries at ``q`` attend to."""
    if isinstance(mask, Band):
        offset = mask._offset()
        return Interval(
            None if mask.left is None else q + offset - min(mask.left, FAR),
            None if mask.right is None else q + offset + (min(mask.right, FAR) + 1),
        )
    if isinstance(mask, Lengths):
        hi = mask.key
        if mask.query is not None:
            hi = _select(q < mask.query, FAR if hi is None else hi, 0)
        return Interval(None, hi)
    if isinstance(mask, Chunked):
        first = q // mask.size * mask.size
        return Interval(first, first + mask.size)
    if not isinstance(mask, And | Or):
        raise TypeError(f"{type(mask).__name__} has no interval")  # see is_direct
    a, b = _interval(mask.left, q), _interval(mask.right, q)
    if isinstance(mask, And):
        return Interval(_both(np.maximum, a.lo, b.lo), _both(np.minimum, a.hi, b.hi))
    unbounded = a.hi is None or b.hi is None
    return Interval(None, None if unbounded else _both(np.maximum, a.hi, b.hi))


def _both(reduce: Any, a: Any, b: Any) -> Any:
    """``np.maximum`` or ``np.minimum`` of two bounds; None means no bound."""
    if a is None or b is None:
        return b if a is None else a
    return getattr(_numpy_of(a, b), reduce.__name__)(a, b)


def _select(condition: Any, a: Any, b: Any) -> Any:
    return _numpy_of(condition, a, b).where(condition, a, b)


def _stacked(lo: Any, hi: Any, T: int) -> Any:
    xp = _numpy_of(lo, hi)
    return xp.stack([xp.broadcast_to(xp.asarray(x, np.int32), (T,)) for x in (lo, hi)], axis=-1)


def _numpy_of(*arrays: Any) -> Any:
    """``jnp`` if one of them is a JAX array; NumPy arrays are computed while tracing."""
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def _int32(x: Any) -> Any:
    return None if x is None else jnp.asarray(x).astype(jnp.int32)


# --- A table and bits.


def _by_bits(mask: Mask, T: int, S: int, b: Any, n: Any) -> Visible:
    grid = Grid(T, S, UNIT_Q, UNIT_K)
    kind = block_map.kinds(mask, grid, b, n)
    if isinstance(kind, np.ndarray):
        return _of_partial_units(mask, kind, b, n)
    words = grid.columns
    first = FIRST_BITS + np.arange(grid.rows)[:, None] * (UNIT_Q * words) + np.arange(words)
    whole_units = jnp.where(kind == block_map.FULL, np.int32(FULL), np.int32(0))
    kinds = jnp.where(kind == block_map.PARTIAL, first.astype(np.int32), whole_units)
    return Visible(kinds=kinds, bits=_packed(_dense(mask, T, S, b, n)))


def _of_partial_units(mask: Mask, kind: np.ndarray, b: Any, n: Any) -> Visible:
    """For masks without arrays, whose partial units are known: only these get bits."""
    rows, columns = np.nonzero(kind == block_map.PARTIAL)
    kinds = np.where(kind == block_map.FULL, FULL, 0).astype(np.int32)
    kinds[rows, columns] = FIRST_BITS + UNIT_Q * np.arange(len(rows), dtype=np.int32)

    def unit(q0: Any, k0: Any) -> Any:
        shape = UNIT_Q, UNIT_K
        pairs = jnp.asarray(mask.rule(b, n, *tile_indices(shape, q0, k0)))
        return _packed(jnp.broadcast_to(pairs, shape))

    if len(rows) == 0:
        return Visible(kinds=kinds)
    at = (UNIT_Q * rows).astype(np.int32), (UNIT_K * columns).astype(np.int32)
    bits = jax.vmap(unit)(*map(jnp.asarray, at))
    return Visible(kinds=kinds, bits=bits.reshape(-1, 1))


def _dense(mask: Mask, T: int, S: int, b: Any, n: Any) -> Any:
    pairs = whole(mask).rule(b, n, *tile_indices((T, S), 0, 0))
    return jnp.broadcast_to(jnp.asarray(pairs), (T, S))


def _packed(pairs: Any) -> Any:
    """bool ``[t s]`` as uint32 ``[t s/32]``, with the first pair in the lowest bit."""
    t, s = pairs.shape
    pairs = jnp.pad(pairs, ((0, 0), (0, -s % UNIT_K))).reshape(t, -1, UNIT_K)
    weights = np.uint32(1) << np.arange(UNIT_K, dtype=np.uint32)
    return jnp.where(pairs, weights, np.uint32(0)).sum(-1, dtype=jnp.uint32)
