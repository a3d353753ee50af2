"""An encoder and a decoder that attends to it, as the first transformer and T5."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.cache import KVCache
from attention_jax.core.axes import AnyArray, accumulation_dtype, check_positions
from attention_jax.models.decoder import check_capacity, first_tokens
from attention_jax.models.layers import Layers, Stack, padding, positions_after
from attention_jax.nn import Embeddings, FeedForward, Residual
from attention_jax.nn.linear import Linear
from attention_jax.nn.padding import as_real, places


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

    In float16, what the layers add up is kept in float32, with the norms and the last product of
    each sublayer: in trained T5s it passes float16's largest number, 65,504.

    >>> import numpy as np
    >>> layers = Layers(features=8, num_layers=2, num_heads=2)
    >>> model = EncoderDecoder(EncoderDecoderConfig(10, layers, layers), rngs=nnx.Rngs(0))
    >>> model(np.array([[3, 1, 4, 1]]), np.array([[5, 9]])).shape
    (1, 2, 10)

    Source: Vaswani et al. 2017, "Attention Is All You Need"; Raffel et al. 2020 (T5).
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        encoder, decoder = _with_float16(config.encoder), _with_float16(config.decoder)
        E, dtypes = decoder.features, decoder.dtypes
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
        self.encoder = Stack(encoder, causal=False, rngs=rngs)
        self.decoder = Stack(decoder, causal=True, context_features=E, rngs=rngs)
        for stack, layers in ((self.encoder, encoder), (self.decoder, decoder)):
            if layers.dtype == jnp.float16:
                _sum_in_float32(stack)
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
          source_real, target_real: bool, of the same shapes, False for padding, on either side of
            the tokens, where these may be any integers.

        Raises:
          ValueError: a token that is known not to be in the vocabulary. Where tokens are not known,
            under ``jit``, the logits of what sees one that is not are NaN.
        """
        memory = self.encode(source, real=source_real)
        return self.decode(target, memory, real=target_real)

    def encode(self, source: Any, *, real: Any = None) -> Memory:
        """The source ``[*B S]`` as the decoder's layers see it."""
        source = check_positions(source, "source")
        real = as_real(real, source.shape, of="the source's")
        positions = places(None, real)
        x = _summand(self.embed(source, positions=positions, real=real))
        x = self.encoder(x, real=real, positions=positions)
        return Memory(self.decoder.contexts(self.dropout(self._narrow(x))), real)

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
          real: bool ``[*B T]``, False for padding, on either side of the tokens; without caches.
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
        target = check_positions(target, "target")
        T = target.shape[-1]
        real = as_real(real, target.shape, of="the target's")
        held = real
        if caches is not None:
            held = None if count is None else first_tokens(count, target.shape)
        positions = None if caches is None else positions_after(caches, T, count)
        positions = places(positions, held)
        result = self.decoder(
            _summand(self.embed(target, positions=positions, real=held)),
            memory.contexts,
            real=real,
            context_mask=padding(memory.real, T),
            positions=positions,
            caches=caches,
            count=count,
        )
        if caches is None:
            return self.dropout(self._narrow(result))
        return self.dropout(self._narrow(result[0])), result[1]

    def _narrow(self, x: jax.Array) -> jax.Array:
        """What a stack gives, in float16 again."""
        return x.astype(jnp.float16) if self.embed.dtype == jnp.float16 else x

    @property
    def vocabulary(self) -> int:
        """How many tokens there are: both sides take those from 0 to one less."""
        return self.config.vocabulary

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


def _with_float16(layers: Layers) -> Layers:
    """Computing in float16 where parameters say so: inputs in float32 would have it otherwise."""
    if layers.dtype is None and layers.param_dtype == jnp.float16:
        return dataclasses.replace(layers, dtype=jnp.float16)
    return layers


def _summand(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _sum_in_float32(stack: Stack) -> None:
    """The norms of a stack, and what its sublayers give, in float32; the rest stays as it is."""
    parts: list[Any] = [stack.norm]
    for _, module in nnx.iter_modules(stack):
        if isinstance(module, Residual):
            sublayer: Any = module.sublayer
            last = sublayer.down if isinstance(sublayer, FeedForward) else sublayer.out
            parts += [module.norm, module.norm_after, last]
    for part in parts:
        if part is not None:
            part.dtype = jnp.float32
