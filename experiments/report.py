"""From the records in ``experiments/results`` to the tables and plots of the README.

``TASK.jsonl`` has a line for each run (``runs.record``). For each task the README has a place
between two comments, ``<!-- report:TASK -->`` and ``<!-- /report:TASK -->``; what stands there is
replaced by a table, mean and spread over seeds, a sentence on whether the classic order holds, and
a plot. What was not run is not there.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import config as configs
from experiments import scaling, tasks
from experiments.config import Config

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

# How scores are written; others with 3 decimals.
PERCENT = re.compile(r"accuracy$|exact$|f1$|precision$|recall$|^rouge")
WHOLE, ONE_DECIMAL = re.compile(r"repaired$|unaligned$"), re.compile(r"^bleu$")

# Options that say what data a run is on: runs on other data are in another table.
DATA = ("corpus", "graph")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to read, and where to write."""

    results: Path = Path("experiments/results")
    """The folder of the records."""
    readme: Path = Path("README.md")
    """The file with the places."""
    check: bool = False
    """Write nothing; end with exit code 1 where the tables are not up to date."""


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


def main(options: Options) -> int:
    """Writes the tables, and the plots beside the records; returns the exit code."""
    before = readme = options.readme.read_text(encoding="utf-8")
    found: dict[str, dict[str, list[Rung]]] = {}
    for name in tasks.TASKS:
        file = options.results / f"{name}.jsonl"
        if file.exists():
            found[name] = ladders(name, read(file))
        said = block(name, found.get(name), options.results)
        readme = replaced(readme, name, said, options.readme, needed=name in found)
    if (options.results / scaling.FILE).exists():
        said = scaling.block(options.results)
        readme = replaced(readme, "scaling", said, options.readme, needed=True)
    if options.check:
        if readme != before:
            print(f"{options.readme} is not up to date: python -m experiments report")
        return int(readme != before)
    for name, parts in found.items():
        for part, ladder in parts.items():
            if _trained(ladder):
                file = picture(name, part, options.results)
                _own(name, draw)(ladder, file)
                print(f"wrote {file}")
    options.readme.write_text(readme, encoding="utf-8")
    print(f"wrote {options.readme}")
    return 0


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


def picture(name: str, part: str, results: Path) -> Path:
    """The file of a ladder's plot."""
    return results / f"{'-'.join([name, *part.split()])}.png"


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


# --- Text.


def block(name: str, parts: dict[str, list[Rung]] | None, results: Path) -> str:
    """What stands in a task's place."""
    if not parts:
        return f"Not run yet: `python -m experiments train {name} --record {results}`."
    return "\n\n".join(_said(name, part, ladder, results) for part, ladder in parts.items())


def _said(name: str, part: str, ladder: list[Rung], results: Path) -> str:
    """Of one ladder."""
    lines = [f"On `{part}`:", ""] if part else []
    lines += [*_own(name, table)(ladder), "", _own(name, order)(ladder)]
    if absent := [x for x in models(name) if x not in {rung.model for rung in ladder}]:
        lines[-1] += f" Not run yet: {', '.join(absent)}."
    runs = [run for rung in ladder for run in rung.runs]
    found = [run["versions"].items() for run in runs if "versions" in run]
    versions = dict.fromkeys(f"{package} {x}" for items in found for package, x in items)
    devices = sorted({run.get("device", "a device not recorded") for run in runs})
    dates = sorted({run["time"][:10] for run in runs if "time" in run})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "undated"
    lines += ["", f"{when}, on {', '.join([*devices, *versions])}."]
    lines += [f"Scores: `{signature}`." for signature in _signatures(runs)]
    if _trained(ladder):
        title = " ".join(filter(None, (name, part)))
        file = picture(name, part, results).as_posix()
        lines += ["", f"![{_own(name, caption)(title)}]({file})"]
    return "\n".join(lines)


def caption(title: str) -> str:
    """What the plot shows."""
    return f"Loss and score of {title} over time"


