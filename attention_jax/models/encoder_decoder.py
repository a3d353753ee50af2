"""An encoder and a decoder that attends to it, as the first transformer and T5."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.axes import AnyArray, accumulation_dtype
from attention_jax.cache import KVCache
from attention_jax.models.decoder import check_capacity
from attention_jax.models.layers import Layers, Stack, padding, positions_after
from attention_jax.nn import Embeddings
from attention_jax.nn.linear import Linear


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """What an ``EncoderDecoder`` is made of."""

    vocabulary: int
    """Number of tokens (V), of both sides."""
    encoder: Layers
    decoder: Layers
    positions: str | None = "sinusoidal"
    """Vectors added to the tokens': ``"learned"``, ``"sinusoidal"``; None where layers have a
    relative bias or are rotary."""
    max_length: int | None = None
    """Rows of learned positions."""
    embedding_scale: float = 1.0
    tied: bool = True
    """Whether the table of tokens is also the head."""
    head_scale: float = 1.0
    """Of what the head sees."""
    dropout_rate: float = 0.0
    """Of the embeddings, and of what the stacks give."""

    def __post_init__(self) -> None:
        if self.encoder.features != self.decoder.features:
            raise ValueError(
                f"encoder and decoder must have one width: they share the table of tokens, got "
                f"{self.encoder.features} and {self.decoder.features}"
            )


class Memory(NamedTuple):
    """An encoded sequence as the decoder's layers see it."""

    contexts: Any
    """Keys and values for each layer, of ``[*B S C]``."""
    real: Any
    """bool ``[*B S]``, False for padding; None: all are real."""


class EncoderDecoder(nnx.Module):
    """Two sequences of tokens to the logits of what follows each of the second.

    >>> import numpy as np
    >>> layers = Layers(features=8, num_layers=2, num_heads=2)
    >>> model = EncoderDecoder(EncoderDecoderConfig(10, layers, layers), rngs=nnx.Rngs(0))
    >>> model(np.array([[3, 1, 4, 1]]), np.array([[5, 9]])).shape
    (1, 2, 10)

    Source: Vaswani et al. 2017, "Attention Is All You Need"; Raffel et al. 2020 (T5).
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        E, dtypes = config.decoder.features, config.decoder.dtypes
        self.config = config
        self.embed = Embeddings(
            config.vocabulary,
            E,
            positions=config.positions,
            max_length=config.max_length,
            scale=config.embedding_scale,
            dropout_rate=config.dropout_rate,
            **dtypes,
            rngs=rngs,
        )
        self.encoder = Stack(config.encoder, causal=False, rngs=rngs)
        self.decoder = Stack(config.decoder, causal=True, context_features=E, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs if config.dropout_rate else None)
        self.head = nnx.data(None)
        if not config.tied:
            self.head = Linear(E, config.vocabulary, use_bias=False, **dtypes, rngs=rngs)

    def __call__(
        self,
        source: Any,
        target: Any,
        *,
        source_real: Any = None,
        target_real: Any = None,
    ) -> jax.Array:
        """The logits ``[*B T V]`` of what follows each token of the target, in float32 or wider.

        Args:
          source: integers ``[*B S]``.
          target: integers ``[*B T]``.
          source_real, target_real: bool, of the same shapes, False for padding.
        """
        memory = self.encode(source, real=source_real)
        return self.decode(target, memory, real=target_real)

    def encode(self, source: Any, *, real: Any = None) -> Memory:
        """The source ``[*B S]`` as the decoder's layers see it."""
        x = self.dropout(self.encoder(self.embed(source), real=real))
        return Memory(self.decoder.contexts(x), real)

    def decode(
        self,
        target: Any,
        memory: Memory,
        *,
        real: Any = None,
        caches: tuple[KVCache, ...] | None = None,
        count: Any = None,
    ) -> Any:
        """The logits ``[*B T V]`` of what follows each token.

        Args:
          target: integers ``[*B T]``.
          memory: what ``encode`` gave.
          real: bool ``[*B T]``, False for padding; without caches.
          caches: of the tokens before; see ``init_caches``.
          count: how many of the tokens are real, with caches.

        Returns:
          The logits; with caches also the new ones.
        """
        result = self.hidden(target, memory, real=real, caches=caches, count=count)
        if caches is None:
            return self.logits(result)
        return self.logits(result[0]), result[1]

    def hidden(
        self,
        target: Any,
        memory: Memory,
        *,
        real: Any = None,
        caches: tuple[KVCache, ...] | None = None,
        count: Any = None,
    ) -> Any:
        """What the head sees, ``[*B T E]``; arguments and result as for ``decode``."""
        T = target.shape[-1]
        positions = jnp.arange(T, dtype=jnp.int32)
        if caches is not None:
            positions = positions_after(caches, T, count)
        result = self.decoder(
            self.embed(target, positions=positions),
            memory.contexts,
            real=real,
            context_mask=padding(memory.real, T),
            positions=positions,
            caches=caches,
            count=count,
        )
        if caches is None:
            return self.dropout(result)
        return self.dropout(result[0]), result[1]

    def logits(self, x: Float[AnyArray, "*B T E"]) -> jax.Array:
        """The head: ``[*B T E]`` to ``[*B T V]``, in float32 or wider."""
        x = jnp.asarray(x)
        if self.config.head_scale != 1.0:
            x = x * jnp.asarray(self.config.head_scale, x.dtype)
        y = self.embed.logits(x) if self.head is None else self.head(x)
        return y.astype(accumulation_dtype(y.dtype))

    def init_caches(
        self, batch: tuple[int, ...], capacity: int, *, dtype: Any = None, spare: int = 0
    ) -> tuple[KVCache, ...]:
        """Empty caches for the decoder's layers; see ``Stack.init_caches``.

        Raises:
          ValueError: more tokens than there are learned positions.
        """
        check_capacity(capacity, self.config)
        return self.decoder.init_caches(batch, capacity, dtype=dtype, spare=spare)
