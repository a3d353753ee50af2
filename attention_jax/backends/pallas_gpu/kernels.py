"""The kernels of ``pallas_gpu``: the formulas of ``blockwise``, each for one block of one head.

``forward``, and ``rows`` for the cotangents of a block of queries, fold over the key blocks that
the queries attend to; ``columns``, for those of a block of keys, folds over the query blocks that
attend to the keys. Each result is written by a single program, so there are no atomics and results
are deterministic. Full blocks are not masked, and empty ones are not visited.

Source: Dao 2023, "FlashAttention-2".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.backends.pallas_gpu.refs import MappedRef, PairTile, Refs, padded, product
from attention_jax.core.softmax import finite, zero_rows


def over_blocks(schedule: Any, i: Any, step: Callable[[Any, bool, Any], Any], carry: Any) -> Any:
    """Folds ``step(block, masked, carry)`` over the blocks that block ``i`` visits, full first.

    Full blocks lie within the arrays, because a last block that extends beyond them is partial.
    """
    index, full, visited = schedule
    count, end = full.entry(i), visited.entry(i)
    carry = lax.fori_loop(np.int32(0), count, lambda m, x: step(index.entry(i, m), False, x), carry)
    return lax.fori_loop(count, end, lambda m, x: step(index.entry(i, m), True, x), carry)


def forward(p: Refs, i: Any, out: MappedRef, m: MappedRef, log_l: MappedRef) -> None:
    """A running softmax over the keys that block ``i`` of queries attends to (see ``softmax``)."""
    t, s = p.config.forward[:2]
    q0 = i * t
    q = p.rows(p.head.query, q0, t)

    def step(j: Any, masked: bool, state: Any) -> Any:
        largest, total, weighted = state
        k, v = (p.rows(x, j * s, s, inside=not masked) for x in (p.head.key, p.head.value))
        tile = p.tile(q, k, q0, j * s, masked=masked)
        new = jnp.maximum(largest, tile.s.max(1))
        shift = finite(new)
        e, rescale = jnp.exp(tile.s - shift[:, None]), jnp.exp(largest - shift)
        total = total * rescale + e.sum(1)
        e = e if tile.dropout_factor is None else e * tile.dropout_factor
        v = zero_rows(tile.visible and tile.visible.keys, v)
        weighted = weighted * rescale[:, None] + product(e.astype(v.dtype), v, 1, 0)
        return new, total, weighted

    start = (
        jnp.full((t,), -jnp.inf, jnp.float32),
        jnp.zeros((t,), jnp.float32),
        jnp.zeros((t, padded(p.D)), jnp.float32),
    )
    largest, total, weighted = over_blocks(p.schedules.forward, i, step, start)
    if p.sink is not None:
        new = jnp.maximum(largest, p.sink)
        rescale = jnp.exp(largest - finite(new))
        total, weighted = (
            total * rescale + jnp.exp(p.sink - finite(new)),
            weighted * rescale[:, None],
        )
        largest = new
    empty = total == 0
    safe = jnp.where(empty, jnp.ones_like(total), total)
    p.put(out, weighted / safe[:, None], q0, t)
    p.put(m, finite(largest), q0, t)
    p.put(log_l, jnp.where(empty, -jnp.inf, jnp.log(safe)), q0, t)


class Gradients(NamedTuple):
    """Of one tile: ``p`` after dropout, and ``ds`` times the tile's slope."""

    dropped: jax.Array
    ds: jax.Array


def gradients(
    tile: PairTile, v: jax.Array, do: jax.Array, m: jax.Array, log_l: jax.Array, shift: jax.Array
) -> Gradients:
    """``p_ij = exp(s_ij - lse_i)``, ``ds_ij = p_ij (do_i . v_j - delta_i + dlse_i)``."""
    prob = jnp.exp((tile.s - m[:, None]) - log_l[:, None])
    dp = product(do, v, 1, 1)
    dropped = prob if tile.dropout_factor is None else prob * tile.dropout_factor
    ds = prob * ((dp if tile.dropout_factor is None else dp * tile.dropout_factor) + shift[:, None])
    if tile.slope is not None:
        ds = ds * tile.slope
    return Gradients(
        dropped, ds if tile.visible is None else jnp.where(tile.visible.pairs, ds, 0.0)
    )


