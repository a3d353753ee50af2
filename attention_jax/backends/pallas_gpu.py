"""Attention on a GPU, forward and backward, for every mask and score that a kernel can compute.

``pallas_kernels`` has the formulas; here they are given their tiles, launched for all heads of all
examples through Triton, and joined into primitives that every transformation understands. What is
no sum over the tiles of a row or column, the cotangents of what scores hold, and forward-mode
tangents are computed by the loops of ``blockwise``.
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
from jax.experimental.pallas import triton

from attention_jax import blocks
from attention_jax.backends import blockwise, kernel_rules, pallas_kernels, primitive, xla
from attention_jax.backends.kernel_rules import as_operands
from attention_jax.backends.pallas_tiles import Refs, RefView, padded
from attention_jax.backends.primitive import RESULTS, Dims, Static
from attention_jax.backends.program import place_of
from attention_jax.backends.request import Request
from attention_jax.grid import Grid
from attention_jax.lift import Call, Head, over_heads_and_examples

# --- Tiles.


class Tiles(NamedTuple):
    """How a kernel is cut: queries and keys per tile, threads, and loads under way at a time."""

    block_q: int
    block_k: int
    warps: int
    stages: int


# Tried in this order: the first that fits. Not tuned on a card yet.
FORWARD = (
    Tiles(128, 64, 8, 3),
    Tiles(128, 64, 8, 2),
    Tiles(64, 64, 4, 2),
    Tiles(64, 32, 4, 2),
    Tiles(32, 32, 4, 1),
    Tiles(16, 16, 2, 1),
)
BACKWARD = (
    Tiles(64, 64, 4, 2),
    Tiles(64, 32, 4, 2),
    Tiles(32, 32, 4, 2),
    Tiles(32, 32, 4, 1),
    Tiles(16, 16, 2, 1),
)
# Bytes of shared memory that a program may use on all cards since Ampere.
SHARED_MEMORY = 99 * 1024


def shared_bytes(tiles: Tiles, H: int, D: int, itemsize: int, *, backward: bool) -> int:
    """What a program keeps in shared memory at the most.

    Its own rows (forward those of the query, backward also of the cotangent), the rows that are
    loaded or under way, and a tile of pairs, which forward and in 16 bits stays in registers.
    """
    H, D = padded(H), padded(D)
    own = tiles.block_q * (H + D if backward else H)
    under_way = tiles.stages * tiles.block_k * (H + D)
    pairs = tiles.block_q * tiles.block_k if backward or itemsize > 2 else 0
    return itemsize * (own + under_way + pairs)


def choose_tiles(
    candidates: tuple[Tiles, ...], T: int, S: int, H: int, D: int, itemsize: int
) -> Tiles | None:
    """The first that fits into shared memory, no longer than the sequences; None: none fits.

    >>> choose_tiles(FORWARD, 4096, 4096, 128, 128, itemsize=2)
    Tiles(block_q=128, block_k=64, warps=8, stages=2)
    >>> choose_tiles(FORWARD, 1, 4096, 256, 256, itemsize=4)
    Tiles(block_q=16, block_k=32, warps=4, stages=1)
    """
    for tiles in candidates:
        tiles = tiles._replace(
            block_q=min(tiles.block_q, padded(T)), block_k=min(tiles.block_k, padded(S))
        )
        used = shared_bytes(tiles, H, D, itemsize, backward=candidates is BACKWARD)
        if used <= SHARED_MEMORY:
            return tiles
    return None


@dataclasses.dataclass(frozen=True)
class Config:
    """What the kernels depend on, besides shapes."""

    forward: Tiles
    backward: Tiles
    dropout_rate: float
    loops: blockwise.Config  # of the tangents, which loops compute
    interpret: bool


class Visits(NamedTuple):
    """The blocks to visit: for each block of queries, or of keys."""

    forward: blocks.Visits
    rows: blocks.Visits
    columns: blocks.Visits
    loops: blocks.Visits


# --- Launching them.


class Result(NamedTuple):
    """What a kernel writes: its shape without mapped axes, its dtype, where those axes are."""

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
    """Runs ``kernel(head, block, *results)`` for ``count`` blocks of every head of every example.

    Args:
      inner: mapped axes that are no axis of the grid: ``head(g)`` is at number ``g`` along them.
    """
    outer = tuple(level for level in range(len(static.levels)) if level not in inner)
    outer_sizes, inner_sizes = (
        tuple(static.levels[level] for level in levels) for levels in (outer, inner)
    )

    def body(*refs: Any) -> None:
        program = pl.program_id(0)
        block, number = lax.rem(program, np.int32(count)), lax.div(program, np.int32(count))
        outer_place = dict(zip(outer, place_of(number, outer_sizes), strict=True))

        def place(g: Any) -> tuple[Any, ...]:
            at = outer_place | dict(zip(inner, place_of(g, inner_sizes), strict=True))
            return tuple(at[level] for level in range(len(static.levels)))

        views = [
            RefView(ref, result.dims, place(np.int32(0)))
            for ref, result in zip(refs[len(arrays) :], results, strict=True)
        ]
        kernel(lambda g: Refs(static, refs[: len(arrays)], place(g)), block, *views)

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
    cores = blockwise.result_cores(static, arrays)
    results = [Result(*core, dims) for core, dims in zip(cores, static.out_dims, strict=True)]
    count = -(-cores[0][0][0] // tiles.block_q)

    def kernel(head: Callable[[Any], Refs], i: Any, *views: RefView) -> None:
        pallas_kernels.forward(head(np.int32(0)), i, *views)

    return tuple(launch(static, arrays, results, kernel, count, tiles))


def backward(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """The cotangents of the operands that vary, in their order."""
    number = blockwise.numbers(static)
    shift, found = _rows(static, arrays, number)
    found |= _columns(static, arrays, number, shift)
    found |= _scores(static, arrays, number)
    return tuple(found[i] for i in static.wrt)


def _rows(
    static: Static, arrays: tuple[Any, ...], number: blockwise.Numbers
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """``shift`` with all mapped axes first, and the cotangents of query, scale and sink."""
    levels = tuple(range(len(static.levels)))
    tiles: Tiles = static.config.backward
    T = primitive.core_shape(arrays[number.query].shape, static.in_dims[number.query])[0]
    count = -(-T // tiles.block_q)
    wanted = [i for i in (number.query, number.scale, number.sink) if i in static.wrt]
    results = [Result((T,), jnp.float32, levels)]
    for i in wanted:
        core: tuple[int, ...] = (count,)  # one part for each block
        if i == number.query:
            core = primitive.core_shape(arrays[i].shape, static.in_dims[i])
        results.append(Result(core, jnp.float32, levels))

    def kernel(head: Callable[[Any], Refs], i: Any, *views: RefView) -> None:
        given = dict(zip(wanted, views[1:], strict=True))
        dq, dscale = given.get(number.query), given.get(number.scale)
        dsink = None if number.sink is None else given.get(number.sink)
        pallas_kernels.rows(head(np.int32(0)), i, views[0], dq, dscale, dsink)

    shift, *parts = launch(static, arrays, results, kernel, count, tiles)
    found = {}
    for i, x in zip(wanted, parts, strict=True):
        x = x if i == number.query else x.sum(-1)
        dims = static.out_dims[static.wrt.index(i)]
        x = x.sum(tuple(level for level in levels if dims[level] is None))
        kept = [d for d in dims if d is not None]
        found[i] = jnp.moveaxis(x, range(len(kept)), kept).astype(arrays[i].dtype)
    return shift, found


def _columns(
    static: Static, arrays: tuple[Any, ...], number: blockwise.Numbers, shift: jax.Array
) -> dict[int, jax.Array]:
    """The cotangents of key and value: together where the same heads share both."""
    tiles: Tiles = static.config.backward
    dims = {i: static.out_dims[static.wrt.index(i)] for i in static.wrt}
    shared: dict[tuple[int, ...], list[int]] = {}
    for i in (number.key, number.value):
        if i in dims:
            inner = tuple(level for level, d in enumerate(dims[i]) if d is None)
            shared.setdefault(inner, []).append(i)
    levels = tuple(range(len(static.levels)))
    static = dataclasses.replace(static, in_dims=(*static.in_dims, levels))
    found: dict[int, jax.Array] = {}
    for inner, wanted in shared.items():
        cores = [primitive.core_shape(arrays[i].shape, static.in_dims[i]) for i in wanted]
        results = [
            Result(core, arrays[i].dtype, dims[i]) for i, core in zip(wanted, cores, strict=True)
        ]
        heads = math.prod(static.levels[level] for level in inner)

        def kernel(
            head: Callable[[Any], Refs],
            j: Any,
            *views: RefView,
            wanted: list[int] = wanted,
            heads: int = heads,
        ) -> None:
            given = dict(zip(wanted, views, strict=True))
            pallas_kernels.columns(heads, head, j, given.get(number.key), given.get(number.value))

        count = -(-cores[0][0] // tiles.block_k)
        outs = launch(static, (*arrays, shift), results, kernel, count, tiles, inner)
        found |= dict(zip(wanted, outs, strict=True))
    return found


def _scores(
    static: Static, arrays: tuple[Any, ...], number: blockwise.Numbers
) -> dict[int, jax.Array]:
    """The cotangents of the arrays of scores, by the loops of ``blockwise``.

    They are sums over many tiles and heads, which in a kernel would take atomics.
    """
    wanted = tuple(i for i in number.score if i in static.wrt)
    if not wanted:
        return {}
    out_dims = tuple(static.out_dims[static.wrt.index(i)] for i in wanted)
    static, arrays = _as_loops(dataclasses.replace(static, wrt=wanted, out_dims=out_dims), arrays)
    # The loops round logits in another order, so their probabilities need a normaliser of theirs.
    count = static.structure.num_leaves
    again = dataclasses.replace(
        static,
        in_dims=static.in_dims[:count],
        out_dims=static.in_dims[count : count + RESULTS],
        wrt=(),
    )
    results = blockwise.KERNEL.forward(again, *arrays[:count])
    arrays = (*arrays[:count], *results, *arrays[count + RESULTS :])
    return dict(zip(wanted, blockwise.KERNEL.backward(static, *arrays), strict=True))


def tangent(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Tangents of output and ``log l``, by the loops of ``blockwise``."""
    static, arrays = _as_loops(static, arrays)
    return blockwise.KERNEL.tangent(static, *arrays)


