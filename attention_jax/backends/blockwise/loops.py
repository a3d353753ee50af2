"""The loops over tiles, and the slices of the operands for each tile.

``OneHead`` slices the operands, which may have any number of mapped axes (see ``primitive``), for
one head of one example. For each of its query blocks, an inner loop runs over the key blocks that
the queries attend to.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from attention_jax.backends import primitive
from attention_jax.backends.primitive import Dims, Static
from attention_jax.backends.tile import (
    Visible,
    apply_scores,
    as_tile,
    local_axes,
    scores_of_visible,
    unmasked_values,
    visible_pairs,
)
from attention_jax.core.axes import Index, Shape, accumulation_dtype
from attention_jax.core.dropout import Dropout
from attention_jax.core.pytree import Leaf, leaves
from attention_jax.core.softmax import zero_rows
from attention_jax.masks.grid import Grid
from attention_jax.scores import tile_indices


@dataclasses.dataclass(frozen=True)
class Loops:
    """The static configuration of the loops, besides shapes."""

    block_q: int
    block_k: int
    some_full: bool  # whether a block may be full; else the loop over full blocks is left out
    some_partial: bool  # the same for partial blocks
    single: bool  # every query block visits exactly one key block
    batched_heads: int  # at most this many heads are computed in one batched product
    only_shared_keys: bool  # batch only heads that share their keys


def loop_operands(
    static: Static, arrays: Sequence[jax.Array]
) -> tuple[Static, tuple[jax.Array, ...]]:
    """The operands of the loops, given those of another backend that falls back to them.

    Args:
      static: its ``config`` and its schedule each have a field ``loops`` for this purpose.
      arrays: the operands; any others, such as results and cotangents, follow.
    """
    count = static.structure.num_leaves
    head, schedules = primitive.as_head(jax.tree.unflatten(static.structure, range(count)))
    order, structure = jax.tree.flatten(primitive.operands(head, schedules.loops))
    in_dims = tuple(static.in_dims[i] for i in order) + static.in_dims[count:]
    static = dataclasses.replace(
        static, structure=structure, config=static.config.loops, in_dims=in_dims
    )
    return static, (*(arrays[i] for i in order), *arrays[count:])


def with_loop_operands(
    run: Callable[..., tuple[jax.Array, ...]],
) -> Callable[..., tuple[jax.Array, ...]]:
    """``run(static, *arrays)`` of the loops as a function of another backend's operands."""

    def wrapped(static: Static, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        static, arrays = loop_operands(static, arrays)
        return run(static, *arrays)

    return wrapped


# --- Cutting tiles out of arrays with mapped axes, and writing them back.

# From an axis of one head to the start and size of a slice; other axes are whole.
Window: TypeAlias = Mapping[int, tuple[Index, int]]


@dataclasses.dataclass(frozen=True)
class MappedArray:
    """An array with mapped axes, and the index of one head along them."""

    array: jax.Array
    dims: Dims
    head_index: tuple[jax.Array, ...]

    def _window(self, window: Window) -> tuple[list[Index], list[int]]:
        starts: list[Index] = []
        sizes: list[int] = []
        core = 0
        for axis, length in enumerate(self.array.shape):
            if axis in self.dims:
                starts.append(self.head_index[self.dims.index(axis)])
                sizes.append(1)
                continue
            start, size = window.get(core, (0, length))
            core += 1
            starts.append(start if isinstance(start, jax.Array) else np.int32(start))
            sizes.append(size)
        return starts, sizes

    def cut(self, window: Window) -> jax.Array:
        """The slice of one head of one example, whose axes are cut to ``window``.

        Args:
          window: from an axis to its start and size; other axes are whole.
        """
        starts, sizes = self._window(window)
        cut = _slice(self.array, starts, sizes)
        return cut.reshape([n for a, n in enumerate(sizes) if a not in self.dims])

    def put(self, x: jax.Array, window: Window) -> jax.Array:
        """The whole array with the slice that ``cut`` returns set to ``x``."""
        starts, sizes = self._window(window)
        return _update(self.array, x.reshape(sizes), starts)

    def add(self, x: jax.Array, window: Window) -> jax.Array:
        """The whole array with ``x`` added to the slice that ``cut`` returns."""
        starts, sizes = self._window(window)
        x = x.reshape(sizes)
        return _update(self.array, _slice(self.array, starts, sizes) + x, starts)


# No index here is negative; without this hint JAX adds three operations to each slice.
_slice = functools.partial(lax.dynamic_slice, allow_negative_indices=False)
_update = functools.partial(lax.dynamic_update_slice, allow_negative_indices=False)


class Tile(NamedTuple):
    """One tile of queries and keys, with zeros in masked rows."""

    q: jax.Array  # [t H], scaled
    raw_q: jax.Array  # [t H]
    k: jax.Array  # [s H]
    v: jax.Array  # [s D]
    k0: jax.Array  # index of the first key
    visible: Visible | None  # None: all pairs
    dropout_factor: jax.Array | None  # [t s]: what dropout multiplies probabilities by
    scores: list[jax.Array]  # the arrays of the scores, cut to the tile
    apply: Callable[..., jax.Array]  # (logits, arrays of the scores) -> logits


class QueryBlock(NamedTuple):
    """One block of queries of one head of one example."""

    i: Index  # of the block
    q0: jax.Array  # index of the first query
    q: jax.Array  # [t H], scaled
    raw_q: jax.Array  # [t H]
    own: jax.Array | None  # bool [t], False for queries of the previous block; None: all True


class OneHead:
    """One head of one example: cuts query blocks and tiles out of the operands."""

    def __init__(
        self, static: Static, arrays: tuple[jax.Array, ...], head_index: tuple[jax.Array, ...]
    ) -> None:
        self.static, self.config, self.head_index = static, static.config, head_index
        n = static.structure.num_leaves
        operands = [
            MappedArray(x, d, head_index) for x, d in zip(arrays, static.in_dims, strict=True)
        ]
        self.operands, self.rest = operands[:n], operands[n:]
        head, schedule = primitive.as_head(jax.tree.unflatten(static.structure, self.operands))
        self.head: Any  # a Head of MappedArrays
        self.head, self.schedule = head, schedule
        self.dtype = accumulation_dtype(arrays[0].dtype)
        (T, self.H), (S, _), (_, self.D) = (
            primitive.core_shape(v.array.shape, v.dims) for v in operands[:3]
        )
        self.grid = Grid(T, S, self.config.block_q, self.config.block_k)
        scalar = lambda v: v.cut({})  # noqa: E731
        self.b, self.n = scalar(head.b), scalar(head.n)
        self.scale = scalar(head.scale).astype(self.dtype)
        self.sink = None if head.sink is None else scalar(head.sink).astype(self.dtype)
        self.mask_leaves, self.mask_structure = jax.tree.flatten(head.mask)
        self.score_leaves, self.score_structure = jax.tree.flatten(head.score)
        # The axes of a leaf are declared by its class, so MappedArrays as leaves have them too.
        self.mask_axes, self.score_axes = leaves(head.mask), leaves(head.score)
        self.dropout_leaves, self.dropout_structure = jax.tree.flatten(head.dropout)
        self.dropout_axes = leaves(head.dropout)

    def core(self, operand: MappedArray) -> tuple[int, ...]:
        """The shape of one head of one example."""
        return primitive.core_shape(operand.array.shape, operand.dims)

    def rows(self, operand: MappedArray, start: Index, size: int) -> jax.Array:
        """Rows ``start`` to ``start + size``, in the accumulation dtype."""
        return operand.cut({0: (start, size)}).astype(self.dtype)

    def row(self, i: Index) -> QueryBlock:
        """Block ``i`` of queries."""
        t, T = self.grid.block_q, self.grid.T
        q0 = jnp.minimum(i * t, T - t)  # the last block is shifted back to end with the array
        raw = self.rows(self.head.query, q0, t)
        own = None if T % t == 0 else q0 + jnp.arange(t, dtype=jnp.int32) >= i * t
        return QueryBlock(i, q0, raw * self.scale, raw, own)

    def tile(self, row: QueryBlock, j: Index, masked: bool) -> Tile:
        """The tile of a row with key block ``j``."""
        t, s = self.grid.block_q, self.grid.block_k
        k0 = jnp.minimum(j * s, self.grid.S - s)  # shifted back likewise
        k, v = self.rows(self.head.key, k0, s), self.rows(self.head.value, k0, s)

        def local(operands: list[MappedArray], axes: list[Leaf]) -> list[jax.Array]:
            return [
                as_tile(x.cut(self.leaf_window(x, leaf, row.q0, k0)), leaf)
                for x, leaf in zip(operands, axes, strict=True)
            ]

        arrays = local(self.score_leaves, self.score_axes)
        mask, own = None, None
        if masked:
            mask = jax.tree.unflatten(self.mask_structure, local(self.mask_leaves, self.mask_axes))
            own = None if row.own is None else row.own[:, None]
            if self.grid.S % s:
                columns = (k0 + jnp.arange(s, dtype=jnp.int32) >= j * s)[None, :]
                own = columns if own is None else own & columns
        scores = jax.tree.unflatten(self.score_structure, arrays)
        visible = visible_pairs(mask, scores, self.b, self.n, (t, s), row.q0, k0, own)
        q, raw_q = row.q, row.raw_q
        if visible is not None:
            raw_q = zero_rows(visible.queries, raw_q)
            arrays = jax.tree.leaves(scores_of_visible(scores, visible))
            q, k, v = visible.zero_rows(q, k, v)
        chex.assert_shape([q, k, v], [(t, self.H), (s, self.H), (s, self.D)])
        kept = None
        if self.dropout_leaves:
            dropout: Dropout = jax.tree.unflatten(
                self.dropout_structure, local(self.dropout_leaves, self.dropout_axes)
            )
            keep = dropout.keep(self.b, self.n, *tile_indices((t, s), row.q0, k0))
            probability = dropout.keep_probability
            kept = jnp.where(keep, 1 / probability, jnp.zeros_like(probability))

        def apply(logits: jax.Array, arrays: list[jax.Array]) -> jax.Array:
            scores = jax.tree.unflatten(self.score_structure, arrays)
            return apply_scores(logits, scores, visible, self.b, self.n, row.q0, k0)

        return Tile(q, raw_q, k, v, k0, visible, kept, arrays, apply)

    def leaf_window(self, operand: MappedArray, leaf: Leaf, q0: Index, k0: Index) -> Window:
        """The window of a mask's or score's array for the tile at ``(q0, k0)``."""
        windows = {"T": (q0, self.grid.block_q), "S": (k0, self.grid.block_k)}
        shape = self.core(operand)
        return {
            d: windows[a]
            for d, a in enumerate(local_axes(leaf))
            if a in windows and shape[d] > 1  # an axis of size 1 broadcasts
        }

    def unmasked_values(self, tile: Tile, s: jax.Array) -> jax.Array:
        """The values of a tile, with zeros for keys that a score masked, given the logits."""
        return unmasked_values(s, tile.v, self.head.score)

    def blocks_of(self, row: QueryBlock) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The key blocks to visit ``[max]``, the number of full ones, and the number of all."""
        index, full, visited = (
            v.cut({0: (row.i, 1)}).reshape(self.core(v)[1:]) for v in self.schedule
        )
        return index, full, visited


Buffers: TypeAlias = list[jax.Array]


class Formula(NamedTuple):
    """A fold over the key blocks that a query block visits.

    ``state`` belongs to the query block. ``buffers`` are the results of all heads and examples,
    which XLA updates in place.
    """

    start: Callable[[OneHead, QueryBlock], Any]  # -> state
    # The last two arguments are state and buffers.
    step: Callable[[OneHead, QueryBlock, Tile, Any, Buffers], tuple[Any, Buffers]]
    finish: Callable[[OneHead, QueryBlock, Any, Buffers], Buffers]


def over_query_blocks(
    static: Static, arrays: tuple[jax.Array, ...], buffers: Buffers, formula: Formula
) -> Buffers:
    """``formula`` on every query block of every head of every example.

    Query blocks run from the last to the first: the last block may have been shifted back onto
    queries of the previous one, whose results then overwrite its own.
    """
    config: Loops = static.config

    def head(e: Index, buffers: Buffers) -> Buffers:
        one = OneHead(static, arrays, unravel(e, static.levels))
        count = one.grid.rows

        def one_row(r: Index, buffers: Buffers) -> Buffers:
            row = one.row(count - 1 - r)

            def visit(j: Index, masked: bool, carry: tuple[Any, Buffers]) -> tuple[Any, Buffers]:
                return formula.step(one, row, one.tile(row, j, masked), *carry)

            carry = (formula.start(one, row), buffers)
            if config.single and not config.some_partial:
                carry = visit(jnp.int32(0), False, carry)
            else:
                index, full, visited = one.blocks_of(row)
                at = functools.partial(
                    lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False
                )
                if config.some_full:
                    carry = lax.fori_loop(
                        jnp.int32(0), full, lambda m, x: visit(at(index, m), False, x), carry
                    )
                if config.some_partial:
                    carry = lax.fori_loop(
                        full, visited, lambda m, x: visit(at(index, m), True, x), carry
                    )
            return formula.finish(one, row, *carry)

        if count == 1:
            return one_row(jnp.int32(0), buffers)
        return lax.fori_loop(jnp.int32(0), jnp.int32(count), one_row, buffers)

    heads = math.prod(static.levels)
    if heads == 1:
        return head(jnp.int32(0), buffers)
    # `asarray`, because the number of heads may be symbolic.
    return lax.fori_loop(jnp.int32(0), jnp.asarray(heads, jnp.int32), head, buffers)


def unravel(e: Index, levels: Shape) -> tuple[jax.Array, ...]:
    """The index along each mapped axis of element ``e``, like ``jnp.unravel_index``."""
    indices = []
    for size in reversed(levels):
        length = jnp.asarray(size, jnp.int32)
        indices.append(lax.rem(e, length))
        e = lax.div(e, length)
    return tuple(reversed(indices))


def zeros(static: Static, cores: list[tuple[Shape, DTypeLike]]) -> list[jax.Array]:
    """Zeros for results whose shapes without mapped axes, and dtypes, are ``cores``."""
    return [
        jnp.zeros(primitive.mapped_shape(core, dims, static.levels), dtype)
        for (core, dtype), dims in zip(cores, static.out_dims, strict=True)
    ]