def rows(
    p: Refs,
    i: Any,
    shift: MappedRef,
    dq: MappedRef | None,
    dscale: MappedRef | None,
    dsink: MappedRef | None,
) -> None:
    """``shift_i = dlse_i - delta_i`` of block ``i`` of queries, and the sums over its rows::

    dq_i = scale sum_j ds_ij k_j,   dscale = sum_ij ds_ij (q_i . k_j)
    dsink = sum_i p_sink,i shift_i
    """
    t, s = p.config.backward[:2]
    q0 = i * t
    out, m, log_l, do, dlse = (p.rows(x, q0, t) for x in p.rest)
    # The output of a fully masked row is constant, so even a NaN cotangent must have no effect.
    dlse = jnp.where(log_l == -jnp.inf, jnp.zeros_like(dlse), dlse)
    delta = jnp.where(out == 0, jnp.zeros_like(out), do * out).sum(1)
    change, log_l = dlse - delta, finite(log_l)
    p.put(shift, change, q0, t)
    if p.sink is not None and dsink is not None:
        inside = q0 + jnp.arange(t, dtype=jnp.int32) < p.T
        per_row = jnp.exp((p.sink - m) - log_l) * change
        dsink.put_entry(jnp.where(inside, per_row, jnp.zeros_like(per_row)).sum(), i)
    if dq is None and dscale is None:
        return
    q = p.rows(p.head.query, q0, t)

    def step(j: Any, masked: bool, state: Any) -> Any:
        sum_q, sum_scale = state
        k, v = (p.rows(x, j * s, s, inside=not masked) for x in (p.head.key, p.head.value))
        tile = p.tile(q, k, q0, j * s, masked=masked, slope=True)
        k, v = (zero_rows(tile.visible and tile.visible.keys, x) for x in (k, v))
        clean_do = zero_rows(tile.visible and tile.visible.queries, do).astype(v.dtype)
        ds = gradients(tile, v, clean_do, m, log_l, change).ds
        dot = tile.dot if tile.visible is None else jnp.where(tile.visible.pairs, tile.dot, 0.0)
        return sum_q + product(ds.astype(k.dtype), k, 1, 0), sum_scale + (ds * dot).sum(1)

    start = jnp.zeros(q.shape, jnp.float32), jnp.zeros((t,), jnp.float32)
    sum_q, sum_scale = over_blocks(p.schedules.rows, i, step, start)
    if dq is not None:
        p.put(dq, p.scale * sum_q, q0, t)
    if dscale is not None:
        dscale.put_entry(sum_scale.sum(), i)


class Heads(NamedTuple):
    """The heads of one program: all that share the result it writes, often only one."""

    size: int
    at: Callable[[Any], Refs]  # from the index of a head

    @property
    def first(self) -> Refs:
        """The first head, which is the only one if results are not shared."""
        return self.at(np.int32(0))

    def fold(self, step: Callable[[Refs, Any], Any], carry: Any) -> Any:
        """Folds ``step(head, carry)`` over all heads."""
        return lax.fori_loop(
            np.int32(0), np.int32(self.size), lambda g, x: step(self.at(g), x), carry
        )


def columns(heads: Heads, j: Any, dk: MappedRef | None, dv: MappedRef | None) -> None:
    """Cotangents of block ``j`` of keys and values, summed over the heads that share it::

    dv_j = sum_i p_ij do_i,   dk_j = scale sum_i ds_ij q_i
    """
    first = heads.first
    t, s = first.config.backward[:2]
    k0 = j * s

    def of_head(p: Refs, state: Any) -> Any:
        k, v = (p.rows(x, k0, s) for x in (p.head.key, p.head.value))

        def step(i: Any, masked: bool, state: Any) -> Any:
            sum_k, sum_v = state
            operands = (p.head.query, *p.rest)
            q, _, m, log_l, do, _, shift = (
                p.rows(x, i * t, t, inside=not masked) for x in operands
            )
            tile = p.tile(q, k, i * t, k0, masked=masked, slope=True)
            visible = tile.visible
            q = zero_rows(visible and visible.queries, q)
            do = zero_rows(visible and visible.queries, do).astype(v.dtype)
            clean_v = zero_rows(visible and visible.keys, v)
            dropped, ds = gradients(tile, clean_v, do, m, finite(log_l), shift)
            return (
                sum_k + p.scale * product(ds.astype(q.dtype), q, 0, 0),
                sum_v + product(dropped.astype(v.dtype), do, 0, 0),
            )

        return over_blocks(p.schedules.columns, j, step, state)

    start = tuple(jnp.zeros((s, padded(width)), jnp.float32) for width in (first.H, first.D))
    sum_k, sum_v = heads.fold(of_head, start)
    for out, x in ((dk, sum_k), (dv, sum_v)):
        if out is not None:
            first.put(out, x, k0, s)


def pairs(heads: Heads, i: Any, j: Any, leaf: int, out: MappedRef, *, number: bool) -> None:
    """The cotangent of an array of the scores in one tile, summed over the heads that share it::

        dx_ij = ds_ij (d s_ij / d x_ij)

    Args:
      i, j: indices of the blocks of queries and keys.
      leaf: index among the arrays of the scores.
      number: whether the array is a scalar, whose cotangent is a sum over the tile; else it has one
        entry per pair.
    """
    t, s = heads.first.config.backward[:2]
    q0, k0 = i * t, j * s

    def of_head(p: Refs, total: jax.Array) -> jax.Array:
        k, v = (p.rows(x, k0, s) for x in (p.head.key, p.head.value))
        q, _, m, log_l, do, _, shift = (p.rows(x, q0, t) for x in (p.head.query, *p.rest))
        tile = p.tile(q, k, q0, k0, masked=True, slope=True, leaf=leaf)
        do = zero_rows(tile.visible and tile.visible.queries, do).astype(v.dtype)
        v = zero_rows(tile.visible and tile.visible.keys, v)
        return total + gradients(tile, v, do, m, finite(log_l), shift).ds

    total = heads.fold(of_head, jnp.zeros((t, s), jnp.float32))
    if number:
        out.put_entry(total.sum(), i, j)
    else:
        out.store(total, (q0, t), (k0, s))
