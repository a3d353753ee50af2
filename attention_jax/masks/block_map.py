"""Block maps: which blocks of ``T x S`` pairs are empty, partial or full under a mask.

A backend skips empty blocks and does no mask work on full ones, so its cost follows the number of
visited blocks, not ``T x S``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.core.axes import brief_fields, int_at_least, kind
from attention_jax.core.closures import uses_arguments
from attention_jax.core.pytree import leaves
from attention_jax.masks import Mask
from attention_jax.masks.base import parts
from attention_jax.masks.grid import Grid

EMPTY, PARTIAL, FULL = np.int8(0), np.int8(1), np.int8(2)


@dataclasses.dataclass(frozen=True)
class BlockMap:
    """The kind of every block: 0 empty, 1 partial, 2 full.

    ``kinds`` is ``[rows columns]``, or ``[B N rows columns]`` where the mask depends on example
    or head. It is a NumPy array where the mask holds no arrays, else a JAX array.
    """

    grid: Grid
    kinds: Any

    def __repr__(self) -> str:
        return brief_fields(self, ("grid", "kinds"))

    def __str__(self) -> str:
        kinds = np.asarray(self.kinds)
        kinds = kinds.reshape(-1, *kinds.shape[-2:])[0]
        return "\n".join("".join("·▒█"[kind] for kind in row) for row in kinds)


def block_map(
    mask: Mask | None,
    T: int,
    S: int,
    *,
    block_q: int = 128,
    block_k: int = 128,
    B: int | None = None,
    N: int | None = None,
) -> BlockMap:
    """For each query block, which key blocks are empty, partial or full.

    Built-in masks use interval arithmetic, in NumPy while tracing if they hold no arrays, in JAX
    otherwise; ``&``, ``|`` and ``~`` combine the results. For ``mask_fn`` every block is partial,
    unless it was created with ``evaluate=True``. Blocks reported as empty or full certainly are;
    a block reported as partial may be empty or full.

    Args:
      mask: the mask, or None for no mask.
      T, S: query and key length.
      block_q, block_k: queries and keys per block.
      B, N: number of examples and heads, where the mask depends on them.

    Returns:
      The kind of every block.

    Raises:
      TypeError: ``mask`` is not a mask, or a size not an int.
      ValueError: a negative length, or a block size below 1.

    >>> from attention_jax import block_map, masks
    >>> print(block_map(masks.causal() & masks.window(256, 0), 1024, 1024))
    ▒·······
    █▒······
    ▒█▒·····
    ·▒█▒····
    ··▒█▒···
    ···▒█▒··
    ····▒█▒·
    ·····▒█▒
    """
    for name, size, least in (
        ("T", T, 0),
        ("S", S, 0),
        ("block_q", block_q, 1),
        ("block_k", block_k, 1),
    ):
        int_at_least(name, size, least)
    if not (mask is None or isinstance(mask, Mask)):
        raise TypeError(
            f"mask must be a Mask or None, got {kind(mask)}: a bool array is masks.dense(array)"
        )
    grid = Grid(T, S, block_q, block_k)
    if mask is None:
        return BlockMap(grid, np.full((grid.rows, grid.columns), FULL))
    mask = mask.resolve(T, S, N or 1)
    if not _differs_between_heads(mask, T, S, B, N):
        return BlockMap(grid, kinds(mask, grid, 0, 0))

    def one(b: Any, n: Any) -> Any:
        # `at` strips B and N; `block` reduces the other axes.
        return kinds(mask.at(b, n, slice(None), slice(None)), grid, b, n)

    heads = jax.vmap(one, in_axes=(None, 0))
    examples = jax.vmap(heads, in_axes=(0, None))
    return BlockMap(grid, examples(jnp.arange(B or 1), jnp.arange(N or 1)))


def _differs_between_heads(mask: Mask, T: int, S: int, B: int | None, N: int | None) -> bool:
    """Whether the map of a resolved mask may depend on the example or the head."""
    if {"B", "N"} & {a for leaf in leaves(mask) for a in leaf.axes}:
        return True
    if not (B or N):
        return False
    # A function or a custom class may use b and n; tracing a single block shows whether it does.
    whole, zero = Grid(T, S, max(T, 1), max(S, 1)), np.int32(0)
    return uses_arguments(lambda b, n: kinds(mask, whole, b, n), zero, zero)


class Counts(NamedTuple):
    """Numbers of blocks over all heads of all examples."""

    visited: int
    full: int
    skipped: int


# Larger maps are first counted in coarse blocks: with 1M tokens and blocks of 64, a map has 268M.
LARGE_MAP = 2**20
COARSE = 64  # blocks per side of a coarse block
BATCH = 256  # coarse blocks that are refined at a time


def count(
    mask: Mask | None, T: int, S: int, *, block_q: int, block_k: int, B: int, N: int
) -> Counts:
    """Counts the blocks of ``block_map``; fast even for large maps.

    Args:
      As for ``block_map``; the mask's arrays must not be traced.
    """
    grid = Grid(T, S, block_q, block_k)
    total = B * N * grid.rows * grid.columns
    if mask is None:
        return Counts(total, total, 0)
    resolved = mask.resolve(T, S, N)
    by_intervals = all(part.BY_INTERVALS for part in parts(resolved))
    if (
        grid.rows * grid.columns > LARGE_MAP
        and by_intervals
        and not leaves(resolved)
        and not _differs_between_heads(resolved, T, S, B, N)
    ):
        visited, full = (B * N * n for n in _count_coarsely(resolved, grid))
    else:
        kind = np.asarray(block_map(mask, T, S, block_q=block_q, block_k=block_k, B=B, N=N).kinds)
        repeat = total // kind.size
        visited, full = (repeat * int(x.sum()) for x in (kind != EMPTY, kind == FULL))
    return Counts(visited, full, total - visited)


def _count_coarsely(mask: Mask, grid: Grid) -> tuple[int, int]:
    """Visited and full blocks, counted within coarse blocks where these are partial."""
    coarse = Grid(grid.T, grid.S, COARSE * grid.block_q, COARSE * grid.block_k)
    kind = kinds(mask, coarse, 0, 0)

    def inside(blocks: int) -> np.ndarray:  # fine blocks per side of each coarse block
        return np.diff([*range(0, blocks, COARSE), blocks])

    size = inside(grid.rows)[:, None] * inside(grid.columns)[None, :]
    visited = full = int(size[kind == FULL].sum())
    rows, columns = np.nonzero(kind == PARTIAL)
    within = np.arange(COARSE)
    for i in range(0, len(rows), BATCH):
        row = (rows[i : i + BATCH, None] * COARSE + within)[:, :, None]
        column = (columns[i : i + BATCH, None] * COARSE + within)[:, None, :]
        there = (row < grid.rows) & (column < grid.columns)
        row, column = np.minimum(row, grid.rows - 1), np.minimum(column, grid.columns - 1)
        some, every = mask.block(
            _Blocks(grid.T, grid.S, grid.block_q, grid.block_k, row, column), 0, 0
        )
        visited += int(np.sum(some & there))
        full += int(np.sum(some & every & there))
    return visited, full


@dataclasses.dataclass(frozen=True)
class _Blocks(Grid):
    """Some blocks of a grid, given by their rows and columns, which broadcast."""

    row: np.ndarray
    column: np.ndarray

    q0 = property(lambda self: (self.row * self.block_q).astype(np.int32))
    q1 = property(lambda self: np.minimum(self.q0 + self.block_q, self.T) - 1)
    k0 = property(lambda self: (self.column * self.block_k).astype(np.int32))
    k1 = property(lambda self: np.minimum(self.k0 + self.block_k, self.S) - 1)


def kinds(mask: Mask | None, grid: Grid, b: Any, n: Any) -> Any:
    """``int8 [rows columns]``, for the mask of one head of one example."""
    shape = (grid.rows, grid.columns)
    if mask is None:
        return np.full(shape, FULL)
    some, every = mask.block(grid, b, n)
    xp = jnp if isinstance(some, jax.Array) or isinstance(every, jax.Array) else np
    kind = xp.where(some, xp.where(every, FULL, PARTIAL), EMPTY)
    return xp.broadcast_to(kind, shape)


class BlockSchedule(NamedTuple):
    """The key blocks to visit for each query block, full ones before partial ones.

    Query block ``i`` visits key blocks ``index[i, :visited[i]]``; the first ``full[i]`` are full.
    """

    index: Any  # int32 [rows most]
    full: Any  # int32 [rows]
    visited: Any  # int32 [rows]


def schedule(kind: Any, grid: Grid) -> BlockSchedule:
    """The blocks to visit, given their kinds.

    A last block that extends beyond the arrays counts as partial: a backend shifts it back to lie
    within them, and must mask the pairs that it then shares with the previous block.

    >>> import numpy as np
    >>> from attention_jax.masks.block_map import schedule
    >>> from attention_jax.masks.grid import Grid
    >>> grid = Grid(T=4, S=6, block_q=2, block_k=2)
    >>> v = schedule(np.array([[2, 0, 1], [1, 2, 2]], np.int8), grid)
    >>> v.index.tolist(), v.full.tolist(), v.visited.tolist()
    ([[0, 2, 1], [1, 2, 0]], [1, 2], [2, 3])
    """
    xp = jnp if isinstance(kind, jax.Array) else np
    ragged = np.zeros((grid.rows, grid.columns), np.bool_)
    ragged[-1, :] |= grid.T % grid.block_q != 0
    ragged[:, -1] |= grid.S % grid.block_k != 0
    kind = xp.where(ragged & (kind == FULL), PARTIAL, kind)
    order = xp.argsort(-kind, axis=-1, stable=True).astype(np.int32)
    full = (kind == FULL).sum(-1, dtype=np.int32)
    visited = (kind != EMPTY).sum(-1, dtype=np.int32)
    if xp is np:  # the longest row is known, so the rest can be cut off
        order = order[:, : max(1, int(visited.max(initial=0)))]
    return BlockSchedule(order, full, visited)
