"""Options and presets of ``shakespeare``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.training import search
from experiments.training.config import at_least_1, heads_divide
from experiments.training.text_config import TextConfig


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """Options of a character-level language model."""

    model: Literal["ngram", "gru", "gru_attention", "transformer"] = "transformer"
    """The model to train."""
    positions: Literal["none", "sinusoidal", "learned", "rotary", "alibi", "relative"] = "rotary"
    """Positional encoding."""
    window: int = 64
    """Of the mask: tokens back, or per chunk."""
    gru_width: int = 256
    """gru and gru_attention: width of the state."""
    gru_depth: int = 2
    """gru and gru_attention: number of layers."""
    context: int = 128
    """Characters per training example, and read at once."""
    order: int = 5
    """ngram: characters per n-gram, the predicted one included."""
    temperature: float = 0.8
    """Sampling temperature; lower is safer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "gru_width", "gru_depth")
        heads_divide(self, "gru_width")
        if self.context < 2 or self.context % 2:
            raise ValueError(f"context must be even and at least 2, got {self.context}")
        if not 1 <= self.order <= 7:
            raise ValueError(f"order must be in [1, 7], got {self.order}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


PRESETS = {
    "cpu": Config(
        steps=3800,
        batch_size=4,
        learning_rate=3e-3,
        weight_decay=0.3,
        depth=4,
        context=256,
        dropout=0.0,
        evaluations=2,
        ema=0.99,
        minutes=10,
    ),
    "smoke": Config(
        steps=6,
        batch_size=4,
        width=16,
        heads=2,
        depth=1,
        context=16,
        evaluations=1,
        synthetic=True,
        gru_width=16,
        gru_depth=1,
    ),
    "accelerator": Config(
        steps=5000,
        batch_size=64,
        learning_rate=1e-3,
        width=384,
        heads=8,
        depth=6,
        gru_width=768,
        context=256,
        dropout=0.2,
        evaluations=20,
        ema=0.999,
        dtype="bfloat16",
    ),
}

SPACES = dict.fromkeys(("gru", "gru_attention", "transformer"), search.USUAL)
