"""The table that opens the results page: four ladders from classic models to attention.

Each ladder is a task whose rungs are models in the order in which the field found them. The table,
and the sentence that says whether each rung is better than the one below it, come from the records.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from experiments.report.ladders import PERCENT, exceptions, format_score, metric_label
from experiments.training.task import Rung

SHORTER = 0.9  # of the time of another rung, from which a shorter time is mentioned

Ladders = Mapping[str, list[Rung]]  # by data set, of one task


class Step(NamedTuple):
    """A rung of a classic ladder."""

    label: str
    model: str
    adversarial: bool = False
    """Whether it is the adversarially trained model; of several strengths, the one with the best
    validation score counts."""


class Ladder(NamedTuple):
    """Which models of a task form a ladder."""

    title: str
    task: str
    steps: tuple[Step, ...]
    part: str = ""
    """The data set, of a task with several."""
    why: str = ""
    """What may explain an order that does not hold."""


CLASSIFICATION = (
    Step("classic", "naive_bayes"),
    Step("CNN", "text_cnn"),
    Step("self-attention + CNN", "attention_cnn"),
    Step("pretrained", "pretrained"),
)

LADDERS = (
    Ladder(
        "Translation",
        "multi30k",
        (
            Step("seq2seq", "gru"),
            Step("+ attention", "gru_attention"),
            Step("Transformer", "transformer"),
        ),
    ),
    Ladder(
        "Summarization",
        "summarise",
        (
            Step("extractive", "lead"),
            Step("+ self-attention", "copier"),
            Step("+ adversarial training", "copier", adversarial=True),
        ),
        part="titles",
        why=(
            "Adversarial training computes two gradients in each step; both rungs take the same "
            "number of steps."
        ),
    ),
    Ladder(
        "Classification of questions",
        "trec",
        CLASSIFICATION,
    ),
    Ladder(
        "Classification of sentiment",
        "sst2",
        CLASSIFICATION,
        why=(
            "The models learn from 6,920 sentences; most published results also train on the ten "
            "times as many phrases of the trees."
        ),
    ),
    Ladder(
        "Generation",
        "shakespeare",
        (
            Step("rules", "ngram"),
            Step("recurrent", "gru"),
            Step("recurrent + attention", "gru_attention"),
            Step("Transformer", "transformer"),
        ),
    ),
)

INTRODUCTION = """\
## The classic ladders

