"""Attention in linear memory: tile by tile, forward and backward, visiting only non-empty blocks.

A block of queries walks through the key blocks it can see, first those it sees in full, then
those that the mask cuts, keeping a running softmax; the backward pass walks the same way and
recomputes the probabilities from the lse. The formulas are here, for one tile; ``program`` has the
loops around them, in which a tile stays in the processor's cache and is reused.

Source: Rabe and Staats 2021, "Self-attention Does Not Need O(n^2) Memory"; Dao et al. 2022,
"FlashAttention".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.backends import primitive, xla
from attention_jax.backends.blockwise.batching import together
from attention_jax.backends.blockwise.loops import (
    Config,
    Formula,
    Program,
    Row,
    Tile,
    View,
    empty,
    over_rows,
)
from attention_jax.backends.call import Call, Head
from attention_jax.backends.heads import over_heads_and_examples
from attention_jax.backends.primitive import RESULTS, Static
from attention_jax.backends.tile import as_tile, product, rows_or_zero
from attention_jax.core import softmax
from attention_jax.core.axes import Sizes, accumulation_dtype
from attention_jax.core.pytree import leaves
from attention_jax.core.softmax import finite
from attention_jax.masks import Mask, block_map
from attention_jax.masks.grid import Grid

# --- The formulas.


def result_cores(static: Static, arrays: tuple[Any, ...]) -> list[tuple[tuple[int, ...], Any]]:
    """Shape, without mapped axes, and dtype of output, (m,) and log l."""
    query, _, value = (
        primitive.core_shape(x.shape, d) for x, d in zip(arrays[:3], static.in_dims, strict=False)
    )
    dtype = accumulation_dtype(arrays[0].dtype)
    rows = [((query[0],), dtype)] * (len(static.out_dims) - 1)
    return [((query[0], value[1]), dtype), *rows]


def forward(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Output ``[T D]``, ``m [T]`` and ``log l [T]`` by a running softmax over a row's blocks."""

    def start(p: Program, row: Row) -> softmax.State:
        return softmax.start(p.grid.block_q, p.D, p.dtype)

    def step(p: Program, row: Row, tile: Tile, state: softmax.State, buffers: Any) -> Any:
        s = tile.apply(product(tile.q, tile.k, 1, 1), tile.scores)
        return softmax.update(state, s, p.clean_values(tile, s), tile.kept), buffers

    def finish(p: Program, row: Row, state: softmax.State, buffers: Any) -> Any:
        return _write(p, row, buffers, softmax.finish(state, p.sink))

    buffers = empty(static, result_cores(static, arrays))
    return tuple(over_rows(static, arrays, buffers, Formula(start, step, finish)))


def _write(p: Program, row: Row, buffers: list[Any], results: Any) -> list[Any]:
    window = {0: (row.q0, p.grid.block_q)}
    return [
        View(buffer, dims, p.place).put(x.astype(buffer.dtype), window)
        for buffer, dims, x in zip(buffers, p.static.out_dims, results, strict=True)
    ]


def _normaliser(p: Program, row: Row) -> tuple[jax.Array, jax.Array]:
    """``m [t]`` and ``log l [t]`` of a row, as the forward pass found them, both finite."""
    _, m, log_l = (p.rows(view, row.q0, p.grid.block_q) for view in p.rest[:RESULTS])
    return m, finite(log_l)


def _probabilities(s: jax.Array, lse: tuple[jax.Array, jax.Array]) -> jax.Array:
    """``exp(s - lse)``, in the order that loses nothing where logits are large."""
    m, log_l = lse
    return jnp.exp((s - m[:, None]) - log_l[:, None])


class Numbers(NamedTuple):
    """The number of each differentiable operand among the leaves; None where there is none."""

    query: int
    key: int
    value: int
    score: list[int]  # of each array of the scores
    sink: int | None
    scale: int


def numbers(static: Static) -> Numbers:
    """Where each differentiable operand is among the leaves."""
    numbered = jax.tree.unflatten(static.structure, range(static.structure.num_leaves))
    (query, key, value, score, sink, scale), _ = numbered
    return Numbers(query, key, value, jax.tree.leaves(score), sink, scale)


