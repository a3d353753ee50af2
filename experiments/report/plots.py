"""Loss and score of a ladder's runs over time, as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path

from experiments.report.ladders import PERCENT, Rung, words

COLOURS = ("#7a7a7a", "#1b9e77", "#d95f02", "#4a5fc1", "#b0307a", "#8a6d00")


def file(name: str, part: str, results: Path) -> Path:
    """Where the plot of a task's data set is."""
    return results / f"{'-'.join([name, *part.split()])}.png"


def caption(title: str) -> str:
    """What the plot shows."""
    return f"Loss and score of {title} over time"


def draw(ladder: list[Rung], file: Path) -> None:
    """Loss of training, and the score on the validation split, over minutes."""
    # A Figure without pyplot needs no display and leaves no global state.
    from matplotlib.figure import Figure

    metric = ladder[0].runs[0]["metric"]
    factor = 100 if PERCENT.search(metric) else 1
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for number, rung in enumerate(ladder):
        colour = COLOURS[number % len(COLOURS)]
        line = "-" if number < len(COLOURS) else ":"
        label: str | None = rung.name
        if not any(run["curve"] for run in rung.runs):
            known = [run["validation"] for run in rung.runs if run["validation"] is not None]
            if not known:  # records of before counted models had a validation score
                known, label = [run["test"] for run in rung.runs], f"{label} (test)"
            score = factor * statistics.fmean(scores[metric] for scores in known)
            axes[1].axhline(score, color=colour, linestyle="--", linewidth=1.2, label=label)
            continue
        for run in rung.runs:
            minutes = [point["seconds"] / 60 for point in run["curve"]]
            for axis, score, scale in zip(axes, ("loss", metric), (1, factor), strict=True):
                drawn = [scale * point[score] for point in run["curve"]]
                axis.plot(
                    minutes,
                    drawn,
                    color=colour,
                    linestyle=line,
                    linewidth=1,
                    marker=".",
                    markersize=3.5,
                    label=label if axis is axes[1] else None,
                )
            label = None  # once for all seeds
    unit = ", %" if PERCENT.search(metric) else ""
    for axis, title in zip(
        axes, ("loss in training", f"{words(metric)} in validation{unit}"), strict=True
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
