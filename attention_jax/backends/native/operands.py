"""Converts the primitive's operands to the kernel's: the role of each array and its mapped axes.

The kernel gets the arrays unchanged, and for each a row of integers: its role, and the axis of the
array for each mapped axis of the call, or -1. It derives strides from these, so ``vmap`` copies
nothing. Only arrays whose last axis is a mapped one are transposed first.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.backends import primitive
from attention_jax.backends.blockwise.loops import Loops
from attention_jax.backends.call import Head
from attention_jax.backends.native.scores import Diagonal
from attention_jax.backends.native.visible import Visible
from attention_jax.backends.primitive import Dims, Static
from attention_jax.core.axes import Shape
from attention_jax.masks.block_map import BlockSchedule
from attention_jax.scores import Bias, Softcap

# Role in frame.h must list the same names in the same order.
Role = enum.IntEnum(
    "Role",
    "QUERY KEY VALUE SCALE SINK BOUNDS POSITIONS QUERY_IDS KEY_IDS KINDS BITS SEED THRESHOLD "
    "KEEP_PROBABILITY EXAMPLE HEAD SOFTCAP BIAS DIAGONAL OUT M LOG_L D_OUT D_LSE "
    "D_QUERY D_KEY D_VALUE D_SCALE D_SINK D_SCORE",
    start=0,
)
SCORES = {Softcap: Role.SOFTCAP, Bias: Role.BIAS, Diagonal: Role.DIAGONAL}


@dataclasses.dataclass(frozen=True)
class Config:
    """The static configuration of the kernel, besides shapes."""

    options: tuple[int, int, int]  # block_k, instructions, few_queries: Options in frame.h
    loops: Loops  # for blockwise, which computes tangents


class Schedule(NamedTuple):
    """The visible pairs in the kernel's form, and the blocks that ``blockwise`` visits."""

    visible: Visible
    loops: BlockSchedule


class Operand(NamedTuple):
    """An array of the kernel."""

    role: Role
    array: Any
    dims: Dims
    score: int = -1  # for the gradient of a score's array: the index of the score


class Result(NamedTuple):
    """A result of the kernel.

    Attributes:
      core: its shape without mapped axes.
      levels: whether the kernel writes each mapped axis; it sums over the others.
      dims: the axes of the returned array; None for a mapped axis that is summed over.
      dtype: of the returned array.
      score: as in ``Operand``.
    """

    role: Role
    core: Shape
    levels: tuple[bool, ...]
    dims: Dims
    dtype: Any
    score: int = -1


def numbered(static: Static) -> tuple[Head, Schedule]:
    """The head and schedule with each array replaced by its index among the operands."""
    count = static.structure.num_leaves
    return primitive.as_head(jax.tree.unflatten(static.structure, range(count)))


def forward_operands(static: Static, arrays: Sequence[Any]) -> list[Operand]:
    """The arrays of a head, as operands of the forward pass."""
    head, schedule = numbered(static)
    found: list[Operand] = []

    def add(role: Role, index: Any, dtype: Any = None) -> None:
        if index is not None:
            x = arrays[index] if dtype is None else arrays[index].astype(dtype)
            found.append(_contiguous(Operand(role, x, static.in_dims[index])))

    add(Role.QUERY, head.query)
    add(Role.KEY, head.key)
    add(Role.VALUE, head.value)
    add(Role.SCALE, head.scale, jnp.float32)
    add(Role.SINK, head.sink, jnp.float32)
    for role, index in zip(list(Role)[Role.BOUNDS : Role.SEED], schedule.visible, strict=True):
        add(role, index)
    if head.dropout is not None:
        add(Role.SEED, head.dropout.seed, jnp.uint32)
        add(Role.THRESHOLD, head.dropout.threshold, jnp.uint32)
        add(Role.KEEP_PROBABILITY, head.dropout.keep_probability, jnp.float32)
        add(Role.EXAMPLE, head.b, jnp.int32)
        add(Role.HEAD, head.n, jnp.int32)
    for score in head.score:
        add(SCORES[type(score)], jax.tree.leaves(score)[0])
    return found


