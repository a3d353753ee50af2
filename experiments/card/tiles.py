"""Tiles of ``pallas_gpu``: all that fit, forward and backward, on causal calls in bfloat16.

The fastest of each width become ``FOLDER/tuned.py``, a new
``attention_jax/backends/pallas_gpu/tuned.py``; only tiles that fit on every card since Ampere do.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import jax

import attention_jax
from attention_jax.backends import PallasGPU
from attention_jax.backends.pallas_gpu.launch import Tiles
from attention_jax.backends.pallas_gpu.run import SHARED_MEMORY, shared_bytes
from experiments.card import timing
from experiments.card.calls import Call
from experiments.card.contenders import gradients
from experiments.card.environment import pace
from experiments.card.parts import Fields, Item, Setting
from experiments.card.speed import compile_program
from experiments.card.worker import RECORDS

FILE = "tuned.py"
ITEMSIZE = 2  # of bfloat16
# Shared memory of one program on Hopper: larger tiles are measured, not written down.
HOPPER = 227 * 1024
HEADER = '''\
"""The tiles that were fastest on a card, which ``python -m experiments card`` writes.

Measured on {where}.
"""

from __future__ import annotations

# By pass, width of a head (padded) and bytes of a number: block_q, block_k, warps, stages.
TUNED: dict[tuple[str, int, int], tuple[int, int, int, int]] = {{
'''


def tuning_calls(dry: bool) -> list[Call]:
    """The widths of the table, at a length where tiles decide."""
    if dry:
        return [Call("causal", 1, 64, 64, 1, 1, 16)]
    return [Call("causal", 4, 4096, 4096, 2048 // H, 2048 // H, H) for H in (128, 64)]


def candidates(H: int, *, backward: bool, dry: bool) -> list[Tiles]:
    """The tiles to measure: all that a Hopper card can hold, the likely ones first."""
    if dry:
        return [Tiles(32, 32, 4, 2), Tiles(16, 32, 4, 2)]
    found = [
        Tiles(q, k, warps, stages)
        for q, k, stages, warps in itertools.product(
            (128, 64, 32), (64, 128, 32), (2, 3, 4, 1), (8, 4)
        )
        if shared_bytes(Tiles(q, k, warps, stages), H, H, ITEMSIZE, backward=backward) <= HOPPER
        # Too few rows for eight warps, or too many numbers a thread.
        and 16 <= q * k // (warps * 32) <= 64
    ]
    return sorted(found, key=lambda x: (abs(math.log2(x.block_q * x.block_k / 8192)), x.stages))


def items(setting: Setting) -> Iterator[Item]:
    """Forward and backward of all widths in turn, so that each has some when time is up."""
    lists = [
        [(call, backward, x) for x in candidates(call.H, backward=backward, dry=setting.dry)]
        for backward in (False, True)
        for call in tuning_calls(setting.dry)
    ]
    for row in itertools.zip_longest(*lists):
        for job in filter(None, row):
            call, backward, tiles = job
            what = f"{name(backward)}, {call}, {tiles.block_q}x{tiles.block_k}"
            run = functools.partial(measure, call, backward, tiles, setting)
            yield Item(f"{what}, {tiles.warps} warps, {tiles.stages} stages", run, limit=30.0)


def name(backward: bool) -> str:
    """Of a pass, as in the table."""
    return "backward" if backward else "forward"


def measure(call: Call, backward: bool, tiles: Tiles, setting: Setting) -> Iterator[Fields]:
    """The time of a call with these tiles; for the backward pass, of both passes.

    The file of the fastest is written again after each, since time may be up at any moment.
    """
    chosen: dict[str, Any] = {name(backward): tiles}
    backend = PallasGPU(interpret=setting.dry, **chosen)
    q, k, v, cotangent = call.arrays()

    def attend(q: Any, k: Any, v: Any) -> Any:
        return attention_jax.attention(q, k, v, implementation=backend, **call.options())

    fn, given = (gradients(attend), [q, k, v, cotangent]) if backward else (attend, [q, k, v])
    program, first, extra = compile_program(fn, given)
    timed = timing.queued(
        functools.partial(program, *given), jax.block_until_ready, **pace(setting.dry)
    )
    yield {
        "tiles": list(tiles),
        "pass": name(backward),
        "H": call.H,
        "tflops": call.flops(backward=backward) / timed.each / 1e12,
        "fits_everywhere": shared_bytes(tiles, call.H, call.H, ITEMSIZE, backward=backward)
        <= SHARED_MEMORY,
        "first_s": first,
        "extra_mib": extra,
        **timed.fields(),
    }
    rows = [json.loads(line) for line in (setting.out / RECORDS).read_text().splitlines()]
    (setting.out / FILE).write_text(source(rows))


def fastest(rows: Iterable[Fields]) -> dict[tuple[str, int, int], tuple[int, ...]]:
    """The fastest tiles of each pass and width, of those that fit on every card."""
    times: dict[tuple[str, int, int], dict[tuple[int, ...], list[float]]] = {}
    for row in rows:
        if "tiles" in row and row["fits_everywhere"]:
            key = (row["pass"], row["H"], ITEMSIZE)
            times.setdefault(key, {}).setdefault(tuple(row["tiles"]), []).append(row["ms"])
    return {
        key: min(of_tiles, key=lambda tiles, x=of_tiles: statistics.median(x[tiles]))  # type: ignore[misc]
        for key, of_tiles in sorted(times.items())
    }


def source(rows: list[Fields]) -> str:
    """The file of the table, from the records of a run."""
    found = fastest(rows)
    measured = [row for row in rows if "tiles" in row]
    where = "nothing"
    if measured:
        one = measured[0]
        where = f"{one['card']}, {one['date']}, jax {one['versions'].get('jax', 'unknown')}"
    lines = [
        f'    ("{kind}", {width}, {size}): ({", ".join(map(str, tiles))}),\n'
        for (kind, width, size), tiles in found.items()
    ]
    return HEADER.format(where=where) + "".join(lines) + "}\n"
