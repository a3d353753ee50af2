"""The text of tiny_shakespeare as bytes, its splits and training batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.datasets.files import path
from experiments.tasks.shakespeare.config import Config
from experiments.training.task import ALL, Rows


class Data(NamedTuple):
    """The text as bytes, and start and stop of its splits."""

    bytes: np.ndarray
    splits: dict[str, tuple[int, int]]


def load(config: Config) -> Data:
    """Training, validation and test split, in the order of the text."""
    if config.synthetic:
        raw = b"".join(b"scene %d: enter %d\n" % (i, i % 7) for i in range(150))
    else:
        raw = path("tiny_shakespeare/input.txt").read_bytes()
    n = len(raw)
    validation, test = n - n // 10 - n // 20, n - n // 10
    splits = {"train": (0, validation), "validation": (validation, test), "test": (test, n)}
    return Data(np.frombuffer(raw, np.uint8).astype(np.int32), splits)


def batches(config: Config, data: Data, step: int, rows: Rows = ALL) -> Iterator[np.ndarray]:
    """Random excerpts ``[B T+1]`` of the training split."""
    start, stop = data.splits["train"]
    T = config.context
    while True:
        rng = np.random.default_rng([config.seed, step])
        at = rows.of(rng.integers(start, stop - T, config.batch_size))
        yield data.bytes[at[:, None] + np.arange(T + 1)]
        step += 1
