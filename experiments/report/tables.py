"""From the records in ``experiments/results`` to the tables and plots of the README.

``TASK.jsonl`` has a line for each run (``runs.record``). For each task the README has a place
between two comments, ``<!-- report:TASK -->`` and ``<!-- /report:TASK -->``; what stands there is
replaced by a table, mean and spread over seeds, a sentence on whether the classic order holds, and
a plot. What was not run is not there.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
from pathlib import Path

from experiments import tasks
from experiments.bench import scaling
from experiments.report import plots
from experiments.report.ladders import (
    PERCENT,
    Record,
    Rung,
    Shown,
    ladders,
    models,
    read,
    shown,
    words,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to read, and where to write."""

    results: Path = Path("experiments/results")
    """The folder of the records."""
    readme: Path = Path("README.md")
    """The file with the places."""
    check: bool = False
    """Write nothing; end with exit code 1 where the tables are not up to date."""


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
                file = plots.file(name, part, options.results)
                _own(name).draw(ladder, file)
                print(f"wrote {file}")
    options.readme.write_text(readme, encoding="utf-8")
    print(f"wrote {options.readme}")
    return 0


# --- Text.


def block(name: str, parts: dict[str, list[Rung]] | None, results: Path) -> str:
    """What stands in a task's place."""
    if not parts:
        return f"Not run yet: `python -m experiments train {name} --record {results}`."
    return "\n\n".join(_said(name, part, ladder, results) for part, ladder in parts.items())


def _said(name: str, part: str, ladder: list[Rung], results: Path) -> str:
    """Of one ladder."""
    lines = [f"On `{part}`:", ""] if part else []
    own = _own(name)
    lines += [*own.table(ladder), "", own.order(ladder)]
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
        file = plots.file(name, part, results).as_posix()
        lines += ["", f"![{own.caption(title)}]({file})"]
    return "\n".join(lines)


def _own(name: str) -> Shown:
    """A task's own way to show its runs, or that of most."""
    return tasks.load(name).shown or Shown(table, order, plots.caption, plots.draw)


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
    heads = [*(f"{words(x)}{', %' if PERCENT.search(x) else ''}" for x in metrics)]
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
