"""The options that every task has, and how they are kept beside the results."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal, TypeVar

from attention_jax.backends import IMPLEMENTATIONS
from attention_jax.mechanisms import NAMED

FLAX = "flax"  # attention by flax.nnx.dot_product_attention in place of ours, to compare


@dataclasses.dataclass(frozen=True)
class Config:
    """The options that every task has. A task's own configuration extends it."""

    seed: int = 0
    """Of the initial weights, the order of the data, augmentation and dropout."""
    steps: int = 1000
    """Updates of the weights."""
    batch_size: int = 128
    """Examples per update."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory; same gradient."""
    devices: int = 1
    """Devices that a batch is spread over; same gradient, dropout aside."""
    learning_rate: float = 1e-3
    """At its highest, after the warm-up."""
    schedule: Literal["cosine", "inverse_sqrt"] = "cosine"
    """How the learning rate falls after the warm-up: to 0 along a cosine, or as 1 / sqrt(step)."""
    warmup: float = 0.1
    """Part of the steps over which the learning rate rises from 0."""
    beta2: float = 0.95
    """Of AdamW: how slowly its estimate of the gradient's square moves."""
    weight_decay: float = 0.05
    """Of matrices; biases, norms and other vectors do not decay."""
    clip: float = 1.0
    """Largest norm of the gradient of all weights together."""
    label_smoothing: float = 0.0
    """Part of the probability that the targets spread over all classes."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is evaluated and kept; 0 is none."""
    adversarial: float = 0.0
    """Also learn from the vectors of a text's tokens moved so far towards a larger loss, as a part
    of their norm; 0 does not. See ``adversarial``."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of forward and backward pass; the weights, their average and the optimiser stay float32."""
    evaluations: int = 5
    """How many times the validation score is taken, the last time at the end."""
    patience: int | None = None
    """Stop after this many evaluations without a better score; None never does."""
    minutes: float | None = None
    """Stop after this much training even if steps are left; None is no limit."""
    synthetic: bool = False
    """Made-up data in place of the task's files, to see that all runs."""
    attention: str | None = None
    """The implementation of attention, by name, or flax; or another mechanism, by name (linear,
    performer, retention, inverted, slot, topk); None lets the library choose."""

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "batch_size",
            "accumulate",
            "devices",
            "learning_rate",
            "clip",
            "evaluations",
            "patience",
            "minutes",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        below_1(self, "warmup", "beta2", "label_smoothing", "ema")
        for name in ("weight_decay", "adversarial"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        parts = self.accumulate * self.devices
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of accumulate x devices, {parts}, got "
                f"{self.batch_size}"
            )
        known = (*IMPLEMENTATIONS, FLAX, *NAMED)
        if self.attention is not None and self.attention not in known:
            raise ValueError(f"attention must be one of {', '.join(known)}, got {self.attention}")


# How long and on how many devices a run goes does not change what it is: it can be resumed with
# others.
MAY_CHANGE = ("minutes", "patience", "devices")

C = TypeVar("C", bound=Config)


def differences(one: Config, other: Config) -> list[str]:
    """The options by which a run cannot go on as another, in words."""
    return [
        f"{field.name} is {mine!r}, was {theirs!r}"
        for field in dataclasses.fields(one)
        if field.name not in MAY_CHANGE
        and (mine := getattr(one, field.name)) != (theirs := getattr(other, field.name))
    ]


def choices(kind: type[Config], field: str) -> tuple[str, ...]:
    """What an option may be, in order: of ``model``, the rungs of the ladder.

    >>> choices(Config, "schedule")
    ('cosine', 'inverse_sqrt')
    """
    return typing.get_args(typing.get_type_hints(kind)[field])


def as_json(config: Config) -> dict[str, Any]:
    """For a file: every option is a number, a word or None."""
    return dataclasses.asdict(config)


def from_json(kind: type[C], values: dict[str, Any], where: str) -> C:
    """The configuration that was saved.

    Raises:
      ValueError: it has other fields: the run is that of another version or task.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    if names != set(values):
        odd = ", ".join(sorted(names ^ set(values)))
        raise ValueError(
            f"{where} was written by another version of this task: its options differ by {odd}; "
            f"train it again"
        )
    return kind(**values)


# --- Checks of a task's own options.


def at_least_1(config: Config, *names: str) -> None:
    """Raises unless each of these options is."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def below_1(config: Config, *names: str) -> None:
    """Raises unless each of these options is a part of something, of all of it not."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")


def heads_divide(config: Any, width: str) -> None:
    """Raises unless the option ``heads`` divides the one called ``width``."""
    if getattr(config, width) % config.heads:
        raise ValueError(f"heads must divide {width} {getattr(config, width)}, got {config.heads}")


def softmax_only(config: Config) -> None:
    """Raises if the option ``attention`` names a mechanism that is no softmax over keys."""
    if config.attention in NAMED:
        raise ValueError(
            f"attention {config.attention} is for listops, shakespeare and the tasks that classify "
            f"sentences, words or questions: here attention must be one of "
            f"{', '.join((*IMPLEMENTATIONS, FLAX))}"
        )
