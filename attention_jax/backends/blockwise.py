"""Attention in linear memory: tile by tile, forward and backward, visiting only non-empty blocks.

A block of queries walks through the key blocks it can see, first those it sees in full, then
those that the mask cuts, keeping a running softmax; the backward pass walks the same way and
recomputes the probabilities from the lse. The formulas are below, for one tile; around them are
loops, so that a tile stays in the processor's cache and is reused.

Source: Rabe and Staats 2021, "Self-attention Does Not Need O(n^2) Memory"; Dao et al. 2022,
"FlashAttention".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax import blocks, dropout, softmax
from attention_jax.axes import Sizes, accumulation_dtype
from attention_jax.backends import primitive, xla
from attention_jax.backends.primitive import Dims, Static
from attention_jax.grid import Grid
from attention_jax.lift import Call, Head, over_heads_and_examples
from attention_jax.masks import Mask
from attention_jax.scores import tile_indices
from attention_jax.softmax import finite
from attention_jax.tiles import (
    Visible,
    apply_scores,
    as_tile,
    local_axes,
    product,
    rows_or_zero,
    seen_values,
    visible,
)
from attention_jax.values import Leaf, leaves


@dataclasses.dataclass(frozen=True)
class Config:
    """What the loops depend on, besides shapes."""

    block_q: int
    block_k: int
    dropout_rate: float
    some_full: bool  # may there be full blocks, and partial ones: else their loop is left out
    some_partial: bool
    single: bool  # every query block visits exactly one key block


# --- Cutting tiles out of arrays with mapped axes, and putting them back.


@dataclasses.dataclass(frozen=True)
class View:
    """An array, where its mapped axes are, and the place along them that is looked at."""

    array: jax.Array
    dims: Dims
    place: tuple[jax.Array, ...]

    def _window(self, window: dict[int, tuple[Any, int]]) -> tuple[list[Any], list[int]]:
        starts: list[Any] = []
        sizes: list[int] = []
        core = 0
        for axis, length in enumerate(self.array.shape):
            if axis in self.dims:
                start, size = self.place[self.dims.index(axis)], 1
            else:
                start, size = window.get(core, (0, length))
                core += 1
            starts.append(jnp.asarray(start, jnp.int32))
            sizes.append(size)
        return starts, sizes

    def cut(self, window: dict[int, tuple[Any, int]]) -> jax.Array:
        """The part of one head of one example in ``window``: axis -> (start, size)."""
        starts, sizes = self._window(window)
        part = lax.dynamic_slice(self.array, starts, sizes)
        return part.reshape([n for a, n in enumerate(sizes) if a not in self.dims])

    def put(self, part: jax.Array, window: dict[int, tuple[Any, int]]) -> jax.Array:
        """The whole array with ``part`` in place of what ``cut`` gives."""
        starts, sizes = self._window(window)
        return lax.dynamic_update_slice(self.array, part.reshape(sizes), starts)

    def add(self, part: jax.Array, window: dict[int, tuple[Any, int]]) -> jax.Array:
        """The whole array with ``part`` added to what ``cut`` gives."""
        starts, sizes = self._window(window)
        part = part.reshape(sizes)
        old = lax.dynamic_slice(self.array, starts, sizes)
        return lax.dynamic_update_slice(self.array, old + part, starts)


class Tile(NamedTuple):
    """One tile, cut and cleaned: what the formulas below see."""

    q: jax.Array  # [t H], scaled
    k: jax.Array  # [s H]
    v: jax.Array  # [s D]
    k0: Any  # its first key
    seen: Visible | None  # None: every query sees every key
    kept: jax.Array | None  # [t s]: what dropout multiplies probabilities by
    scores: list[Any]  # the arrays of the scores, cut to the tile
    apply: Callable[..., jax.Array]  # (logits, arrays of the scores) -> logits


class Row(NamedTuple):
    """One block of queries of one head of one example."""

    i: Any  # its number
    q0: Any  # its first query
    q: jax.Array  # [t H], scaled
    raw_q: jax.Array  # [t H]
    own: jax.Array | None  # bool [t]: False for queries that the row before owns


class Program:
    """One head of one example: cuts rows and tiles out of the operands."""

    def __init__(self, static: Static, arrays: tuple[Any, ...], place: tuple[Any, ...]) -> None:
        self.static, self.config = static, static.config
        n = static.structure.num_leaves
        views = [View(x, d, place) for x, d in zip(arrays, static.in_dims, strict=True)]
        self.views, self.rest = views[:n], views[n:]
        head, visits = primitive.as_head(jax.tree.unflatten(static.structure, self.views))
        self.head, self.visits = head, visits
        self.dtype = accumulation_dtype(arrays[0].dtype)
        (T, self.H), (S, _), (_, self.D) = (
            primitive.core_shape(v.array.shape, v.dims) for v in views[:3]
        )
        self.grid = Grid(T, S, self.config.block_q, self.config.block_k)
        scalar = lambda v: v.cut({})  # noqa: E731
        self.b, self.n = scalar(head.b), scalar(head.n)
        self.seed = None if head.seed is None else scalar(head.seed)
        self.scale = scalar(head.scale).astype(self.dtype)
        self.sink = None if head.sink is None else scalar(head.sink).astype(self.dtype)
        self.mask_leaves, self.mask_structure = jax.tree.flatten(head.mask)
        self.score_leaves, self.score_structure = jax.tree.flatten(head.score)
        # A leaf's axes are a matter of its class, so they can be read off the structure.
        self.mask_axes, self.score_axes = leaves(head.mask), leaves(head.score)

    def core(self, view: View) -> tuple[int, ...]:
        return primitive.core_shape(view.array.shape, view.dims)

    def rows(self, view: View, start: Any, size: int) -> jax.Array:
        """Rows of a core axis 0, in the accumulation dtype."""
        return view.cut({0: (start, size)}).astype(self.dtype)

    def row(self, i: Any) -> Row:
        t, T = self.grid.block_q, self.grid.T
        q0 = jnp.minimum(i * t, T - t)  # the last block is moved back to lie within the array
        raw = self.rows(self.head.query, q0, t)
        own = None if T % t == 0 else q0 + jnp.arange(t, dtype=jnp.int32) >= i * t
        return Row(i, q0, raw * self.scale, raw, own)

    def tile(self, row: Row, j: Any, masked: bool) -> Tile:
        """The tile of a row with key block ``j``."""
        t, s = self.grid.block_q, self.grid.block_k
        k0 = jnp.minimum(j * s, self.grid.S - s)  # the last block is moved back likewise
        k, v = self.rows(self.head.key, k0, s), self.rows(self.head.value, k0, s)

        def local(views: list[View], axes: list[Leaf]) -> list[Any]:
            return [
                as_tile(x.cut(self.leaf_window(x, leaf, row.q0, k0)), leaf)
                for x, leaf in zip(views, axes, strict=True)
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
        seen = visible(mask, scores, self.b, self.n, (t, s), row.q0, k0, own)
        q = row.q
        if seen is not None:
            q, k, v = (
                rows_or_zero(r, x) for r, x in ((seen.queries, q), (seen.keys, k), (seen.keys, v))
            )
        kept = None
        if self.seed is not None:
            rate = self.config.dropout_rate
            at = tile_indices((t, s), row.q0, k0)
            keep = dropout.keep(self.seed, self.b, self.n, *at, rate=rate)
            kept = jnp.where(keep, jnp.asarray(1.0 / (1.0 - rate), self.dtype), 0)

        def apply(logits: jax.Array, arrays: Any) -> jax.Array:
            scores = jax.tree.unflatten(self.score_structure, arrays)
            return apply_scores(logits, scores, seen, self.b, self.n, row.q0, k0)

        return Tile(q, k, v, k0, seen, kept, arrays, apply)

    def leaf_window(self, view: View, leaf: Leaf, q0: Any, k0: Any) -> dict[int, Any]:
        """The window of a mask's or score's array for the tile at ``(q0, k0)``."""
        windows = {"T": (q0, self.grid.block_q), "S": (k0, self.grid.block_k)}
        shape = self.core(view)
        return {
            d: windows[a]
            for d, a in enumerate(local_axes(leaf))
            if a in windows and shape[d] > 1  # else it broadcasts
        }

    def clean_values(self, tile: Tile, s: jax.Array) -> jax.Array:
        return seen_values(s, tile.v, self.head.score)

    def walk(self, row: Row, step: Callable[..., Any], state: Any) -> Any:
        """Folds ``step(state, j, masked)`` over the blocks that a row visits."""
        c = self.config
        if c.single and not c.some_partial:
            return step(state, jnp.int32(0), False)
        index, full, visited = (
            v.cut({0: (row.i, 1)}).reshape(self.core(v)[1:]) for v in self.visits
        )
        if c.some_full:
            state = lax.fori_loop(jnp.int32(0), full, lambda m, x: step(x, index[m], False), state)
        if c.some_partial:
            state = lax.fori_loop(full, visited, lambda m, x: step(x, index[m], True), state)
        return state


def _programs(
    static: Static, arrays: tuple[Any, ...], buffers: Any, body: Callable[..., Any]
) -> Any:
    """Folds ``body(program, row, buffers)`` over every row of every head of every example.

    Rows run from the last to the first: the last may have been moved back onto rows that the one
    before it owns, which then writes what is right.
    """

    def one_head(e: Any, buffers: Any) -> Any:
        place, rest = [], e
        for size in reversed(static.levels):
            place.append(rest % size)
            rest = rest // size
        program = Program(static, arrays, tuple(reversed(place)))
        rows = program.grid.rows

        def one_row(r: Any, buffers: Any) -> Any:
            return body(program, program.row(rows - 1 - r), buffers)

        if rows == 1:
            return one_row(jnp.int32(0), buffers)
        return lax.fori_loop(jnp.int32(0), jnp.int32(rows), one_row, buffers)

    heads = math.prod(static.levels)
    return lax.fori_loop(jnp.int32(0), jnp.int32(heads), one_head, buffers)


def _empty(static: Static, cores: list[tuple[tuple[int, ...], Any]]) -> list[jax.Array]:
    return [
        jnp.zeros(primitive.mapped_shape(core, dims, static.levels), dtype)
        for (core, dtype), dims in zip(cores, static.out_dims, strict=True)
    ]


# --- The formulas.


def _result_cores(static: Static, arrays: tuple[Any, ...]) -> list[tuple[tuple[int, ...], Any]]:
    query, _, value = (
        primitive.core_shape(x.shape, d) for x, d in zip(arrays[:3], static.in_dims, strict=False)
    )
    dtype = arrays[0].dtype
    return [((query[0], value[1]), dtype), ((query[0],), accumulation_dtype(dtype))]


def forward(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Output ``[T D]`` and lse ``[T]`` by a running softmax over each row's blocks."""

    def body(p: Program, row: Row, buffers: list[Any]) -> list[Any]:
        def step(state: softmax.State, j: Any, masked: bool) -> softmax.State:
            tile = p.tile(row, j, masked)
            s = tile.apply(product(tile.q, tile.k, 1, 1), tile.scores)
            return softmax.update(state, s, p.clean_values(tile, s), tile.kept)

        t = p.grid.block_q
        out, lse = softmax.finish(p.walk(row, step, softmax.start(t, p.D, p.dtype)), p.sink)
        return _write(p, row, buffers, (out, lse))

    return tuple(_programs(static, arrays, _empty(static, _result_cores(static, arrays)), body))


