"""The options of all text models: who sees whom, how positions enter, and by which attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
from flax import nnx

from attention_jax import Mask, masks
from attention_jax.api import attention
from attention_jax.mechanisms import NAMED
from attention_jax.models import Layers, Relative
from attention_jax.positions import Rotary
from attention_jax.scores import Score
from experiments.training.config import FLAX, Config, at_least_1, below_1, heads_divide

# Embeddings begin with a deviation of 0.02: so scaled, tokens weigh as much as their positions.
EMBEDDING_SCALE = 25.0


@dataclasses.dataclass(frozen=True)
class TextConfig(Config):
    """The options of a model of text."""

    width: int = 128
    """Numbers per token (E)."""
    heads: int = 4
    """Heads of attention (N); divides the width."""
    depth: int = 2
    """Layers."""
    dropout: float = 0.1
    """Probability of dropping a number of the embeddings and of what each sublayer gives."""
    mask: Literal["global", "window", "window_prefix", "chunked", "dilated"] = "global"
    """Who sees whom, a decoder's tokens only those before them: all; a window to both sides; that
    and the first token; blocks as wide as the window; every other token."""
    window: int = 8
    """Of the mask: tokens to each side, or in a block."""
    positions: Literal["none", "sinusoidal", "learned", "rotary", "alibi", "relative"] = (
        "sinusoidal"
    )
    """How a token knows where it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "width", "heads", "depth", "window")
        heads_divide(self, "width")
        below_1(self, "dropout")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(
                f"width / heads must be even for rotary positions, got {self.width // self.heads}"
            )

    @property
    def vectors(self) -> str | None:
        """The positions that are added to the embeddings."""
        return self.positions if self.positions in ("sinusoidal", "learned") else None


def mask_of(config: TextConfig) -> Mask | None:
    """What the options say, beside causality; None where all see all."""
    near = masks.window(config.window, config.window)
    return {
        "global": None,
        "window": near,
        "window_prefix": near | masks.prefix(1),
        "chunked": masks.chunked(config.window),
        "dilated": masks.dilated(2),
    }[config.mask]


def layers(config: TextConfig, **more: Any) -> Layers:
    """The stack that the options describe; ``more`` are other fields of ``Layers``."""
    return Layers(
        **{
            "features": config.width,
            "num_layers": config.depth,
            "num_heads": config.heads,
            "dropout_rate": config.dropout,
            "mask": mask_of(config),
            "rotary": Rotary() if config.positions == "rotary" else None,
            "alibi": config.positions == "alibi",
            "relative": Relative() if config.positions == "relative" else None,
            **attention_options(config),
            **more,
        }
    )


def attention_options(config: Config) -> dict[str, Any]:
    """``attention=`` and ``implementation=`` of a module, for ``--attention``."""
    if config.attention == FLAX:
        return {"attention": flax_attention}
    if config.attention in NAMED:
        return {"attention": NAMED[config.attention]}
    return {"attention": attention, "implementation": config.attention}


def flax_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    score: tuple[Score, ...] = (),
    sinks: Any = None,
    scale: Any = None,
    dropout_rate: float = 0.0,
) -> jax.Array:
    """``flax.nnx.dot_product_attention`` with our arguments: what one would write without us.

    A mask becomes a bool array, as small as it can be: ``[T S]``, or ``[B 1 T S]`` where it depends
    on the example.

    Raises:
      NotImplementedError: for what it has no argument.
    """
    if score or sinks is not None or scale is not None or dropout_rate:
        raise NotImplementedError(
            "attention flax has no scores (positions alibi and relative), sinks, scale or our "
            "dropout: take another attention"
        )
    *batch, T, _, _ = query.shape
    S = key.shape[-3]
    if mask is not None:
        if jax.tree.leaves(mask):
            mask = mask.to_dense(T, S, B=math.prod(batch)).reshape(*batch, 1, T, S)
        else:
            mask = mask.to_dense(T, S)
    return nnx.dot_product_attention(query, key, value, mask=mask)
