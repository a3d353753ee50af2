"""``fewshot`` for every model, number of labelled examples and seed; ``curve`` shows the runs.

::

    python -m experiments fewshot --record experiments/results
    python -m experiments fewshot --models adapted finetuned --sizes 30 100 --seeds 1

A run whose record is there is not run again: what was broken off goes on when it is called again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.tasks import fewshot
from experiments.tasks.classification import Data
from experiments.tasks.fewshot import Config, Pretrained, curve
from experiments.tasks.fewshot.curve import ALL
from experiments.training import config as configs
from experiments.training import train
from experiments.training.runs import Flags
from experiments.training.task import Record, Rung

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
    ladder = rungs(records)
    print("\n".join(curve.table(ladder)))
    curve.draw(ladder, file)
    print(f"wrote {file}")
    return 0


def rungs(records: list[Record]) -> list[Rung]:
    """A rung for each model, in the order of the ladder, and number of labelled examples."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: MODELS.index(record["model"])):
        groups.setdefault((record["model"], record["config"]["examples"]), []).append(record)
    return [Rung(model, runs) for (model, _), runs in groups.items()]


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
    flags = Flags(out=options.out, name=name, resume=True, record=options.record)
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
