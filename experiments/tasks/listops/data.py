"""Random expressions as arrays: the fixed splits, and an endless stream of training batches."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.datasets import text
from experiments.tasks.listops.config import Config
from experiments.tasks.listops.expressions import expression, values
from experiments.training.task import ALL, Array, Rows


class Examples(NamedTuple):
    """Expressions as token indices, and their values."""

    rows: list[list[int]]
    labels: np.ndarray


class Data(NamedTuple):
    """The validation and test splits; training expressions are generated on the fly."""

    splits: dict[str, Examples]


class Batch(NamedTuple):
    """Tokens ``[B T]``, values ``[B]``, and the values of all lists ``[B T]``; see ``values``."""

    tokens: Array
    labels: Array
    values: Array


def examples(config: Config, n: int, rng: random.Random) -> Examples:
    """``n`` random expressions of ``shortest`` to ``longest`` tokens."""
    rows: list[list[int]] = []
    labels = []
    while len(rows) < n:
        row, label = expression(config, rng)
        if config.shortest <= len(row) <= config.longest:
            rows.append(row)
            labels.append(label)
    return Examples(rows, np.array(labels, np.int32))


def load(config: Config) -> Data:
    """The validation and test splits, the same for every seed."""
    n = 64 if config.synthetic else 1000
    names = ("validation", "test")
    return Data({name: examples(config, n, random.Random(name)) for name in names})


def buckets(config: Config) -> list[int]:
    """Lengths to pad to."""
    return sorted({config.longest, *(x for x in text.BUCKETS if 32 < x < config.longest)})


def batches(config: Config, data: Data, step: int, rows: Rows = ALL) -> Iterator[Batch]:
    """New expressions at every step, up to a length drawn uniformly from ``buckets``.

    A batch has ``batch_size`` expressions of the longest bucket and more of a shorter one, so that
    all batches have about the same number of tokens. Short expressions teach the models most.
    """
    *shorter, longest = buckets(config)
    lengths = [*(length for length in shorter if length >= 2 * config.shortest), longest]
    while True:
        rng = random.Random(f"train {config.seed} {step}")
        length = rng.choice(lengths)
        n = config.batch_size * (config.longest // length)
        mine = rows.slice(n)  # each expression depends on those before it
        drawn, labels = examples(dataclasses.replace(config, longest=length), mine.stop, rng)
        expressions = drawn[mine]
        of_lists = text.padded([values(row) for row in expressions], length)
        yield Batch(text.padded(expressions, length), labels[mine], of_lists)
        step += 1
