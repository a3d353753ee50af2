"""``sweep``: searches the hyperparameters of each model of a task by random search.

::

    python -m experiments sweep TASK --minutes 30
    python -m experiments sweep ner --corpus wnut17 --models gru transformer

Each model has the same time budget. Trial 0 is the preset; those after it draw the options of the
model's search space (``Task.spaces``) at random. A trial trains as ``train`` does and is judged by
its best validation score; the test split is not scored. Another trial begins while one of average
length fits into what is left of the budget.

``TASK.jsonl`` has a line for each trial. Trials that it has are not run again; an interrupted one
resumes from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import shutil
import statistics
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.options import PROGRAM, flag, not_one_of
from experiments.training import config as configs
from experiments.training import runs, search, train
from experiments.training.config import TrainConfig
from experiments.training.progress import one_line
from experiments.training.task import Record, Task

LAST = 1000  # no search has more trials
FIELDS = (
    "model",
    "preset",
    "options",
    "metric",
    "larger",
    "validation",
    "steps",
    "finished",
    "seconds",
    "config",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``sweep``."""

    preset: str = "cpu"
    """The preset that trials start from."""
    models: tuple[str, ...] = ()
    """The models to search; default all that have a search space."""
    minutes: float = 30.0
    """Time budget of each model. A trial stops after this time at the latest."""
    trials: int | None = None
    """Trials of each model at most; None for as many as the budget allows."""
    seed: int = 0
    """Seed of the random draws, and of every trial."""
    out: Path = Path("runs")
    """Folder of the runs, TASK/sweep-MODEL-PRESET-CODE, which are removed when they end."""
    results: Path = Path("experiments/results/sweeps")
    """Folder of TASK.jsonl, which has a line for each trial."""

    def __post_init__(self) -> None:
        for name in ("minutes", "trials"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")


def main(task: Task[Any, Any], options: Options, fixed: Mapping[str, Any] | None = None) -> int:
    """Runs the trials that are left, and prints the best of each model; returns the exit code.

    Args:
      task: whose models are searched.
      options: those of the search.
      fixed: options of the task that all trials have, in place of the preset's; they are not
        searched.

    Raises:
      ValueError: an unknown preset, or a model without a search space.
    """
    if options.preset not in task.presets:
        raise ValueError(not_one_of("preset", options.preset, task.presets))
    if not task.spaces:
        raise ValueError(f"{task.name} has no search spaces: add them to its Task as spaces")
    for model in options.models:
        if model not in task.spaces:
            raise ValueError(not_one_of("models", model, task.spaces))
    fixed = {} if fixed is None else fixed
    file = options.results / f"{task.name}.jsonl"
    done = read(file)
    lines = []
    for model in options.models or task.spaces:
        found = _search(task, model, options, fixed, done, file)
        lines.append(summary(task, model, options, fixed, found))
    print("\n".join(["", *lines]))
    return 0


def read(file: Path) -> list[Record]:
    """The trials of a file; none if there is no file.

    Raises:
      ValueError: a line is not a trial.
    """
    if not file.exists():
        return []
    trials = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            trial = json.loads(line)
        except json.JSONDecodeError:
            trial = None
        if not isinstance(trial, dict) or any(name not in trial for name in FIELDS):
            raise ValueError(f"{file}, line {number} is not a trial: remove it")
        trials.append(trial)
    return trials


def _search(
    task: Task[Any, Any],
    model: str,
    options: Options,
    fixed: Mapping[str, Any],
    done: list[Record],
    file: Path,
) -> list[Record]:
    """The trials of a model within the budget; runs those that ``done`` lacks."""
    space = {name: x for name, x in task.spaces[model].items() if name not in fixed}
    found: list[Record] = []
    tried: list[TrainConfig] = []
    for number in range(LAST):
        spent = [trial["seconds"] for trial in found]
        next_one = statistics.fmean(spent) if spent else 0.0
        full = options.trials is not None and len(found) >= options.trials
        if full or sum(spent) + next_one > 60 * options.minutes:
            break
        drawn = search.sample(space, options.seed, model, number)
        config = _config(task, model, options, {**fixed, **drawn})
        if config in tried:
            continue
        tried.append(config)
        same = [trial for trial in done if _is_of(trial, task, config, options.preset)]
        if same:
            found.append(same[-1])
            continue
        trial = _run(task, config, options, number, drawn)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(trial, default=str) + "\n")
        found.append(trial)
    return found


