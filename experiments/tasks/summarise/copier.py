"""An encoder and decoder that may copy: each word is made, or pointed at in the source."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.api import attention_weights
from attention_jax.models import EncoderDecoder, EncoderDecoderConfig
from attention_jax.models.encoder_decoder import Memory
from attention_jax.models.layers import padding
from attention_jax.nn.linear import Linear
from experiments.datasets.text import UNKNOWN
from experiments.training.losses import cross_entropy

TINY = 1e-9  # a probability whose logarithm is finite


class Places(NamedTuple):
    """Of an encoded source what the decoder's layers see, and what it takes to point into it."""

    contexts: Any
    """Keys and values for each layer."""
    keys: Any
    """``[B S E]``."""
    source: Any
    """Words ``[B S]``, those without a vector included."""


class Copier(EncoderDecoder):
    """Probabilities of the words of a vocabulary, and of the words of the source::

        p(w)  = g * softmax(head(x))_w + (1 - g) * sum of a_j over the j with source_j = w
        a     = softmax_j(query(x) . key(source_j) / sqrt(E)),    g = sigmoid(gate(x))

    Words from ``vocabulary`` on, as many as ``others``, have no vector: they can be copied only.
    What the model gives as logits are logarithms of ``p``.

    Source: See et al. 2017, "Get To The Point: Summarization with Pointer-Generator Networks".
    """

    def __init__(self, config: EncoderDecoderConfig, *, others: int, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        E = config.decoder.features
        self.others = others
        self.query, self.key = (Linear(E, E, use_bias=False, rngs=rngs) for _ in range(2))
        self.gate = Linear(E, 1, rngs=rngs)

    @property
    def vocabulary(self) -> int:
        """How many words there are, those without a vector included."""
        return self.config.vocabulary + self.others

    def known(self, words: Any) -> jax.Array:
        """Words without a vector as the unknown one."""
        words = jnp.asarray(words)
        return jnp.where(words < self.config.vocabulary, words, UNKNOWN)

    def encode(self, source: Any, *, real: Any = None) -> Memory:
        """The source ``[B S]``; its contexts are ``Places``."""
        x = self.dropout(self.encoder(self.embed(self.known(source), real=real), real=real))
        places = Places(self.decoder.contexts(x), self.key(x), jnp.asarray(source))
        return Memory(places, real)

    def hidden(self, target: Any, memory: Memory, *, caches: Any = None, **options: Any) -> Any:
        """``x`` and beside it the probabilities to copy each word, ``[B T E + V + others]``."""
        result = self._read(target, memory, caches=caches, **options)
        x = result if caches is None else result[0]
        words = self.config.vocabulary + self.others

        def copied(a: jax.Array, source: jax.Array) -> jax.Array:
            """Of one example: ``[T S]`` and ``[S]`` to ``[T V + others]``."""
            return jnp.zeros((a.shape[0], words), a.dtype).at[:, source].add(a)

        each = jax.vmap(copied)(self.pointed(x, memory), memory.contexts.source)
        both = jnp.concatenate([x, each], axis=-1)
        return both if caches is None else (both, result[1])

    def pointed(self, x: jax.Array, memory: Memory) -> jax.Array:
        """``a``, ``[B T S]``: a head of attention whose values are the words themselves."""
        query, keys = self.query(x)[:, :, None], memory.contexts.keys[:, :, None]
        return attention_weights(query, keys, mask=padding(memory.real, x.shape[1]))[:, 0]

    def log_probability(
        self, source: Any, target: Any, wanted: Any, *, source_real: Any, target_real: Any
    ) -> jax.Array:
        """``log p`` of the words ``wanted [B T]``, each after those of the target before it.

        The same as looking it up in the logits, without making those of all words.
        """
        memory = self.encode(source, real=source_real)
        x = self._read(target, memory, real=target_real)
        g = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))[..., 0]
        made = jnp.exp(-cross_entropy(super().logits(x), self.known(wanted)))
        made = jnp.where(wanted < self.config.vocabulary, made, 0)
        same = memory.contexts.source[:, None, :] == jnp.asarray(wanted)[..., None]
        copied = jnp.where(same, self.pointed(x, memory), 0).astype(jnp.float32).sum(-1)
        return jnp.log(g * made + (1 - g) * copied + TINY)

    def copied_from(self, source: Any, target: Any) -> jax.Array:
        """``a`` for each word of the target, ``[B T S]``."""
        memory = self.encode(source)
        return self.pointed(self._read(target, memory), memory)

    def _read(self, target: Any, memory: Memory, **options: Any) -> Any:
        """``x``, as without copying."""
        plain = Memory(memory.contexts.contexts, memory.real)
        return super().hidden(self.known(target), plain, **options)

    def logits(self, x: Any) -> jax.Array:
        """Of what ``hidden`` gives: ``log p``, ``[B T V + others]``."""
        E = self.config.decoder.features
        x, copied = x[..., :E], x[..., E:]
        g = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        made = g * jax.nn.softmax(super().logits(x), axis=-1)
        made = jnp.pad(made, [(0, 0)] * (made.ndim - 1) + [(0, self.others)])
        return jnp.log(made + (1 - g) * copied.astype(jnp.float32) + TINY)
