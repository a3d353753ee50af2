"""The kernels of ``pallas_gpu``: the formulas of ``blockwise``, each for one block of one head.

Three kernels, each a fold over the tiles that the mask leaves: ``forward`` and ``rows`` (cotangents
of a block of queries) walk through the key blocks that the queries see, ``columns`` (of a block of
keys) through the query blocks that see the keys. So each result is written by one program, in one
order: no atomics, the same bits each time. Full blocks do no mask work, empty ones are not visited.

Source: Dao 2023, "FlashAttention-2".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.backends.pallas_gpu.refs import Refs, RefView, Tile, padded, product
from attention_jax.backends.tile import rows_or_zero
from attention_jax.core.softmax import finite


def over_blocks(visits: Any, i: Any, step: Callable[[Any, bool, Any], Any], carry: Any) -> Any:
    """Folds ``step(block, masked, carry)`` over what block ``i`` visits, full blocks first.

    A full block lies within the arrays: one that the length does not fill counts as partial.
    """
    index, full, visited = visits
    count, end = full.entry(i), visited.entry(i)
    carry = lax.fori_loop(np.int32(0), count, lambda m, x: step(index.entry(i, m), False, x), carry)
    return lax.fori_loop(count, end, lambda m, x: step(index.entry(i, m), True, x), carry)


def forward(p: Refs, i: Any, out: RefView, m: RefView, log_l: RefView) -> None:
    """A running softmax over the keys that block ``i`` of queries sees (see ``softmax``)."""
    t, s = p.config.forward[:2]
    q0 = i * t
    q = p.rows(p.head.query, q0, t)

    def step(j: Any, masked: bool, state: Any) -> Any:
        largest, total, weighted = state
        k, v = (p.rows(x, j * s, s, inside=not masked) for x in (p.head.key, p.head.value))
        tile = p.tile(q, k, q0, j * s, masked=masked)
        new = jnp.maximum(largest, tile.s.max(1))
        shift = finite(new)
        e, shrink = jnp.exp(tile.s - shift[:, None]), jnp.exp(largest - shift)
        total = total * shrink + e.sum(1)
        e = e if tile.kept is None else e * tile.kept
        v = rows_or_zero(tile.seen and tile.seen.keys, v)
        weighted = weighted * shrink[:, None] + product(e.astype(v.dtype), v, 1, 0)
        return new, total, weighted

    start = (
        jnp.full((t,), -jnp.inf, jnp.float32),
        jnp.zeros((t,), jnp.float32),
        jnp.zeros((t, padded(p.D)), jnp.float32),
    )
    largest, total, weighted = over_blocks(p.visits.forward, i, step, start)
    if p.sink is not None:
        new = jnp.maximum(largest, p.sink)
        shrink = jnp.exp(largest - finite(new))
        total, weighted = total * shrink + jnp.exp(p.sink - finite(new)), weighted * shrink[:, None]
        largest = new
    empty = total == 0
    safe = jnp.where(empty, jnp.ones_like(total), total)
    p.put(out, weighted / safe[:, None], q0, t)
    p.put(m, finite(largest), q0, t)
    p.put(log_l, jnp.where(empty, -jnp.inf, jnp.log(safe)), q0, t)


class Gradients(NamedTuple):
    """Of one tile: ``p`` times what dropout keeps, and ``ds`` times the tile's slope."""

    dropped: jax.Array
    ds: jax.Array


def gradients(
    tile: Tile, v: jax.Array, do: jax.Array, m: jax.Array, log_l: jax.Array, shift: jax.Array
) -> Gradients:
    """``p_ij = exp(s_ij - lse_i)``, ``ds_ij = p_ij (do_i . v_j - delta_i + dlse_i)``."""
    prob = jnp.exp((tile.s - m[:, None]) - log_l[:, None])
    dp = product(do, v, 1, 1)
    dropped = prob if tile.kept is None else prob * tile.kept
    ds = prob * ((dp if tile.kept is None else dp * tile.kept) + shift[:, None])
    if tile.slope is not None:
        ds = ds * tile.slope
    return Gradients(dropped, ds if tile.seen is None else jnp.where(tile.seen.pairs, ds, 0.0))


