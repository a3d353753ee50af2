"""Options and presets of ``fewshot``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.models import finetuning
from experiments.tasks import classification, trec
from experiments.training.config import at_least_1

ALL = 0  # as the number of labeled examples
Ladder = Literal[
    "naive_bayes",
    "text_cnn",
    "transformer",
    "finetuned",
    "adapted",
    "pretrained",
    "pretrained_adapted",
]


@dataclasses.dataclass(frozen=True)
class Config(classification.Config):
    """Options of this task."""

    model: Ladder = "adapted"  # type: ignore[assignment]
    """The model to train."""
    examples: int = 100
    """Labeled questions, drawn with the seed; 0 uses all."""
    read: int = 24
    """Words read of each training question, the rest of the few longer ones is cut; pretrained and
    pretrained_adapted read all."""
    rank: int = 8
    """adapted and pretrained_adapted: rank of the LoRA updates."""
    pretraining_steps: int = 500
    """finetuned and adapted: steps of masked language modeling before any label is used."""
    pretraining_batch_size: int = 64
    """finetuned and adapted: questions per pretraining step."""
    pretraining_rate: float = 2e-3
    """finetuned and adapted: peak learning rate of pretraining."""
    hidden: int = 3
    """finetuned and adapted: masked words per question in pretraining, at most; never more than a
    third of its words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "read", "rank", "pretraining_steps", "pretraining_batch_size", "hidden")
        if self.examples != ALL and self.examples < len(trec.CLASSES):
            raise ValueError(
                f"examples must be 0 (all) or at least {len(trec.CLASSES)}, one per class, got "
                f"{self.examples}"
            )
        if self.low_rank and self.model in ("adapted", "pretrained_adapted"):
            raise ValueError(
                f"low_rank must be left out for {self.model}, whose adapters have the rank of the "
                f"option rank, got {self.low_rank}"
            )
        if not self.pretraining_rate > 0:
            raise ValueError(f"pretraining_rate must be above 0, got {self.pretraining_rate}")


PRESETS = {
    "cpu": Config(
        steps=300,
        batch_size=32,
        learning_rate=2e-3,
        width=64,
        depth=2,
        dropout=0.1,
        word_dropout=0.1,
        evaluations=1,
        read=20,
        pretraining_steps=1500,
    ),
    "smoke": Config(
        steps=8,
        batch_size=16,
        evaluations=1,
        examples=50,
        width=16,
        heads=2,
        depth=1,
        filters=8,
        word_width=16,
        read=8,
        rank=2,
        pretraining_steps=8,
        pretraining_batch_size=16,
        synthetic=True,
    ),
    "accelerator": Config(
        steps=1000,
        batch_size=64,
        width=256,
        heads=8,
        dropout=0.2,
        evaluations=1,
        pretraining_steps=10_000,
        pretraining_batch_size=256,
        pretraining_rate=1e-3,
    ),
}

_CPU = {
    **finetuning.OPTIONS,
    "batch_size": 16,
    "steps": 200,
    "evaluations": 1,
    "feature_dropout": 0.1,
}
_ACCELERATOR = {**_CPU, **finetuning.ON_ACCELERATOR}
_ADAPTED = {"learning_rate": 2e-3, "layer_decay": 1.0}
CHANGES = {
    ("cpu", "pretrained"): _CPU,
    ("cpu", "pretrained_adapted"): {**_CPU, **_ADAPTED},
    ("smoke", "pretrained"): finetuning.SMOKE,
    ("smoke", "pretrained_adapted"): finetuning.SMOKE,
    ("accelerator", "pretrained"): _ACCELERATOR,
    ("accelerator", "pretrained_adapted"): {**_ACCELERATOR, **_ADAPTED},
}
