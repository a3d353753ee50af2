"""Where the mapped axes of arrays are: what ``vmap`` notes and a primitive's kernel loops over.

Batch axes and heads are mapped axes too. Each is a level, the outermost first; an array has a level
at one of its axes, or not at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from attention_jax.core.axes import Shape

# Where each mapped axis of an array is, outermost first; None: the array does not have it.
Dims = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Static:
    """What a primitive's program depends on, besides shapes."""

    structure: Any  # of the operands, a pytree (Head, schedule)
    config: Any  # the kernel's own
    levels: Shape = ()  # sizes of the mapped axes, outermost first
    in_dims: tuple[Dims, ...] = ()  # one per array
    out_dims: tuple[Dims, ...] = ()  # one per result; None: summed over that axis
    wrt: tuple[int, ...] = ()  # tangent and backward: the operands that vary


def core_shape(shape: Shape, dims: Dims) -> tuple[int, ...]:
    """The shape without the mapped axes."""
    return tuple(n for axis, n in enumerate(shape) if axis not in dims)


def mapped_shape(core: Shape, dims: Dims, levels: Shape) -> Shape:
    """The shape with the mapped axes."""
    rank = len(core) + sum(d is not None for d in dims)
    at = {d: n for d, n in zip(dims, levels, strict=True) if d is not None}
    rest = iter(core)
    return tuple(at[axis] if axis in at else next(rest) for axis in range(rank))
