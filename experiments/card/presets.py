"""The ``accelerator`` presets of two tasks, each with its own time limit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from experiments.card.parts import Fields, Item, Setting, Skipped
from experiments.tasks import load
from experiments.training.runs import Flags
from experiments.training.train import run as train

# Task, metric, and the score to reach: at most for nats, at least for BLEU.
TARGETS = (("shakespeare", "nats", 1.48), ("multi30k", "bleu", 36.0))
LEAST = 45.0  # seconds: below, a run says nothing
SPARE = 0.25  # of the time, for compiling, evaluating and scoring


def items(setting: Setting) -> Iterator[Item]:
    """Half of the time for the first task, all that is left for the second."""
    for number, (task, metric, target) in enumerate(TARGETS):
        seconds = setting.seconds / len(TARGETS) * (1 if number == 0 else 0.95)
        run = functools.partial(preset, task, metric, target, seconds, setting)
        yield Item(task, run, limit=seconds)


def preset(
    name: str, metric: str, target: float, seconds: float, setting: Setting
) -> Iterator[Fields]:
    """Trains within the time and scores the test split."""
    if not setting.dry and seconds < LEAST:
        raise Skipped(f"{seconds:.0f} s are left, at least {LEAST:.0f} are needed")
    task = load(name)
    which = "smoke" if setting.dry else "accelerator"
    config: Any = task.presets[which]
    if not setting.dry:
        config = dataclasses.replace(config, minutes=(1 - SPARE) * seconds / 60)
    flags = Flags(out=setting.out / "runs", overwrite=True)
    found = train(task, config, preset=which, flags=flags)
    score = found["test"][metric]
    yield {
        "task": name,
        "preset": which,
        "metric": metric,
        "score": score,
        "target": target,
        "reached": score >= target if task.larger else score <= target,
        "steps": found["steps"],
        "of_steps": config.steps,
        "seconds": found["seconds"],
    }
