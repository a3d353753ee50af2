"""An encoder alone, as BERT: each token sees all others."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.core.axes import AnyArray, accumulation_dtype, check_positions, same_rank
from attention_jax.masks import Mask
from attention_jax.models.layers import Layers, Stack
from attention_jax.nn import Embeddings, pooling
from attention_jax.nn.feed_forward import ACTIVATIONS
from attention_jax.nn.linear import Linear
from attention_jax.nn.padding import as_real, places

HEADS = (None, "tokens", "classes")
POOLS = ("first", "mean")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What an ``Encoder`` is made of."""

    vocabulary: int
    """Number of tokens (V)."""
    layers: Layers
    positions: str | None = "learned"
    """Vectors added to the tokens': ``"learned"``, ``"sinusoidal"`` or None."""
    max_length: int | None = 512
    """Rows of learned positions."""
    embedding_scale: float = 1.0
    """Of the tokens' vectors, before positions are added."""
    types: int = 0
    """Token types (segments), 0 for none."""
    embedding_norm: bool = False
    """Whether the embeddings are normalised."""
    pooler: bool = False
    """Whether what is pooled goes through a projection and tanh."""
    pool: str = "first"
    """``"first"`` is the class token, the first real one; ``"mean"`` that of the real tokens."""
    head: str | None = None
    """``"tokens"``: logits of each token; ``"classes"``: of the whole; None: the vectors."""
    classes: int | None = None
    """Number of classes (C)."""
    dropout_rate: float = 0.0
    """Of the embeddings, and before the classes."""

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {HEADS}, got {self.head!r}")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {self.pool!r}")
        if (self.head == "classes") != (self.classes is not None):
            raise ValueError(f"classes must be given with head 'classes' alone, got {self.classes}")


class Encoder(nnx.Module):
    """Tokens to vectors, to logits of the tokens, or to logits of classes.

    >>> import numpy as np
    >>> config = EncoderConfig(vocabulary=10, max_length=4, head="classes", classes=3,
    ...                        layers=Layers(features=8, num_layers=2, num_heads=2, order="post"))
    >>> tokens, real = np.array([[3, 1, 4, 0]]), np.array([[True, True, True, False]])
    >>> Encoder(config, rngs=nnx.Rngs(0))(tokens, real=real).shape
    (1, 3)

    Source: Devlin et al. 2019, "BERT".
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        layers = config.layers
        E = layers.features
        norm = layers.new_norm(rngs)
        self.config = config
        self.embed = Embeddings(
            config.vocabulary,
            E,
            positions=config.positions,
            max_length=config.max_length,
            scale=config.embedding_scale,
            types=config.types,
            norm=norm if config.embedding_norm else None,
            dropout_rate=config.dropout_rate,
            **layers.dtypes,
            rngs=rngs,
        )
        self.stack = Stack(layers, causal=False, rngs=rngs)
        self.pooler = self.classify = self.transform = self.transform_norm = nnx.data(None)
        self.token_bias = nnx.data(None)
        if config.pooler:
            self.pooler = Linear(E, E, **layers.dtypes, rngs=rngs)
        if config.classes is not None:
            self.classify = Linear(E, config.classes, **layers.dtypes, rngs=rngs)
            self.dropout = nnx.Dropout(
                config.dropout_rate, rngs=rngs if config.dropout_rate else None
            )
        if config.head == "tokens":
            self.transform = Linear(E, E, **layers.dtypes, rngs=rngs)
            self.transform_norm = norm()
            self.token_bias = nnx.Param(jnp.zeros(config.vocabulary, layers.param_dtype))

    def __call__(
        self,
        tokens: Any,
        *,
        real: Any = None,
        types: Any = None,
        mask: Mask | None = None,
        positions: Any = None,
    ) -> jax.Array:
        """What the head gives: ``[*B T E]``, ``[*B T V]`` or ``[*B C]``.

        Args:
          tokens: integers ``[*B T]``.
          real: bool ``[*B T]``, False for padding, on either side of the tokens, where tokens,
            types and positions may be any integers.
          types: of the tokens, integers ``[*B T]``.
          mask: beside that of padding and windows; as that of the layers it counts indices,
            padding included.
          positions: of the tokens, integers that broadcast to ``[*B T]``; default from 0 at the
            first real token.
        """
        x = self.hidden(tokens, real=real, types=types, mask=mask, positions=positions)
        if self.config.head == "tokens":
            return self.token_logits(x)
        if self.config.head == "classes":
            return self.class_logits(self.pooled(x, real))
        return x

    def hidden(
        self,
        tokens: Any,
        *,
        real: Any = None,
        types: Any = None,
        mask: Mask | None = None,
        positions: Any = None,
    ) -> jax.Array:
        """The vectors of the tokens, ``[*B T E]``; arguments as for a call."""
        tokens = check_positions(tokens, "tokens")
        real = as_real(real, tokens.shape)
        positions = places(positions, real)
        x = self.embed(tokens, positions=positions, types=types, real=real)
        return self.stack(x, real=real, mask=mask, positions=positions)

    def pooled(self, x: Float[AnyArray, "*B T E"], real: Any = None) -> jax.Array:
        """One vector for all tokens, ``[*B E]``."""
        x = jnp.asarray(x)
        real = as_real(real, x.shape[:-1])
        x = pooling.first(x, real) if self.config.pool == "first" else pooling.mean(x, real)
        return x if self.pooler is None else jnp.tanh(self.pooler(x))

    def class_logits(self, x: Float[AnyArray, "*B E"]) -> jax.Array:
        """``[*B E]`` to ``[*B C]``, in float32 or wider."""
        y = self.classify(self.dropout(x))  # type: ignore[misc]
        return y.astype(accumulation_dtype(y.dtype))

    def token_logits(self, x: Float[AnyArray, "*B T E"]) -> jax.Array:
        """``norm(activation(x W)) . table + bias``: ``[*B T E]`` to ``[*B T V]``."""
        x = self.transform(jnp.asarray(x))  # type: ignore[misc]
        x = self.transform_norm(ACTIVATIONS[self.config.layers.activation](x))  # type: ignore[misc]
        y = self.embed.logits(x)
        wide = accumulation_dtype(y.dtype)
        logits, bias = same_rank(y.astype(wide), self.token_bias[...].astype(wide))  # type: ignore[index]
        return logits + bias
