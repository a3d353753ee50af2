"""Sequence to sequence: recurrent models with and without attention, and greedy decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.mechanisms import additive_attention, additive_weights
from attention_jax.models import EncoderDecoderConfig, generate
from attention_jax.nn import Embeddings, pooling
from attention_jax.nn.linear import Linear
from experiments.datasets import text
from experiments.datasets.text import END, PAD, START
from experiments.models.inference import map_by_length
from experiments.models.recurrent import GRU
from experiments.training import text_config
from experiments.training.task import Array, Model


class Memory(NamedTuple):
    """An encoded source."""

    states: Any
    """``[B S E]``."""
    keys: Any
    """``U states [B S 1 E]`` for attention, None without attention."""
    real: Array
    """bool ``[B S]``, false at padding."""
    summary: jax.Array
    """``[B E]``: the initial state of the decoder."""


class Seq2Seq(nnx.Module):
    """A GRU encoder, and a GRU decoder that reads one vector or attends to the source::

        h_t    = GRU(h_{t-1}, [e(y_{t-1}), c_t])
        c_t    = summary of the source, or additive_attention(h_{t-1}, states, states)
        logits = W [h_t, c_t, e(y_{t-1})]

    Source: Cho et al. 2014 (one vector); Bahdanau et al. 2015 (``attend``).
    """

    def __init__(
        self,
        vocabulary: int,
        features: int,
        *,
        attend: bool,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        E = features
        init = nnx.initializers.normal(0.25)
        self.embed = Embeddings(vocabulary, E, embedding_init=init, rngs=rngs)
        self.encoder = GRU(E, E, 1, bidirectional=True, dropout_rate=dropout_rate, rngs=rngs)
        self.start = Linear(E, E, rngs=rngs)
        self.cell = nnx.GRUCell(2 * E, E, rngs=rngs)
        self.query: Any = nnx.data(None)
        self.key: Any = nnx.data(None)
        self.vector: Any = nnx.data(None)
        if attend:
            self.query = Linear(E, E, use_bias=False, rngs=rngs)
            self.key = Linear(E, E, rngs=rngs)
            self.vector = nnx.Param(nnx.initializers.normal(E**-0.5)(rngs.params(), (1, E)))
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)
        self.combine = Linear(3 * E, E, rngs=rngs)
        self.head = Linear(E, vocabulary, rngs=rngs)

    def __call__(self, source: Array, target: Array) -> jax.Array:
        """Logits ``[B T V]`` of the token after each token of ``target [B T]``."""
        memory = self.encode(source)
        embedded = self.dropout(self.embed(jnp.asarray(target)))
        step = functools.partial(self.step, memory)
        _, outputs = jax.lax.scan(step, memory.summary, jnp.swapaxes(embedded, 0, 1))
        return self.logits(jnp.swapaxes(outputs, 0, 1))

    def encode(self, source: Array) -> Memory:
        """Encodes ``source [B S]``."""
        source = jnp.asarray(source)
        real = source != PAD
        lengths = jnp.sum(real, axis=-1, dtype=jnp.int32)
        states = self.encoder(self.dropout(self.embed(source)), lengths)
        states = jnp.where(real[..., None], states, 0)
        keys = None if self.key is None else self.key(states)[:, :, None]
        summary = jnp.tanh(self.start(pooling.mean(states, real)))
        return Memory(states, keys, real, summary)

    def step(self, memory: Memory, h: jax.Array, embedded: jax.Array) -> tuple[Any, Any]:
        """One decoding step: from the state ``[B E]`` and the embedding ``[B E]`` of the last
        token to the new state and the features ``[B 3E]`` for ``logits``.
        """
        context = memory.summary
        if memory.keys is not None:
            context = additive_attention(
                self.query(h)[:, None, None],
                memory.keys,
                memory.states[:, :, None],
                self.vector[...],
                mask=memory.real[:, None, None],
            )[:, 0, 0]
        h, _ = self.cell(h, jnp.concatenate([embedded, context], axis=-1))
        return h, jnp.concatenate([h, context, embedded], axis=-1)

    def logits(self, features: jax.Array) -> jax.Array:
        """``[... 3E]`` to ``[... V]``, in float32."""
        return self.head(self.dropout(jnp.tanh(self.combine(features)))).astype(jnp.float32)

    @nnx.jit
    def weights(self, source: Array, target: Array) -> jax.Array:
        """Attention weights ``[B T S]`` of each target token over the source."""
        memory = self.encode(source)

        def step(h: jax.Array, embedded: jax.Array) -> tuple[Any, Any]:
            weights = additive_weights(
                self.query(h)[:, None, None],
                memory.keys,
                self.vector[...],
                mask=memory.real[:, None, None],
            )
            return self.step(memory, h, embedded)[0], weights[:, 0, 0]

        embedded = jnp.swapaxes(self.embed(jnp.asarray(target)), 0, 1)
        return jnp.swapaxes(jax.lax.scan(step, memory.summary, embedded)[1], 0, 1)


def transformer_config(config: Any, vocabulary: int, max_length: int) -> EncoderDecoderConfig:
    """The encoder-decoder transformer that a task's options describe.

    Args:
      config: a ``TextConfig`` with the option ``hidden``, the feed-forward width in units of the
        model width.
      vocabulary: number of tokens.
      max_length: longest sequence, for learned positions.
    """
    layers = text_config.layers(config, hidden=config.hidden * config.width)
    return EncoderDecoderConfig(
        vocabulary,
        layers,
        layers,
        positions=config.vectors,
        max_length=max_length if config.vectors == "learned" else None,
        embedding_scale=text_config.EMBEDDING_SCALE,
        dropout_rate=config.dropout,
    )


# --- Greedy decoding.


def decode_rows(
    model: Model,
    rows: Sequence[list[int]],
    *,
    limit: Callable[[int], int],
    size: int,
    buckets: Sequence[int],
) -> list[list[int]]:
    """``decode`` of sources of different lengths, in batches of similar length.

    Args:
      model: see ``decode``.
      rows: tokens of each source.
      limit: from the padded length of a batch to the number of tokens to decode at most.
      size: rows per batch.
      buckets: lengths to pad to.
    """

    def run(index: np.ndarray) -> list[list[int]]:
        length = text.bucket(max(len(rows[i]) for i in index), buckets)
        source = text.padded([rows[i] or [END] for i in index], length, size)
        source[len(index) :, 0] = END  # rows that fill up the batch need a token to attend to
        return decode(model, source, limit(length))

    return map_by_length(run, [len(row) for row in rows], size)


def decode(model: Model, source: np.ndarray, limit: int) -> list[list[int]]:
    """The target of each row of ``source [B S]``, decoded greedily, without ``START`` and ``END``.

    Args:
      model: a ``Seq2Seq``, or an ``EncoderDecoder`` from ``attention_jax.models``.
      source: rows of at least one token, padded with ``PAD``.
      limit: tokens to decode at most.
    """
    if isinstance(model, Seq2Seq):
        tokens = greedy(model, source, start=START, stop=END, limit=limit)
    else:
        tokens = generate(
            model,
            np.full((len(source), 1), START, np.int32),
            source=source,
            source_real=source != PAD,
            max_new_tokens=limit,
            stop=END,
            pad_token=PAD,
        ).tokens
    return [[x for x in row if x not in (PAD, END)] for row in np.asarray(tokens).tolist()]


def greedy(model: Seq2Seq, source: Array, *, start: int, stop: int, limit: int) -> jax.Array:
    """The likeliest token at each step, ``[B limit]``; ``PAD`` follows ``stop``."""
    return _greedy(model, source, start, stop, limit)


@nnx.jit(static_argnums=(2, 3, 4))
def _greedy(model: Seq2Seq, source: Array, start: int, stop: int, limit: int) -> jax.Array:
    memory = model.encode(source)
    B = source.shape[0]

    def unfinished(carry: Any) -> jax.Array:
        step, _, _, done, _ = carry
        return (step < limit) & ~done.all()

    def decode_one(carry: Any) -> Any:
        step, h, token, done, tokens = carry
        h, features = model.step(memory, h, model.embed.vectors(token))
        token = jnp.argmax(model.logits(features), axis=-1).astype(jnp.int32)
        token = jnp.where(done, PAD, token)
        return step + 1, h, token, done | (token == stop), tokens.at[:, step].set(token)

    first = (jnp.int32(0), memory.summary, jnp.full(B, start, jnp.int32), jnp.zeros(B, bool))
    tokens = jnp.full((B, limit), PAD, jnp.int32)
    return jax.lax.while_loop(unfinished, decode_one, (*first, tokens))[-1]
