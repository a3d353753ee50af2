"""The encoder-only transformer (BERT): each token attends to all others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.core.axes import (
    AnyArray,
    accumulation_dtype,
    check_positions,
    int_at_least,
    same_rank,
)
from attention_jax.masks import Mask
from attention_jax.models.layers import Layers, check_embeddings
from attention_jax.models.stack import Stack
from attention_jax.nn import Embeddings, pooling
from attention_jax.nn.feed_forward import ACTIVATIONS, check_activation
from attention_jax.nn.linear import linear
from attention_jax.nn.logical import logical
from attention_jax.nn.padding import as_real, places
from attention_jax.nn.rngs import check_rngs

HEADS = (None, "tokens", "replaced")
POOLS = ("first", "mean")


@dataclasses.dataclass(frozen=True)
class Pooler:
    """Configuration of a pooler, ``norm(activation(x W + b))`` of the pooled vector ``x``.

    Attributes:
      activation: as for ``Layers``.
      bias: whether the projection has a bias.
      norm: whether the result is normalized.
      dropout: whether a ``Classifier`` applies its dropout to ``x`` too.
      tokens: whether a ``Tagger`` and a ``Reader`` apply the pooler to each token.
    """

    activation: str = "tanh"
    bias: bool = True
    norm: bool = False
    dropout: bool = False
    tokens: bool = False

    def __post_init__(self) -> None:
        check_activation(self.activation)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Configuration of an ``Encoder``.

    Attributes:
      vocabulary: number of tokens (V).
      layers: the stack.
      positions: vectors added to those of the tokens: ``"learned"``, ``"sinusoidal"`` or None.
      max_length: number of learned positions; without those, the length the model was trained for.
      first_position: row of the table of positions for the first token, 2 in RoBERTa; the rows
        before it are not used.
      embedding_scale: of the token vectors, before positions are added.
      embedding_features: width of the embeddings, which are projected to that of the model if it is
        another one; default: that of the model.
      types: number of token types (segments), 0 for none.
      embedding_norm: whether the embeddings are normalized.
      pooler: whether the pooled vector goes through a projection and an activation.
      pooler_config: of the pooler; without one, of the pooler that ``models.classifier`` adds.
      pool: ``"first"``, the first real token (the class token), or ``"mean"`` of the real tokens.
      head: ``"tokens"``, logits of the vocabulary for each token; ``"replaced"``, one logit for
        each token, whether it was replaced (ELECTRA); or None. The heads of
        ``models.heads`` stand on an encoder without one.
      head_activation: of the projection in front of the logits of the vocabulary; default: that of
        the layers.
      head_bias: whether that projection has a bias.
      dropout_rate: of the embeddings.
    """

    vocabulary: int
    layers: Layers
    positions: str | None = "learned"
    max_length: int | None = 512
    first_position: int = 0
    embedding_scale: float = 1.0
    embedding_features: int | None = None
    types: int = 0
    embedding_norm: bool = False
    pooler: bool = False
    pooler_config: Pooler = Pooler()
    pool: str = "first"
    head: str | None = None
    head_activation: str | None = None
    head_bias: bool = True
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        check_embeddings(self)
        int_at_least("types", self.types, 0)
        int_at_least("first_position", self.first_position, 0)
        if self.embedding_features is not None:
            int_at_least("embedding_features", self.embedding_features, 1)
        if self.embedding_features == self.layers.features:  # so that equal models compare equal
            object.__setattr__(self, "embedding_features", None)
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {HEADS}, got {self.head!r}")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {self.pool!r}")
        if self.head_activation is not None:
            check_activation(self.head_activation, "head_activation")
        if self.head_activation == self.layers.activation:
            object.__setattr__(self, "head_activation", None)


