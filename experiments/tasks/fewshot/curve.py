"""A table and a plot of ``fewshot`` runs: accuracy against the number of labeled examples."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import numpy as np

from experiments.tasks.fewshot.config import ALL
from experiments.training.task import COLORS, LadderReport, Rung

TRAINING = 4907  # questions in the training split of trec


def cells(ladder: list[Rung]) -> dict[str, dict[int, Rung]]:
    """Runs by model and number of examples; of several, those nearest to a preset."""
    rows: dict[str, dict[int, Rung]] = {}
    for rung in ladder:
        rows.setdefault(rung.model, {}).setdefault(rung.runs[0]["config"]["examples"], rung)
    return rows


def table(ladder: list[Rung]) -> list[str]:
    """Accuracy by model (rows) and number of examples (columns); the best of a column is bold."""
    rows = cells(ladder)
    sizes = sorted({size for row in rows.values() for size in row}, key=_place)
    best = {
        size: max(row[size].mean("accuracy") for row in rows.values() if size in row)
        for size in sizes
    }
    heads = ["all" if size == ALL else f"{size}" for size in sizes]
    lines = [
        f"| accuracy, %, of labeled examples: | {' | '.join(heads)} | parameters |",
        f"| --- |{' ---: |' * (len(sizes) + 1)}",
    ]
    for model, row in rows.items():
        columns = []
        for size in sizes:
            if size not in row:
                columns.append("")
                continue
            mean, spread = (100 * x("accuracy") for x in (row[size].mean, row[size].spread))
            cell = f"{mean:.1f} ± {spread:.1f}" if len(row[size].runs) > 1 else f"{mean:.1f}"
            bold = row[size].mean("accuracy") == best[size]
            columns.append(f"**{cell}**" if bold else cell)
        parameters = next(iter(row.values())).runs[0]["parameters"]
        lines.append(f"| {model} | {' | '.join(columns)} | {parameters:,} |")
    return lines


def comment(ladder: list[Rung]) -> str:
    """A sentence on the number of draws and the mean training time."""
    draws = sorted({len(rung.runs) for rung in ladder})
    number = f"{draws[0]} to {draws[-1]}" if len(draws) > 1 else f"{draws[0]}"
    seconds = [run["seconds"] for rung in ladder for run in rung.runs if run["parameters"]]
    trained = f" Training took {statistics.fmean(seconds):.0f} seconds a run." if seconds else ""
    return f"Mean and standard deviation over {number} draws of each number of examples.{trained}"


def caption(title: str) -> str:
    """The caption of the plot."""
    return f"Accuracy of {title} against the number of labeled examples"


def draw(ladder: list[Rung], file: Path) -> None:
    """Plots test accuracy against the number of labeled examples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    rows = cells(ladder)
    for color, (model, row) in zip(itertools.cycle(COLORS), rows.items(), strict=False):
        sizes = sorted(row, key=_place)
        x = [_place(size) for size in sizes]
        mean = np.array([100 * row[size].mean("accuracy") for size in sizes])
        spread = np.array([100 * row[size].spread("accuracy") for size in sizes])
        axis.plot(x, mean, color=color, marker="o", markersize=4, linewidth=1.4, label=model)
        axis.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0)
    ticks = sorted({size for row in rows.values() for size in row}, key=_place)
    axis.set_xscale("log")
    axis.set_xticks([_place(size) for size in ticks])
    axis.set_xticklabels(["all" if size == ALL else f"{size}" for size in ticks])
    axis.minorticks_off()
    axis.set_title(
        "test accuracy, %; mean and standard deviation over draws", fontsize=10, loc="left"
    )
    axis.set_xlabel("labeled examples", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.legend(fontsize=8.5, frameon=False, loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, facecolor="white", metadata={"Software": None})


def _place(size: int) -> int:
    """The position of a number of examples on the axis."""
    return TRAINING if size == ALL else size


REPORT = LadderReport(table, comment, caption, draw)
