"""Mapped axes: those that ``vmap`` adds to arrays, and that a primitive's kernel loops over.

Batch axes and heads are mapped axes too. A mapped axis is called a level, numbered from the
outermost. It is one of the axes of an array, or the array lacks it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from attention_jax.core.axes import Shape

# The axis of an array at each level, outermost first; None if the array lacks the level.
Dims = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Static:
    """The static parameters of a primitive, besides shapes."""

    structure: Any  # of the operands, a pytree (Head, schedule)
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
