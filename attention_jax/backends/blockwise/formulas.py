"""The formulas of blockwise attention for one tile of one head: output, tangents and cotangents.

``forward`` keeps a running softmax over the key blocks that a block of queries attends to;
``tangent`` and ``backward`` visit the same blocks and recompute the probabilities from the lse.
``loops`` slices the tiles and runs the steps.

Source: Rabe and Staats 2021, "Self-attention Does Not Need O(n^2) Memory"; Dao et al. 2022,
"FlashAttention".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.backends import primitive
from attention_jax.backends.blockwise.loops import (
    Formula,
    MappedArray,
    OneHead,
    QueryBlock,
    Tile,
    over_query_blocks,
    zeros,
)
from attention_jax.backends.primitive import RESULTS, Static
from attention_jax.backends.tile import as_tile
from attention_jax.core import softmax
from attention_jax.core.axes import accumulation_dtype
from attention_jax.core.softmax import finite, product, zero_rows


def result_cores(static: Static, arrays: tuple[Any, ...]) -> list[tuple[tuple[int, ...], Any]]:
    """Shape, without mapped axes, and dtype of output, (m,) and log l."""
    query, _, value = (
        primitive.core_shape(x.shape, d) for x, d in zip(arrays[:3], static.in_dims, strict=False)
    )
    dtype = accumulation_dtype(arrays[0].dtype)
    rows = [((query[0],), dtype)] * (len(static.out_dims) - 1)
    return [((query[0], value[1]), dtype), *rows]


def forward(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Output ``[T D]``, ``m [T]`` and ``log l [T]`` by a running softmax over key blocks."""

    def start(p: OneHead, row: QueryBlock) -> softmax.State:
        return softmax.start(p.grid.block_q, p.D, p.dtype)

    def step(p: OneHead, row: QueryBlock, tile: Tile, state: softmax.State, buffers: Any) -> Any:
        s = tile.apply(product(tile.q, tile.k, 1, 1), tile.scores)
        return softmax.update(state, s, p.unmasked_values(tile, s), tile.dropout_factor), buffers

    def finish(p: OneHead, row: QueryBlock, state: softmax.State, buffers: Any) -> Any:
        return _write(p, row, buffers, softmax.finish(state, p.sink))

    buffers = zeros(static, result_cores(static, arrays))
    return tuple(over_query_blocks(static, arrays, buffers, Formula(start, step, finish)))


def _write(p: OneHead, row: QueryBlock, buffers: list[Any], results: Any) -> list[Any]:
    window = {0: (row.q0, p.grid.block_q)}
    return [
        MappedArray(buffer, dims, p.head_index).put(x.astype(buffer.dtype), window)
        for buffer, dims, x in zip(buffers, p.static.out_dims, results, strict=True)
    ]


def _normalizer(p: OneHead, row: QueryBlock) -> tuple[jax.Array, jax.Array]:
    """``m [t]`` and ``log l [t]`` of the forward pass, both finite."""
    _, m, log_l = (p.rows(operand, row.q0, p.grid.block_q) for operand in p.rest[:RESULTS])
    return m, finite(log_l)


def _probabilities(s: jax.Array, lse: tuple[jax.Array, jax.Array]) -> jax.Array:
    """``exp(s - lse)``, subtracting ``m`` first, so that large logits lose no digits."""
    m, log_l = lse
    return jnp.exp((s - m[:, None]) - log_l[:, None])


class OperandIndex(NamedTuple):
    """The index of each differentiable operand among the leaves; None if it is absent."""

    query: int
    key: int
    value: int
    score: list[int]  # of each array of the scores
    sink: int | None
    scale: int


def operand_index(static: Static) -> OperandIndex:
    """The index of each differentiable operand among the leaves."""
    numbered = jax.tree.unflatten(static.structure, range(static.structure.num_leaves))
    (query, key, value, score, sink, scale), _ = numbered
    return OperandIndex(query, key, value, jax.tree.leaves(score), sink, scale)


