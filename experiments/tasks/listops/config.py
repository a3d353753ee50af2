"""Options and presets of ``listops``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.training import search
from experiments.training.config import at_least_1
from experiments.training.text_config import TextConfig


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """Options of a classifier of expressions."""

    model: Literal["gru", "transformer", "window", "linear"] = "transformer"
    """The model to train."""
    window: int = 32
    """Of the mask and of the model window: tokens to each side, or per chunk."""
    shortest: int = 32
    """Tokens per expression at least."""
    longest: int = 512
    """Tokens per expression at most."""
    nesting: int = 10
    """Depth of nested lists at most."""
    arguments: int = 10
    """Arguments per operator at most; at least 2."""
    asked: Literal["all", "outermost"] = "all"
    """Which lists training predicts the value of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "nesting")
        if self.arguments < 2:
            raise ValueError(f"arguments must be at least 2, got {self.arguments}")
        if not 4 <= self.shortest <= self.longest:
            raise ValueError(
                f"shortest must be in [4, longest = {self.longest}], got {self.shortest}"
            )


PRESETS = {
    "cpu": Config(
        steps=1800,
        batch_size=4,
        learning_rate=2e-3,
        width=64,
        heads=2,
        depth=3,
        positions="rotary",
        dropout=0.0,
        evaluations=3,
        ema=0.99,
        minutes=10,
    ),
    "smoke": Config(
        steps=4,
        batch_size=8,
        width=16,
        heads=2,
        depth=1,
        shortest=8,
        longest=32,
        nesting=3,
        evaluations=1,
        synthetic=True,
    ),
    "accelerator": Config(
        steps=20_000,
        batch_size=64,
        learning_rate=5e-4,
        width=256,
        heads=8,
        depth=6,
        shortest=500,
        longest=2000,
        positions="rotary",
        evaluations=10,
        ema=0.999,
        dtype="bfloat16",
    ),
}

SPACES = dict.fromkeys(("gru", "transformer", "window", "linear"), search.USUAL)
