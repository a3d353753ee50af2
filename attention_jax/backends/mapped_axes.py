"""Mapped axes: those that ``vmap`` adds to arrays, and that a primitive's kernel loops over.

Batch axes and heads are mapped axes too. A mapped axis is called a level, numbered from the
outermost. It is one of the axes of an array, or the array lacks it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef

from attention_jax.core.axes import AnyArray, Shape
from attention_jax.core.compat import Primitive

# The axis of an array at each level, outermost first; None if the array lacks the level.
Dims = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Static:
    """The static parameters of a primitive, besides shapes."""

    structure: PyTreeDef  # of the operands, see primitive.operands
    config: Any  # the kernel's own
    levels: Shape = ()  # sizes of the mapped axes, outermost first
    in_dims: tuple[Dims, ...] = ()  # one per array
    out_dims: tuple[Dims, ...] = ()  # one per result; None: the result is summed over that level
    wrt: tuple[int, ...] = ()  # in tangent and backward: the operands to differentiate


def core_shape(shape: Shape, dims: Dims) -> tuple[int, ...]:
    """The shape without the mapped axes."""
    return tuple(n for axis, n in enumerate(shape) if axis not in dims)


def mapped_shape(core: Shape, dims: Dims, levels: Shape) -> Shape:
    """The shape with the mapped axes."""
    rank = len(core) + sum(d is not None for d in dims)
    at = {d: n for d, n in zip(dims, levels, strict=True) if d is not None}
    rest = iter(core)
    return tuple(at[axis] if axis in at else next(rest) for axis in range(rank))


# --- The vmap rules of primitives: they only record the new axis.

Batched: TypeAlias = tuple[Sequence[jax.Array], list[int]]  # results, and the new axis of each


def batch_results(
    primitive: Primitive, args: Sequence[AnyArray], dims: Dims, *, static: Static
) -> Batched:
    """Batches forward or tangent; the new axis of a result is that of the query."""
    axis = dims[0] if dims[0] is not None else 0
    # m and log_l have one axis less than the query.
    ranks = (sum(d is not None for d in out) for out in static.out_dims)
    axes = [min(axis, (2 if i == 0 else 1) + rank) for i, rank in enumerate(ranks)]
    return _batch(primitive, args, dims, axes, static)


def batch_cotangents(
    primitive: Primitive, args: Sequence[AnyArray], dims: Dims, *, static: Static
) -> Batched:
    """Batches backward; the new axis of a cotangent is that of its operand."""
    axes = [dims[i] or 0 for i in static.wrt]
    return _batch(primitive, args, dims, axes, static)


def _batch(
    primitive: Primitive, args: Sequence[AnyArray], dims: Dims, axes: list[int], static: Static
) -> Batched:
    """Records a new mapped axis: ``dims`` of the operands and ``axes`` of the results."""
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    static = dataclasses.replace(
        static,
        levels=(size, *static.levels),
        in_dims=tuple(_insert(d, old) for d, old in zip(dims, static.in_dims, strict=True)),
        out_dims=tuple(_insert(a, old) for a, old in zip(axes, static.out_dims, strict=True)),
    )
    return primitive.bind(*args, static=static), axes


def _insert(new: int | None, old: Dims) -> Dims:
    """``old`` after a mapped axis is inserted at ``new``, which becomes the outermost level."""
    if new is None:
        return (None, *old)
    return (new, *(d + 1 if d is not None and d >= new else d for d in old))


def vmapped(
    fn: Callable[..., Sequence[jax.Array]], static: Static
) -> Callable[..., tuple[jax.Array, ...]]:
    """``fn(static, *arrays)`` of one head, mapped over all levels by ``jax.vmap``."""

    def run(*arrays: AnyArray) -> tuple[jax.Array, ...]:
        mapped: Callable[..., tuple[jax.Array, ...]] = lambda *xs: tuple(fn(static, *xs))  # noqa: E731
        dims = static.in_dims
        in_axes = []
        for _ in static.levels:
            in_axes.append(tuple(d[0] for d in dims))
            dims = tuple(map(_without_first, dims))
        for axes, size in reversed(list(zip(in_axes, static.levels, strict=True))):
            mapped = jax.vmap(mapped, in_axes=axes, out_axes=0, axis_size=size)
        results = []
        for x, dims_of_x in zip(mapped(*arrays), static.out_dims, strict=True):
            x = x.sum(tuple(i for i, d in enumerate(dims_of_x) if d is None))
            kept = [d for d in dims_of_x if d is not None]
            results.append(jnp.moveaxis(x, range(len(kept)), kept))
        return tuple(results)

    return run


def _without_first(dims: Dims) -> Dims:
    """The mapped axes after the outermost one is removed."""
    first, *rest = dims
    return tuple(d - 1 if d is not None and first is not None and d > first else d for d in rest)
