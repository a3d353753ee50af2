"""Models that evaluate an expression: a GRU and a transformer encoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.models import EncoderConfig, Tagger, TaggerConfig
from attention_jax.nn import Embeddings
from attention_jax.nn.linear import Linear
from experiments.datasets.text import PAD
from experiments.models.recurrent import GRU, last_state
from experiments.tasks.listops.config import Config
from experiments.tasks.listops.expressions import CLOSE, OPERATOR, WORDS
from experiments.training import text_config
from experiments.training.task import Array

VALUES = tuple(map(str, range(10)))


class Recurrent(nnx.Module):
    """A GRU; predicts the value of the expression from its last state."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        E = config.width
        init = nnx.initializers.normal(E**-0.5)
        self.embed = Embeddings(len(WORDS), E, embedding_init=init, rngs=rngs)
        self.gru = GRU(E, E, config.depth, dropout_rate=config.dropout, rngs=rngs)
        self.classify = Linear(E, 10, rngs=rngs)

    def each(self, tokens: Array) -> tuple[jax.Array, jax.Array]:
        """Logits ``[B T 10]``, and where they predict the value of a list: at its end."""
        tokens = jnp.asarray(tokens)
        lengths = jnp.sum(tokens != PAD, axis=-1, dtype=jnp.int32)
        return self.classify(self.gru(self.embed(tokens), lengths)), tokens == CLOSE

    def __call__(self, tokens: Array) -> jax.Array:
        """Logits ``[B 10]`` of the value of the expression."""
        lengths = jnp.sum(jnp.asarray(tokens) != PAD, axis=-1, dtype=jnp.int32)
        return last_state(self.each(tokens)[0], lengths)


class Transformer(nnx.Module):
    """An encoder; predicts the value of the expression at its first token, the outer operator."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        encoder = EncoderConfig(
            len(WORDS),
            text_config.layers(config),
            positions=config.vectors,
            max_length=config.longest,
            embedding_scale=text_config.EMBEDDING_SCALE,
            dropout_rate=config.dropout,
        )
        self.tagger = Tagger(TaggerConfig(encoder, VALUES, config.dropout), rngs=rngs)

    def each(self, tokens: Array) -> tuple[jax.Array, jax.Array]:
        """Logits ``[B T 10]``, and where they predict the value of a list: at its operator."""
        tokens = jnp.asarray(tokens)
        logits = self.tagger(tokens, real=tokens != PAD)
        return logits, (tokens >= OPERATOR) & (tokens < CLOSE)

    def __call__(self, tokens: Array) -> jax.Array:
        """Logits ``[B 10]`` of the value of the expression."""
        return self.each(tokens)[0][:, 0]