class Encoder(nnx.Module):
    """A bidirectional encoder of tokens, with or without a head of its pretraining.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Encoder, EncoderConfig, Layers
    >>> config = EncoderConfig(vocabulary=10, max_length=4, pooler=True,
    ...                        layers=Layers(features=8, num_layers=1, num_heads=2, order="post"))
    >>> tokens, real = np.array([[3, 1, 4, 0]]), np.array([[True, True, True, False]])
    >>> encoder = Encoder(config, rngs=nnx.Rngs(0))
    >>> x = encoder(tokens, real=real)
    >>> x.shape, encoder.pooled(x, real).shape
    ((1, 4, 8), (1, 8))

    Source: Devlin et al. 2019, "BERT".
    """

    def __init__(
        self, config: EncoderConfig, *, embed: Embeddings | None = None, rngs: nnx.Rngs
    ) -> None:
        """Creates the encoder.

        Args:
          config: of the model.
          embed: embeddings to use in place of those that ``config`` describes, such as a subclass.
          rngs: for parameters and dropout.

        Raises:
          ValueError: ``embed`` of another vocabulary or width.
        """
        check_rngs(rngs)
        layers = config.layers
        E = layers.features
        width = config.embedding_features or E
        norm = functools.partial(layers.new_norm(rngs), width)

        def project(inputs: int, outputs: int, bias: bool = True) -> nnx.Linear:
            axes = ("embed", None)
            return linear(inputs, outputs, axes=axes, use_bias=bias, **layers.dtypes, rngs=rngs)

        self.config = config
        if embed is None:
            embed = Embeddings(
                config.vocabulary,
                width,
                positions=config.positions,
                max_length=config.max_length,
                first_position=config.first_position,
                scale=config.embedding_scale,
                types=config.types,
                norm=norm if config.embedding_norm else None,
                dropout_rate=config.dropout_rate,
                **layers.dtypes,
                rngs=rngs,
            )
        elif embed.tokens[...].shape != (config.vocabulary, width):
            raise ValueError(
                f"embed must have a table of the shape (vocabulary, features) "
                f"{(config.vocabulary, width)}, got {embed.tokens[...].shape}"
            )
        self.embed = embed
        self.stack = Stack(layers, causal=False, rngs=rngs)
        self.project = nnx.data(None if width == E else project(width, E))
        self.pooler: nnx.Linear | None = nnx.data(None)
        self.pooler_norm: Any = nnx.data(None)
        self.transform = self.transform_norm = nnx.data(None)
        self.token_bias = self.replaced = nnx.data(None)
        if config.pooler:
            self.add_pooler(rngs)
        if config.head == "replaced":
            self.transform, self.replaced = project(E, E), project(E, 1)
        if config.head == "tokens":
            self.transform = project(E, width, config.head_bias)
            self.transform_norm = norm()
            self.token_bias = nnx.Param(
                jnp.zeros(config.vocabulary, layers.param_dtype), **logical("vocab")
            )

    def add_pooler(self, rngs: nnx.Rngs) -> None:
        """Creates the pooler that the configuration describes."""
        layers, pooler = self.config.layers, self.config.pooler_config
        E, options = layers.features, {"axes": ("embed", None), **layers.dtypes, "rngs": rngs}
        self.pooler = linear(E, E, use_bias=pooler.bias, **options)
        self.pooler_norm = nnx.data(layers.new_norm(rngs)() if pooler.norm else None)

    def __call__(
        self,
        tokens: Any,
        *,
        real: Any = None,
        **options: Any,
    ) -> jax.Array:
        """The output of the head, ``[*B T V]`` or ``[*B T]``; without one, ``[*B T E]``.

        Args:
          tokens: integers ``[*B T]``.
          real: bool ``[*B T]``, False for padding; see ``hidden``.
          **options: ``types``, ``mask`` and ``positions`` of ``hidden``.
        """
        x = self.hidden(tokens, real=real, **options)
        if self.config.head == "tokens":
            return self.token_logits(x)
        if self.config.head == "replaced":
            return self.replaced_logits(x)
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
        """The vectors of the tokens, ``[*B T E]``.

        Args:
          tokens: integers ``[*B T]``.
          real: bool ``[*B T]``, False for padding, on either side of the tokens, where tokens,
            types and positions may hold any integers.
          types: of the tokens, integers ``[*B T]``.
          mask: combined with padding and windows; like that of the layers, it counts indices,
            padding included.
          positions: of the tokens, integers that broadcast to ``[*B T]``; default from 0 at the
            first real token.
        """
        tokens = check_positions(tokens, "tokens")
        real = as_real(real, tokens.shape)
        positions = places(positions, real)
        x = self.embed(tokens, positions=positions, types=types, real=real)
        x = x if self.project is None else self.project(x)
        return self.stack(x, real=real, mask=mask, positions=positions)

    def pooled(
        self,
        x: Float[AnyArray, "*B T E"],
        real: Any = None,
        *,
        dropout: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """One vector for the sequence, ``[*B E]``, through the pooler if there is one.

        Args:
          x: the vectors of the tokens, from ``hidden``.
          real: bool ``[*B T]``, False for padding.
          dropout: of a head, applied before the pooler if ``pooler_config.dropout`` is set.
        """
        x = jnp.asarray(x)
        real = as_real(real, x.shape[:-1])
        x = pooling.first(x, real) if self.config.pool == "first" else pooling.mean(x, real)
        if self.pooler is None:
            return x
        if self.config.pooler_config.dropout and dropout is not None:
            x = dropout(x)
        return self.projected(x)

    def projected(self, x: Float[AnyArray, "*B E"]) -> jax.Array:
        """The pooler's ``norm(activation(x W + b))`` of any vectors; see ``Pooler``."""
        y = ACTIVATIONS[self.config.pooler_config.activation](self.pooler(jnp.asarray(x)))  # type: ignore[misc]
        return y if self.pooler_norm is None else self.pooler_norm(y)

    def token_logits(self, x: Float[AnyArray, "*B T E"]) -> jax.Array:
        """``norm(activation(x W)) . table + bias``: ``[*B T E]`` to ``[*B T V]``."""
        activation = ACTIVATIONS[self.config.head_activation or self.config.layers.activation]
        x = self.transform_norm(activation(self.transform(jnp.asarray(x))))  # type: ignore[misc]
        y = self.embed.logits(x)
        wide = accumulation_dtype(y.dtype)
        logits, bias = same_rank(y.astype(wide), self.token_bias[...].astype(wide))  # type: ignore[index]
        return logits + bias

    def replaced_logits(self, x: Float[AnyArray, "*B T E"]) -> jax.Array:
        """``activation(x W) v + b``, ``[*B T E]`` to ``[*B T]``, in float32 or wider.

        Source: Clark et al. 2020, "ELECTRA".
        """
        x = ACTIVATIONS[self.config.layers.activation](self.transform(jnp.asarray(x)))  # type: ignore[misc]
        y = self.replaced(x)[..., 0]  # type: ignore[misc]
        return y.astype(accumulation_dtype(y.dtype))
