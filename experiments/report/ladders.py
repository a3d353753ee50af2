"""Reads the records of runs and sorts them into ladders; formats scores.

A record is a line of ``TASK.jsonl`` (``runs.record``). Runs that differ only in their seed are a
``Rung``; the rungs on one data set are a ladder.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
from pathlib import Path
from typing import Any

from experiments import tasks
from experiments.training import config as configs
from experiments.training.config import TrainConfig
from experiments.training.task import Record, Rung

# The fields that the tables need.
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

# Options that select the data: runs on different data are in different tables.
DATA_OPTIONS = ("corpus", "graph")


def read(file: Path) -> list[Record]:
    """The records of a file; of several with the same configuration, the last.

    Options that a record lacks, since its run is older than they are, have their defaults.

    Raises:
      ValueError: a line is not a record, or one of another task.
    """
    latest: dict[str, Record] = {}
    defaults: dict[str, Any] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{file}, line {number} is not JSON: {problem}") from None
        where = f"{file}, line {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where} is not a record: it is not a JSON object")
        missing = [name for name in FIELDS if name not in record]
        if not missing:  # scores are looked up by the metric
            metric, points = record["metric"], record["curve"]
            places = [("test", record["test"]), *(("curve", point) for point in points)]
            missing = [f"{metric} in {name}" for name, scores in places if metric not in scores]
        if missing:
            raise ValueError(
                f"{where} is not a record: it lacks {', '.join(dict.fromkeys(missing))}"
            )
        if record["task"] != file.stem:
            raise ValueError(f"{where} is a record of {record['task']}, not {file.stem}")
        defaults = defaults or configs.defaults(type(_preset(file.stem)))
        record["config"] = {**defaults, **record["config"]}
        latest[json.dumps([record["config"], record.get("preset")], sort_keys=True)] = record
    return list(latest.values())


def _preset(name: str) -> TrainConfig:
    """The first preset of a task."""
    first: TrainConfig = next(iter(tasks.load(name).presets.values()))
    return first


def ladders(name: str, records: list[Record]) -> dict[str, list[Rung]]:
    """The ladders of a task by data set, that of the first preset first.

    A task with one data set has one ladder, under the empty name.
    """
    default = configs.as_json(_preset(name))

    def data(config: dict[str, Any]) -> str:
        return " ".join(str(config[option]) for option in DATA_OPTIONS if option in config)

    parts: dict[str, list[Record]] = {data(default): []}
    for record in records:
        parts.setdefault(data(record["config"]), []).append(record)
    return {part: rungs(name, group) for part, group in parts.items() if group}


def rungs(name: str, records: list[Record]) -> list[Rung]:
    """Groups runs that differ only in their seed, in the order of the ladder.

    The rungs of one model are in the order of presets, and within one those closest to the preset
    come first.

    Raises:
      ValueError: a record has a model that the task does not have.
    """
    task, ladder = tasks.load(name), models(name)
    groups: dict[str, list[Record]] = collections.defaultdict(list)
    for record in records:
        if record["model"] not in ladder:
            raise ValueError(
                f"a record has model {record['model']}, which {name} does not have; its models are "
                f"{', '.join(ladder)}"
            )
        key = [record["model"], record.get("preset"), _options(record["config"])]
        groups[json.dumps(key, sort_keys=True)].append(record)

    def position(rung: Rung) -> tuple[int, int, int]:
        run = rung.runs[0]
        names, preset = list(task.presets), str(run.get("preset"))
        changes, order = 0, len(names)
        if preset in names:
            own = task.configured(preset, model=run["model"])
            changes, order = _changes(run["config"], own), names.index(preset)
        return ladder.index(rung.model), order, changes

    unsorted = [
        Rung(_rung_name(runs[0], records), sorted(runs, key=lambda run: run["seed"]))
        for runs in groups.values()
    ]
    return sorted(unsorted, key=position)


def models(name: str) -> tuple[str, ...]:
    """The models of a task, in the order of its ladder."""
    return configs.choices(type(next(iter(tasks.load(name).presets.values()))), "model")


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """The options that distinguish rows of the same model."""
    excluded = ("seed", "model", *configs.MAY_CHANGE)
    return {name: x for name, x in config.items() if name not in excluded}


def _changes(config: dict[str, Any], preset: TrainConfig) -> int:
    """The number of options that differ from the preset."""
    default = json.loads(json.dumps(configs.as_json(preset), default=str))  # as in a record
    return sum(default.get(name) != x for name, x in _options(config).items())


def _rung_name(record: Record, all_records: list[Record]) -> str:
    """The model, with its preset and options where those differ among runs of the model."""
    same = [other for other in all_records if other["model"] == record["model"]]
    preset = record.get("preset")
    alike = [other for other in same if other.get("preset") == preset]
    differing = [] if len(alike) == len(same) else [f"preset {preset}"]
    differing += [
        f"{option} {x}"
        for option, x in _options(record["config"]).items()
        if any(other["config"].get(option) != x for other in alike)
    ]
    return ", ".join([record["model"], *differing])


def exceptions(ladder: list[Rung]) -> list[str]:
    """Where a rung is not better than the one below it by more than the spread, in words."""
    if not ladder:
        return []
    metric, larger = ladder[0].runs[0]["metric"], ladder[0].runs[0]["larger"]
    found = []
    for below, above in itertools.pairwise(ladder):
        gain = above.mean(metric) - below.mean(metric)
        gain = gain if larger else -gain
        spread = max(below.spread(metric), above.spread(metric))
        lower, upper = (
            f"{rung.name} ({format_score(metric, rung.mean(metric))})" for rung in (below, above)
        )
        if abs(gain) <= spread:
            found.append(f"{upper} and {lower} are within the spread")
        elif gain < 0:
            found.append(f"{lower} is better than {upper}")
    return found


# --- Formatting of scores. Those that match no pattern have 3 decimals.

PERCENT = re.compile(r"accuracy$|exact$|f1$|precision$|recall$|^rouge")
WHOLE, ONE_DECIMAL = re.compile(r"repaired$|unaligned$"), re.compile(r"^bleu$")


def format_score(metric: str, x: float) -> str:
    """A score as text.

    >>> format_score("xquad_f1", 0.9125), format_score("nats", 1.6214)
    ('91.2', '1.621')
    >>> format_score("bleu", 31.27), format_score("repaired", 9)
    ('31.3', '9')
    """
    if PERCENT.search(metric):
        return f"{100 * x:.1f}"
    if WHOLE.search(metric):
        return f"{x:,.0f}"
    return f"{x:.1f}" if ONE_DECIMAL.search(metric) else f"{x:.3f}"


def metric_label(metric: str) -> str:
    """The name of a metric in text."""
    return {"bleu": "BLEU", "nats": "nats per character", "bits": "bits per character"}.get(
        metric, metric.replace("_", "-")
    )
