"""Search spaces: which options of a model a sweep varies, and over what values.

A space is a mapping from the names of options to ranges::

    {"learning_rate": Log(3e-4, 1e-2), "dropout": OneOf((0.1, 0.3, 0.5))}
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

DIGITS = 2  # significant digits of a sampled number, so that it can be read and typed


class Log(NamedTuple):
    """A number between two others, uniform in its logarithm."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> float:
        """A value."""
        x = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return float(f"{x:.{DIGITS - 1}e}")


class OneOf(NamedTuple):
    """One of these values, with equal probability."""

    values: Sequence[Any]

    def draw(self, rng: np.random.Generator) -> Any:
        """A value."""
        return self.values[int(rng.integers(len(self.values)))]


Space = Mapping[str, Log | OneOf]

# For models that are trained from scratch, with dropout.
USUAL: Space = {
    "learning_rate": Log(5e-4, 1e-2),
    "weight_decay": OneOf((0.0, 0.05, 0.3)),
    "dropout": OneOf((0.0, 0.1, 0.2, 0.3, 0.5)),
}


def sample(space: Space, seed: int, model: str, trial: int) -> dict[str, Any]:
    """The options of a trial: none for trial 0, which is the preset itself, else a random draw.

    A draw depends on its arguments alone, so that an interrupted search resumes with the same ones.

    >>> sample({"dropout": OneOf((0.1, 0.3))}, seed=0, model="gru", trial=0)
    {}
    >>> sample({"dropout": OneOf((0.1, 0.3))}, seed=0, model="gru", trial=1)
    {'dropout': 0.1}
    """
    if trial == 0:
        return {}
    rng = np.random.default_rng([seed, zlib.crc32(model.encode()), trial])
    return {name: values.draw(rng) for name, values in space.items()}
