"""What ``sample`` and ``look`` share between tasks: which examples to show, and input checks."""

from __future__ import annotations

import numpy as np

from experiments.training.config import TrainConfig


def random_indices(n: int, count: int, seed: int) -> np.ndarray:
    """Up to ``count`` distinct indices below ``n``, in random order."""
    return np.random.default_rng(seed).permutation(n)[:count]


def check_length(length: int, limit: int, unit: str, option: str) -> None:
    """Raises if a user's text is longer than the model reads, a limit that ``option`` sets.

    Raises:
      ValueError: it is.
    """
    if length > limit:
        raise ValueError(
            f"text has {length} {unit}, the model reads {limit} ({option}): shorten the text"
        )


def check_attends(config: TrainConfig, *models: str) -> None:
    """Raises unless the option ``model`` is one of these, the models whose attention can be shown.

    Raises:
      ValueError: it is another one.
    """
    model: str = getattr(config, "model")  # noqa: B009 - each task has its own ladder
    if model not in models:
        use = " or ".join(filter(None, (", ".join(models[:-1]), models[-1])))
        raise ValueError(f"model {model} has no attention to look at: use {use}")


def verdict(guess: str, label: str) -> str:
    """Whether a prediction is right, in words.

    >>> verdict("cat", "dog")
    'wrong, it is dog'
    """
    return "right" if guess == label else f"wrong, it is {label}"
