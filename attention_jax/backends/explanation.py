"""What ``explain`` returns."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation runs, why, and what it costs.

    Attributes:
      chosen: the implementation's name, or None if none of those asked for supports the call.
      platform: the platform that it was chosen for.
      reasons: for each implementation, why it was or was not chosen.
      blocks: visited, full and skipped blocks over all heads and examples, and the block size; None
        if the chosen implementation has no blocks, or the mask's arrays are known only at run time.
      flops: of the forward pass of the chosen implementation, over the visited blocks if it has
        blocks, else over all pairs; None if nothing is chosen, or the mask's arrays are known only
        at run time.
      dense_flops: of the forward pass over all pairs, ``2 * B * N * T * S * (H + D)``.
      extra_bytes: of each implementation's forward pass, not counting arguments and results.
      split: how arrays that are sharded over explicit mesh axes are split among devices, and what
        each device gathers; None if they are not. The other numbers are of all devices together.
    """

    chosen: str | None
    platform: str
    reasons: dict[str, str]
    blocks: dict[str, Any] | None
    flops: int | None
    dense_flops: int
    extra_bytes: dict[str, int]
    split: str | None = None

    def __str__(self) -> str:
        width = max(len(name) for name in self.reasons)
        lines = [f"attention on {self.platform}"]
        for name, reason in self.reasons.items():
            mark = "->" if name == self.chosen else "  "
            cannot = reason.startswith("cannot")
            memory = "" if cannot else f"{_bytes(self.extra_bytes[name])} extra"
            lines.append(f"{mark} {name:{width}}  {memory:>15}  {reason}")
        if self.blocks is not None:
            b = self.blocks
            lines.append(
                f"blocks of {b['block_q']} x {b['block_k']}: {b['visited']} visited, "
                f"{b['full']} of them full, {b['skipped']} skipped"
            )
        elif self.flops is not None:
            lines.append(f"blocks: not counted for {self.chosen}")
        elif self.chosen is not None:
            lines.append("blocks: the mask holds arrays known only at run time")
        if self.flops is not None:
            share = self.flops / self.dense_flops if self.dense_flops else 1.0
            lines.append(f"forward: {self.flops / 1e9:.3g} GFLOP ({share:.0%} of dense)")
        elif self.chosen is not None:
            lines.append(f"forward: at most {self.dense_flops / 1e9:.3g} GFLOP")
        if self.split is not None:
            lines.append(f"split: {self.split}")
        return "\n".join(lines)


def _bytes(n: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 2**10:.1f} KiB"
