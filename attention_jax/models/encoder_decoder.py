"""The encoder-decoder transformer (the original one, T5)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.cache import Cache
from attention_jax.core.axes import AnyArray, accumulation_dtype, brief_fields, check_positions
from attention_jax.models.decoder import check_capacity, first_tokens
from attention_jax.models.layers import Layers, check_embeddings
from attention_jax.models.stack import Stack
from attention_jax.models.tokens import padding, positions_after
from attention_jax.nn import Embeddings, FeedForward, MultiHeadAttention, Residual
from attention_jax.nn.linear import linear
from attention_jax.nn.padding import as_real, places
from attention_jax.nn.rngs import check_rngs


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Configuration of an ``EncoderDecoder``.

    Attributes:
      vocabulary: number of tokens (V), shared by source and target.
      encoder: the stack of the encoder.
      decoder: the stack of the decoder.
      positions: vectors added to those of the tokens: ``"learned"``, ``"sinusoidal"``; None, if the
        layers have a relative bias or rotary positions.
      max_length: rows of learned positions.
      embedding_scale: of the token vectors.
      tied: whether the output head shares the table of token vectors.
      head_scale: of the input of the head.
      dropout_rate: of the embeddings, and of the outputs of the stacks.
    """

    vocabulary: int
    encoder: Layers
    decoder: Layers
    positions: str | None = "sinusoidal"
    max_length: int | None = None
    embedding_scale: float = 1.0
    tied: bool = True
    head_scale: float = 1.0
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        check_embeddings(self)
        if self.encoder.features != self.decoder.features:
            raise ValueError(
                f"encoder and decoder must have the same width, since they share the table of "
                f"tokens, got {self.encoder.features} and {self.decoder.features}"
            )


class Memory(NamedTuple):
    """An encoded source, ready for the decoder's cross-attention.

    Attributes:
      contexts: a tuple with the ``KeysValues`` of each layer.
      real: bool ``[*B S]``, False for padding; None: all are real.
    """

    contexts: Any
    real: Any

    def __repr__(self) -> str:
        return brief_fields(self, self._fields)


