"""``report``: the pages and plots of ``experiments/results``, from the records there.

``TASK.jsonl`` has a line for each run (``runs.record``). ``README.md`` opens with the classic
ladders (see ``classic``) and gets a section for each task: a table with mean and spread over seeds,
whether each rung of the ladder is better than the one before it, and a plot. ``SPEED.md`` gets the
measurements of ``bench`` and ``card`` (see ``speed`` and ``gpu``), and so does the paragraph on
GPUs in the repository's README.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from pathlib import Path

from experiments import tasks
from experiments.report import classic, gpu, plots, speed
from experiments.report.ladders import (
    PERCENT,
    exceptions,
    format_score,
    ladders,
    metric_label,
    models,
    read,
)
from experiments.training.task import LadderReport, Record, Rung

Ladders = dict[str, list[Rung]]  # by data set, of one task


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``report``."""

    results: Path = Path("experiments/results")
    """The folder of the records, and of the pages and plots."""
    check: bool = False
    """Write nothing; exit with code 1 if a page is out of date."""


def main(options: Options) -> int:
    """Writes the pages, and the plots beside them; returns the exit code."""
    results = options.results
    found = {
        name: ladders(name, read(file))
        for name in tasks.TASKS
        if (file := results / f"{name}.jsonl").exists()
    }
    pages = {results / "README.md": page(found), results / "SPEED.md": speed.page(results)}
    readme = results.resolve().parents[1] / "README.md"  # of the repository
    if readme.exists():
        pages[readme] = gpu.readme(readme.read_text(encoding="utf-8"), results)
    if options.check:
        stale = [file for file, text in pages.items() if _text(file) != text]
        for file in stale:
            print(f"{file} is out of date: run python -m experiments report")
        return int(bool(stale))
    for name, parts in found.items():
        for part, ladder in parts.items():
            if _has_curves(ladder):
                file = results / plots.file_name(name, part)
                _report(name).draw(ladder, file)
                print(f"wrote {file}")
    if (picture := gpu.draw(results)) is not None:
        print(f"wrote {picture}")
    for file, text in pages.items():
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}")
    return 0


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.exists() else None


# --- The page.

INTRODUCTION = """\
# Results

What self-attention buys on real tasks, beside classic models. Each row is one model of a task's
ladder, trained by `python -m experiments train TASK --model MODEL` with the `cpu` preset unless its
name says otherwise. Scores are those of the test split, with the weights that were best on the
validation split; `±` is the standard deviation over seeds. Seconds are those of a whole run. The
Transformer of `shakespeare` and the models `pretrained` had both cores of a machine with two, in
`relations` and `ner` beside other work and until their 15 minutes were over; the other runs had one
core, with other work beside them. How to run a task:
[experiments](../README.md). Speed and memory of attention itself: [SPEED.md](SPEED.md); over
several devices: [SHARDING.md](SHARDING.md).

This page is written by `python -m experiments report` from the records in this folder
(`TASK.jsonl`); edit those, not the page."""

# What a reader needs to interpret a table, by task.
NOTES = {
    "relations": (
        "Macro-F1 is the official score; the nouns are marked in the text. `attention` averages "
        "over all tokens; whether that is why it falls behind was not tested."
    ),
    "ner": "F1 of whole spans with their kind, counted like the CoNLL scorer.",
    "listops": (
        "The value of the whole expression is scored. Training also asks for the value of every "
        "list inside it, so scores are not comparable to the Long Range Arena. Knowing the "
        "outermost operator alone gives 34 to 35 % on expressions of up to 512 tokens. The test "
        "split has 1,000 expressions: a score is uncertain by 1.5 points. The options were chosen "
        "with the Transformer, among four settings; the other models use them unchanged."
    ),
    "vqa": (
        "Five kinds of question. A model without the image, or without the question, can only "
        "guess (38 %)."
    ),
    "links": (
        "Ranks are among all entities except other correct answers (filtered). DistMult's "
        "published MRR is 0.241 on FB15k-237 and 0.43 on WN18RR. The latter has three times as "
        "many entities to score, so 10 minutes on one core see each fact about twice; longer runs "
        "were not tried."
    ),
    "summarise": (
        "ROUGE F1 without stemming. `lead` takes the first 12 words of an article or the first "
        "sentence of an abstract; `copier` is a Transformer that generates words or copies "
        "those of the source. Models that must generate every word learn little from 6,080 titles: "
        "the Transformer gave the same title to five articles out of five."
    ),
    "qa": (
        "Exact match and F1 by the rules of SQuAD 1.1, on articles that training did not have; "
        "`xquad` is a second test set, of other articles with one reference each. Only the encoder "
        "of `pretrained` has read other text."
    ),
    "fewshot": (
        "TREC's questions, of which only some are labeled; `python -m experiments fewshot` runs "
        "the whole curve. The learning rate of `adapted` was chosen between two on one draw of 100 "
        "examples; the models above it share one that was not tuned for each."
    ),
}


