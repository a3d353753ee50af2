"""Block maps: which blocks of ``T x S`` pairs a mask leaves empty, fills, or cuts.

A backend skips empty blocks and does no mask work on full ones, so cost follows the
number of visited blocks, not ``T x S``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.core.pytree import leaves
from attention_jax.masks import Mask
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

    Built-in masks answer by interval arithmetic: in NumPy while tracing where they hold no arrays,
    in JAX otherwise; ``&``, ``|`` and ``~`` combine the answers. An unknown function is partial
    everywhere unless it was made with ``evaluate=True``. The answer is on the safe side: an empty
    or full block surely is.

    Args:
      mask: the mask, or None for no mask.
      T, S: query and key length.
      block_q, block_k: queries and keys per block.
      B, N: number of examples and heads, where the mask depends on them.

    Returns:
      The kind of every block.

    Raises:
      TypeError: ``mask`` is no mask.
      ValueError: a block size below 1.

    >>> from attention_jax import masks
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
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not (mask is None or isinstance(mask, Mask)):
        raise TypeError(
            f"mask must be a Mask or None, got {type(mask).__name__}: a bool array is "
            f"masks.dense(array)"
        )
    grid = Grid(T, S, block_q, block_k)
    if mask is None:
        return BlockMap(grid, np.full((grid.rows, grid.columns), FULL))
    mask = mask.resolve(T, S, N or 1)
    per_call = {"B", "N"} & {a for leaf in leaves(mask) for a in leaf.axes}
    if not per_call:
        return BlockMap(grid, kinds(mask, grid, 0, 0))

    def one(b: Any, n: Any) -> Any:
        # `at` strips B and N only, leaving the other axes for `block` to reduce.
        return kinds(mask.at(b, n, slice(None), slice(None)), grid, b, n)

    per_head = jax.vmap(one, in_axes=(None, 0))
    every = jax.vmap(per_head, in_axes=(0, None))(jnp.arange(B or 1), jnp.arange(N or 1))
    return BlockMap(grid, every)


def kinds(mask: Mask | None, grid: Grid, b: Any, n: Any) -> Any:
    """``int8 [rows columns]`` for one head of one example, whose arrays ``mask`` is cut to."""
    shape = (grid.rows, grid.columns)
    if mask is None:
        return np.full(shape, FULL)
    some, every = mask.block(grid, b, n)
    xp = jnp if isinstance(some, jax.Array) or isinstance(every, jax.Array) else np
    kind = xp.where(some, xp.where(every, FULL, PARTIAL), EMPTY)
    return xp.broadcast_to(kind, shape)


class BlockSchedule(NamedTuple):
    """The key blocks to visit for each query block: first the full, then the partial ones.

    Row ``i`` visits key blocks ``index[i, :visited[i]]``, of which the first ``full[i]`` are full.
    """

    index: Any  # int32 [rows most]
    full: Any  # int32 [rows]
    visited: Any  # int32 [rows]


def schedule(kind: Any, grid: Grid) -> BlockSchedule:
    """The blocks to visit, given their kinds.

    A last block that the length does not fill counts as partial: a backend moves it back to lie
    within the arrays, and must then mask what it shares with the block before.

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
    if xp is np:  # the longest row is known: keep no more
        order = order[:, : max(1, int(visited.max(initial=0)))]
    return BlockSchedule(order, full, visited)
