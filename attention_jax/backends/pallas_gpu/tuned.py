"""The fastest tiles measured on a GPU, written by ``python -m experiments card``.

Nothing has been measured yet: without an entry, the tables of ``run`` apply.
"""

from __future__ import annotations

# (pass, padded width of a head, itemsize) -> (block_q, block_k, warps, stages)
TUNED: dict[tuple[str, int, int], tuple[int, int, int, int]] = {}