def _write(p: Program, row: Row, buffers: list[Any], results: Any) -> list[Any]:
    place = p.views[0].place
    window = {0: (row.q0, p.grid.block_q)}
    return [
        View(buffer, dims, place).put(x.astype(buffer.dtype), window)
        for buffer, dims, x in zip(buffers, p.static.out_dims, results, strict=True)
    ]


def tangent(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Tangents of output and lse, with ``s`` the logits and a dot for tangents:

    d lse_i = sum_j p_ij ds_ij + p_sink dsink
    d out_i = sum_j p_ij (ds_ij v_j + dv_j) - (d lse_i) out_i
    """

    def body(p: Program, row: Row, buffers: list[Any]) -> list[Any]:
        t, s_size = p.grid.block_q, p.grid.block_k
        out_view, lse_view, *dots = p.rest
        dot = dict(zip(static.wrt, dots, strict=True))
        lse = p.rows(lse_view, row.q0, t)
        out = p.rows(out_view, row.q0, t)
        numbers, score_numbers = _numbers(static)
        dscale = _scalar(dot.get(numbers["scale"]), p.dtype)
        dq_row = jnp.zeros_like(row.raw_q)  # of scale * q
        if numbers["query"] in dot:
            dq_row = dq_row + p.scale * p.rows(dot[numbers["query"]], row.q0, t)
        if dscale is not None:
            dq_row = dq_row + dscale * row.raw_q

        def step(state: Any, j: Any, masked: bool) -> Any:
            total, weighted = state
            tile = p.tile(row, j, masked)
            k0 = tile.k0
            s0 = product(tile.q, tile.k, 1, 1)
            dq = rows_or_zero(tile.seen and tile.seen.queries, dq_row)
            ds0 = product(dq, tile.k, 1, 1)
            if numbers["key"] in dot:
                dk = rows_or_zero(
                    tile.seen and tile.seen.keys, p.rows(dot[numbers["key"]], k0, s_size)
                )
                ds0 = ds0 + product(tile.q, dk, 1, 1)
            dscores = []
            for x, number, view, leaf in zip(
                tile.scores, score_numbers, p.score_leaves, p.score_axes, strict=True
            ):
                if number in dot:
                    window = p.leaf_window(view, leaf, row.q0, k0)
                    dscores.append(as_tile(dot[number].cut(window), leaf).astype(x.dtype))
                elif jnp.issubdtype(x.dtype, jnp.inexact):
                    dscores.append(jnp.zeros_like(x))
                else:
                    dscores.append(np.zeros(x.shape, jax.dtypes.float0))
            s, ds = jax.jvp(tile.apply, (s0, tile.scores), (ds0, dscores))
            prob = jnp.exp(s - finite(lse)[:, None])
            pds = prob * ds
            kept = 1 if tile.kept is None else tile.kept
            weighted = weighted + product(pds * kept, p.clean_values(tile, s), 1, 0)
            if numbers["value"] in dot:
                dv = rows_or_zero(
                    tile.seen and tile.seen.keys, p.rows(dot[numbers["value"]], k0, s_size)
                )
                weighted = weighted + product(prob * kept, dv, 1, 0)
            return total + pds.sum(-1), weighted

        start = (jnp.zeros((t,), p.dtype), jnp.zeros((t, p.D), p.dtype))
        dlse, weighted = p.walk(row, step, start)
        if p.sink is not None and numbers["sink"] in dot:
            dlse = dlse + jnp.exp(p.sink - lse) * _scalar(dot[numbers["sink"]], p.dtype)
        return _write(p, row, buffers, (weighted - dlse[:, None] * out, dlse))

    return tuple(_programs(static, arrays, _empty(static, _result_cores(static, arrays)), body))


def _scalar(view: View | None, dtype: Any) -> Any:
    return None if view is None else view.cut({}).astype(dtype)


def _numbers(static: Static) -> tuple[dict[str, Any], list[int]]:
    """The number of each differentiable operand among the leaves; of each array of the scores."""
    numbered = jax.tree.unflatten(static.structure, range(static.structure.num_leaves))
    (query, key, value, score, sink, scale), _ = numbered
    names = {"query": query, "key": key, "value": value, "sink": sink, "scale": scale}
    return names, jax.tree.leaves(score)


def backward(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Cotangents of the operands, with ``do, dlse`` those of output and lse:

        p_ij  = exp(s_ij - lse_i)
        dv_j  = sum_i p_ij do_i
        ds_ij = p_ij (do_i . v_j - delta_i + dlse_i),   delta_i = do_i . out_i
        dq_i  = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i
        dsink = sum_i p_sink,i (dlse_i - delta_i),   dscale = sum_ij ds_ij (q_i . k_j)

    where ``ds`` is pulled back through the scores, whose arrays get theirs on the way.
    """
    numbers, score_numbers = _numbers(static)
    wrt = static.wrt
    dtype = accumulation_dtype(arrays[0].dtype)

    def body(p: Program, row: Row, buffers: list[Any]) -> list[Any]:
        t, s_size = p.grid.block_q, p.grid.block_k
        place = p.views[0].place
        out_view, lse_view, do_view, dlse_view = p.rest
        lse = p.rows(lse_view, row.q0, t)
        out = p.rows(out_view, row.q0, t)
        # A row that sees nothing has no gradient, whatever its cotangent holds.
        do = rows_or_zero(lse != -jnp.inf, p.rows(do_view, row.q0, t))
        dlse = p.rows(dlse_view, row.q0, t)
        dlse = jnp.where(lse == -jnp.inf, jnp.zeros_like(dlse), dlse)
        shift = dlse - (do * out).sum(-1)  # dlse - delta

        def add(buffers: list[Any], number: int, part: Any, window: Any) -> list[Any]:
            if number not in wrt:
                return buffers
            at = wrt.index(number)
            view = View(buffers[at], static.out_dims[at], place)
            return [*buffers[:at], view.add(part.astype(dtype), window), *buffers[at + 1 :]]

        varying = [m for m, number in enumerate(score_numbers) if number in wrt]

        def step(state: Any, j: Any, masked: bool) -> Any:
            dq, buffers = state
            tile = p.tile(row, j, masked)
            k0 = tile.k0

            def logits(s0: Any, *xs: Any) -> Any:
                arrays = list(tile.scores)
                for m, x in zip(varying, xs, strict=True):
                    arrays[m] = x
                return tile.apply(s0, arrays)

            s0 = product(tile.q, tile.k, 1, 1)
            s, pull = jax.vjp(logits, s0, *(tile.scores[m] for m in varying))
            prob = jnp.exp(s - finite(lse)[:, None])
            dp = product(do, p.clean_values(tile, s), 1, 1)
            if tile.kept is not None:
                dp = dp * tile.kept
            ds = prob * (dp + shift[:, None])
            if tile.seen is not None:
                ds = jnp.where(tile.seen.pairs, ds, jnp.zeros_like(ds))
            ds0, *dscores = pull(ds)
            keys = {0: (k0, s_size)}
            if numbers["value"] in wrt:
                dropped = prob if tile.kept is None else prob * tile.kept
                buffers = add(buffers, numbers["value"], product(do, dropped, 0, 0).T, keys)
            if numbers["key"] in wrt:
                buffers = add(buffers, numbers["key"], product(tile.q, ds0, 0, 0).T, keys)
            for m, part in zip(varying, dscores, strict=True):
                view, leaf = p.score_leaves[m], p.score_axes[m]
                window = p.leaf_window(view, leaf, row.q0, k0)
                buffers = add(buffers, score_numbers[m], part, window)
            return dq + product(ds0, tile.k, 1, 0), buffers

        # dq is that of scale * q.
        dq, buffers = p.walk(row, step, (jnp.zeros_like(row.raw_q), buffers))
        buffers = add(buffers, numbers["query"], p.scale * dq, {0: (row.q0, t)})
        if numbers["scale"] in wrt:
            dscale = jnp.where(dq == 0, jnp.zeros_like(dq), dq * row.raw_q).sum()
            buffers = add(buffers, numbers["scale"], dscale, {})
        if p.sink is not None and numbers["sink"] in wrt:
            dsink = jnp.exp(p.sink - finite(lse)) * shift
            dsink = dsink if row.own is None else jnp.where(row.own, dsink, jnp.zeros_like(dsink))
            buffers = add(buffers, numbers["sink"], dsink.sum(), {})
        return buffers

    cores = [(primitive.core_shape(arrays[i].shape, static.in_dims[i]), dtype) for i in wrt]
    buffers = _programs(static, arrays, _empty(static, cores), body)
    return tuple(x.astype(arrays[i].dtype) for x, i in zip(buffers, wrt, strict=True))


def _plain(head: Head, config: Config) -> tuple[jax.Array, jax.Array]:
    return xla.attend(head, dropout_rate=config.dropout_rate)


_bind = primitive.make("attention_blockwise", primitive.Kernel(forward, tangent, backward, _plain))


# --- Block sizes.


def _balanced(length: int, block: int) -> int:
    """The block size that cuts ``length`` into as many blocks as ``block`` does, evenly."""
    if length <= block:
        return length
    even = -(-length // -(-length // block))
    return min(length, -(-even // 16) * 16)


def block_sizes(T: int, S: int, mask: Mask | None) -> tuple[int, int]:
    """Queries and keys per block."""
    return _balanced(T, 512), _balanced(S, 1024)


def extra_bytes(sizes: Sizes, dtype: Any, mask: Mask | None) -> int:
    """Logits, probabilities and a copy of one tile, the running softmax, and the block lists."""
    block_q, block_k = block_sizes(sizes.T, sizes.S, mask)
    tile = 3 * block_q * block_k + (block_q + 2 * block_k) * (sizes.H + sizes.D)
    grid = Grid(sizes.T, sizes.S, block_q, block_k)
    return tile * accumulation_dtype(dtype).itemsize + 4 * grid.rows * grid.columns


def attend(head: Head, *, dropout_rate: float, sizes: tuple[int, int]) -> tuple[Any, Any]:
    """Output ``[T D]`` and lse ``[T]``."""
    T, S = head.query.shape[0], head.key.shape[0]
    grid = Grid(T, S, *sizes)
    kind = blocks.kinds(head.mask, grid, head.b, head.n)
    visits = blocks.visits(kind, grid)
    known = isinstance(kind, np.ndarray)
    config = Config(
        *sizes,
        dropout_rate=dropout_rate,
        some_full=not known or bool(visits.full.any()),
        some_partial=not known or bool((visits.visited > visits.full).any()),
        single=known and grid.columns == 1 and bool((visits.visited == 1).all()),
    )
    return _bind(head, visits, config)


def run(
    call: Call, sizes: Sizes, *, dropout_rate: float, block: tuple[int, int] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Output ``[*B T N D]`` and lse ``[*B T N]``."""
    block = block or block_sizes(sizes.T, sizes.S, call.mask)
    out, lse = over_heads_and_examples(
        lambda head: attend(head, dropout_rate=dropout_rate, sizes=block),
        call,
        sizes,
        ("*B T N D", "*B T N"),
    )
    return out, lse