def _as_loops(static: Static, arrays: tuple[Any, ...]) -> tuple[Static, tuple[Any, ...]]:
    """The same operands with the blocks that ``blockwise`` visits."""
    count = static.structure.num_leaves
    head, visits = primitive.as_head(jax.tree.unflatten(static.structure, range(count)))
    order, structure = jax.tree.flatten(primitive.operands(head, visits.loops))
    in_dims = tuple(static.in_dims[i] for i in order) + static.in_dims[count:]
    static = dataclasses.replace(
        static, structure=structure, config=static.config.loops, in_dims=in_dims
    )
    return static, (*(arrays[i] for i in order), *arrays[count:])


def _plain(head: Head, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    return xla.attend(head, dropout_rate=config.dropout_rate)


_bind = primitive.make("attention_pallas_gpu", primitive.Kernel(forward, tangent, backward, _plain))


# --- What the table of implementations needs.


def attend(
    head: Head, *, dropout_rate: float, tiles: tuple[Tiles, Tiles], interpret: bool
) -> tuple[Any, Any]:
    """Output ``[T D]`` and lse ``[T]``."""
    T, S = head.query.shape[0], head.key.shape[0]
    forward_tiles, backward_tiles = tiles

    def visits(tiles: Tiles, *, columns: bool = False) -> blocks.Visits:
        grid = Grid(T, S, tiles.block_q, tiles.block_k)
        kind = blocks.kinds(head.mask, grid, head.b, head.n)
        if columns:
            kind, grid = kind.T, Grid(S, T, tiles.block_k, tiles.block_q)
        return blocks.visits(kind, grid)

    loops, loops_config = blockwise.plan(
        head, blockwise.block_sizes(T, S, head.mask), dropout_rate=dropout_rate
    )
    config = Config(forward_tiles, backward_tiles, dropout_rate, loops_config, interpret)
    every = Visits(
        visits(forward_tiles),
        visits(backward_tiles),
        visits(backward_tiles, columns=True),
        loops,
    )
    out, lse = _bind(head._replace(mask=as_operands(head.mask)), every, config)
    return out.astype(head.query.dtype), lse


def run(
    call: Call,
    request: Request,
    *,
    tiles: tuple[Tiles, Tiles] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Output ``[*B T N D]`` and lse ``[*B T N]``.

    Args:
      tiles: those of the forward and the backward pass; None chooses.
      interpret: run the kernels step by step, on any platform, to test them.
    """
    chosen = tiles or tuple(_tiles(candidates, request) for candidates in (FORWARD, BACKWARD))
    out, lse = over_heads_and_examples(
        lambda head: attend(
            head,
            dropout_rate=request.dropout_rate,
            tiles=chosen,  # type: ignore[arg-type]  # `why_unsupported` has seen to it
            interpret=interpret,
        ),
        call,
        request.sizes,
        ("*B T N D", "*B T N"),
    )
    return out, lse


def _tiles(candidates: tuple[Tiles, ...], request: Request) -> Tiles | None:
    z = request.sizes
    return choose_tiles(candidates, z.T, z.S, z.H, z.D, jnp.dtype(request.dtype).itemsize)


def extra_bytes(request: Request) -> int:
    """Output, maximum and normaliser in float32."""
    z = request.sizes
    return 4 * math.prod(z.B) * z.N * z.T * (z.D + 2)


def block(request: Request) -> tuple[int, int] | None:
    """Queries and keys per block of the forward pass."""
    tiles = _tiles(FORWARD, request)
    return None if tiles is None else tiles[:2]


def why_unsupported(request: Request) -> str | None:
    """What the kernels cannot do, in words; None where they can."""
    z = request.sizes
    if request.platform != "gpu":
        return f"its kernels are for GPUs, this is a {request.platform}"
    if request.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{jnp.dtype(request.dtype).name}: its products are of bfloat16, float16 or float32"
    if None in (_tiles(FORWARD, request), _tiles(BACKWARD, request)):
        return (
            f"widths {z.H} (H) and {z.D} (D) in {jnp.dtype(request.dtype).name}: the smallest "
            f"tiles need more than the {SHARED_MEMORY // 1024} KiB of shared memory there is"
        )
    return kernel_rules.why_unsupported(request.mask, request.score)
