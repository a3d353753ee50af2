"""Records of runs, read and put in the order of their ladder.

A record is a line of ``TASK.jsonl`` (``runs.record``). Runs that differ in nothing but their seed
are a ``Rung``; the rungs of one data set are a ladder.
"""

from __future__ import annotations

import collections
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import tasks
from experiments.training import config as configs
from experiments.training.config import Config

Record = dict[str, Any]

# What a record must have to be in a table.
FIELDS = (
    "task",
    "model",
    "seed",
    "metric",
    "larger",
    "test",
    "validation",
    "curve",
    "parameters",
    "seconds",
    "config",
)

# Options that say what data a run is on: runs on other data are in another table.
DATA = ("corpus", "graph")


class Rung(NamedTuple):
    """All the runs that differ in nothing but their seed."""

    name: str
    runs: list[Record]

    @property
    def model(self) -> str:
        """The name without options."""
        return self.runs[0]["model"]

    def scores(self, metric: str) -> list[float]:
        """One for each seed."""
        return [run["test"][metric] for run in self.runs]

    def mean(self, metric: str) -> float:
        """Over seeds."""
        return statistics.fmean(self.scores(metric))

    def spread(self, metric: str) -> float:
        """The sample standard deviation over seeds; 0 of a single one."""
        scores = self.scores(metric)
        return statistics.stdev(scores) if len(scores) > 1 else 0.0


class Shown(NamedTuple):
    """What is shown of a ladder; a task may have its own."""

    table: Callable[[list[Rung]], list[str]]
    """The lines of a table."""
    order: Callable[[list[Rung]], str]
    """What to say of it."""
    caption: Callable[[str], str]
    """What the plot shows, of the ladder's title."""
    draw: Callable[[list[Rung], Path], None]
    """Writes the plot."""


def read(file: Path) -> list[Record]:
    """The records of a file, the last of each configuration.

    Raises:
      ValueError: a line is no record, or that of another task.
    """
    kept: dict[str, Record] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{file}, line {number} is no JSON: {problem}") from None
        where = f"{file}, line {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where} is no record: it is no JSON object")
        missing = [name for name in FIELDS if name not in record]
        if not missing:  # scores are looked up by the metric
            metric, points = record["metric"], record["curve"]
            wanted = [("test", record["test"]), *(("curve", point) for point in points)]
            missing = [f"{metric} in {name}" for name, scores in wanted if metric not in scores]
        if missing:
            raise ValueError(f"{where} is no record: it lacks {', '.join(dict.fromkeys(missing))}")
        if record["task"] != file.stem:
            raise ValueError(f"{where} is a record of {record['task']}, not of {file.stem}")
        kept[json.dumps([record["config"], record.get("preset")], sort_keys=True)] = record
    return list(kept.values())


def ladders(name: str, records: list[Record]) -> dict[str, list[Rung]]:
    """For each of a task's data sets, by name, its ladder; that of the first preset first.

    A task of one data set has one ladder, without a name.
    """
    usual = configs.as_json(next(iter(tasks.load(name).presets.values())))

    def data(config: dict[str, Any]) -> str:
        return " ".join(str(config[option]) for option in DATA if option in config)

    parts: dict[str, list[Record]] = {data(usual): []}
    for record in records:
        parts.setdefault(data(record["config"]), []).append(record)
    return {part: rungs(name, some) for part, some in parts.items() if some}


def rungs(name: str, records: list[Record]) -> list[Rung]:
    """Runs that belong together, in the order of the ladder; of a model, those like a preset first.

    Raises:
      ValueError: a record is of a model that the task does not have.
    """
    presets, ladder = tasks.load(name).presets, models(name)
    groups: dict[str, list[Record]] = collections.defaultdict(list)
    for record in records:
        if record["model"] not in ladder:
            raise ValueError(
                f"{name} has no model {record['model']}, which a record is of; it has "
                f"{', '.join(ladder)}"
            )
        key = [record["model"], record.get("preset"), _options(record["config"])]
        groups[json.dumps(key, sort_keys=True)].append(record)

    def place(rung: Rung) -> tuple[int, int, int]:
        run = rung.runs[0]
        names, preset = list(presets), str(run.get("preset"))
        changed, order = 0, len(names)
        if preset in presets:
            changed, order = _changes(run["config"], presets[preset]), names.index(preset)
        return ladder.index(rung.model), order, changed

    named = [
        Rung(_named(runs[0], records), sorted(runs, key=lambda run: run["seed"]))
        for runs in groups.values()
    ]
    return sorted(named, key=place)


def models(name: str) -> tuple[str, ...]:
    """The ladder of a task."""
    return configs.choices(type(next(iter(tasks.load(name).presets.values()))), "model")


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """Those that set rows of the same model apart."""
    apart = ("seed", "model", *configs.MAY_CHANGE)
    return {name: x for name, x in config.items() if name not in apart}


def _changes(config: dict[str, Any], preset: Config) -> int:
    """How many options of a run are not its preset's."""
    usual = json.loads(json.dumps(configs.as_json(preset), default=str))  # as a record has them
    return sum(usual.get(name) != x for name, x in _options(config).items())


def _named(record: Record, all_records: list[Record]) -> str:
    """The model; its preset and options where others of the same model have others."""
    same = [other for other in all_records if other["model"] == record["model"]]
    preset = record.get("preset")
    alike = [other for other in same if other.get("preset") == preset]
    odd = [] if len(alike) == len(same) else [f"preset {preset}"]
    odd += [
        f"{option} {x}"
        for option, x in _options(record["config"]).items()
        if any(other["config"].get(option) != x for other in alike)
    ]
    return ", ".join([record["model"], *odd])


# --- How scores are written; those of no pattern with 3 decimals.

PERCENT = re.compile(r"accuracy$|exact$|f1$|precision$|recall$|^rouge")
WHOLE, ONE_DECIMAL = re.compile(r"repaired$|unaligned$"), re.compile(r"^bleu$")


def shown(metric: str, x: float) -> str:
    """A score as it is written.

    >>> shown("xquad_f1", 0.9125), shown("nats", 1.6214), shown("bleu", 31.27), shown("repaired", 9)
    ('91.2', '1.621', '31.3', '9')
    """
    if PERCENT.search(metric):
        return f"{100 * x:.1f}"
    if WHOLE.search(metric):
        return f"{x:,.0f}"
    return f"{x:.1f}" if ONE_DECIMAL.search(metric) else f"{x:.3f}"


def words(metric: str) -> str:
    """A metric as it is called in text."""
    return {"bleu": "BLEU", "nats": "nats per character", "bits": "bits per character"}.get(
        metric, metric.replace("_", "-")
    )
