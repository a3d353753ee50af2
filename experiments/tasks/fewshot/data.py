"""TREC with few labels: stratified draws of labeled questions, batches of a fixed shape."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from experiments.datasets import text
from experiments.tasks import classification, trec
from experiments.tasks.classification import Batch, Data, Split
from experiments.tasks.fewshot.config import Config
from experiments.training.task import ALL, Rows


def load(config: Config) -> Data:
    """The splits of ``trec``, with few training questions, and all of them as ``"unlabeled"``.

    Raises:
      ValueError: there are fewer training questions than ``examples``.
    """
    data = classification.load(trec.CLASSES, trec.read, config)
    full = data.splits["train"]
    if config.examples > len(full.labels):
        raise ValueError(
            f"examples must be at most {len(full.labels)}, the number of training questions, got "
            f"{config.examples}"
        )
    index = draw(full.labels, config.seed)[: config.examples or None]
    few = Split(
        [full.rows[i] for i in index],
        full.lengths[index],
        full.labels[index],
        [full.texts[i] for i in index],
    )
    unlabeled = full._replace(labels=np.full_like(full.labels, -1))
    return data._replace(splits=data.splits | {"train": few, "unlabeled": unlabeled})


def draw(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order of examples, every prefix of which is a stratified draw.

    One example of each class comes first. After that, example ``i`` of the ``n`` of a class is
    placed at ``i / n`` of the way, so that every prefix has about the class proportions of the
    whole.

    >>> labels = np.array([0] * 6 + [1] * 3)
    >>> [labels[draw(labels, seed=0)[:n]].tolist().count(0) for n in (2, 3, 6)]
    [1, 2, 4]
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
        place[members[0]] = -1
    return order[np.argsort(place[order], kind="stable")]


def cycle(n: int, size: int, seed: int, step: int) -> Iterator[np.ndarray]:
    """Batches of exactly ``size`` indices below ``n``, which continue across epochs.

    >>> np.concatenate(list(itertools.islice(cycle(3, 4, seed=0, step=0), 3))).tolist()
    [2, 0, 1, 2, 0, 1, 2, 1, 0, 2, 1, 0]
    """
    for number in itertools.count(step):
        epochs, places = np.divmod(np.arange(number * size, (number + 1) * size), n)
        orders = {e: np.random.default_rng([seed, e]).permutation(n) for e in set(epochs.tolist())}
        yield np.array([orders[e][i] for e, i in zip(epochs.tolist(), places, strict=True)])


def batches(config: Config, data: Data, step: int, rows: Rows = ALL) -> Iterator[Batch]:
    """Batches of one shape, however few examples there are; of few shapes for pretrained."""
    split = data.splits["train"]
    size, seed = config.batch_size, config.seed
    if config.model in classification.FINETUNED:
        yield from classification.batches(config, data, step, rows)
        return
    for index in cycle(len(split.rows), size, seed, step):
        mine = rows.of(index)
        yield Batch(words_of(config, split, mine), split.labels[mine])


def words_of(config: Config, split: Split, index: np.ndarray) -> np.ndarray:
    """The first ``read`` words of the questions at these indices, ``[B read]``."""
    return text.padded([split.rows[i][: config.read] for i in index], length=config.read)
