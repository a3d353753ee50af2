"""Neural language models: a GRU with and without attention, and a transformer decoder."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import masks
from attention_jax.models import Decoder, DecoderConfig
from attention_jax.nn import Embeddings, MultiHeadAttention, Residual
from attention_jax.nn.linear import Linear
from experiments.models.recurrent import GRU
from experiments.tasks.shakespeare.config import Config
from experiments.tasks.shakespeare.ngrams import BYTES
from experiments.training import text_config
from experiments.training.task import Array


class Recurrent(nnx.Module):
    """A GRU, optionally with causal attention over its states."""

    def __init__(self, config: Config, *, attend: bool, rngs: nnx.Rngs) -> None:
        E = config.gru_width
        init = nnx.initializers.normal(E**-0.5)
        self.embed = Embeddings(BYTES, E, embedding_init=init, rngs=rngs)
        self.gru = GRU(E, E, config.gru_depth, dropout_rate=config.dropout, rngs=rngs)
        self.attention = nnx.data(None)
        if attend:
            heads = MultiHeadAttention(
                E,
                config.heads,
                mask=masks.causal(),
                **text_config.attention_options(config),
                rngs=rngs,
            )
            norm = functools.partial(nnx.LayerNorm, E, rngs=rngs)
            self.attention = Residual(heads, norm, dropout_rate=config.dropout, rngs=rngs)
        self.head = Linear(E, BYTES, rngs=rngs)

    def __call__(self, tokens: Array) -> jax.Array:
        """Logits ``[B T 256]`` of the byte after each of ``tokens [B T]``."""
        x = self.gru(self.embed(jnp.asarray(tokens)))
        return self.head(x if self.attention is None else self.attention(x))


def transformer(config: Config, *, rngs: nnx.Rngs) -> Decoder:
    """A decoder-only transformer."""
    return Decoder(
        DecoderConfig(
            BYTES,
            text_config.layers(config, activation="gelu_tanh"),  # as GPT-2, and cheaper than erf
            positions=config.vectors,
            max_length=config.context if config.vectors == "learned" else None,
            embedding_scale=text_config.EMBEDDING_SCALE,
            tied=False,
            dropout_rate=config.dropout,
        ),
        rngs=rngs,
    )