def result_operands(static: Static, arrays: Sequence[Any]) -> list[Operand]:
    """The results of the forward pass and their cotangents, as operands of the backward pass."""
    count = static.structure.num_leaves
    roles = (Role.OUT, Role.M, Role.LOG_L, Role.D_OUT, Role.D_LSE)
    rest = zip(roles, arrays[count:], static.in_dims[count:], strict=True)
    return [_contiguous(Operand(role, x.astype(jnp.float32), dims)) for role, x, dims in rest]


def _contiguous(operand: Operand) -> Operand:
    """The operand, transposed if its last axis is a mapped one."""
    x, dims = operand.array, operand.dims
    mapped = [d for d in dims if d is not None]
    if len(mapped) == x.ndim or x.ndim - 1 not in mapped:
        return operand
    axes = iter(range(len(mapped)))
    x = jnp.moveaxis(x, mapped, range(len(mapped)))
    return operand._replace(array=x, dims=tuple(None if d is None else next(axes) for d in dims))


def group_levels(static: Static) -> tuple[bool, ...]:
    """Whether key and value lack each mapped axis, so that its query heads share them."""
    key, value = static.in_dims[1:3]
    return tuple(k is None and v is None for k, v in zip(key, value, strict=True))


def run(
    target: str, static: Static, operands: list[Operand], results: list[Result]
) -> tuple[Any, ...]:
    """Calls the kernel."""
    levels = static.levels
    layouts = [_written_layout(x, levels) for x in results]
    arguments = [_row(x.role, x.score, x.dims) for x in operands]
    written = [_row(x.role, x.score, dims) for x, (_, dims) in zip(results, layouts, strict=True)]
    call = jax.ffi.ffi_call(
        target, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in layouts]
    )
    found = call(
        *(x.array for x in operands),
        arguments=np.array(arguments, np.int64).reshape(-1),
        results=np.array(written, np.int64).reshape(-1),
        levels=np.array([len(levels), *levels], np.int64),
        options=np.array(static.config.options, np.int64),
    )
    return tuple(
        _as_requested(x, want, dims)
        for x, want, (_, dims) in zip(found, results, layouts, strict=True)
    )


def _row(role: Role, score: int, dims: Dims) -> list[int]:
    return [int(role), score, *(-1 if d is None else d for d in dims)]


def _written_layout(x: Result, levels: Shape) -> tuple[Shape, Dims]:
    """The shape and mapped axes of the array that the kernel writes.

    That is the requested layout if the kernel supports it, else one with the mapped axes first.
    """
    dims = tuple(d if kept else None for d, kept in zip(x.dims, x.levels, strict=True))
    axes = [d for d in dims if d is not None]
    rank = len(axes) + len(x.core)
    if len(axes) == sum(x.levels) and (not x.core or rank - 1 not in axes):
        return primitive.mapped_shape(x.core, dims, levels), dims
    count = iter(range(sum(x.levels)))
    front = tuple(next(count) if kept else None for kept in x.levels)
    return primitive.mapped_shape(x.core, front, levels), front


def _as_requested(x: Any, want: Result, dims: Dims) -> Any:
    """A result of the kernel in the requested layout and dtype."""
    summed = [d for d, w in zip(dims, want.dims, strict=True) if d is not None and w is None]
    kept = [
        (d - sum(s < d for s in summed), w)
        for d, w in zip(dims, want.dims, strict=True)
        if d is not None and w is not None
    ]
    if summed:
        x = x.sum(tuple(summed))
    if any(d != w for d, w in kept):
        x = jnp.moveaxis(x, [d for d, _ in kept], [w for _, w in kept])
    return x.astype(want.dtype)
