"""Options and presets of ``qa``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.models import finetuning
from experiments.tasks.qa.answers import LONGEST_QUESTION
from experiments.training import search
from experiments.training.config import at_least_1, below_1, even
from experiments.training.text_config import PretrainedConfig

BUCKETS = (128, 176, 304, 576)  # lengths to pad inputs to


@dataclasses.dataclass(frozen=True)
class Config(PretrainedConfig):
    """Options of a reader."""

    model: Literal["overlap", "gru", "transformer", "pretrained"] = "transformer"
    """The model to train."""
    dropout: float = 0.3
    """Dropout rate of the embeddings and of the output of each sublayer."""
    word_dropout: float = 0.2
    """Probability of replacing a word by the unknown word in training; its suffix and its match
    features are kept."""
    least: int = 3
    """Occurrences in the training split that a word needs to enter the vocabulary."""
    reads: int = 256
    """Words of a passage per window."""
    stride: int = 128
    """Words from the start of one window to the start of the next."""
    longest: int = 20
    """Words per answer at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "least", "reads", "stride", "longest")
        below_1(self, "word_dropout")
        even(self, "width")
        if self.max_length > BUCKETS[-1]:
            raise ValueError(
                f"reads must be at most {BUCKETS[-1] - LONGEST_QUESTION - 2}, got {self.reads}"
            )
        if self.stride > self.reads - self.longest + 1:
            raise ValueError(
                f"stride must be at most reads - longest + 1, {self.reads - self.longest + 1}, so "
                f"that some window holds each answer in full, got {self.stride}"
            )

    @property
    def max_length(self) -> int:
        """Longest input: a question, a window and two separators."""
        return LONGEST_QUESTION + 2 + self.reads


PRESETS = {
    "cpu": Config(
        steps=700,
        batch_size=16,
        learning_rate=1.5e-3,
        width=128,
        depth=2,
        positions="rotary",
        evaluations=4,
        ema=0.995,
        minutes=10,
    ),
    "smoke": Config(
        steps=4,
        batch_size=8,
        evaluations=1,
        width=16,
        heads=2,
        depth=1,
        least=1,
        reads=16,
        stride=8,
        longest=4,
        synthetic=True,
    ),
    "accelerator": Config(
        steps=6000,
        batch_size=64,
        learning_rate=1e-3,
        width=256,
        heads=8,
        depth=4,
        dropout=0.4,
        positions="rotary",
        evaluations=10,
        ema=0.999,
    ),
}

SPACES = {**dict.fromkeys(("gru", "transformer"), search.USUAL), "pretrained": finetuning.SPACE}

CHANGES = {
    ("cpu", "pretrained"): {
        **finetuning.OPTIONS,
        "batch_size": 16,
        "steps": 520,
        "learning_rate": 3e-4,
        "freeze": 2,
        "evaluations": 2,
    },
    ("smoke", "pretrained"): finetuning.SMOKE,
    ("accelerator", "pretrained"): {
        **finetuning.ACCELERATOR,
        "steps": 400,
        "learning_rate": 3e-4,
        "evaluations": 4,
    },
}
