"""The tiles that were fastest on a card, which ``python -m experiments card`` writes.

Not measured yet: without an entry the tables of ``run`` apply.
"""

from __future__ import annotations

# By pass, width of a head (padded) and bytes of a number: block_q, block_k, warps, stages.
TUNED: dict[tuple[str, int, int], tuple[int, int, int, int]] = {}
