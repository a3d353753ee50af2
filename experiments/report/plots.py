"""The usual plot of a ladder: training loss and validation score over time."""

from __future__ import annotations

import statistics
from pathlib import Path

from experiments.report.ladders import PERCENT, metric_label
from experiments.training.task import COLORS, Rung


def file_name(name: str, part: str) -> str:
    """The file with the plot of a task's data set."""
    return f"{'-'.join([name, *part.split()])}.png"


def caption(title: str) -> str:
    """What the plot shows."""
    return f"Loss and score of {title} over time"


def draw(ladder: list[Rung], file: Path) -> None:
    """Draws training loss and validation score over minutes, a line per run."""
    # Without pyplot, a figure needs no display and leaves no global state.
    from matplotlib.figure import Figure

    metric = ladder[0].runs[0]["metric"]
    factor = 100 if PERCENT.search(metric) else 1
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for number, rung in enumerate(ladder):
        color = COLORS[number % len(COLORS)]
        line = "-" if number < len(COLORS) else ":"
        label: str | None = rung.name
        if not any(run["curve"] for run in rung.runs):
            known = [run["validation"] for run in rung.runs if run["validation"] is not None]
            if not known:  # old records of fitted models
                known, label = [run["test"] for run in rung.runs], f"{label} (test)"
            score = factor * statistics.fmean(scores[metric] for scores in known)
            axes[1].axhline(score, color=color, linestyle="--", linewidth=1.2, label=label)
            continue
        for run in rung.runs:
            minutes = [point["seconds"] / 60 for point in run["curve"]]
            for axis, score, scale in zip(axes, ("loss", metric), (1, factor), strict=True):
                values = [scale * point[score] for point in run["curve"]]
                axis.plot(
                    minutes,
                    values,
                    color=color,
                    linestyle=line,
                    linewidth=1,
                    marker=".",
                    markersize=3.5,
                    label=label if axis is axes[1] else None,
                )
            label = None  # one legend entry for all seeds
    unit = ", %" if PERCENT.search(metric) else ""
    for axis, title in zip(
        axes, ("loss in training", f"{metric_label(metric)} in validation{unit}"), strict=True
    ):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("minutes", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_xlim(left=0)
    columns = 4 if max(len(rung.name) for rung in ladder) < 30 else 2
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)
    figure.savefig(file, dpi=100, facecolor="white", metadata={"Software": None})
