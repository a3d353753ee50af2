"""Inference: batches of similar length or of one fixed size, and attention weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from flax import nnx

from attention_jax import nn
from experiments.datasets import text

R = TypeVar("R")

record_weights = nnx.jit(nn.record_weights)
"""``attention_jax.nn.record_weights`` as one program: op by op it would compile dozens."""


def map_by_length(
    run: Callable[[np.ndarray], Iterable[R]], lengths: Sequence[int], size: int
) -> list[R]:
    """Runs batches of examples of similar length; the results come in the order of the examples.

    Args:
      run: from the indices of up to ``size`` examples to a result for each; further results, those
        of padding rows, are dropped.
      lengths: length of each example.
      size: examples per batch.

    >>> map_by_length(lambda index: [10 * i for i in index.tolist()], [3, 1, 2], size=2)
    [0, 10, 20]
    """
    results: dict[int, R] = {}
    for index in text.covering(lengths, size):
        results |= dict(zip(index.tolist(), run(index), strict=False))
    return [results[i] for i in range(len(lengths))]


def full_batches(n: int, size: int) -> Iterator[np.ndarray]:
    """Indices of all ``n`` examples in batches of exactly ``size``; the last example is repeated.

    >>> [index.tolist() for index in full_batches(3, 2)]
    [[0, 1], [2, 2]]
    """
    for start in range(0, n, size):
        yield np.minimum(np.arange(start, start + size), n - 1)
