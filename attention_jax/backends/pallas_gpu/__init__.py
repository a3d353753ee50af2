"""Attention on a GPU, forward and backward, for every mask and score that a kernel can compute.

``pallas_kernels`` has the formulas, ``pallas_launch`` runs them for all heads of all examples; here
they are given their tiles and joined into primitives that every transformation understands. They
are lowered through Triton, which also knows cards before Hopper.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.backends import blockwise, primitive, xla
from attention_jax.backends.call import Call, Head, Spec
from attention_jax.backends.heads import over_heads_and_examples
from attention_jax.backends.pallas_gpu import launch, support
from attention_jax.backends.pallas_gpu.launch import Config, Tiles, Visits
from attention_jax.backends.pallas_gpu.refs import padded
from attention_jax.backends.pallas_gpu.support import as_operands
from attention_jax.core import compat
from attention_jax.masks import block_map
from attention_jax.masks.grid import Grid

# --- Tiles.

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


_bind = primitive.make(
    "attention_pallas_gpu",
    primitive.Kernel(launch.forward, launch.tangent, launch.backward, xla.attend),
)


# --- What the table of implementations needs.


def attend(head: Head, *, tiles: tuple[Tiles, Tiles], interpret: bool) -> tuple[Any, Any]:
    """Output ``[T D]`` and lse ``[T]``."""
    T, S = head.query.shape[0], head.key.shape[0]
    forward_tiles, backward_tiles = tiles

    def kinds(tiles: Tiles) -> tuple[Any, Grid]:
        grid = Grid(T, S, tiles.block_q, tiles.block_k)
        return block_map.kinds(head.mask, grid, head.b, head.n), grid

    kind, grid = kinds(backward_tiles)
    turned = Grid(S, T, grid.block_k, grid.block_q)
    loops, loops_config = blockwise.plan(head, blockwise.block_sizes(T, S, head.mask))
    config = Config(forward_tiles, backward_tiles, loops_config, interpret)
    every = Visits(
        block_map.visits(*kinds(forward_tiles)),
        block_map.visits(kind, grid),
        block_map.visits(kind.T, turned),
        loops,
    )
    out, lse = _bind(head._replace(mask=as_operands(head.mask)), every, config)
    return out.astype(head.query.dtype), lse


def run(
    call: Call,
    spec: Spec,
    *,
    tiles: tuple[Tiles, Tiles] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Output ``[*B T N D]`` and lse ``[*B T N]``.

    Args:
      tiles: those of the forward and the backward pass; None chooses.
      interpret: run the kernels step by step, on any platform, to test them.
    """
    chosen = tiles or tuple(_tiles(candidates, spec) for candidates in (FORWARD, BACKWARD))
    out, lse = over_heads_and_examples(
        lambda head: attend(
            head,
            tiles=chosen,  # type: ignore[arg-type]  # `why_unsupported` has seen to it
            interpret=interpret,
        ),
        call,
        spec.sizes,
        ("*B T N D", "*B T N"),
    )
    return out, lse


def _tiles(candidates: tuple[Tiles, ...], spec: Spec) -> Tiles | None:
    z = spec.sizes
    return choose_tiles(candidates, z.T, z.S, z.H, z.D, jnp.dtype(spec.dtype).itemsize)


def extra_bytes(spec: Spec) -> int:
    """Output, maximum and normaliser in float32."""
    z = spec.sizes
    return 4 * math.prod(z.B) * z.N * z.T * (z.D + 2)


def block(spec: Spec) -> tuple[int, int] | None:
    """Queries and keys per block of the forward pass."""
    tiles = _tiles(FORWARD, spec)
    return None if tiles is None else tiles[:2]


def why_unsupported(spec: Spec) -> str | None:
    """What the kernels cannot do, in words; None where they can."""
    z = spec.sizes
    if spec.platform != "gpu":
        return f"its kernels are for GPUs, this is a {spec.platform}"
    if compat.triton is None:
        return "this release of JAX has no Triton, in which its kernels are written"
    if spec.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{jnp.dtype(spec.dtype).name}: its products are of bfloat16, float16 or float32"
    if None in (_tiles(FORWARD, spec), _tiles(BACKWARD, spec)):
        return (
            f"widths {z.H} (H) and {z.D} (D) in {jnp.dtype(spec.dtype).name}: the smallest "
            f"tiles need more than the {SHARED_MEMORY // 1024} KiB of shared memory there is"
        )
    return support.why_unsupported(spec.mask, spec.score)
