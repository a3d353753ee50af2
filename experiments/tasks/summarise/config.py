"""Options and presets of ``summarise``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.models import finetuning
from experiments.training import search
from experiments.training.config import at_least_1, softmax_only
from experiments.training.text_config import PretrainedConfig

COPIERS = ("copier", "pretrained")
BUCKETS = (32, 48, 64, 128, 192, 256)  # lengths to pad sources to


@dataclasses.dataclass(frozen=True)
class Config(PretrainedConfig):
    """Options of a summarizer."""

    model: Literal[
        "lead", "best_sentence", "gru", "gru_attention", "transformer", "copier", "pretrained"
    ] = "copier"
    """The model to train."""
    corpus: Literal["titles", "scitldr"] = "titles"
    """News articles and their titles, or abstracts and one-sentence summaries."""
    dropout: float = 0.3
    """Dropout rate of the embeddings and of the output of each sublayer."""
    hidden: int = 2
    """Feed-forward width in units of the model width."""
    least: int = 3
    """Occurrences in the training split that a word needs to enter the vocabulary; other words can
    be copied but not generated."""
    reads: int = 64
    """Words per source at most; longer sources are cut, and how many is printed."""
    writes: int = 20
    """Words per summary at most; longer training summaries are cut, and how many is printed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "hidden", "least", "reads", "writes")
        softmax_only(self)  # decoding uses a cache
        if self.reads > BUCKETS[-1]:
            raise ValueError(f"reads must be at most {BUCKETS[-1]}, got {self.reads}")
        if self.label_smoothing and self.model in COPIERS:
            raise ValueError(
                f"label_smoothing must be 0 for {self.model}, got {self.label_smoothing}: words "
                f"outside the vocabulary have probability 0 unless the source has them"
            )


PRESETS = {
    "cpu": Config(
        steps=1200,
        batch_size=32,
        learning_rate=2e-3,
        width=128,
        depth=2,
        evaluations=4,
        ema=0.99,
        minutes=10,
    ),
    "smoke": Config(
        steps=4,
        batch_size=8,
        width=16,
        heads=2,
        depth=1,
        evaluations=1,
        writes=8,
        synthetic=True,
    ),
    "accelerator": Config(
        steps=6000,
        batch_size=128,
        learning_rate=1e-3,
        width=256,
        heads=8,
        depth=4,
        dropout=0.4,
        evaluations=10,
        ema=0.999,
        dtype="bfloat16",
    ),
}

SPACES = {
    **dict.fromkeys(("gru", "gru_attention", "transformer", "copier"), search.USUAL),
    "pretrained": finetuning.SPACE,
}

CHANGES = {
    ("cpu", "pretrained"): {
        **finetuning.OPTIONS,
        "learning_rate": 6e-4,
        "layer_decay": 0.5,  # the decoder is fresh
        "freeze": 2,
        "steps": 570,
        "evaluations": 3,
    },
    ("smoke", "pretrained"): {**finetuning.SMOKE, "depth": 1},
    ("accelerator", "pretrained"): {
        **finetuning.ACCELERATOR,
        "learning_rate": 6e-4,
        "layer_decay": 0.5,
        "steps": 3000,
        "evaluations": 5,
    },
}