def tangent(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Tangents of output and ``log l``, with ``s`` the logits and a dot for tangents::

        d lse_i = sum_j p_ij ds_ij + p_sink dsink
        d out_i = sum_j p_ij (ds_ij v_j + dv_j) - (d lse_i) out_i

    where ``p`` is recomputed from the lse, and all of ``d lse`` is returned as ``d log l``.
    """
    index = operand_index(static)

    def dot(p: OneHead, which: int | None) -> MappedArray | None:
        """The tangent of an operand; None if it has none."""
        return p.rest[RESULTS + static.wrt.index(which)] if which in static.wrt else None

    def start(p: OneHead, row: QueryBlock) -> Any:
        t = p.grid.block_q
        dq = jnp.zeros_like(row.raw_q)  # of scale * q
        if operand := dot(p, index.query):
            dq = dq + p.scale * p.rows(operand, row.q0, t)
        if operand := dot(p, index.scale):
            dq = dq + operand.cut({}).astype(p.dtype) * row.raw_q
        lse = _normalizer(p, row)
        return dq, lse, jnp.zeros((t,), p.dtype), jnp.zeros((t, p.D), p.dtype)

    def dscores(p: OneHead, row: QueryBlock, tile: Tile) -> list[Any]:
        tangents = []
        for x, which, operand, leaf in zip(
            tile.scores, index.score, p.score_leaves, p.score_axes, strict=True
        ):
            if x_dot := dot(p, which):
                window = p.leaf_window(operand, leaf, row.q0, tile.k0)
                tangents.append(as_tile(x_dot.cut(window), leaf).astype(x.dtype))
            elif jnp.issubdtype(x.dtype, jnp.inexact):
                tangents.append(jnp.zeros_like(x))
            else:
                tangents.append(np.zeros(x.shape, jax.dtypes.float0))
        return tangents

    def step(p: OneHead, row: QueryBlock, tile: Tile, state: Any, buffers: Any) -> Any:
        dq, lse, dlse, weighted = state
        keys = tile.k0, p.grid.block_k
        s0 = product(tile.q, tile.k, 1, 1)
        ds0 = product(zero_rows(tile.visible and tile.visible.queries, dq), tile.k, 1, 1)
        if operand := dot(p, index.key):
            dk = zero_rows(tile.visible and tile.visible.keys, p.rows(operand, *keys))
            ds0 = ds0 + product(tile.q, dk, 1, 1)
        s, ds = jax.jvp(tile.apply, (s0, tile.scores), (ds0, dscores(p, row, tile)))
        prob = _probabilities(s, lse)
        pds = prob * ds
        dropped = (
            (lambda x: x) if tile.dropout_factor is None else (lambda x: x * tile.dropout_factor)
        )
        weighted = weighted + product(dropped(pds), p.unmasked_values(tile, s), 1, 0)
        if operand := dot(p, index.value):
            dv = zero_rows(tile.visible and tile.visible.keys, p.rows(operand, *keys))
            weighted = weighted + product(dropped(prob), dv, 1, 0)
        return (dq, lse, dlse + pds.sum(-1), weighted), buffers

    def finish(p: OneHead, row: QueryBlock, state: Any, buffers: Any) -> Any:
        _, lse, dlse, weighted = state
        out = p.rows(p.rest[0], row.q0, p.grid.block_q)
        if (operand := dot(p, index.sink)) and p.sink is not None:
            dlse = dlse + _probabilities(p.sink, lse)[:, 0] * operand.cut({}).astype(p.dtype)
        return _write(p, row, buffers, (weighted - dlse[:, None] * out, dlse))

    buffers = zeros(static, result_cores(static, arrays))
    return tuple(over_query_blocks(static, arrays, buffers, Formula(start, step, finish)))


def backward(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Cotangents of the operands, with ``do, dlse`` those of output and lse::

        p_ij  = exp(s_ij - lse_i)
        dv_j  = sum_i p_ij do_i
        ds_ij = p_ij (do_i . v_j - delta_i + dlse_i),   delta_i = do_i . out_i
        dq_i  = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i
        dsink = sum_i p_sink,i (dlse_i - delta_i),   dscale = sum_ij ds_ij (q_i . k_j)

    where the vjp of the scores turns ``ds`` into cotangents of ``q . k`` and of their arrays.
    """
    index, wrt = operand_index(static), static.wrt
    dtype = accumulation_dtype(arrays[0].dtype)
    varying = [m for m, which in enumerate(index.score) if which in wrt]

    def add(p: OneHead, buffers: list[Any], which: int | None, x: Any, window: Any) -> list[Any]:
        if which not in wrt:
            return buffers
        at = wrt.index(which)
        result = MappedArray(buffers[at], static.out_dims[at], p.head_index)
        x = x.astype(buffers[at].dtype)
        return [*buffers[:at], result.add(x, window), *buffers[at + 1 :]]

    def start(p: OneHead, row: QueryBlock) -> Any:
        out, _, log_l, do, dlse = (p.rows(operand, row.q0, p.grid.block_q) for operand in p.rest)
        # The output of a fully masked row is constant, so even a NaN cotangent must have no effect.
        dlse = jnp.where(log_l == -jnp.inf, jnp.zeros_like(dlse), dlse)
        delta = jnp.where(out == 0, jnp.zeros_like(out), do * out).sum(-1)
        dq, dscale = jnp.zeros_like(row.raw_q), jnp.zeros((), p.dtype)
        return do, _normalizer(p, row), dlse - delta, dq, dscale

    def step(p: OneHead, row: QueryBlock, tile: Tile, state: Any, buffers: list[Any]) -> Any:
        do, lse, shift, dq, dscale = state
        clean_do = zero_rows(tile.visible and tile.visible.queries, do)

        def logits(s0: Any, *xs: Any) -> Any:
            arrays = list(tile.scores)
            for m, x in zip(varying, xs, strict=True):
                arrays[m] = x
            return tile.apply(s0, arrays)

        s0 = product(tile.q, tile.k, 1, 1)
        s, vjp = jax.vjp(logits, s0, *(tile.scores[m] for m in varying))
        prob = _probabilities(s, lse)
        dp = product(clean_do, p.unmasked_values(tile, s), 1, 1)
        dropped = prob if tile.dropout_factor is None else prob * tile.dropout_factor
        ds = prob * (
            (dp if tile.dropout_factor is None else dp * tile.dropout_factor) + shift[:, None]
        )
        if tile.visible is not None:
            ds = jnp.where(tile.visible.pairs, ds, jnp.zeros_like(ds))
        ds0, *dscores = vjp(ds)
        keys = {1: (tile.k0, p.grid.block_k)}
        if index.value in wrt:
            buffers = add(p, buffers, index.value, product(clean_do, dropped, 0, 0), keys)
        if index.key in wrt:
            buffers = add(p, buffers, index.key, product(tile.q, ds0, 0, 0), keys)
        for m, dscore in zip(varying, dscores, strict=True):
            window = p.leaf_window(p.score_leaves[m], p.score_axes[m], row.q0, tile.k0)
            buffers = add(p, buffers, index.score[m], dscore, window)
        if index.scale in wrt:
            dscale = dscale + (ds0 * product(tile.raw_q, tile.k, 1, 1)).sum()
        return (do, lse, shift, dq + product(ds0, tile.k, 1, 0), dscale), buffers

    def finish(p: OneHead, row: QueryBlock, state: Any, buffers: list[Any]) -> list[Any]:
        _, lse, shift, dq, dscale = state  # dq is the cotangent of scale * q
        buffers = add(p, buffers, index.query, p.scale * dq, {0: (row.q0, p.grid.block_q)})
        if index.scale in wrt:
            buffers = add(p, buffers, index.scale, dscale, {})
        if p.sink is not None and index.sink in wrt:
            dsink = _probabilities(p.sink, lse)[:, 0] * shift
            dsink = dsink if row.own is None else jnp.where(row.own, dsink, jnp.zeros_like(dsink))
            buffers = add(p, buffers, index.sink, dsink.sum(), {})
        return buffers

    # The cotangents of key and value are accumulated as [H S] and [D S], because products with keys
    # as columns are twice as fast as with keys as rows.
    columns = [i for i in wrt if i in (index.key, index.value)]
    cores = []
    for i in wrt:
        core = primitive.core_shape(arrays[i].shape, static.in_dims[i])
        # A score function may have complex arrays.
        is_complex = jnp.issubdtype(arrays[i].dtype, jnp.complexfloating)
        wide = arrays[i].dtype if is_complex else dtype
        cores.append((core[::-1] if i in columns else core, wide))
    buffers = over_query_blocks(static, arrays, zeros(static, cores), Formula(start, step, finish))
    results = []
    for x, i, dims in zip(buffers, wrt, static.out_dims, strict=True):
        if i in columns:
            x = jnp.swapaxes(x, *(axis for axis in range(x.ndim) if axis not in dims))
        results.append(x.astype(arrays[i].dtype))
    return tuple(results)
