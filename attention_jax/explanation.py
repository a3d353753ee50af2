"""What ``explain`` returns: a value that prints as a table."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.backends import blockwise
from attention_jax.core.axes import Sizes
from attention_jax.core.compat import no_mesh
from attention_jax.masks import Mask, block_map


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation runs, why, and what it costs.

    Attributes:
      chosen: the implementation's name, or None where none of those asked for can.
      platform: for which platform.
      reasons: for each implementation, the reason for or against it.
      blocks: visited, full and skipped blocks over all heads and examples, and the block size; None
        where the mask's arrays are known only at run time.
      flops: of the forward pass over the visited blocks.
      dense_flops: of the forward pass over all pairs, ``2 * B * N * T * S * (H + D)``.
      extra_bytes: for each implementation, forward, beside arguments and results.
    """

    chosen: str | None
    platform: str
    reasons: dict[str, str]
    blocks: dict[str, Any] | None
    flops: int | None
    dense_flops: int
    extra_bytes: dict[str, int]

    def __str__(self) -> str:
        width = max(len(name) for name in self.reasons)
        lines = [f"attention on {self.platform}"]
        for name, reason in self.reasons.items():
            mark = "->" if name == self.chosen else "  "
            memory = _bytes(self.extra_bytes[name])
            lines.append(f"{mark} {name:{width}}  {memory:>9} extra  {reason}")
        if self.blocks is None:
            lines.append("blocks: the mask holds arrays known only at run time")
        else:
            b = self.blocks
            lines.append(
                f"blocks of {b['block_q']} x {b['block_k']}: {b['visited']} visited, "
                f"{b['full']} of them full, {b['skipped']} skipped"
            )
        if self.flops is not None:
            share = self.flops / self.dense_flops if self.dense_flops else 1.0
            lines.append(f"forward: {self.flops / 1e9:.3g} GFLOP ({share:.0%} of dense)")
        else:
            lines.append(f"forward: at most {self.dense_flops / 1e9:.3g} GFLOP")
        return "\n".join(lines)


def _bytes(n: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 2**10:.1f} KiB"


def explain_blocks(
    mask: Mask | None, sizes: Sizes, block: tuple[int, int] | None
) -> dict[str, Any]:
    """Block counts and FLOPs of what walks through blocks of this size, for ``Explanation``.

    Without a size, those of the blockwise implementation, which every platform has.
    """
    programs = math.prod(sizes.B) * sizes.N
    dense = 2 * programs * sizes.T * sizes.S * (sizes.H + sizes.D)
    unknown: dict[str, Any] = {"blocks": None, "flops": None, "dense_flops": dense}
    arrays = jax.tree.leaves(mask)
    if any(isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct)) for x in arrays):
        return unknown
    if 0 in (*sizes.B, sizes.T, sizes.S):
        return {**unknown, "flops": 0}
    block_q, block_k = block or blockwise.block_sizes(sizes.T, sizes.S, mask)
    batch = math.prod(sizes.B)
    with no_mesh():  # its devices may not be there, or the mask's arrays split among them
        mask = jax.tree.map(jnp.asarray, jax.device_get(mask))
        kinds = np.asarray(
            block_map.block_map(
                mask, sizes.T, sizes.S, block_q=block_q, block_k=block_k, B=batch, N=sizes.N
            ).kinds
        )
    repeat = programs * kinds.shape[-2] * kinds.shape[-1] // kinds.size
    visited = int((kinds != block_map.EMPTY).sum()) * repeat
    pairs = block_q * block_k
    return {
        "blocks": {
            "block_q": block_q,
            "block_k": block_k,
            "visited": visited,
            "full": int((kinds == block_map.FULL).sum()) * repeat,
            "skipped": programs * kinds.shape[-2] * kinds.shape[-1] - visited,
        },
        "flops": min(dense, 2 * visited * pairs * (sizes.H + sizes.D)),
        "dense_flops": dense,
    }
