"""``fewshot`` for every model, number of labelled examples and seed, and what came of it.

::

    python -m experiments fewshot --record experiments/results
    python -m experiments fewshot --models adapted finetuned --sizes 30 100 --seeds 1

A run whose record is there is not run again: what was broken off goes on when it is called again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import config as configs
from experiments import report, train
from experiments.report import Record, Rung
from experiments.tasks import fewshot
from experiments.tasks.classification import Data
from experiments.tasks.fewshot import ALL, Config, Pretrained

TRAINING = 4907  # labelled questions there are
MODELS = configs.choices(Config, "model")
RATES = {"adapted": 6e-3}  # learning rates other than the preset's: adapters begin at nothing


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    preset: str = "cpu"
    """Whose options every run has."""
    models: tuple[str, ...] = MODELS
    """The rungs of the ladder."""
    sizes: tuple[int, ...] = (10, 30, 100, 300, 1000, ALL)
    """Numbers of labelled examples; 0 is all."""
    seeds: int = 5
    """How many draws of each size."""
    out: Path = Path("runs")
    """The folder that runs go to, each in one of its own, fewshot/NAME."""
    record: Path | None = None
    """A folder whose fewshot.jsonl the records are also appended to, and where the plot goes;
    experiments/results is ours. Without it the plot is beside the runs."""

    def __post_init__(self) -> None:
        checks = {
            "preset": ({self.preset}, tuple(fewshot.PRESETS)),
            "models": ({*self.models}, MODELS),
        }
        for name, (given, known) in checks.items():
            if unknown := sorted(given - {*known}):
                raise ValueError(f"{name} must be of {', '.join(known)}, got {', '.join(unknown)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")


def main(options: Options) -> int:
    """Runs what was not run, and draws; returns the exit code."""
    once = _Once()
    task = dataclasses.replace(
        fewshot.TASK, init=lambda config, data, rngs: fewshot.init(config, data, rngs, once)
    )
    records = []
    with _programs_kept(options.out / "fewshot" / "programs"):
        for seed in range(options.seeds):
            for model in options.models:
                for size in options.sizes:
                    records.append(_run(task, options, model, size, seed))
    file = (options.record or options.out / "fewshot") / "fewshot.png"
    ladder = report.rungs("fewshot", records)
    print("\n".join(table(ladder)))
    draw(ladder, file)
    print(f"wrote {file}")
    return 0


class _Once:
    """``fewshot.pretrain``, of each seed once: it does not depend on model and examples."""

    def __init__(self) -> None:
        self.kept: dict[Config, Pretrained] = {}

    def __call__(self, config: Config, data: Data) -> Pretrained:
        key = dataclasses.replace(config, model="finetuned", examples=ALL)
        if key not in self.kept:
            self.kept[key] = fewshot.pretrain(config, data)
        return self.kept[key]


def _run(task: Any, options: Options, model: Any, size: int, seed: int) -> Record:
    """The record of a run, which is made where there is none."""
    preset = fewshot.PRESETS[options.preset]
    rate = RATES.get(model, preset.learning_rate)
    config = dataclasses.replace(preset, model=model, examples=size, seed=seed, learning_rate=rate)
    name = f"{model}-{options.preset}-{size or 'all'}-seed{seed}"
    file = options.out / "fewshot" / name / "record.json"
    if file.exists():
        record: Record = json.loads(file.read_text())
        if record["config"] != configs.as_json(config):
            raise ValueError(f"{file} is of another configuration: take another folder, --out")
        return record
    flags = train.Flags(out=options.out, name=name, resume=True, record=options.record)
    return train.run(task, config, preset=options.preset, flags=flags)


@contextlib.contextmanager
def _programs_kept(folder: Path) -> Iterator[None]:
    """Keeps what XLA compiles: all runs of a model have one program."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, x in zip(names, (str(folder.resolve()), 0.5), strict=True):
        jax.config.update(name, x)
    try:
        yield
    finally:
        for name, x in zip(names, before, strict=True):
            jax.config.update(name, x)


# --- What came of it.


def cells(ladder: list[Rung]) -> dict[str, dict[int, Rung]]:
    """By model and number of examples; of those that differ in more, what is most like a preset."""
    found: dict[str, dict[int, Rung]] = {}
    for rung in ladder:
        found.setdefault(rung.model, {}).setdefault(rung.runs[0]["config"]["examples"], rung)
    return found


def table(ladder: list[Rung]) -> list[str]:
    """Accuracy: a row for each model, a column for each number; the best of a column is bold."""
    rows = cells(ladder)
    sizes = sorted({size for row in rows.values() for size in row}, key=_place)
    best = {
        size: max(row[size].mean("accuracy") for row in rows.values() if size in row)
        for size in sizes
    }
    heads = ["all" if size == ALL else f"{size}" for size in sizes]
    lines = [
        f"| accuracy, %, of labelled examples: | {' | '.join(heads)} | parameters |",
        f"| --- |{' ---: |' * (len(sizes) + 1)}",
    ]
    for model, row in rows.items():
        shown = []
        for size in sizes:
            if size not in row:
                shown.append("")
                continue
            mean, spread = (100 * x("accuracy") for x in (row[size].mean, row[size].spread))
            cell = f"{mean:.1f} ± {spread:.1f}" if len(row[size].runs) > 1 else f"{mean:.1f}"
            bold = row[size].mean("accuracy") == best[size]
            shown.append(f"**{cell}**" if bold else cell)
        parameters = next(iter(row.values())).runs[0]["parameters"]
        lines.append(f"| {model} | {' | '.join(shown)} | {parameters:,} |")
    return lines


def order(ladder: list[Rung]) -> str:
    """Of how many draws the table is, and how long a run took."""
    draws = sorted({len(rung.runs) for rung in ladder})
    number = f"{draws[0]} to {draws[-1]}" if len(draws) > 1 else f"{draws[0]}"
    seconds = [run["seconds"] for rung in ladder for run in rung.runs if run["parameters"]]
    trained = f" Training took {statistics.fmean(seconds):.0f} seconds a run." if seconds else ""
    return f"Mean and standard deviation over draws, {number} of each number of examples.{trained}"


def caption(title: str) -> str:
    """What the plot shows."""
    return f"Accuracy of {title} against the number of labelled examples"


def draw(ladder: list[Rung], file: Path) -> None:
    """Accuracy on the test split against the number of labelled examples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    rows = cells(ladder)
    for colour, (model, row) in zip(itertools.cycle(report.COLOURS), rows.items(), strict=False):
        sizes = sorted(row, key=_place)
        x = [_place(size) for size in sizes]
        mean = np.array([100 * row[size].mean("accuracy") for size in sizes])
        spread = np.array([100 * row[size].spread("accuracy") for size in sizes])
        axis.plot(x, mean, color=colour, marker="o", markersize=4, linewidth=1.4, label=model)
        axis.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    ticks = sorted({size for row in rows.values() for size in row}, key=_place)
    axis.set_xscale("log")
    axis.set_xticks([_place(size) for size in ticks])
    axis.set_xticklabels(["all" if size == ALL else f"{size}" for size in ticks])
    axis.minorticks_off()
    axis.set_title("test accuracy, %; mean and deviation over draws", fontsize=10, loc="left")
    axis.set_xlabel("labelled examples", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.legend(fontsize=8.5, frameon=False, loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, facecolor="white", metadata={"Software": None})


def _place(size: int) -> int:
    """Where a number of examples is on the axis."""
    return TRAINING if size == ALL else size