def _config(
    task: Task[Any, Any], model: str, options: Options, changes: dict[str, Any]
) -> TrainConfig:
    config: TrainConfig = task.configured(options.preset, model=model, seed=options.seed, **changes)
    limit = options.minutes if config.minutes is None else min(config.minutes, options.minutes)
    return dataclasses.replace(config, minutes=limit)


def _is_of(trial: Record, task: Task[Any, Any], config: TrainConfig, preset: str) -> bool:
    """Whether a trial ran with this configuration; options that are newer have their defaults."""
    wanted = json.loads(json.dumps(configs.as_json(config), default=str))
    ran = {**configs.defaults(type(config)), **trial["config"]}
    same = all(ran.get(name) == x for name, x in wanted.items() if name != "minutes")
    cut = trial["steps"] < config.steps and not trial["finished"]  # by a shorter time
    longer = (config.minutes or math.inf) > (trial["config"]["minutes"] or math.inf)
    return same and trial["preset"] == preset and not (cut and longer)


def _run(
    task: Task[Any, Any], config: TrainConfig, options: Options, number: int, drawn: dict[str, Any]
) -> Record:
    """Trains a trial; returns its record, without a score if the loss diverged."""
    model: str = getattr(config, "model")  # noqa: B009 - each task has its own ladder
    code = zlib.crc32(json.dumps(configs.as_json(config), sort_keys=True).encode())
    name = f"sweep-{model}-{options.preset}-{code:08x}"
    flags = runs.Flags(out=options.out, name=name, resume=True)
    folder = runs.start(task, config, preset=options.preset, flags=flags)
    changed = ", ".join(f"{name} {x}" for name, x in drawn.items())
    print(f"{model}, trial {number}: {changed or 'the preset'}", flush=True)
    validation, problem, seconds, steps, finished = None, None, 0.0, 0, True
    began = datetime.datetime.now(datetime.UTC)
    try:
        progress = train.train(task, config, task.data(config), folder, flags).progress
        validation, seconds, steps = progress.best, progress.seconds, progress.step
        finished = progress.finished
    except FloatingPointError as diverged:
        problem = str(diverged)
        seconds = (datetime.datetime.now(datetime.UTC) - began).total_seconds()
    shutil.rmtree(folder)  # the weights of a trial are not used
    print(f"{model}, trial {number}: {one_line(validation) if validation else problem}", flush=True)
    return {
        "task": task.name,
        "model": model,
        "preset": options.preset,
        "trial": number,
        "options": drawn,
        "metric": task.metric,
        "larger": task.larger,
        "validation": validation,
        "problem": problem,
        "steps": steps,
        "finished": finished,
        "seconds": round(seconds, 2),
        "budget_minutes": options.minutes,
        "config": configs.as_json(config),
        "time": began.isoformat(timespec="seconds"),
        "device": runs.device(),
        "versions": runs.versions(),
    }


def summary(
    task: Task[Any, Any],
    model: str,
    options: Options,
    fixed: Mapping[str, Any],
    trials: list[Record],
) -> str:
    """The best trial of a model beside its preset, and the command that trains with it."""
    minutes = sum(trial["seconds"] for trial in trials) / 60
    count = f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}"
    budget = f"{count} in {minutes:.1f} of {options.minutes:g} minutes"
    best = best_of(trials)
    if best is None:
        return f"{model}: {budget}, and every loss diverged"
    score = f"{task.metric} {best['validation'][task.metric]:.4f}"
    before = trials[0]["validation"]
    preset = "diverged" if before is None else f"{before[task.metric]:.4f}"
    changed = {**fixed, **best["options"]}
    if best["steps"] < best["config"]["steps"]:  # its time was up
        changed["minutes"] = best["config"]["minutes"]
    given = [x for name, value in changed.items() for x in as_arguments(name, value)]
    command = " ".join([PROGRAM, "train", task.name, "--preset", options.preset])
    return (
        f"{model}: {budget}; best on validation {score}, the preset {preset}\n"
        f"    {' '.join([command, '--model', model, *given])}"
    )


def as_arguments(name: str, value: Any) -> list[str]:
    """An option as the command line takes it."""
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [flag(name), *map(str, values)]


def best_of(trials: list[Record]) -> Record | None:
    """The trial with the best validation score, the first of equals; None if all diverged."""
    scored = [
        (trial["validation"][trial["metric"]], trial) for trial in trials if trial["validation"]
    ]
    scored = [(score, trial) for score, trial in scored if not math.isnan(score)]
    if not scored:
        return None
    larger = scored[0][1]["larger"]
    return (max if larger else min)(scored, key=lambda pair: pair[0])[1]
