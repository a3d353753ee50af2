"""The GPU part of ``SPEED.md`` and of the README, from the records of ``card``.

``card*.jsonl`` are runs on a card, several of one card are read in the order of their names: a
later measurement of the same thing replaces an earlier one. Dry runs are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FILES = "card*.jsonl"
PICTURE = "card.png"
NOT_MEASURED = "not measured"

# Colors and order of the bars, ours first.
COLORS = {
    "ours, auto": "#d1495b",
    "ours, pallas_gpu": "#e07a5f",
    "ours, cudnn": "#f2b5a7",
    "ours, fa4": "#f4d6cc",
    "ours, blockwise": "#c9ada7",
    "jax.nn, cudnn": "#8d99ae",
    "jax, Hopper kernel": "#5c677d",
    "fa4_jax": "#b5c0d0",
    "tokamax": "#778da9",
    "torch, SDPA": "#2b2d42",
    "torch, flex": "#415a77",
}
# What the plot shows, by kind and length, both directions: enough to compare by.
DRAWN_LENGTH, DRAWN_WIDTH = 4096, 128

INTRODUCTION = """\
## On a GPU

Measured by `python -m experiments card`, in bfloat16. TFLOP/s count the visible pairs of query and
key, `4 * pairs * H` forward and 2.5 times that backward; decoding is given in GB/s of keys and
values. The best of a row is bold. Memory, first calls and refusals are in the records."""

# In the README.
START, END = "<!-- gpu -->\n", "<!-- /gpu -->\n"


def read(results: Path) -> dict[str, list[Row]]:
    """The records by card, those of dry runs left out."""
    cards: dict[str, list[Row]] = {}
    for file in sorted(results.glob(FILES)):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if not row.get("dry"):
                cards.setdefault(row["card"], []).append(row)
    return cards


def section(results: Path) -> list[str]:
    """The blocks of the page; none without records."""
    cards = read(results)
    if not cards:
        return []
    blocks = [INTRODUCTION]
    for card, rows in cards.items():
        blocks += [f"### {card}", provenance(rows), *filter(None, map("\n".join, _tables(rows)))]
    if any(drawn(rows) for rows in cards.values()):
        blocks.append(f"![TFLOP/s of each implementation]({PICTURE})")
    return blocks


def provenance(rows: list[Row]) -> str:
    """Date, versions, and the two rates of the card."""
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = [f"{name} {x}" for name, x in rows[-1]["versions"].items()]
    driver = [f"driver {row['driver']}" for row in rows if "driver" in row][-1:]
    text = ", ".join([when, *driver, *versions]) + "."
    rates = []
    if (matrix := _most(rows, "matrix_tflops")) is not None:
        rates.append(f"bfloat16 matrix products {matrix:,.0f} TFLOP/s")
    copies = [row for row in rows if row.get("item") == "copy"]
    if (bandwidth := _most(copies, "gb_per_s")) is not None:
        rates.append(f"copies {bandwidth:,.0f} GB/s")
    return f"{text} Measured limits: {', '.join(rates)}." if rates else text


def _most(rows: list[Row], field: str) -> float | None:
    return max((row[field] for row in rows if field in row), default=None)


# --- Tables.


def _tables(rows: list[Row]) -> list[list[str]]:
    return [_calls(rows), _models(rows), _presets(rows), _contract(rows)]


def measured(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Of each call and direction, the last measurement of each implementation."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["part"] == "speed" and "ms" in row:
            found.setdefault((row["call"], row["direction"]), {})[row["implementation"]] = row
    return found


def _calls(rows: list[Row]) -> list[str]:
    """A row for each call, a column for each implementation."""
    found = measured(rows)
    if not found:
        return []
    met = {name for of_call in found.values() for name in of_call}
    names = [name for name in COLORS if name in met] + sorted(met - COLORS.keys())
    lines = [
        f"| call | {' | '.join(names)} | share of matrix rate |",
        f"| --- |{' ---: |' * (len(names) + 1)}",
    ]
    for (call, direction), of_call in found.items():
        best = min(of_call.values(), key=lambda row: row["ms"])
        cells = []
        for name in names:
            cell = _speed(of_call[name]) if name in of_call else ""
            cells.append(f"**{cell}**" if of_call.get(name) is best else cell)
        ours = [row["share"] for name, row in of_call.items() if name.startswith("ours")]
        shares = [share for share in ours if share is not None]
        share = f"{max(shares):.0%}" if shares and best["kind"] != "decode" else ""
        lines.append(f"| {direction}, {call} | {' | '.join(cells)} | {share} |")
    return lines


def _speed(row: Row) -> str:
    text = f"{row['gb_per_s']:,.0f} GB/s" if "gb_per_s" in row else f"{row['tflops']:,.0f}"
    return f"{text} (launch-bound)" if row.get("launch_bound") else text


def _models(rows: list[Row]) -> list[str]:
    """Training steps and generation."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["part"] == "training" and "tokens_per_s" in row:
            found.setdefault(row["work"], {})[row["implementation"]] = row
    if not found:
        return []
    lines = ["| work | ours | vs flax.nnx with cuDNN | MFU |", "| --- | ---: | ---: | ---: |"]
    for work, of_work in found.items():
        ours, other = of_work.get("ours"), of_work.get("flax.nnx, cudnn")
        speed = "" if ours is None else f"{ours['tokens_per_s']:,.0f} tokens/s"
        ratio = ""
        if ours is not None and other is not None:
            ratio = f"{ours['tokens_per_s'] / other['tokens_per_s']:.2f}x"
        mfu = "" if ours is None or ours.get("mfu") is None else f"{ours['mfu']:.0%}"
        lines.append(f"| {work} | {speed} | {ratio} | {mfu} |")
    return lines