class EncoderDecoder(nnx.Module):
    """A sequence-to-sequence model: the decoder attends to the encoded source.

    In float16, the residual stream is kept in float32, with the norms and the last projection of
    each sublayer: in trained T5s it exceeds float16's largest number, 65,504.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import EncoderDecoder, EncoderDecoderConfig, Layers
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> model = EncoderDecoder(EncoderDecoderConfig(10, layers, layers), rngs=nnx.Rngs(0))
    >>> model(np.array([[3, 1, 4, 1]]), np.array([[5, 9]])).shape
    (1, 2, 10)

    Source: Vaswani et al. 2017, "Attention Is All You Need"; Raffel et al. 2020 (T5).
    """

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        check_rngs(rngs)
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
            vocab = "embed", "vocab"
            self.head = linear(
                E, config.vocabulary, axes=vocab, use_bias=False, **dtypes, rngs=rngs
            )

    def __call__(
        self,
        source: Any,
        target: Any,
        *,
        source_real: Any = None,
        target_real: Any = None,
    ) -> jax.Array:
        """The logits ``[*B T V]`` of the token after each token of the target.

        Args:
          source: integers ``[*B S]``.
          target: integers ``[*B T]``.
          source_real, target_real: bool, of the same shapes, False for padding, on either side of
            the tokens, where these may hold any integers.

        Returns:
          The logits, in float32 or wider.

        Raises:
          ValueError: a token that is not in the vocabulary. Under ``jit``, where tokens are not
            known, the logits of all tokens that attend to it are NaN instead.
        """
        source, target = check_positions(source, "source"), check_positions(target, "target")
        as_real(source_real, source.shape, name="source_real", of="the source's")
        as_real(target_real, target.shape, name="target_real", of="the target's")
        memory = self.encode(source, real=source_real)
        return self.decode(target, memory, real=target_real)

    def encode(self, source: Any, *, real: Any = None) -> Memory:
        """Encodes the source ``[*B S]`` for the decoder."""
        source = check_positions(source, "source")
        real = as_real(real, source.shape, of="the source's")
        positions = places(None, real)
        x = _widened(self.embed(source, positions=positions, real=real))
        x = self.encoder(x, real=real, positions=positions)
        return Memory(self.decoder.contexts(self.dropout(self._narrow(x))), real)

    def decode(
        self,
        target: Any,
        memory: Memory,
        *,
        caches: tuple[Cache, ...] | None = None,
        **options: Any,
    ) -> Any:
        """The logits ``[*B T V]`` of the token after each token.

        Args:
          target: integers ``[*B T]``.
          memory: from ``encode``.
          caches: of the previous tokens, from ``init_caches`` or the last call.
          **options: ``real`` and ``count`` of ``hidden``.

        Returns:
          The logits, in float32 or wider; with caches also the new ones.
        """
        result = self.hidden(target, memory, caches=caches, **options)
        if caches is None:
            return self.logits(result)
        return self.logits(result[0]), result[1]

    def hidden(
        self,
        target: Any,
        memory: Memory,
        *,
        real: Any = None,
        caches: tuple[Cache, ...] | None = None,
        count: Any = None,
    ) -> Any:
        """The hidden states ``[*B T E]``, the input of the head.

        Args:
          target: integers ``[*B T]``.
          memory: from ``encode``.
          real: bool ``[*B T]``, False for padding, on either side of the tokens; without caches.
          caches: of the previous tokens, from ``init_caches`` or the last call.
          count: with caches, how many of the tokens are real.

        Returns:
          The hidden states; with caches also the new ones.
        """
        target = check_positions(target, "target")
        T = target.shape[-1]
        real = as_real(real, target.shape, of="the target's")
        in_row = real
        if caches is not None:
            in_row = None if count is None else first_tokens(count, target.shape)
        positions = None if caches is None else positions_after(caches, T, count)
        positions = places(positions, in_row)
        result = self.decoder(
            _widened(self.embed(target, positions=positions, real=in_row)),
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
        """The output of a stack, cast back to float16."""
        return x.astype(jnp.float16) if self.embed.dtype == jnp.float16 else x

    @property
    def vocabulary(self) -> int:
        """The number of tokens (V): source and target hold integers from 0 to V - 1."""
        return self.config.vocabulary

    def logits(self, x: Float[AnyArray, "*B T E"]) -> jax.Array:
        """The output head: ``[*B T E]`` to ``[*B T V]``, in float32 or wider."""
        x = jnp.asarray(x)
        if self.config.head_scale != 1.0:
            x = x * jnp.asarray(self.config.head_scale, x.dtype)
        y = self.embed.logits(x) if self.head is None else self.head(x)
        return y.astype(accumulation_dtype(y.dtype))

    def init_caches(
        self, batch: tuple[int, ...], capacity: int, **options: Any
    ) -> tuple[Cache, ...]:
        """Empty caches for the decoder's layers; arguments and options of ``Stack.init_caches``.

        Raises:
          ValueError: ``capacity`` exceeds the learned positions.
        """
        check_capacity(capacity, self.config)
        return self.decoder.init_caches(batch, capacity, **options)


def _with_float16(layers: Layers) -> Layers:
    """With ``dtype`` float16 if parameters are: float32 inputs would promote it to float32."""
    if layers.dtype is None and layers.param_dtype == jnp.float16:
        return dataclasses.replace(layers, dtype=jnp.float16)
    return layers


def _widened(x: jax.Array) -> jax.Array:
    """The input of a stack: float16 is cast to float32."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _sum_in_float32(stack: Stack) -> None:
    """Sets the norms of a stack and the last projection of each sublayer to float32."""
    parts: list[Any] = [stack.norm]
    for _, module in nnx.iter_modules(stack):
        if isinstance(module, Residual):
            sublayer: Any = module.sublayer
            last = sublayer.down if isinstance(sublayer, FeedForward) else sublayer
            last = sublayer.out if isinstance(sublayer, MultiHeadAttention) else last
            parts += [module.norm, module.norm_after, last]
    for part in parts:
        if part is not None:
            part.dtype = jnp.float32