def rows(
    p: Refs,
    i: Any,
    shift: RefView,
    dq: RefView | None,
    dscale: RefView | None,
    dsink: RefView | None,
) -> None:
    """``shift_i = dlse_i - delta_i`` of block ``i`` of queries, then what its rows add up to::

    dq_i = scale sum_j ds_ij k_j,   dscale = sum_ij ds_ij (q_i . k_j)
    dsink = sum_i p_sink,i shift_i
    """
    t, s = p.config.backward[:2]
    q0 = i * t
    out, m, log_l, do, dlse = (p.rows(x, q0, t) for x in p.rest)
    # A row that sees nothing has no gradient, whatever its cotangent holds: its output is 0.
    dlse = jnp.where(log_l == -jnp.inf, jnp.zeros_like(dlse), dlse)
    delta = jnp.where(out == 0, jnp.zeros_like(out), do * out).sum(1)
    change, log_l = dlse - delta, finite(log_l)
    p.put(shift, change, q0, t)
    if p.sink is not None and dsink is not None:
        inside = q0 + jnp.arange(t, dtype=jnp.int32) < p.T
        part = jnp.exp((p.sink - m) - log_l) * change
        dsink.put_entry(jnp.where(inside, part, jnp.zeros_like(part)).sum(), i)
    if dq is None and dscale is None:
        return
    q = p.rows(p.head.query, q0, t)

    def step(j: Any, masked: bool, state: Any) -> Any:
        sum_q, sum_scale = state
        k, v = (p.rows(x, j * s, s, inside=not masked) for x in (p.head.key, p.head.value))
        tile = p.tile(q, k, q0, j * s, masked=masked, slope=True)
        k, v = (rows_or_zero(tile.seen and tile.seen.keys, x) for x in (k, v))
        clean_do = rows_or_zero(tile.seen and tile.seen.queries, do).astype(v.dtype)
        ds = gradients(tile, v, clean_do, m, log_l, change).ds
        dot = tile.dot if tile.seen is None else jnp.where(tile.seen.pairs, tile.dot, 0.0)
        return sum_q + product(ds.astype(k.dtype), k, 1, 0), sum_scale + (ds * dot).sum(1)

    start = jnp.zeros(q.shape, jnp.float32), jnp.zeros((t,), jnp.float32)
    sum_q, sum_scale = over_blocks(p.visits.rows, i, step, start)
    if dq is not None:
        p.put(dq, p.scale * sum_q, q0, t)
    if dscale is not None:
        dscale.put_entry(sum_scale.sum(), i)


class Heads(NamedTuple):
    """The heads of examples that one program sees: those that share what it writes, often one."""

    size: int
    at: Callable[[Any], Refs]  # by its number

    @property
    def first(self) -> Refs:
        """The only one, or any where it does not matter which."""
        return self.at(np.int32(0))

    def fold(self, step: Callable[[Refs, Any], Any], carry: Any) -> Any:
        """``step(head, carry)`` over all of them."""
        return lax.fori_loop(
            np.int32(0), np.int32(self.size), lambda g, x: step(self.at(g), x), carry
        )


def columns(heads: Heads, j: Any, dk: RefView | None, dv: RefView | None) -> None:
    """What block ``j`` of keys gets from all queries that see it, of all heads that share it::

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
            seen = tile.seen
            q = rows_or_zero(seen and seen.queries, q)
            do = rows_or_zero(seen and seen.queries, do).astype(v.dtype)
            clean_v = rows_or_zero(seen and seen.keys, v)
            dropped, ds = gradients(tile, clean_v, do, m, finite(log_l), shift)
            return (
                sum_k + p.scale * product(ds.astype(q.dtype), q, 0, 0),
                sum_v + product(dropped.astype(v.dtype), do, 0, 0),
            )

        return over_blocks(p.visits.columns, j, step, state)

    start = tuple(jnp.zeros((s, padded(width)), jnp.float32) for width in (first.H, first.D))
    sum_k, sum_v = heads.fold(of_head, start)
    for view, x in ((dk, sum_k), (dv, sum_v)):
        if view is not None:
            first.put(view, x, k0, s)


def pairs(heads: Heads, i: Any, j: Any, leaf: int, out: RefView, *, number: bool) -> None:
    """What an array of the scores gets from one tile, of all heads that share it::

        dx_ij = ds_ij (d s_ij / d x_ij)

    Args:
      i, j: which block of queries, and of keys.
      leaf: which array of the scores.
      number: it is a number, which gets the sum; else it has an entry for each pair.
    """
    t, s = heads.first.config.backward[:2]
    q0, k0 = i * t, j * s

    def of_head(p: Refs, total: jax.Array) -> jax.Array:
        k, v = (p.rows(x, k0, s) for x in (p.head.key, p.head.value))
        q, _, m, log_l, do, _, shift = (p.rows(x, q0, t) for x in (p.head.query, *p.rest))
        tile = p.tile(q, k, q0, k0, masked=True, slope=True, leaf=leaf)
        do = rows_or_zero(tile.seen and tile.seen.queries, do).astype(v.dtype)
        v = rows_or_zero(tile.seen and tile.seen.keys, v)
        return total + gradients(tile, v, do, m, finite(log_l), shift).ds

    total = heads.fold(of_head, jnp.zeros((t, s), jnp.float32))
    if number:
        out.put_entry(total.sum(), i, j)
    else:
        out.store(total, (q0, t), (k0, s))
