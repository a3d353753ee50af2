"""From the primitive's operands to the kernel's: what each array is, and where its mapped axes are.

Arrays go to the kernel as they are, with a row of numbers each: its role, and for each mapped axis
of the call which axis of the array that is, or -1. The kernel takes strides from them, so ``vmap``
copies nothing. Only an array whose mapped axes come after its own last axis is transposed first.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
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

# As in frame.h.
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
    """What the kernel's program depends on, besides shapes."""

    options: tuple[int, int, int]  # block_k, instructions, few: as in frame.h
    loops: Loops  # of blockwise, which computes tangents


class Schedule(NamedTuple):
    """The visible pairs for the kernel, and the blocks that blockwise visits."""

    visible: Visible
    loops: BlockSchedule


class Operand(NamedTuple):
    """An array of the kernel."""

    role: Role
    array: Any
    dims: Dims
    score: int = -1  # whose gradient it is


class Result(NamedTuple):
    """A result of the kernel.

    Attributes:
      core: its shape without mapped axes.
      levels: the mapped axes that the kernel writes apart.
      dims: where they are in what is returned; None: summed.
      dtype: of what is returned.
    """

    role: Role
    core: Shape
    levels: tuple[bool, ...]
    dims: Dims
    dtype: Any
    score: int = -1


def numbered(static: Static) -> tuple[Head, Schedule]:
    """The head and schedule with the index of each array in its place."""
    count = static.structure.num_leaves
    return primitive.as_head(jax.tree.unflatten(static.structure, range(count)))


def of_forward(static: Static, arrays: Sequence[Any]) -> list[Operand]:
    """All that a head is, for the kernel."""
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


def of_results(static: Static, arrays: Sequence[Any]) -> list[Operand]:
    """What the backward pass is given besides: the results and their cotangents."""
    count = static.structure.num_leaves
    roles = (Role.OUT, Role.M, Role.LOG_L, Role.D_OUT, Role.D_LSE)
    rest = zip(roles, arrays[count:], static.in_dims[count:], strict=True)
    return [_contiguous(Operand(role, x.astype(jnp.float32), dims)) for role, x, dims in rest]


def _contiguous(operand: Operand) -> Operand:
    """The same with its own last axis last."""
    x, dims = operand.array, operand.dims
    mapped = [d for d in dims if d is not None]
    if len(mapped) == x.ndim or x.ndim - 1 not in mapped:
        return operand
    places = iter(range(len(mapped)))
    x = jnp.moveaxis(x, mapped, range(len(mapped)))
    return operand._replace(array=x, dims=tuple(None if d is None else next(places) for d in dims))


def groups(static: Static) -> tuple[bool, ...]:
    """Which mapped axes query heads that share their keys have alone."""
    key, value = static.in_dims[1:3]
    return tuple(k is None and v is None for k, v in zip(key, value, strict=True))


def run(
    target: str, static: Static, operands: list[Operand], results: list[Result]
) -> tuple[Any, ...]:
    """Calls the kernel."""
    levels = static.levels
    laid_out = [_laid_out(x, levels) for x in results]
    arguments = [_row(x.role, x.score, x.dims) for x in operands]
    written = [_row(x.role, x.score, dims) for x, (_, dims) in zip(results, laid_out, strict=True)]
    call = jax.ffi.ffi_call(
        target, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in laid_out]
    )
    found = call(
        *(x.array for x in operands),
        arguments=np.array(arguments, np.int64).reshape(-1),
        results=np.array(written, np.int64).reshape(-1),
        levels=np.array([len(levels), *levels], np.int64),
        options=np.array(static.config.options, np.int64),
    )
    return tuple(
        _returned(x, want, dims)
        for x, want, (_, dims) in zip(found, results, laid_out, strict=True)
    )


def _row(role: Role, score: int, dims: Dims) -> list[int]:
    return [int(role), score, *(-1 if d is None else d for d in dims)]


def _laid_out(x: Result, levels: Shape) -> tuple[Shape, Dims]:
    """The shape that the kernel writes, and where the mapped axes are: as returned if it can be."""
    here = tuple(d if kept else None for d, kept in zip(x.dims, x.levels, strict=True))
    places = [d for d in here if d is not None]
    rank = len(places) + len(x.core)
    if len(places) == sum(x.levels) and (not x.core or rank - 1 not in places):
        return primitive.mapped_shape(x.core, here, levels), here
    count = iter(range(sum(x.levels)))
    front = tuple(next(count) if kept else None for kept in x.levels)
    return primitive.mapped_shape(x.core, front, levels), front


def _returned(x: Any, want: Result, dims: Dims) -> Any:
    """A result in the layout that is wanted."""
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


def as_loops(static: Static, arrays: Sequence[Any]) -> tuple[Static, tuple[Any, ...]]:
    """The same operands with the blocks that ``blockwise`` visits."""
    count = static.structure.num_leaves
    head, schedule = numbered(static)
    order, structure = jax.tree.flatten(primitive.operands(head, schedule.loops))
    in_dims = tuple(static.in_dims[i] for i in order) + static.in_dims[count:]
    static = dataclasses.replace(
        static, structure=structure, config=static.config.loops, in_dims=in_dims
    )
    return static, (*(arrays[i] for i in order), *arrays[count:])


def looped(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of blockwise's operands as one of the kernel's."""

    def wrapped(static: Static, *arrays: Any) -> Any:
        static, arrays = as_loops(static, arrays)
        return run(static, *arrays)

    return wrapped
