"""A pointer-generator transformer: each word is generated, or copied from the source."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.api import attention_weights
from attention_jax.models import EncoderDecoder, EncoderDecoderConfig
from attention_jax.models.encoder_decoder import Memory
from attention_jax.models.tokens import padding
from attention_jax.nn.linear import Linear
from experiments.datasets.text import UNKNOWN
from experiments.training.losses import cross_entropy
from experiments.training.task import Array

TINY = 1e-9  # added to probabilities, so that their logarithm is finite


class CopyContext(NamedTuple):
    """An encoded source: contexts of the decoder's layers, and what copying needs."""

    contexts: Any
    """Keys and values of each layer."""
    keys: Array
    """Keys of the copy attention, ``[B S E]``."""
    source: Array
    """Word indices ``[B S]``, those without an embedding included."""


class Copier(EncoderDecoder):
    """Mixes a distribution over the vocabulary with one over the words of the source::

        p(w)  = g * softmax(head(x))_w + (1 - g) * sum of a_j over the j with source_j = w
        a     = softmax_j(query(x) . key(source_j) / sqrt(E)),    g = sigmoid(gate(x))

    The ``others`` indices after the vocabulary are words without an embedding, which can only be
    copied. The logits of the model are ``log p``.

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
        """Number of word indices, those without an embedding included."""
        return self.config.vocabulary + self.others

    def known(self, words: Array) -> jax.Array:
        """Replaces words without an embedding by the unknown word."""
        words = jnp.asarray(words)
        return jnp.where(words < self.config.vocabulary, words, UNKNOWN)

    def encode(self, source: Array, *, real: Array | None = None) -> Memory:
        """Encodes the source ``[B S]``; the contexts of the memory are a ``CopyContext``."""
        x = self.dropout(self.encoder(self.embed(self.known(source), real=real), real=real))
        contexts = CopyContext(self.decoder.contexts(x), self.key(x), jnp.asarray(source))
        return Memory(contexts, real)

    def hidden(self, target: Array, memory: Memory, *, caches: Any = None, **options: Any) -> Any:
        """``x`` and the copy probability of each word, concatenated: ``[B T E + V + others]``."""
        result = self._read(target, memory, caches=caches, **options)
        x = result if caches is None else result[0]
        words = self.config.vocabulary + self.others

        def copied(a: jax.Array, source: jax.Array) -> jax.Array:
            """One example: ``[T S]`` and ``[S]`` to ``[T V + others]``."""
            return jnp.zeros((a.shape[0], words), a.dtype).at[:, source].add(a)

        p_copy = jax.vmap(copied)(self.copy_weights(x, memory), memory.contexts.source)
        both = jnp.concatenate([x, p_copy], axis=-1)
        return both if caches is None else (both, result[1])

    def copy_weights(self, x: jax.Array, memory: Memory) -> jax.Array:
        """``a [B T S]``: the weights of an attention head over the source."""
        query, keys = self.query(x)[:, :, None], memory.contexts.keys[:, :, None]
        return attention_weights(query, keys, mask=padding(memory.real, x.shape[1]))[:, 0]

    def log_probability(
        self, source: Array, target: Array, wanted: Array, *, source_real: Array, target_real: Array
    ) -> jax.Array:
        """``log p`` of the words ``wanted [B T]``, each given ``target`` up to the same position.

        Equals a lookup in the logits, without computing those of all words.
        """
        memory = self.encode(source, real=source_real)
        x = self._read(target, memory, real=target_real)
        g = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))[..., 0]
        generated = jnp.exp(-cross_entropy(super().logits(x), self.known(wanted)))
        generated = jnp.where(wanted < self.config.vocabulary, generated, 0)
        same = memory.contexts.source[:, None, :] == jnp.asarray(wanted)[..., None]
        copied = jnp.where(same, self.copy_weights(x, memory), 0).astype(jnp.float32).sum(-1)
        return jnp.log(g * generated + (1 - g) * copied + TINY)

    @nnx.jit
    def copied_from(self, source: Array, target: Array) -> jax.Array:
        """``a [B T S]`` for each word of the target."""
        memory = self.encode(source)
        return self.copy_weights(self._read(target, memory), memory)

    def _read(self, target: Array, memory: Memory, **options: Any) -> Any:
        """``x``, the hidden states without copying."""
        plain = Memory(memory.contexts.contexts, memory.real)
        return super().hidden(self.known(target), plain, **options)

    def logits(self, x: Any) -> jax.Array:
        """``log p [B T V + others]``, from the result of ``hidden``."""
        E = self.config.decoder.features
        x, copied = x[..., :E], x[..., E:]
        g = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        generated = g * jax.nn.softmax(super().logits(x), axis=-1)
        generated = jnp.pad(generated, [(0, 0)] * (generated.ndim - 1) + [(0, self.others)])
        return jnp.log(generated + (1 - g) * copied.astype(jnp.float32) + TINY)