def _presets(rows: list[Row]) -> list[str]:
    """Scores of trained models."""
    found = {row["task"]: row for row in rows if row["part"] == "presets" and "score" in row}
    if not found:
        return []
    lines = ["| task | score | aim | steps | seconds |", "| --- | ---: | ---: | ---: | ---: |"]
    for task, row in found.items():
        score = f"{row['score']:.2f} {row['metric']}"
        score = f"**{score}**" if row["reached"] else score
        steps = f"{row['steps']:,} of {row['of_steps']:,}"
        lines.append(
            f"| {task}, {row['preset']} | {score} | {row['target']:g} | {steps} "
            f"| {row['seconds']:,.0f} |"
        )
    return lines


def _contract(rows: list[Row]) -> list[str]:
    """How many cases were right, refused and failed, by implementation and dtype."""
    last = {
        (row["implementation"], row["dtype"], row["item"]): row["verdict"]
        for row in rows
        if row["part"] == "contract" and "verdict" in row
    }
    if not last:
        return []
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for (implementation, dtype, _), verdict in last.items():
        of_both = counts.setdefault((implementation, dtype), {})
        of_both[verdict] = of_both.get(verdict, 0) + 1
    lines = [
        "| against the oracle | dtype | right | refused | failed |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (implementation, dtype), n in sorted(counts.items()):
        cells = " | ".join(str(n.get(verdict, 0)) for verdict in ("ok", "refused", "failed"))
        lines.append(f"| {implementation} | {dtype} | {cells} |")
    return lines


# --- The plot.


def drawn(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """By direction and kind, the TFLOP/s of each implementation at one size."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (_, direction), of_call in measured(rows).items():
        for name, row in of_call.items():
            if (row["T"], row["H"]) == (DRAWN_LENGTH, DRAWN_WIDTH):
                kinds = found.setdefault(direction, {})
                kinds.setdefault(row["kind"], {})[name] = row["tflops"]
    return found


def draw(results: Path) -> Path | None:
    """Draws the bars of every card; returns the file, or None if there is nothing to draw."""
    panels = [
        (f"{card}: {direction}", kinds)
        for card, rows in read(results).items()
        for direction, kinds in drawn(rows).items()
    ]
    if not panels:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.4 * len(panels), 6.4), squeeze=False, layout="constrained"
    )
    met = {name for _, kinds in panels for of_kind in kinds.values() for name in of_kind}
    names = [name for name in COLORS if name in met]
    height = 0.84 / len(names)
    for axis, (title, kinds) in zip(axes[0], panels, strict=True):
        for i, name in enumerate(names):
            y = np.arange(len(kinds)) + (i - (len(names) - 1) / 2) * height
            speeds = [of_kind.get(name, 0.0) for of_kind in kinds.values()]
            axis.barh(y, speeds, height=0.92 * height, color=COLORS[name], label=name)
        axis.set_yticks(range(len(kinds)), list(kinds))
        axis.invert_yaxis()
        axis.set_xlabel("TFLOP/s of the visible pairs (higher is better)")
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"bfloat16, {DRAWN_LENGTH:,} tokens, H = {DRAWN_WIDTH}", fontsize=9)
    file = results / PICTURE
    figure.savefig(file, dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return file


# --- The README.


def readme(text: str, results: Path) -> str:
    """The README with its paragraph on GPUs between the two marks written again.

    Raises:
      ValueError: the marks are missing.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md must hold the lines {START.strip()} and {END.strip()}")
    return before + start + paragraph(results) + end + after


def paragraph(results: Path) -> str:
    """What the README says of the speed on GPUs."""
    parts = []
    for card, rows in read(results).items():
        for direction, kinds in drawn(rows).items():
            if (causal := kinds.get("causal")) is not None:
                names = [name for name in COLORS if name in causal]
                speeds = ", ".join(f"`{name}` {causal[name]:,.0f}" for name in names)
                parts.append(f"- {card}, {direction}: {speeds}\n")
    if not parts:
        return f"Speed on GPUs: {NOT_MEASURED}.\n"
    head = (
        f"TFLOP/s of causal attention over {DRAWN_LENGTH:,} tokens, H = {DRAWN_WIDTH}, in "
        f"bfloat16 ([more](experiments/results/SPEED.md#on-a-gpu)):\n\n"
    )
    return head + "".join(parts)
