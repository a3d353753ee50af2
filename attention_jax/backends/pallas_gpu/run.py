"""Attention on a GPU, forward and backward, for every mask and score that a kernel can compute.

``kernels`` has the formulas and ``launch`` runs them for all heads of all examples. This module
chooses their tiles and makes them primitives that support every transformation. They are lowered
through Triton, which also supports GPUs older than Hopper.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from attention_jax.backends import primitive, xla
from attention_jax.backends.blockwise import run as blockwise
from attention_jax.backends.call import Head, Spec, symbolic_sizes_refused
from attention_jax.backends.on_primitives import Plan, PrimitiveBackend
from attention_jax.backends.pallas_gpu import launch, support
from attention_jax.backends.pallas_gpu.launch import Launches, Schedules, Tiles
from attention_jax.backends.pallas_gpu.refs import padded
from attention_jax.backends.pallas_gpu.support import as_operands
from attention_jax.backends.pallas_gpu.tuned import TUNED
from attention_jax.core import compat
from attention_jax.masks import block_map
from attention_jax.masks.grid import Grid

# --- Tiles.

# The first that fits is chosen, unless ``tuned`` has an entry for the width.
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
# Bytes of shared memory that a program may use on all GPUs since Ampere.
SHARED_MEMORY = 99 * 1024


def shared_bytes(tiles: Tiles, H: int, D: int, itemsize: int, *, backward: bool) -> int:
    """An upper bound on the shared memory of a program.

    It holds the rows of its block (of the query, and backward also of the cotangent), the rows in
    each stage of the load pipeline, and a tile of pairs, except forward in 16 bits, where that
    stays in registers.
    """
    H, D = padded(H), padded(D)
    block = tiles.block_q * (H + D if backward else H)
    pipeline = tiles.stages * tiles.block_k * (H + D)
    pairs = tiles.block_q * tiles.block_k if backward or itemsize > 2 else 0
    return itemsize * (block + pipeline + pairs)


def choose_tiles(
    candidates: tuple[Tiles, ...], T: int, S: int, H: int, D: int, itemsize: int
) -> Tiles | None:
    """The first candidate that fits into shared memory, cut to the lengths; None if none fits.

    Tiles that were measured to be fastest for the width are tried before the candidates.

    >>> from attention_jax.backends.pallas_gpu.run import FORWARD, choose_tiles
    >>> choose_tiles(FORWARD, 4096, 4096, 128, 128, itemsize=2)
    Tiles(block_q=128, block_k=64, warps=8, stages=2)
    >>> choose_tiles(FORWARD, 1, 4096, 256, 256, itemsize=4)
    Tiles(block_q=16, block_k=32, warps=4, stages=1)
    """
    name = "backward" if candidates is BACKWARD else "forward"
    measured = TUNED.get((name, padded(max(H, D)), itemsize))
    for tiles in candidates if measured is None else (Tiles(*measured), *candidates):
        tiles = tiles._replace(
            block_q=min(tiles.block_q, padded(T)), block_k=min(tiles.block_k, padded(S))
        )
        used = shared_bytes(tiles, H, D, itemsize, backward=candidates is BACKWARD)
        if used <= SHARED_MEMORY:
            return tiles
    return None


@dataclasses.dataclass(frozen=True)
class PallasGPU(PrimitiveBackend):
    """Our kernels for GPUs.

    Attributes:
      forward, backward: tiles of the two passes; None chooses by shape.
      interpret: run the kernels in Pallas's interpreter, which tests do on any platform.
    """

    STATIC_NUMBERS = True
    PRIMITIVES = primitive.make(
        "attention_pallas_gpu",
        primitive.Kernel(launch.forward, launch.tangent, launch.backward, xla.attend),
    )
    forward: Tiles | None = None
    backward: Tiles | None = None
    interpret: bool = False

    def __post_init__(self) -> None:
        for name in ("forward", "backward"):
            tiles = getattr(self, name)
            if tiles is not None and not isinstance(tiles, Tiles):
                raise TypeError(f"{name} must be Tiles or None, got {type(tiles).__name__}")
            if tiles is not None and tuple(map(padded, tiles[:2])) != tiles[:2]:
                raise ValueError(f"{name} must have blocks of a power of two, from 16, got {tiles}")

    def why_unsupported(self, spec: Spec) -> str | None:
        z = spec.sizes
        if reason := symbolic_sizes_refused(z):
            return reason
        if spec.platform != "gpu" and not self.interpret:
            return f"its kernels are for GPUs, the platform is {spec.platform}"
        if compat.triton is None:
            return "this release of JAX has no Triton, in which its kernels are written"
        dtype = jnp.dtype(spec.dtype)
        if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"{dtype.name}: its kernels take bfloat16, float16 and float32"
        if None in self._tiles(spec) or not (self.interpret or self._fit(spec)):
            return (
                f"widths {z.H} (H) and {z.D} (D) in {dtype.name}: the tiles need more "
                f"than the {SHARED_MEMORY // 1024} KiB of shared memory"
            )
        return support.why_unsupported(spec.mask, spec.score)

    def head_plan(self, spec: Spec) -> Plan:
        forward, backward = self._tiles(spec)
        if forward is None or backward is None:
            raise NotImplementedError(
                f"implementation 'pallas_gpu' cannot: {self.why_unsupported(spec)}"
            )

        def planned(one: Head) -> tuple[Head, Schedules, Launches]:
            schedules, launches = plan(one, forward, backward, interpret=self.interpret)
            return one._replace(mask=as_operands(one.mask)), schedules, launches

        return planned

    def extra_bytes(self, spec: Spec) -> int:
        """Output, maximum and normalizer in float32."""
        z = spec.sizes
        return 4 * math.prod(z.B) * z.N * z.T * (z.D + 2)

    def block(self, spec: Spec) -> tuple[int, int] | None:
        tiles, _ = self._tiles(spec)
        return None if tiles is None else (tiles.block_q, tiles.block_k)

    def _fit(self, spec: Spec) -> bool:
        """Whether the tiles of both passes fit into shared memory."""
        z, itemsize = spec.sizes, jnp.dtype(spec.dtype).itemsize
        return all(
            tiles is not None
            and shared_bytes(tiles, z.H, z.D, itemsize, backward=backward) <= SHARED_MEMORY
            for tiles, backward in zip(self._tiles(spec), (False, True), strict=True)
        )

    def _tiles(self, spec: Spec) -> tuple[Tiles | None, Tiles | None]:
        """The tiles of the forward and the backward pass; None if none fit into shared memory."""
        z = spec.sizes
        shape = z.T, z.S, z.H, z.D, jnp.dtype(spec.dtype).itemsize
        forward = self.forward or choose_tiles(FORWARD, *shape)
        return forward, self.backward or choose_tiles(BACKWARD, *shape)


def plan(
    head: Head, forward: Tiles, backward: Tiles, *, interpret: bool
) -> tuple[Schedules, Launches]:
    """The blocks that each kernel visits, and what the launches depend on."""
    T, S = head.query.shape[0], head.key.shape[0]

    def kinds(tiles: Tiles) -> tuple[Any, Grid]:
        grid = Grid(T, S, tiles.block_q, tiles.block_k)
        return block_map.kinds(head.mask, grid, head.b, head.n), grid

    kind, grid = kinds(backward)
    transposed = Grid(S, T, grid.block_k, grid.block_q)
    loops_schedule, loops = blockwise.plan(head, blockwise.block_sizes(T, S, head.mask))
    schedules = Schedules(
        block_map.schedule(*kinds(forward)),
        block_map.schedule(kind, grid),
        block_map.schedule(kind.T, transposed),
        loops_schedule,
    )
    return schedules, Launches(forward, backward, loops, interpret)
