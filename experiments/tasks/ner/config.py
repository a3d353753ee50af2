"""Options and presets of ``ner``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.models import finetuning
from experiments.training import search
from experiments.training.config import at_least_1, below_1, even
from experiments.training.text_config import PretrainedConfig

BUCKETS = (16, 32, 64, 128, 256)  # lengths to pad sentences to


@dataclasses.dataclass(frozen=True)
class Config(PretrainedConfig):
    """Options of a tagger."""

    model: Literal["most_frequent", "gru", "transformer", "pretrained"] = "transformer"
    """The model to train."""
    corpus: Literal["ncbi", "wnut17"] = "ncbi"
    """Diseases in abstracts (ncbi), or emerging entities in social media (wnut17)."""
    dropout: float = 0.3
    """Dropout rate of the embeddings and of the output of each sublayer."""
    word_dropout: float = 0.2
    """Probability of replacing a word by the unknown word in training; its characters are kept."""
    feature_dropout: float = 0.1
    """pretrained: dropout rate of the vectors that the tags are predicted from."""
    letter_width: int = 32
    """Width of the character embeddings."""
    least: int = 2
    """Occurrences in the training split that a word needs to enter the vocabulary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "letter_width", "least")
        below_1(self, "word_dropout", "feature_dropout")
        even(self, "width")


PRESETS = {
    "cpu": Config(
        steps=1500,
        batch_size=32,
        learning_rate=2e-3,
        depth=2,
        positions="rotary",
        evaluations=5,
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
        letter_width=8,
        synthetic=True,
    ),
    "accelerator": Config(
        steps=4000,
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

# The model ``pretrained``; see ``classification.PRETRAINED``.
CHANGES = {
    ("cpu", "pretrained"): {
        **finetuning.OPTIONS,
        "steps": 850,
        "evaluations": 4,
    },
    ("smoke", "pretrained"): finetuning.SMOKE,
    ("accelerator", "pretrained"): {
        **finetuning.ACCELERATOR,
        "steps": 425,
        "evaluations": 5,
    },
}