def _own(name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
    """``table``, ``order``, ``caption`` or ``draw``; those of ``curve`` for what it runs."""
    if name != "fewshot":
        return usual
    from experiments import curve  # which reads records as we do

    found: Callable[..., Any] = getattr(curve, usual.__name__)
    return found


def _signatures(runs: list[Record]) -> list[str]:
    """How scores were counted: a field of the record, or words among its scores."""
    said = [x for run in runs for x in (run.get("signature"), *run["test"].values())]
    return sorted({x for x in said if isinstance(x, str)})


def table(ladder: list[Rung]) -> list[str]:
    """One row for each rung; the best score is bold."""
    first = ladder[0].runs[0]
    metric, larger = first["metric"], first["larger"]
    tests = [run["test"].items() for rung in ladder for run in rung.runs]
    scores = (x for test in tests for x, score in test if not isinstance(score, str))
    metrics = list(dict.fromkeys((metric, *scores)))
    best = (max if larger else min)(rung.mean(metric) for rung in ladder)
    heads = [*(f"{_words(x)}{', %' if PERCENT.search(x) else ''}" for x in metrics)]
    lines = [
        f"| model | {' | '.join(heads)} | seeds | parameters | steps | seconds |",
        f"| --- |{' ---: |' * (len(heads) + 4)}",
    ]
    for rung in ladder:
        cells = []
        for x in metrics:
            if any(x not in run["test"] for run in rung.runs):
                cells.append("")
                continue
            cell = shown(x, rung.mean(x))
            if len(rung.runs) > 1:
                cell += f" ± {shown(x, rung.spread(x))}"
            bold = x == metric and rung.mean(metric) == best
            cells.append(f"**{cell}**" if bold else cell)
        run = rung.runs[0]
        seconds = statistics.fmean(one["seconds"] for one in rung.runs)
        steps = statistics.fmean(one.get("steps", 0) for one in rung.runs)
        cells += [str(len(rung.runs)), f"{run['parameters']:,}", f"{steps:,.0f}", f"{seconds:,.0f}"]
        lines.append(f"| {rung.name} | {' | '.join(cells)} |")
    return lines


def order(ladder: list[Rung]) -> str:
    """Whether each model is better than the one before it; of a model, the first row counts."""
    ladder = [next(rows) for _, rows in itertools.groupby(ladder, key=lambda rung: rung.model)]
    first = ladder[0].runs[0]
    metric, larger = first["metric"], first["larger"]
    said = []
    for below, above in itertools.pairwise(ladder):
        one, other = below.mean(metric), above.mean(metric)
        gain = other - one if larger else one - other
        spread = max(below.spread(metric), above.spread(metric))
        both = (
            f"{above.name} ({shown(metric, other)}) and {below.name} ({shown(metric, one)}) are "
            f"within the spread"
        )
        if abs(gain) <= spread:
            said.append(both)
        elif gain < 0:
            said.append(
                f"{below.name} ({shown(metric, one)}) is better than {above.name} "
                f"({shown(metric, other)})"
            )
    alone = " Where there is one seed, no spread is known." if _single(ladder) else ""
    if len(ladder) < 2:
        return f"One rung of the ladder.{alone}"
    if not said:
        return f"The classic order holds: each rung is better than the one before it.{alone}"
    return f"The classic order does not hold throughout: {'; '.join(said)}.{alone}"


def _trained(ladder: list[Rung]) -> bool:
    """Whether there is anything to draw: models that are counted have no curve."""
    return any(run["curve"] for rung in ladder for run in rung.runs)


def _single(ladder: list[Rung]) -> bool:
    """Whether one that is trained, and so depends on its seed, has but one."""
    return any(len(rung.runs) == 1 and rung.runs[0]["parameters"] for rung in ladder)


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


def _words(metric: str) -> str:
    return {"bleu": "BLEU", "nats": "nats per character", "bits": "bits per character"}.get(
        metric, metric.replace("_", "-")
    )


def replaced(text: str, name: str, said: str, file: Path, *, needed: bool) -> str:
    """The text with what is said in a task's place.

    Raises:
      ValueError: there is no such place, and it is needed.
    """
    begin, end = f"<!-- report:{name} -->", f"<!-- /report:{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        if needed:
            raise ValueError(f"{file} has no place for {name}: add the lines {begin} and {end}")
        return text
    return pattern.sub(lambda _: f"{begin}\n{said}\n{end}", text, count=1)


# --- Pictures.

COLOURS = ("#7a7a7a", "#1b9e77", "#d95f02", "#4a5fc1", "#b0307a", "#8a6d00")


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
        axes, ("loss in training", f"{_words(metric)} in validation{unit}"), strict=True
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
