"""Batches heads with small tiles into one product.

The loops compute one head at a time. A large tile is enough work for all cores, but for small tiles
the overhead of the loop dominates. With few queries and many keys, time is bound by reading the
keys: query heads that share their keys are batched and read them once, other heads are not, because
batching would first copy their keys next to each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.export

from attention_jax.backends.primitive import Dims, Static

Run = Callable[..., tuple[Any, ...]]  # (static, *arrays) -> arrays


def batched(run: Run) -> Run:
    """``run`` under ``vmap`` over the innermost mapped axes, up to ``batched_heads`` heads.

    Only over axes that the schedule lacks: under ``vmap``, all heads must visit the same blocks.
    """

    def wrapped(static: Static, *arrays: Any) -> tuple[Any, ...]:
        return _innermost(run, static, arrays, static.config.batched_heads)

    return wrapped


def _innermost(run: Run, static: Static, arrays: tuple[Any, ...], limit: int) -> tuple[Any, ...]:
    if not static.levels or limit < 2:
        return run(static, *arrays)
    count = static.structure.num_leaves
    must_share = static.in_dims[count - 3 : count]  # the schedule
    if static.config.only_shared_keys:
        must_share += static.in_dims[1:3]  # key and value
    if any(dims[-1] is not None for dims in must_share):
        return run(static, *arrays)
    size = static.levels[-1]
    if jax.export.is_symbolic_dim(size):
        return run(static, *arrays)
    if size > limit:
        limit = next(n for n in range(limit, 0, -1) if size % n == 0)
        return _split(run, static, arrays, limit) if limit > 1 else run(static, *arrays)
    inner = dataclasses.replace(
        static,
        levels=static.levels[:-1],
        in_dims=tuple(_without_last(dims) for dims in static.in_dims),
        out_dims=tuple(_without_last(dims) for dims in static.out_dims),
    )
    outs = [dims[-1] for dims in static.out_dims]
    results = jax.vmap(
        lambda *xs: _innermost(run, inner, xs, limit // size),
        in_axes=[dims[-1] for dims in static.in_dims],
        out_axes=tuple(o or 0 for o in outs),
        axis_size=size,
    )(*arrays)
    return tuple(x.sum(0) if o is None else x for x, o in zip(results, outs, strict=True))


def _split(run: Run, static: Static, arrays: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """Splits the innermost mapped axis into two, the inner one of ``size``."""

    def split(dims: Dims) -> Dims:
        *rest, last = dims
        if last is None:
            return (*rest, None, None)
        return (*(d + 1 if d is not None and d > last else d for d in rest), last, last + 1)

    def reshape(x: Any, dims: Dims) -> Any:
        d = dims[-1]
        return x if d is None else x.reshape(*x.shape[:d], -1, size, *x.shape[d + 1 :])

    def join(x: Any, dims: Dims) -> Any:
        d = dims[-1]
        return x if d is None else x.reshape(*x.shape[:d], -1, *x.shape[d + 2 :])

    finer = dataclasses.replace(
        static,
        levels=(*static.levels[:-1], static.levels[-1] // size, size),
        in_dims=tuple(split(dims) for dims in static.in_dims),
        out_dims=tuple(split(dims) for dims in static.out_dims),
    )
    cut = [reshape(x, dims) for x, dims in zip(arrays, static.in_dims, strict=True)]
    results = _innermost(run, finer, tuple(cut), size)
    return tuple(join(x, dims) for x, dims in zip(results, static.out_dims, strict=True))


def _without_last(dims: Dims) -> Dims:
    """The mapped axes after the innermost one is removed."""
    *rest, last = dims
    return tuple(d - 1 if d is not None and last is not None and d > last else d for d in rest)
