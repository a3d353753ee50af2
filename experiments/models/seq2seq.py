"""Translation by recurrence: an encoder, a decoder, and between them one vector or attention."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.mechanisms import additive_attention, additive_weights
from attention_jax.nn import Embeddings, pooling
from attention_jax.nn.linear import Linear
from experiments.datasets.text import PAD
from experiments.models.recurrent import GRU


class Memory(NamedTuple):
    """An encoded source."""

    states: Any
    """``[B S E]``."""
    keys: Any
    """``U states [B S 1 E]``, for attention; None without."""
    real: Any
    """bool ``[B S]``."""
    summary: Any
    """``[B E]``: what the decoder begins with."""


class Seq2Seq(nnx.Module):
    """Two gated recurrent networks: one reads the source, the other writes the target::

        h_t    = GRU(h_{t-1}, [e(y_{t-1}), c_t])
        c_t    = the mean state of the source, or additive_attention(h_{t-1}, states, states)
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

    def __call__(self, source: Any, target: Any) -> jax.Array:
        """Logits ``[B T V]`` of what follows each token of the target ``[B T]``."""
        memory = self.encode(source)
        embedded = self.dropout(self.embed(jnp.asarray(target)))
        one = functools.partial(self.step, memory)
        _, seen = jax.lax.scan(one, memory.summary, jnp.swapaxes(embedded, 0, 1))
        return self.logits(jnp.swapaxes(seen, 0, 1))

    def encode(self, source: Any) -> Memory:
        """The source ``[B S]``."""
        source = jnp.asarray(source)
        real = source != PAD
        lengths = jnp.sum(real, axis=-1, dtype=jnp.int32)
        states = self.encoder(self.dropout(self.embed(source)), lengths)
        states = jnp.where(real[..., None], states, 0)
        keys = None if self.key is None else self.key(states)[:, :, None]
        summary = jnp.tanh(self.start(pooling.mean(states, real)))
        return Memory(states, keys, real, summary)

    def step(self, memory: Memory, h: jax.Array, embedded: jax.Array) -> tuple[Any, Any]:
        """From the state ``[B E]`` and the last token ``[B E]``: the state, and what logits see."""
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

    def logits(self, seen: jax.Array) -> jax.Array:
        """``[... 3E]`` to ``[... V]``, in float32."""
        return self.head(self.dropout(jnp.tanh(self.combine(seen)))).astype(jnp.float32)

    def weights(self, source: Any, target: Any) -> jax.Array:
        """Who looks where: ``[B T S]``, for each token of the target."""
        memory = self.encode(source)

        def one(h: jax.Array, embedded: jax.Array) -> tuple[Any, Any]:
            looked = additive_weights(
                self.query(h)[:, None, None],
                memory.keys,
                self.vector[...],
                mask=memory.real[:, None, None],
            )
            return self.step(memory, h, embedded)[0], looked[:, 0, 0]

        embedded = jnp.swapaxes(self.embed(jnp.asarray(target)), 0, 1)
        return jnp.swapaxes(jax.lax.scan(one, memory.summary, embedded)[1], 0, 1)


def greedy(model: Seq2Seq, source: Any, *, start: int, stop: int, most: int) -> jax.Array:
    """The likeliest token after the likeliest, ``[B most]``; after ``stop`` come ``PAD``."""
    return _greedy(model, source, start, stop, most)


@nnx.jit(static_argnums=(2, 3, 4))
def _greedy(model: Seq2Seq, source: Any, start: int, stop: int, most: int) -> jax.Array:
    memory = model.encode(source)
    B = source.shape[0]

    def going(loop: Any) -> jax.Array:
        step, _, _, done, _ = loop
        return (step < most) & ~done.all()

    def go(loop: Any) -> Any:
        step, h, token, done, made = loop
        h, seen = model.step(memory, h, model.embed.vectors(token))
        token = jnp.argmax(model.logits(seen), axis=-1).astype(jnp.int32)
        token = jnp.where(done, PAD, token)
        return step + 1, h, token, done | (token == stop), made.at[:, step].set(token)

    first = (jnp.int32(0), memory.summary, jnp.full(B, start, jnp.int32), jnp.zeros(B, bool))
    return jax.lax.while_loop(going, go, (*first, jnp.full((B, most), PAD, jnp.int32)))[-1]
