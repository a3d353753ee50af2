"""The options shared by all tasks, their checks, and their JSON form."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal, TypeVar

from attention_jax.backends import IMPLEMENTATIONS
from attention_jax.mechanisms import NAMED
from experiments.options import not_one_of

FLAX = "flax"  # flax.nnx.dot_product_attention instead of ours, for comparison


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The options that every task has. A task's own configuration extends it."""

    seed: int = 0
    """Seed of the initial weights, the order of the data, augmentation and dropout."""
    steps: int = 1000
    """Number of updates."""
    batch_size: int = 128
    """Examples per update."""
    accumulate: int = 1
    """Microbatches that a batch is split into, to save memory; the gradient is the same."""
    devices: int = 1
    """Devices that a batch is split over; the same as ``--mesh data=N``."""
    learning_rate: float = 1e-3
    """Peak learning rate, after the warm-up."""
    schedule: Literal["cosine", "inverse_sqrt"] = "cosine"
    """Decay of the learning rate after the warm-up: to 0 along a cosine, or as 1 / sqrt(step)."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises from 0."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the matrices of transformer layers, and AdamW for all other weights."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer of the encoder to the layer below it; above the
    last layer the rate is learning_rate, and the embeddings are below the first layer."""
    freeze: int | None = None
    """Layers of the encoder that are not trained, from the first one, nor are the embeddings; 0 for
    the embeddings alone, None to train everything."""
    low_rank: int = 0
    """Rank of LoRA updates of queries and values, which are trained in place of the embeddings and
    layers of the encoder; 0 turns them off."""
    beta2: float = 0.95
    """Decay of AdamW's estimate of the squared gradient."""
    weight_decay: float = 0.05
    """Weight decay of matrices; biases, norms and other vectors do not decay."""
    clip: float = 1.0
    """Gradients are clipped to this global norm."""
    label_smoothing: float = 0.0
    """Fraction of the target probability that is spread over all classes."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is what is evaluated and saved; 0 turns it
    off."""
    adversarial: float = 0.0
    """Size of an adversarial perturbation of the token embeddings, relative to their norm; 0 turns
    adversarial training off. See ``adversarial``."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of forward and backward pass; weights, their average and the optimizer state stay
    float32."""
    evaluations: int = 5
    """Number of evaluations on the validation split, the last one after the last step."""
    patience: int | None = None
    """Stop after this many evaluations without a better score; None for never."""
    minutes: float | None = None
    """Stop after this many minutes even if steps are left; None for no limit."""
    synthetic: bool = False
    """Train on synthetic data instead of the task's files, to check that everything runs."""
    attention: str | None = None
    """The attention implementation, by name, or flax; or another mechanism (linear, performer,
    retention, inverted, slot, topk); None lets the library choose."""

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
        for name in ("weight_decay", "adversarial", "freeze", "low_rank"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        parts = self.accumulate * self.devices
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of accumulate x devices, {parts}, got "
                f"{self.batch_size}"
            )
        known = (*IMPLEMENTATIONS, FLAX, *NAMED)
        if self.attention is not None and self.attention not in known:
            raise ValueError(not_one_of("attention", self.attention, known))


# A run may be resumed with other values of these.
MAY_CHANGE = ("minutes", "patience", "devices")

C = TypeVar("C", bound=TrainConfig)


def differences(new: TrainConfig, old: TrainConfig) -> list[str]:
    """The options that keep a run started with ``old`` from being resumed with ``new``."""
    return [
        f"{field.name} is {now!r}, was {before!r}"
        for field in dataclasses.fields(new)
        if field.name not in MAY_CHANGE
        and (now := getattr(new, field.name)) != (before := getattr(old, field.name))
    ]


def choices(kind: type[TrainConfig], field: str) -> tuple[str, ...]:
    """The values that a ``Literal`` option may take, in order; for ``model``, the ladder.

    >>> choices(TrainConfig, "schedule")
    ('cosine', 'inverse_sqrt')
    """
    return typing.get_args(typing.get_type_hints(kind)[field])


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The options as JSON values: every option is a number, a string or None."""
    return dataclasses.asdict(config)


def defaults(kind: type[TrainConfig]) -> dict[str, Any]:
    """The options as a task declares them, without a preset: those that older records lack."""
    return {field.name: field.default for field in dataclasses.fields(kind)}


def from_json(kind: type[C], values: dict[str, Any], where: str) -> C:
    """The configuration that ``as_json`` wrote.

    Raises:
      ValueError: the fields differ: another version of the task wrote it.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    if names != set(values):
        changed = ", ".join(sorted(names ^ set(values)))
        raise ValueError(
            f"{where} was written by another version of this task: its options differ by "
            f"{changed}; train it again"
        )
    return kind(**values)


# --- Checks of a task's own options.


def at_least_1(config: TrainConfig, *names: str) -> None:
    """Raises ``ValueError`` unless each of these options is at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def below_1(config: TrainConfig, *names: str) -> None:
    """Raises ``ValueError`` unless each of these options is in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")


def even(config: TrainConfig, name: str) -> None:
    """Raises ``ValueError`` unless this option is even."""
    if getattr(config, name) % 2:
        raise ValueError(f"{name} must be even, got {getattr(config, name)}")


def heads_divide(config: TrainConfig, width: str) -> None:
    """Raises ``ValueError`` unless ``heads`` divides the option called ``width``."""
    size, heads = getattr(config, width), getattr(config, "heads")  # noqa: B009
    if size % heads:
        raise ValueError(f"heads must divide {width} {size}, got {heads}")


def softmax_only(config: TrainConfig) -> None:
    """Raises ``ValueError`` if ``attention`` names a mechanism other than softmax attention."""
    if config.attention in NAMED:
        raise ValueError(
            f"attention {config.attention} works for listops, shakespeare and the tasks that "
            f"classify sentences, words or questions; here attention must be one of "
            f"{', '.join((*IMPLEMENTATIONS, FLAX))}"
        )
