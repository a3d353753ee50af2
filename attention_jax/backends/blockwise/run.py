"""Attention in linear memory: tile by tile, forward and backward, visiting only non-empty blocks.

A block of queries visits the key blocks that it attends to, first the full ones, then the partial
ones. ``formulas`` has the computation for one tile, ``loops`` the loops around it, sized so that a
tile stays in the processor's cache, and ``batching`` computes small heads together.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from attention_jax.backends import primitive, xla
from attention_jax.backends.blockwise import formulas
from attention_jax.backends.blockwise.batching import batched
from attention_jax.backends.blockwise.loops import Loops
from attention_jax.backends.call import Head, Spec, symbolic_lengths_refused
from attention_jax.backends.on_primitives import Plan, PrimitiveBackend
from attention_jax.core.axes import accumulation_dtype, int_at_least
from attention_jax.core.pytree import leaves
from attention_jax.masks import Mask, block_map
from attention_jax.masks.grid import Grid

KERNEL = primitive.Kernel(
    batched(formulas.forward),
    batched(formulas.tangent),
    batched(formulas.backward),
    xla.attend,
)


# --- Block sizes.

# (block_q, block_k) -> GFLOP/s of the forward loop over full blocks on two cores of an AMD EPYC,
# float32, H = 64, measured by `python -m experiments bench --only blocks`. Large blocks compute
# faster, small ones skip more: the size with the smallest visited pairs / speed is chosen.
SPEED = {
    (1024, 512): 163,
    (512, 1024): 158,
    (512, 512): 146,
    (256, 512): 110,
    (256, 256): 83,
    (128, 128): 77,
}
# For masks whose blocks are known only at run time: a compromise between skipping and speed.
UNKNOWN = (512, 512)
# Up to this many queries, time is bound by reading keys, not by arithmetic.
FEW_QUERIES, FEW_QUERIES_BLOCK_K = 16, 2048
# The cost of a partial block, which evaluates the mask, relative to a full one.
PARTIAL_COST = 1.5
# Larger grids are not examined while tracing.
MAX_BLOCKS = 2**22

# Heads are batched until a product covers this many pairs; forward and backward, GFLOP/s of 32
# heads of 512 x 512: 83 and 95 one by one, 95 and 109 with 2**19, 104 and 111 with 2**20, 91 and 82
# with 2**22 (two cores of an Intel Xeon).
BATCH_PAIRS = 2**20


def block_sizes(T: int, S: int, mask: Mask | None) -> tuple[int, int]:
    """Queries and keys per block.

    >>> from attention_jax.backends.blockwise.run import block_sizes
    >>> block_sizes(4096, 4096, None), block_sizes(1, 10_000, None)
    ((1024, 512), (1, 2000))
    """
    if T <= FEW_QUERIES:
        return T, _even(S, FEW_QUERIES_BLOCK_K)
    if leaves(mask):
        return _even(T, UNKNOWN[0]), _even(S, UNKNOWN[1])
    costs: dict[tuple[int, int], float] = {}
    for (block_q, block_k), speed in SPEED.items():
        grid = Grid(T, S, _even(T, block_q), _even(S, block_k))
        if costs and grid.rows * grid.columns > MAX_BLOCKS:
            continue
        kind = block_map.kinds(mask, grid, 0, 0)
        if not isinstance(kind, np.ndarray):  # a function is evaluated at run time
            return _even(T, UNKNOWN[0]), _even(S, UNKNOWN[1])
        full, partial = (kind == block_map.FULL).sum(), (kind == block_map.PARTIAL).sum()
        pairs = grid.block_q * grid.block_k * (full + PARTIAL_COST * partial)
        costs.setdefault((grid.block_q, grid.block_k), pairs / speed)
    return min(costs, key=lambda size: costs[size])


def _even(length: int, block: int) -> int:
    """A block size near ``block`` that divides ``length`` as evenly as possible."""
    if length <= block:
        return length
    even = -(-length // -(-length // block))
    return min(length, -(-even // 16) * 16)


@dataclasses.dataclass(frozen=True)
class Blockwise(PrimitiveBackend):
    """Blockwise attention, for any mask and score.

    Attributes:
      block_q, block_k: queries and keys per block, at most the lengths; None chooses by cost.
      batch_pairs: heads are batched until a product covers this many pairs.
    """

    PRIMITIVES = primitive.make("attention_blockwise", KERNEL)
    block_q: int | None = None
    block_k: int | None = None
    batch_pairs: int = BATCH_PAIRS

    def __post_init__(self) -> None:
        for name, least in (("block_q", 1), ("block_k", 1), ("batch_pairs", 0)):
            x = getattr(self, name)
            if x is not None:
                object.__setattr__(self, name, int_at_least(name, x, least))

    def why_unsupported(self, spec: Spec) -> str | None:
        return symbolic_lengths_refused(spec.sizes)

    def head_plan(self, spec: Spec) -> Plan:
        block = self.block(spec)
        return lambda one: (one, *plan(one, block, self.batch_pairs))

    def extra_bytes(self, spec: Spec) -> int:
        """Logits, probabilities and copies of the tiles computed together, and the schedule."""
        z = spec.sizes
        block_q, block_k = self.block(spec)
        tile = 3 * block_q * block_k + (block_q + 2 * block_k) * (z.H + z.D)
        heads = self.batch_pairs // max(1, block_q * block_k)
        tile *= max(1, min(heads, math.prod(z.B) * z.N))
        grid = Grid(z.T, z.S, block_q, block_k)
        return tile * accumulation_dtype(spec.dtype).itemsize + 4 * grid.rows * grid.columns

    def block(self, spec: Spec) -> tuple[int, int]:
        T, S = spec.sizes.T, spec.sizes.S
        if self.block_q is not None and self.block_k is not None:
            return min(self.block_q, T), min(self.block_k, S)
        block_q, block_k = block_sizes(T, S, spec.mask)
        return (
            block_q if self.block_q is None else min(self.block_q, T),
            block_k if self.block_k is None else min(self.block_k, S),
        )


def plan(
    head: Head, block: tuple[int, int], batch_pairs: int = BATCH_PAIRS
) -> tuple[block_map.BlockSchedule, Loops]:
    """The blocks to visit, and the configuration of the loops."""
    T, S = head.query.shape[0], head.key.shape[0]
    grid = Grid(T, S, *block)
    kind = block_map.kinds(head.mask, grid, head.b, head.n)
    schedule = block_map.schedule(kind, grid)
    known = isinstance(kind, np.ndarray)
    return schedule, Loops(
        *block,
        some_full=not known or bool(schedule.full.any()),
        some_partial=not known or bool((schedule.visited > schedule.full).any()),
        single=known and grid.columns == 1 and bool((schedule.visited == 1).all()),
        batched_heads=batch_pairs // max(1, math.prod(block)),
        only_shared_keys=T <= FEW_QUERIES,
    )
