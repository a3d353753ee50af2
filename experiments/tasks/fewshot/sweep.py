"""Runs ``fewshot`` for every model, number of labeled examples and seed, and plots the curve.

::

    python -m experiments fewshot --record experiments/results
    python -m experiments fewshot --models adapted finetuned --sizes 30 100 --seeds 1

Runs that already have a record are skipped, so an interrupted sweep resumes when started again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.options import not_one_of
from experiments.tasks import fewshot
from experiments.tasks.classification import Data
from experiments.tasks.fewshot import curve
from experiments.tasks.fewshot.config import ALL, PRESETS, Config
from experiments.tasks.fewshot.pretraining import Pretrained, pretrain
from experiments.training import config as configs
from experiments.training import train
from experiments.training.runs import Flags
from experiments.training.task import Record, Rung, Task

MODELS = configs.choices(Config, "model")
RATES = {"adapted": 6e-3}  # overrides the preset's learning rate: LoRA updates start at zero


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run, and where results go."""

    preset: str = "cpu"
    """The preset that all runs start from."""
    models: tuple[str, ...] = MODELS
    """The models to train."""
    sizes: tuple[int, ...] = (10, 30, 100, 300, 1000, ALL)
    """Numbers of labeled examples; 0 is all."""
    seeds: int = 5
    """Draws of each size."""
    out: Path = Path("runs")
    """Folder of the runs; each is written to fewshot/NAME in it."""
    record: Path | None = None
    """Also append the records to fewshot.jsonl in this folder, and write the plot there, not beside
    the runs. Published results are in experiments/results."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(not_one_of("preset", self.preset, PRESETS))
        for model in self.models:
            if model not in MODELS:
                raise ValueError(not_one_of("models", model, MODELS))
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")


def main(options: Options) -> int:
    """Runs what has no record yet, prints the table and writes the plot; returns the exit code."""
    once = _PretrainOnce()
    task = dataclasses.replace(
        fewshot.TASK, init=lambda config, data, rngs: fewshot.init(config, data, rngs, once)
    )
    records = []
    with _compilation_cache(options.out / "fewshot" / "programs"):
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
    """A rung for each model, in the order of the ladder, and number of labeled examples."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: MODELS.index(record["model"])):
        groups.setdefault((record["model"], record["config"]["examples"]), []).append(record)
    return [Rung(model, runs) for (model, _), runs in groups.items()]


class _PretrainOnce:
    """``pretrain``, cached by seed: it depends on neither the model nor the labeled examples."""

    def __init__(self) -> None:
        self.cache: dict[Config, Pretrained] = {}

    def __call__(self, config: Config, data: Data) -> Pretrained:
        key = dataclasses.replace(config, model="finetuned", examples=ALL)
        if key not in self.cache:
            self.cache[key] = pretrain(config, data)
        return self.cache[key]


def _run(task: Task[Config, Data], options: Options, model: Any, size: int, seed: int) -> Record:
    """The record of a run; runs it if it has none."""
    own = {"learning_rate": RATES[model]} if model in RATES else {}
    config = task.configured(options.preset, model=model, examples=size, seed=seed, **own)
    name = f"{model}-{options.preset}-{size or 'all'}-seed{seed}"
    file = options.out / "fewshot" / name / "record.json"
    if file.exists():
        record: Record = json.loads(file.read_text())
        if record["config"] != configs.as_json(config):
            raise ValueError(
                f"{file} is of another configuration: choose another folder with --out"
            )
        return record
    flags = Flags(out=options.out, name=name, resume=True, record=options.record)
    return train.run(task, config, preset=options.preset, flags=flags)


@contextlib.contextmanager
def _compilation_cache(folder: Path) -> Iterator[None]:
    """Enables JAX's persistent compilation cache: all runs of a model compile the same program."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, x in zip(names, (str(folder.resolve()), 0.5), strict=True):
        jax.config.update(name, x)
    try:
        yield
    finally:
        for name, x in zip(names, before, strict=True):
            jax.config.update(name, x)