def page(found: dict[str, Ladders]) -> str:
    """The page of all tasks, from the ladders of those that were run."""
    tables = (section(name, found.get(name, {})) for name in tasks.TASKS)
    sections = [INTRODUCTION, classic.section(found), *tables]
    return "\n\n".join(sections) + "\n"


def section(name: str, parts: Ladders) -> str:
    """The section of a task."""
    summary = tasks.TASKS[name]
    about = summary.about[0].upper() + summary.about[1:]
    blocks = [f"## {name}", f"{about}. Data: {summary.data}."]
    blocks += [NOTES[name]] if name in NOTES else []
    blocks += [ladder_block(name, part, ladder) for part, ladder in parts.items()]
    if not parts:
        blocks.append(
            f"Not run yet: `python -m experiments train {name} --record experiments/results`."
        )
    return "\n\n".join(blocks)


def ladder_block(name: str, part: str, ladder: list[Rung]) -> str:
    """Table, comment, provenance and plot of one ladder."""
    report = _report(name)
    comment = report.comment(ladder)
    if absent := [x for x in models(name) if x not in {rung.model for rung in ladder}]:
        comment += f" Not run yet: {', '.join(absent)}."
    lines = [f"On `{part}`:", ""] if part else []
    lines += [*report.table(ladder), "", comment]
    runs = [run for rung in ladder for run in rung.runs]
    found = [run["versions"].items() for run in runs if "versions" in run]
    versions = dict.fromkeys(f"{package} {x}" for items in found for package, x in items)
    devices = sorted({run.get("device", "unrecorded device") for run in runs})
    dates = sorted({run["time"][:10] for run in runs if "time" in run})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "undated"
    lines += ["", f"{when}, on {', '.join([*devices, *versions])}."]
    lines += [f"Signature of the scores: `{signature}`." for signature in _signatures(runs)]
    if _has_curves(ladder):
        title = " ".join(filter(None, (name, part)))
        lines += ["", f"![{report.caption(title)}]({plots.file_name(name, part)})"]
    return "\n".join(lines)


def _report(name: str) -> LadderReport:
    """A task's own report, or the usual one."""
    return tasks.load(name).report or LadderReport(table, comment, plots.caption, plots.draw)


def _signatures(runs: list[Record]) -> list[str]:
    """How scores were computed: a field of the record, or text among its scores."""
    values = [x for run in runs for x in (run.get("signature"), *run["test"].values())]
    return sorted({x for x in values if isinstance(x, str)})


# --- The usual table and comment.


def table(ladder: list[Rung]) -> list[str]:
    """A row for each rung; the best score is bold."""
    first = ladder[0].runs[0]
    metric, larger = first["metric"], first["larger"]
    tests = [run["test"].items() for rung in ladder for run in rung.runs]
    scores = (x for test in tests for x, score in test if not isinstance(score, str))
    metrics = list(dict.fromkeys((metric, *scores)))
    best = (max if larger else min)(rung.mean(metric) for rung in ladder)
    heads = [f"{metric_label(x)}{', %' if PERCENT.search(x) else ''}" for x in metrics]
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
            cell = format_score(x, rung.mean(x))
            if len(rung.runs) > 1:
                cell += f" ± {format_score(x, rung.spread(x))}"
            bold = x == metric and rung.mean(metric) == best
            cells.append(f"**{cell}**" if bold else cell)
        run = rung.runs[0]
        seconds = statistics.fmean(one["seconds"] for one in rung.runs)
        steps = statistics.fmean(one.get("steps", 0) for one in rung.runs)
        cells += [str(len(rung.runs)), f"{run['parameters']:,}", f"{steps:,.0f}", f"{seconds:,.0f}"]
        lines.append(f"| {rung.name} | {' | '.join(cells)} |")
    return lines


def comment(ladder: list[Rung]) -> str:
    """Where a model is no better than the one above it. The first row of a model counts."""
    ladder = [next(rows) for _, rows in itertools.groupby(ladder, key=lambda rung: rung.model)]
    found = exceptions(ladder)
    single = " Rows with one seed have no spread." if _single_seed(ladder) else ""
    if len(ladder) < 2:
        return f"Only one model of the ladder.{single}"
    if not found:
        return f"Each model is better than the one above it.{single}"
    listed = "; ".join(found)
    return f"Each model is better than the one above it, with exceptions: {listed}.{single}"


def _has_curves(ladder: list[Rung]) -> bool:
    """Whether there is anything to plot: models fitted by counting have no curve."""
    return any(run["curve"] for rung in ladder for run in rung.runs)


def _single_seed(ladder: list[Rung]) -> bool:
    """Whether a trained model, which depends on its seed, has only one."""
    return any(len(rung.runs) == 1 and rung.runs[0]["parameters"] for rung in ladder)