def tangent(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Tangents of output and ``log l``, with ``s`` the logits and a dot for tangents::

        d lse_i = sum_j p_ij ds_ij + p_sink dsink
        d out_i = sum_j p_ij (ds_ij v_j + dv_j) - (d lse_i) out_i

    where ``p`` is that of the forward pass, and the whole of ``d lse`` counts as ``d log l``.
    """
    number = numbers(static)

    def dot(p: Program, which: int | None) -> View | None:
        """The tangent of an operand; None where it does not vary."""
        return p.rest[RESULTS + static.wrt.index(which)] if which in static.wrt else None

    def start(p: Program, row: Row) -> Any:
        t = p.grid.block_q
        dq = jnp.zeros_like(row.raw_q)  # of scale * q
        if view := dot(p, number.query):
            dq = dq + p.scale * p.rows(view, row.q0, t)
        if view := dot(p, number.scale):
            dq = dq + view.cut({}).astype(p.dtype) * row.raw_q
        lse = _normaliser(p, row)
        return dq, lse, jnp.zeros((t,), p.dtype), jnp.zeros((t, p.D), p.dtype)

    def dscores(p: Program, row: Row, tile: Tile) -> list[Any]:
        tangents = []
        for x, which, view, leaf in zip(
            tile.scores, number.score, p.score_leaves, p.score_axes, strict=True
        ):
            if moving := dot(p, which):
                window = p.leaf_window(view, leaf, row.q0, tile.k0)
                tangents.append(as_tile(moving.cut(window), leaf).astype(x.dtype))
            elif jnp.issubdtype(x.dtype, jnp.inexact):
                tangents.append(jnp.zeros_like(x))
            else:
                tangents.append(np.zeros(x.shape, jax.dtypes.float0))
        return tangents

    def step(p: Program, row: Row, tile: Tile, state: Any, buffers: Any) -> Any:
        dq, lse, dlse, weighted = state
        keys = tile.k0, p.grid.block_k
        s0 = product(tile.q, tile.k, 1, 1)
        ds0 = product(rows_or_zero(tile.seen and tile.seen.queries, dq), tile.k, 1, 1)
        if view := dot(p, number.key):
            dk = rows_or_zero(tile.seen and tile.seen.keys, p.rows(view, *keys))
            ds0 = ds0 + product(tile.q, dk, 1, 1)
        s, ds = jax.jvp(tile.apply, (s0, tile.scores), (ds0, dscores(p, row, tile)))
        prob = _probabilities(s, lse)
        pds = prob * ds
        dropped = (lambda x: x) if tile.kept is None else (lambda x: x * tile.kept)
        weighted = weighted + product(dropped(pds), p.clean_values(tile, s), 1, 0)
        if view := dot(p, number.value):
            dv = rows_or_zero(tile.seen and tile.seen.keys, p.rows(view, *keys))
            weighted = weighted + product(dropped(prob), dv, 1, 0)
        return (dq, lse, dlse + pds.sum(-1), weighted), buffers

    def finish(p: Program, row: Row, state: Any, buffers: Any) -> Any:
        _, lse, dlse, weighted = state
        out = p.rows(p.rest[0], row.q0, p.grid.block_q)
        if (view := dot(p, number.sink)) and p.sink is not None:
            dlse = dlse + _probabilities(p.sink, lse)[:, 0] * view.cut({}).astype(p.dtype)
        return _write(p, row, buffers, (weighted - dlse[:, None] * out, dlse))

    buffers = empty(static, result_cores(static, arrays))
    return tuple(over_rows(static, arrays, buffers, Formula(start, step, finish)))


def backward(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Cotangents of the operands, with ``do, dlse`` those of output and lse::

        p_ij  = exp(s_ij - lse_i)
        dv_j  = sum_i p_ij do_i
        ds_ij = p_ij (do_i . v_j - delta_i + dlse_i),   delta_i = do_i . out_i
        dq_i  = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i
        dsink = sum_i p_sink,i (dlse_i - delta_i),   dscale = sum_ij ds_ij (q_i . k_j)

    where ``ds`` is pulled back through the scores, whose arrays get theirs on the way.
    """
    number, wrt = numbers(static), static.wrt
    dtype = accumulation_dtype(arrays[0].dtype)
    varying = [m for m, which in enumerate(number.score) if which in wrt]

    def add(p: Program, buffers: list[Any], which: int | None, part: Any, window: Any) -> list[Any]:
        if which not in wrt:
            return buffers
        at = wrt.index(which)
        view = View(buffers[at], static.out_dims[at], p.place)
        part = part.astype(buffers[at].dtype)
        return [*buffers[:at], view.add(part, window), *buffers[at + 1 :]]

    def start(p: Program, row: Row) -> Any:
        out, _, log_l, do, dlse = (p.rows(view, row.q0, p.grid.block_q) for view in p.rest)
        # A row that sees nothing has no gradient, whatever its cotangent holds: its output is 0.
        dlse = jnp.where(log_l == -jnp.inf, jnp.zeros_like(dlse), dlse)
        delta = jnp.where(out == 0, jnp.zeros_like(out), do * out).sum(-1)
        dq, dscale = jnp.zeros_like(row.raw_q), jnp.zeros((), p.dtype)
        return do, _normaliser(p, row), dlse - delta, dq, dscale

    def step(p: Program, row: Row, tile: Tile, state: Any, buffers: list[Any]) -> Any:
        do, lse, shift, dq, dscale = state
        clean_do = rows_or_zero(tile.seen and tile.seen.queries, do)

        def logits(s0: Any, *xs: Any) -> Any:
            arrays = list(tile.scores)
            for m, x in zip(varying, xs, strict=True):
                arrays[m] = x
            return tile.apply(s0, arrays)

        s0 = product(tile.q, tile.k, 1, 1)
        s, pull = jax.vjp(logits, s0, *(tile.scores[m] for m in varying))
        prob = _probabilities(s, lse)
        dp = product(clean_do, p.clean_values(tile, s), 1, 1)
        dropped = prob if tile.kept is None else prob * tile.kept
        ds = prob * ((dp if tile.kept is None else dp * tile.kept) + shift[:, None])
        if tile.seen is not None:
            ds = jnp.where(tile.seen.pairs, ds, jnp.zeros_like(ds))
        ds0, *dscores = pull(ds)
        keys = {1: (tile.k0, p.grid.block_k)}
        if number.value in wrt:
            buffers = add(p, buffers, number.value, product(clean_do, dropped, 0, 0), keys)
        if number.key in wrt:
            buffers = add(p, buffers, number.key, product(tile.q, ds0, 0, 0), keys)
        for m, part in zip(varying, dscores, strict=True):
            window = p.leaf_window(p.score_leaves[m], p.score_axes[m], row.q0, tile.k0)
            buffers = add(p, buffers, number.score[m], part, window)
        if number.scale in wrt:
            dscale = dscale + (ds0 * product(tile.raw_q, tile.k, 1, 1)).sum()
        return (do, lse, shift, dq + product(ds0, tile.k, 1, 0), dscale), buffers

    def finish(p: Program, row: Row, state: Any, buffers: list[Any]) -> list[Any]:
        _, lse, shift, dq, dscale = state  # dq is that of scale * q
        buffers = add(p, buffers, number.query, p.scale * dq, {0: (row.q0, p.grid.block_q)})
        if number.scale in wrt:
            buffers = add(p, buffers, number.scale, dscale, {})
        if p.sink is not None and number.sink in wrt:
            dsink = _probabilities(p.sink, lse)[:, 0] * shift
            dsink = dsink if row.own is None else jnp.where(row.own, dsink, jnp.zeros_like(dsink))
            buffers = add(p, buffers, number.sink, dsink.sum(), {})
        return buffers

    # The cotangents of key and value are gathered as [H S] and [D S]: a product that leaves the
    # keys as columns is twice as fast as one that leaves them as rows.
    columns = [i for i in wrt if i in (number.key, number.value)]
    cores = []
    for i in wrt:
        core = primitive.core_shape(arrays[i].shape, static.in_dims[i])
        is_complex = jnp.issubdtype(arrays[i].dtype, jnp.complexfloating)  # of a function
        wide = arrays[i].dtype if is_complex else dtype
        cores.append((core[::-1] if i in columns else core, wide))
    buffers = over_rows(static, arrays, empty(static, cores), Formula(start, step, finish))
    results = []
    for x, i, dims in zip(buffers, wrt, static.out_dims, strict=True):
        if i in columns:
            x = jnp.swapaxes(x, *(axis for axis in range(x.ndim) if axis not in dims))
        results.append(x.astype(arrays[i].dtype))
    return tuple(results)


KERNEL = primitive.Kernel(together(forward), together(tangent), together(backward), xla.attend)
_bind = primitive.make("attention_blockwise", KERNEL)


# --- Block sizes.

# (block_q, block_k) -> GFLOP/s of the forward loop over full blocks; two cores of an AMD EPYC,
# float32, H = 64: `python -m experiments bench --only blocks`. Large blocks do the work of a block
# faster, small ones leave more of it out: the least visited pairs / speed wins.
SPEED = {
    (1024, 512): 163,
    (512, 1024): 158,
    (512, 512): 146,
    (256, 512): 110,
    (256, 256): 83,
    (128, 128): 77,
}
# Masks whose blocks are known only at run time: neither too coarse to skip nor too small.
UNKNOWN = (512, 512)
# Few queries: bound by reading keys, not by arithmetic.
FEW_QUERIES, FEW_QUERIES_BLOCK_K = 16, 2048
# Partial blocks also compute the mask.
PARTIAL_COST = 1.5
# More blocks than this are not looked at one by one while tracing.
MOST_BLOCKS = 2**22

# So many pairs are computed at once, of as many heads as that takes; forward and backward, GFLOP/s
# of 32 heads of 512 x 512: 83 and 95 one by one, 95 and 109 with 2**19, 104 and 111 with 2**20,
# 91 and 82 with 2**22 (two cores of an Intel Xeon).
TOGETHER = 2**20


def block_sizes(T: int, S: int, mask: Mask | None) -> tuple[int, int]:
    """Queries and keys per block.

    >>> block_sizes(4096, 4096, None), block_sizes(1, 10_000, None)
    ((1024, 512), (1, 2000))
    """
    if T <= FEW_QUERIES:
        return T, _even(S, FEW_QUERIES_BLOCK_K)
    if leaves(mask):
        return _even(T, UNKNOWN[0]), _even(S, UNKNOWN[1])
    costs: dict[tuple[int, int], float] = {}
    for (block_q, block_k), speed in SPEED.items():
        grid = Grid(T, S, _even(T, block_q), _even(S, block_k))
        if costs and grid.rows * grid.columns > MOST_BLOCKS:
            continue
        kind = block_map.kinds(mask, grid, 0, 0)
        if not isinstance(kind, np.ndarray):  # a function is evaluated at run time
            return _even(T, UNKNOWN[0]), _even(S, UNKNOWN[1])
        full, partial = (kind == block_map.FULL).sum(), (kind == block_map.PARTIAL).sum()
        pairs = grid.block_q * grid.block_k * (full + PARTIAL_COST * partial)
        costs.setdefault((grid.block_q, grid.block_k), pairs / speed)
    return min(costs, key=lambda size: costs[size])


def _even(length: int, block: int) -> int:
    """At most about ``block``, so that ``length`` is cut into blocks as equal as can be."""
    if length <= block:
        return length
    even = -(-length // -(-length // block))
    return min(length, -(-even // 16) * 16)


def extra_bytes(sizes: Sizes, dtype: Any, mask: Mask | None) -> int:
    """Logits, probabilities and a copy of the tiles computed together, and the block lists."""
    block_q, block_k = block_sizes(sizes.T, sizes.S, mask)
    tile = 3 * block_q * block_k + (block_q + 2 * block_k) * (sizes.H + sizes.D)
    tile *= max(1, min(_together(block_q, block_k), math.prod(sizes.B) * sizes.N))
    grid = Grid(sizes.T, sizes.S, block_q, block_k)
    return tile * accumulation_dtype(dtype).itemsize + 4 * grid.rows * grid.columns


def _together(block_q: int, block_k: int) -> int:
    """How many heads to compute at once."""
    return TOGETHER // max(1, block_q * block_k)


def plan(head: Head, block: tuple[int, int]) -> tuple[block_map.Visits, Config]:
    """The blocks to visit, and what the loops depend on."""
    T, S = head.query.shape[0], head.key.shape[0]
    grid = Grid(T, S, *block)
    kind = block_map.kinds(head.mask, grid, head.b, head.n)
    visits = block_map.visits(kind, grid)
    known = isinstance(kind, np.ndarray)
    return visits, Config(
        *block,
        some_full=not known or bool(visits.full.any()),
        some_partial=not known or bool((visits.visited > visits.full).any()),
        single=known and grid.columns == 1 and bool((visits.visited == 1).all()),
        together=_together(*block),
        sharing=T <= FEW_QUERIES,
    )


def attend(head: Head, *, sizes: tuple[int, int]) -> tuple[Any, Any]:
    """Output ``[T D]`` and lse ``[T]``."""
    visits, config = plan(head, sizes)
    out, lse = _bind(head, visits, config)
    return out.astype(head.query.dtype), lse


def run(
    call: Call, sizes: Sizes, *, block: tuple[int, int] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Output ``[*B T N D]`` and lse ``[*B T N]``."""
    block = block or block_sizes(sizes.T, sizes.S, call.mask)
    out, lse = over_heads_and_examples(
        lambda head: attend(head, sizes=block),
        call,
        sizes,
        ("*B T N D", "*B T N"),
    )
    return out, lse
