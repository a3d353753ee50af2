"""Launches the kernels, forward and backward, for all heads of all examples.

Heads and batch axes are mapped axes of one primitive (see ``primitive``). Here they become the
grid, or, for heads that share a result, a loop inside a program of the grid. The loops of
``blockwise`` compute tangents, and the cotangents of tables, to which many programs would add.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from attention_jax.backends import primitive
from attention_jax.backends.blockwise import formulas
from attention_jax.backends.blockwise.loops import Loops, loop_operands, unravel
from attention_jax.backends.blockwise.run import KERNEL
from attention_jax.backends.pallas_gpu import kernels
from attention_jax.backends.pallas_gpu.kernels import Heads
from attention_jax.backends.pallas_gpu.refs import MappedRef, Refs
from attention_jax.backends.primitive import RESULTS, Dims, Static
from attention_jax.backends.tile import local_axes
from attention_jax.core.compat import triton
from attention_jax.core.pytree import leaves
from attention_jax.masks import block_map
from attention_jax.masks.grid import Grid


class Tiles(NamedTuple):
    """Tile sizes of a kernel, warps per program, and stages of its load pipeline."""

    block_q: int
    block_k: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Launches:
    """The static configuration of the kernels, besides shapes."""

    forward: Tiles
    backward: Tiles
    loops: Loops  # for blockwise, which computes tangents
    interpret: bool


class Schedules(NamedTuple):
    """The blocks that each kernel visits, for each block of queries, or of keys."""

    forward: block_map.BlockSchedule
    rows: block_map.BlockSchedule
    columns: block_map.BlockSchedule
    loops: block_map.BlockSchedule


class Result(NamedTuple):
    """An array that a kernel writes: its shape without mapped axes, dtype and mapped axes."""

    core: tuple[int, ...]
    dtype: Any
    dims: Dims


def launch(
    static: Static,
    arrays: tuple[Any, ...],
    results: list[Result],
    kernel: Callable[..., None],
    count: int,
    tiles: Tiles,
    inner: tuple[int, ...] = (),
) -> list[jax.Array]:
    """Runs ``kernel(heads, block, *results)`` for ``count`` blocks of every head of every example.

    Args:
      inner: mapped axes that are not part of the grid: a program loops over the heads along them.
    """
    outer = tuple(level for level in range(len(static.levels)) if level not in inner)
    outer_sizes, inner_sizes = (
        tuple(static.levels[level] for level in levels) for levels in (outer, inner)
    )

    def body(*refs: Any) -> None:
        program = pl.program_id(0)
        block, outer_index = lax.rem(program, np.int32(count)), lax.div(program, np.int32(count))
        outer_indices = dict(zip(outer, unravel(outer_index, outer_sizes), strict=True))

        def head_index(g: Any) -> tuple[Any, ...]:
            at = outer_indices | dict(zip(inner, unravel(g, inner_sizes), strict=True))
            return tuple(at[level] for level in range(len(static.levels)))

        outs = [
            MappedRef(ref, result.dims, head_index(np.int32(0)))
            for ref, result in zip(refs[len(arrays) :], results, strict=True)
        ]
        heads = Heads(
            math.prod(inner_sizes), lambda g: Refs(static, refs[: len(arrays)], head_index(g))
        )
        kernel(heads, block, *outs)

    shapes = [
        jax.ShapeDtypeStruct(primitive.mapped_shape(r.core, r.dims, static.levels), r.dtype)
        for r in results
    ]
    outs = pl.pallas_call(
        body,
        grid=(count * math.prod(outer_sizes),),
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=static.config.interpret,
        name="attention",
    )(*arrays)
    return list(outs)


def forward(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Output ``[T D]``, ``m [T]`` and ``log l [T]``."""
    tiles: Tiles = static.config.forward
    cores = formulas.result_cores(static, arrays)
    results = [Result(*core, dims) for core, dims in zip(cores, static.out_dims, strict=True)]
    count = -(-cores[0][0][0] // tiles.block_q)

    def kernel(heads: Heads, i: Any, *outs: MappedRef) -> None:
        kernels.forward(heads.first, i, *outs)

    return tuple(launch(static, arrays, results, kernel, count, tiles))


def backward(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """The cotangents of the operands that vary, in their order."""
    index = formulas.operand_index(static)
    shift, found = _rows(static, arrays, index)
    found |= _cotangents_by_loops(static, arrays, index)
    levels = tuple(range(len(static.levels)))
    static = dataclasses.replace(static, in_dims=(*static.in_dims, levels))
    arrays = (*arrays, shift)
    found |= _columns(static, arrays, index)
    for leaf, i in enumerate(index.score):
        if i in static.wrt and _has_pairs(static, arrays, index, leaf):
            found[i] = _pairs(static, arrays, index, leaf)
    return tuple(found[i] for i in static.wrt)


def _rows(
    static: Static, arrays: tuple[Any, ...], index: formulas.OperandIndex
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """``shift`` with all mapped axes first, and the cotangents of query, scale and sink."""
    levels = tuple(range(len(static.levels)))
    tiles: Tiles = static.config.backward
    T = primitive.core_shape(arrays[index.query].shape, static.in_dims[index.query])[0]
    count = -(-T // tiles.block_q)
    wanted = [i for i in (index.query, index.scale, index.sink) if i in static.wrt]
    results = [Result((T,), jnp.float32, levels)]
    for i in wanted:
        core: tuple[int, ...] = (count,)  # one partial sum per block
        if i == index.query:
            core = primitive.core_shape(arrays[i].shape, static.in_dims[i])
        results.append(Result(core, jnp.float32, levels))

    def kernel(heads: Heads, i: Any, *outs: MappedRef) -> None:
        given = dict(zip(wanted, outs[1:], strict=True))
        dq, dscale = given.get(index.query), given.get(index.scale)
        dsink = None if index.sink is None else given.get(index.sink)
        kernels.rows(heads.first, i, outs[0], dq, dscale, dsink)

    shift, *outs = launch(static, arrays, results, kernel, count, tiles)
    found = {}
    for i, x in zip(wanted, outs, strict=True):
        x = x if i == index.query else x.sum(-1)
        dims = static.out_dims[static.wrt.index(i)]
        x = x.sum(tuple(level for level in levels if dims[level] is None))
        kept = [d for d in dims if d is not None]
        found[i] = jnp.moveaxis(x, range(len(kept)), kept).astype(arrays[i].dtype)
    return shift, found


def _columns(
    static: Static, arrays: tuple[Any, ...], index: formulas.OperandIndex
) -> dict[int, jax.Array]:
    """The cotangents of key and value, by one launch if they have the same mapped axes.

    Args:
      arrays: the operands, followed by ``shift``.
    """
    tiles: Tiles = static.config.backward
    dims = dict(zip(static.wrt, static.out_dims, strict=True))
    shared: dict[tuple[int, ...], list[int]] = {}
    for i in (index.key, index.value):
        if i in dims:
            shared.setdefault(_summed(dims[i]), []).append(i)
    found: dict[int, jax.Array] = {}
    for inner, wanted in shared.items():
        cores = [primitive.core_shape(arrays[i].shape, static.in_dims[i]) for i in wanted]
        results = [
            Result(core, arrays[i].dtype, dims[i]) for i, core in zip(wanted, cores, strict=True)
        ]

        def kernel(heads: Heads, j: Any, *outs: MappedRef, wanted: list[int] = wanted) -> None:
            given = dict(zip(wanted, outs, strict=True))
            kernels.columns(heads, j, given.get(index.key), given.get(index.value))

        count = -(-cores[0][0] // tiles.block_k)
        outs = launch(static, arrays, results, kernel, count, tiles, inner)
        found |= dict(zip(wanted, outs, strict=True))
    return found


def _summed(dims: Dims) -> tuple[int, ...]:
    """The mapped axes that a result lacks and is summed over."""
    return tuple(level for level, d in enumerate(dims) if d is None)


def _lengths(
    static: Static, arrays: tuple[Any, ...], index: formulas.OperandIndex
) -> tuple[int, int]:
    """``T`` and ``S``."""
    (T, _), (S, _) = (
        primitive.core_shape(arrays[i].shape, static.in_dims[i]) for i in (index.query, index.key)
    )
    return T, S


def _has_pairs(
    static: Static, arrays: tuple[Any, ...], index: formulas.OperandIndex, leaf: int
) -> bool:
    """Whether an array of the scores is a scalar, or has one entry for each pair.

    In other arrays several pairs read one entry, so a kernel would need atomics for its cotangent.
    The arrays of a function count among them: it may read any entry for any pair.
    """
    head, _ = primitive.as_head(
        jax.tree.unflatten(static.structure, arrays[: static.structure.num_leaves])
    )
    i, declared = index.score[leaf], leaves(head.score)[leaf]
    core = primitive.core_shape(arrays[i].shape, static.in_dims[i])
    if core == ():
        return True
    return core == _lengths(static, arrays, index) and local_axes(declared) == ("T", "S")


def _pairs(
    static: Static, arrays: tuple[Any, ...], index: formulas.OperandIndex, leaf: int
) -> jax.Array:
    """The cotangent of an array of the scores that is a scalar or ``[T S]``."""
    tiles: Tiles = static.config.backward
    lengths = _lengths(static, arrays, index)
    grid = Grid(*lengths, tiles.block_q, tiles.block_k)
    i = index.score[leaf]
    dims = static.out_dims[static.wrt.index(i)]
    one = primitive.core_shape(arrays[i].shape, static.in_dims[i]) == ()
    result = Result(
        (grid.rows, grid.columns) if one else lengths,  # for a scalar, one partial sum per tile
        jnp.float32 if one else arrays[i].dtype,
        dims,
    )

    def kernel(heads: Heads, block: Any, out: MappedRef) -> None:
        row, column = unravel(block, (grid.rows, grid.columns))
        kernels.pairs(heads, row, column, leaf, out, number=one)

    count = grid.rows * grid.columns
    (x,) = launch(static, arrays, [result], kernel, count, tiles, _summed(dims))
    return x.sum((-1, -2)).astype(arrays[i].dtype) if one else x


def _cotangents_by_loops(
    static: Static, arrays: tuple[Any, ...], index: formulas.OperandIndex
) -> dict[int, jax.Array]:
    """The cotangents of the scores' other arrays, by the loops of ``blockwise``."""
    wanted = tuple(
        i
        for leaf, i in enumerate(index.score)
        if i in static.wrt and not _has_pairs(static, arrays, index, leaf)
    )
    if not wanted:
        return {}
    out_dims = tuple(static.out_dims[static.wrt.index(i)] for i in wanted)
    static = dataclasses.replace(static, wrt=wanted, out_dims=out_dims)
    static, arrays = loop_operands(static, arrays)
    # The loops round logits differently than the kernels, so they compute their own normalizer.
    count = static.structure.num_leaves
    again = dataclasses.replace(
        static,
        in_dims=static.in_dims[:count],
        out_dims=static.in_dims[count : count + RESULTS],
        wrt=(),
    )
    results = KERNEL.forward(again, *arrays[:count])
    arrays = (*arrays[:count], *results, *arrays[count + RESULTS :])
    return dict(zip(wanted, KERNEL.backward(static, *arrays), strict=True))


def tangent(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Tangents of output and ``log l``, by the loops of ``blockwise``."""
    static, arrays = loop_operands(static, arrays)
    return KERNEL.tangent(static, *arrays)
