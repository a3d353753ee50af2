"""The page on speed and memory, ``SPEED.md``, from the records of ``bench`` and ``card``.

::

    bench.json           calls of attention
    bench-models.json    whole models
    scaling.json         growth with length (``bench --scaling``)
    card*.jsonl          GPU kernels (``card``, see ``gpu``)

A record may have ``remarks``, paragraphs on that measurement, which are added below its table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.bench import scaling, tables
from experiments.bench.shapes import WINDOW
from experiments.report import gpu

INTRODUCTION = """\
# Speed and memory

Measured by `python -m experiments bench`. To reproduce it, with torch and transformers:

```sh
python -m pip install -e ".[experiments,peers]"
python -m experiments bench
python -m experiments bench --scaling
```

All implementations are timed in alternation in one process, and times are medians. A ratio says
how many times faster ours is, and is bold where it reaches its target. Ratios vary by a quarter
from run to run, and with the processor. {elsewhere}

This page is written by `python -m experiments report` from the records in this folder; edit those,
not the page. The scores of trained models are in [README.md](README.md)."""

SECTIONS = {
    "bench.json": "## Calls of attention",
    "bench-models.json": "## Whole models",
}

SCALING = f"""\
## Growth with length

The forward pass of one head of width {scaling.H}, in float32, for every mask and every mechanism.
Windows, chunks and segments have {WINDOW} tokens. The slope is that of log time against log
length from {scaling.FROM:,} to {scaling.TO:,} tokens: 1 is linear, 2 is quadratic. Memory is what
the compiled program plans in addition to arguments and results."""


def page(results: Path) -> str:
    """The page, from the records of a folder; a missing one leaves its section out."""
    on_gpu = gpu.section(results)
    measured = f"GPUs: [below](#on-a-gpu). TPUs: {gpu.NOT_MEASURED}."
    elsewhere = measured if on_gpu else f"GPUs and TPUs: {gpu.NOT_MEASURED}."
    blocks = [INTRODUCTION.format(elsewhere=elsewhere)]
    for name, heading in SECTIONS.items():
        if (results / name).exists():
            blocks += [heading, *_bench(_read(results / name))]
            if (picture := results / name.replace(".json", ".png")).exists():
                blocks.append(f"![Speed of attention_jax beside other libraries]({picture.name})")
    if (results / scaling.FILE).exists():
        blocks += [SCALING, *_scaling(_read(results / scaling.FILE))]
    blocks += on_gpu
    return "\n\n".join(blocks) + "\n"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _bench(record: dict[str, Any]) -> list[str]:
    """Provenance, table and remarks."""
    machine = record["machine"]
    versions = [f"{package} {x}" for package, x in record["versions"].items()]
    repeats = [f"medians of {record['repeats']} runs"] if record.get("repeats") else []
    parts = [
        record["date"],
        f"{machine['cores']} cores of {machine['cpu']}",
        "float32",
        *versions,
        *repeats,
    ]
    table = tables.table(tables.read(record)).rstrip("\n")
    return [", ".join(parts) + ".", table, *record.get("remarks", [])]


def _scaling(record: dict[str, Any]) -> list[str]:
    """Table, provenance and picture."""
    provenance = (
        f"{record['time']}, on {record['device']}, jax {record['jax']}. Bold: linear, a slope of "
        f"at most {scaling.STEEPEST}. Empty: too long or too large to measure."
    )
    picture = "![Time and memory against length](scaling.png)"
    return ["\n".join(scaling.table(record)), provenance, picture]
