"""The decoder-only transformer (GPT, Llama): each token predicts the next."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.cache import Cache
from attention_jax.core.axes import (
    AnyArray,
    Shape,
    accumulation_dtype,
    check_finite,
    check_positions,
    int_at_least,
    positive_float,
)
from attention_jax.masks import Mask
from attention_jax.models.layers import Layers, check_embeddings
from attention_jax.models.stack import Stack
from attention_jax.models.tokens import positions_after
from attention_jax.nn import Embeddings
from attention_jax.nn.linear import linear
from attention_jax.nn.padding import as_real, places
from attention_jax.nn.rngs import check_rngs


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Configuration of a ``Decoder``.

    Attributes:
      vocabulary: number of tokens (V).
      layers: the stack.
      positions: vectors added to those of the tokens: ``"learned"``, ``"sinusoidal"``; None, with
        rotary positions for example.
      max_length: number of learned positions; without those, the length the model was trained for.
      first_position: row of the table of positions for the first token, 2 in OPT; the rows before
        it are not used.
      embedding_scale: of the token vectors.
      head_scale: of the input of the head.
      tied: whether the output head shares the table of token vectors.
      logits_softcap: of the output logits.
      dropout_rate: of the embeddings.
    """

    vocabulary: int
    layers: Layers
    positions: str | None = None
    max_length: int | None = None
    first_position: int = 0
    embedding_scale: float = 1.0
    head_scale: float = 1.0
    tied: bool = True
    logits_softcap: float | None = None
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        check_embeddings(self)
        int_at_least("first_position", self.first_position, 0)
        check_finite("embedding_scale", self.embedding_scale)
        check_finite("head_scale", self.head_scale)
        if self.logits_softcap is not None:
            positive_float("logits_softcap", self.logits_softcap)


class Decoder(nnx.Module):
    """A causal language model: embeddings, causal layers, output head.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Decoder, DecoderConfig, Layers
    >>> config = DecoderConfig(vocabulary=10, layers=Layers(features=8, num_layers=1, num_heads=2),
    ...                        positions="sinusoidal")
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> tokens = np.array([[3, 1, 4, 1]])
    >>> model(tokens).shape
    (1, 4, 10)
    >>> logits, caches = model(tokens, caches=model.init_caches((1,), capacity=6))

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Touvron et
    al. 2023, "LLaMA".
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        check_rngs(rngs)
        layers = config.layers
        self.config = config
        self.embed = Embeddings(
            config.vocabulary,
            layers.features,
            positions=config.positions,
            max_length=config.max_length,
            first_position=config.first_position,
            scale=config.embedding_scale,
            dropout_rate=config.dropout_rate,
            **layers.dtypes,
            rngs=rngs,
        )
        self.stack = Stack(layers, causal=True, rngs=rngs)
        self.head = nnx.data(None)
        if not config.tied:
            self.head = linear(
                layers.features,
                config.vocabulary,
                axes=("embed", "vocab"),
                use_bias=False,
                **layers.dtypes,
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Any,
        *,
        caches: tuple[Cache, ...] | None = None,
        **options: Any,
    ) -> Any:
        """The logits ``[*B T V]`` of the token after each token.

        Args:
          tokens: integers ``[*B T]``.
          caches: of the previous tokens, from ``init_caches`` or the last call.
          **options: ``real``, ``mask``, ``positions``, ``count`` and ``prefix`` of ``hidden``.

        Returns:
          The logits, in float32 or wider; with caches also the new ones.

        Raises:
          ValueError: as ``hidden``.
        """
        result = self.hidden(tokens, caches=caches, **options)
        if caches is None:
            return self.logits(result)
        return self.logits(result[0]), result[1]

    def hidden(
        self,
        tokens: Any,
        *,
        real: Any = None,
        mask: Mask | None = None,
        positions: Any = None,
        caches: tuple[Cache, ...] | None = None,
        count: Any = None,
        prefix: Any = None,
    ) -> Any:
        """The hidden states ``[*B T E]``, the input of the head.

        Args:
          tokens: integers ``[*B T]``.
          real: bool ``[*B T]``, False for padding, on either side of the tokens, where tokens and
            positions may hold any integers; without caches.
          mask: combined with the causal mask; like that of the layers, it counts indices, padding
            included.
          positions: of the tokens, integers that broadcast to ``[*B T]``; default from 0 at the
            first real token, or from the end of the caches.
          caches: of the previous tokens, from ``init_caches`` or the last call.
          count: with caches, how many of the tokens are real, an int or int array ``[*B]``; the
            rest is padding.
          prefix: how many of the first tokens attend to each other in both directions (prefix-LM),
            an int or int array ``[*B]``; see ``Layers.prefix_lm``.

        Returns:
          The hidden states; with caches also the new ones.

        Raises:
          ValueError: ``real`` with caches; a token that is not in the vocabulary. Under ``jit``,
            where tokens are not known, its logits are NaN instead.
        """
        tokens = check_positions(tokens, "tokens")
        real = as_real(real, tokens.shape)
        in_row = real
        if caches is not None:
            in_row = None if count is None else first_tokens(count, tokens.shape)
        if caches is not None and positions is None:
            positions = positions_after(caches, tokens.shape[-1], count)
        positions = places(positions, in_row)
        x = self.embed(tokens, positions=positions, real=in_row)
        return self.stack(
            x,
            real=real,
            mask=mask,
            positions=positions,
            caches=caches,
            count=count,
            prefix=prefix,
        )

    @property
    def vocabulary(self) -> int:
        """The number of tokens (V): a call takes integers from 0 to V - 1."""
        return self.config.vocabulary

    def logits(self, x: Float[AnyArray, "*B T E"]) -> jax.Array:
        """The output head: ``[*B T E]`` to ``[*B T V]``, in float32 or wider."""
        x = jnp.asarray(x)
        if self.config.head_scale != 1.0:
            x = x * jnp.asarray(self.config.head_scale, x.dtype)
        y = self.embed.logits(x) if self.head is None else self.head(x)
        y = y.astype(accumulation_dtype(y.dtype))
        cap = self.config.logits_softcap
        return y if cap is None else cap * jnp.tanh(y / cap)

    def init_caches(
        self, batch: tuple[int, ...], capacity: int, **options: Any
    ) -> tuple[Cache, ...]:
        """Empty caches, one for each layer; arguments and options of ``Stack.init_caches``.

        Raises:
          ValueError: ``capacity`` exceeds the learned positions.
        """
        check_capacity(capacity, self.config)
        return self.stack.init_caches(batch, capacity, **options)


def first_tokens(count: Any, shape: Shape) -> jax.Array:
    """Bool ``[*B T]``: True for the first ``count`` tokens of each row."""
    count = jnp.asarray(count, jnp.int32)
    tokens = jnp.arange(shape[-1], dtype=jnp.int32)
    return jnp.broadcast_to(jnp.expand_dims(tokens, range(count.ndim)) < count[..., None], shape)


def check_capacity(capacity: int, config: Any) -> None:
    """Raises if a model has fewer learned positions than ``capacity``."""
    if config.positions == "learned" and capacity > config.max_length:
        raise ValueError(
            f"capacity must be at most {config.max_length}, the number of learned positions "
            f"(max_length), got {capacity}"
        )