From the models of the textbooks to attention, each rung with its test score, `±` the standard
deviation over seeds. Of a model with several rows in the section of its task, the row closest to
the preset counts."""


def section(found: Mapping[str, Ladders]) -> str:
    """The section of all ladders.

    Args:
      found: the ladders of each task that was run.
    """
    lines = [
        "| ladder | rung | model | score | seeds | minutes |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    remarks = []
    for ladder in LADDERS:
        rungs = found.get(ladder.task, {}).get(ladder.part, [])
        steps = [(step, _chosen(step, rungs)) for step in ladder.steps]
        metric = next((rung.runs[0]["metric"] for _, rung in steps if rung is not None), "")
        measured = f"{metric_label(metric)}{', %' if PERCENT.search(metric) else ''}"
        data = f"`{' '.join(filter(None, (ladder.task, ladder.part)))}`"
        title = f"{ladder.title}: {data}" + (f", {measured}" if metric else "")
        for step, rung in steps:
            lines.append(f"| {title} | {step.label} | {' | '.join(_cells(step, rung))} |")
            title = ""
        remarks.append(f"- **{ladder.title}** ({data}): {verdict(ladder, rungs)}")
    return "\n\n".join((INTRODUCTION, "\n".join(lines), "\n".join(remarks)))


def _cells(step: Step, rung: Rung | None) -> list[str]:
    """Model, score, seeds and minutes."""
    if rung is None:
        return [f"`{step.model}`", "not run yet", "", ""]
    run = rung.runs[0]
    metric = run["metric"]
    score = format_score(metric, rung.mean(metric))
    if len(rung.runs) > 1:
        score += f" ± {format_score(metric, rung.spread(metric))}"
    strength = f" `--adversarial {run['config']['adversarial']}`" if step.adversarial else ""
    return [f"`{rung.model}`{strength}", score, str(len(rung.runs)), f"{_minutes(rung):.1f}"]


def _minutes(rung: Rung) -> float:
    """Of a run, on average."""
    return statistics.fmean(run["seconds"] for run in rung.runs) / 60


def verdict(ladder: Ladder, rungs: list[Rung]) -> str:
    """Whether each rung is better than the one below it, and where it is not.

    Two rungs are compared if one of them has several seeds, whose spread the difference must
    exceed, or if both are fitted without a seed.

    Args:
      ladder: the models, in order.
      rungs: all rungs of its data set.
    """
    chosen = [(step, _chosen(step, rungs)) for step in ladder.steps]
    run = [Rung(step.label, rung.runs) for step, rung in chosen if rung is not None]
    missing = [step.label for step, rung in chosen if rung is None]
    tail = [f"Not run yet: {', '.join(missing)}."] if missing else []
    if len(run) < 2:
        return " ".join(["There is nothing to compare.", *tail])
    so_far = " so far" if missing else ""
    pairs = list(itertools.pairwise(run))
    undecided = [pair for pair in pairs if not _has_spread(pair)]
    found = [x for pair in pairs if pair not in undecided for x in exceptions(list(pair))]
    seen = "; ".join(map(_difference, undecided))
    if len(undecided) == len(pairs):
        parts = [f"There is no verdict on the order{so_far}, with one seed each: {seen}."]
    elif not found:
        parts = [f"The order holds{so_far}{' where there is a spread' if undecided else ''}."]
    elif any(" is better than " in x for x in found):
        parts = [f"The order does not hold{so_far}: {'; '.join(found)}."]
    else:
        parts = [f"The order is not established{so_far}: {'; '.join(found)}."]
    if undecided and len(undecided) < len(pairs):
        parts.append(f"No verdict with one seed each: {seen}.")
    parts += _shorter(run) + _longer(chosen, rungs)
    parts += [ladder.why] if (found or " is behind " in seen) and ladder.why else []
    strengths = len([x for step in ladder.steps if step.adversarial for x in _of(step, rungs)])
    if strengths:
        kinds = "One strength was" if strengths == 1 else f"{strengths} strengths were"
        parts.append(f"{kinds} tried.")
    told = [rung for pair in undecided for rung in pair]
    single = [x.name for x in run if len(x.runs) == 1 and not _fitted(x) and x not in told]
    if single:
        parts.append(f"One seed, hence no spread: {', '.join(single)}.")
    return " ".join([*parts, *tail])


def _has_spread(pair: tuple[Rung, Rung]) -> bool:
    """Whether a difference of two rungs can be told from chance."""
    return any(len(rung.runs) > 1 for rung in pair) or all(map(_fitted, pair))


def _difference(pair: tuple[Rung, Rung]) -> str:
    """Which of two rungs has the better score, in words that are no verdict."""
    below, above = pair
    metric, larger = below.runs[0]["metric"], below.runs[0]["larger"]
    gain = above.mean(metric) - below.mean(metric)
    way = "level with" if not gain else "ahead of" if (gain > 0) == larger else "behind"
    one, other = (f"{x.name} ({format_score(metric, x.mean(metric))})" for x in (above, below))
    return f"{one} is {way} {other}"


def _fitted(rung: Rung) -> bool:
    """Whether the model has no weights, so that every seed gives the same score."""
    return not rung.runs[0]["parameters"]


def _shorter(rungs: list[Rung]) -> list[str]:
    """Sentences on rungs that are behind the one below them and trained for less time."""
    sentences = []
    for below, above in itertools.pairwise(rungs):
        less, more = _minutes(above), _minutes(below)
        if exceptions([below, above]) and less < SHORTER * more:
            sentences.append(
                f"{above.name} trained for {less:.0f} minutes, {below.name} for {more:.0f}."
            )
    return sentences


def _longer(chosen: list[tuple[Step, Rung | None]], rungs: list[Rung]) -> list[str]:
    """Sentences on rows of the same model, with other options, that are better than its rung."""
    sentences = []
    for step, rung in chosen:
        if rung is None or step.adversarial:
            continue
        metric, larger = rung.runs[0]["metric"], rung.runs[0]["larger"]
        for other in _of(step, rungs):
            gain = other.mean(metric) - rung.mean(metric)
            if (gain if larger else -gain) > 0:
                score = format_score(metric, other.mean(metric))
                sentences.append(
                    f"`{other.name}` reaches {score} in {_minutes(other):.0f} minutes."
                )
    return sentences


def _of(step: Step, rungs: list[Rung]) -> list[Rung]:
    """The rows of the step's model, those closest to the preset first."""
    return [
        rung
        for rung in rungs
        if rung.model == step.model
        and bool(rung.runs[0]["config"].get("adversarial")) == step.adversarial
    ]


def _chosen(step: Step, rungs: list[Rung]) -> Rung | None:
    """The row that counts; None if the model was not run."""
    found = _of(step, rungs)
    if not step.adversarial:
        return found[0] if found else None

    def validation(rung: Rung) -> float:
        run = rung.runs[0]
        mean = statistics.fmean(one["validation"][run["metric"]] for one in rung.runs)
        return mean if run["larger"] else -mean

    return max(found, key=validation, default=None)
