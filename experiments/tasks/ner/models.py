"""Taggers: the most frequent tag of each word, and networks over words and characters."""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.models.stack import Stack
from attention_jax.nn.embeddings import Embeddings
from attention_jax.nn.linear import Linear
from experiments.datasets.text import PAD
from experiments.models.recurrent import GRU
from experiments.models.sentences import WordDropout
from experiments.tasks.ner.config import BUCKETS, Config
from experiments.tasks.ner.data import Split
from experiments.training import text_config
from experiments.training.task import Array


class MostFrequent:
    """Predicts the most frequent tag of each word in training, and O for unknown words."""

    def __init__(self, split: Split) -> None:
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for sentence in split.sentences:
            for word, tag in zip(*sentence, strict=True):
                counts[word][tag] += 1
        self.tags = {word: count.most_common(1)[0][0] for word, count in counts.items()}

    def tag(self, words: list[str]) -> list[str]:
        """A tag for each word."""
        return [self.tags.get(word, "O") for word in words]


class Letters(nnx.Module):
    """``max_i relu(conv_3(e(byte_i)))`` for each word: ``[B T LETTERS]`` to ``[B T E]``."""

    def __init__(self, width: int, features: int, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(0.25)
        self.embed = nnx.Embed(257, width, embedding_init=init, rngs=rngs)
        self.convolution = nnx.Conv(width, features, kernel_size=(3,), rngs=rngs)

    def __call__(self, letters: Array) -> jax.Array:
        """Embeds words by their bytes."""
        x = jnp.where(letters[..., None] > 0, self.embed(jnp.asarray(letters)), 0)
        return jax.nn.relu(self.convolution(x)).max(axis=-2)


class Tagger(nnx.Module):
    """Embeds words and their characters, applies a GRU or transformer, classifies each word."""

    def __init__(self, config: Config, vocabulary: int, tags: int, rngs: nnx.Rngs) -> None:
        E = config.width
        self.noise = WordDropout(config.word_dropout, rngs=rngs)
        self.embed = Embeddings(
            vocabulary,
            E,
            positions=config.vectors,
            max_length=BUCKETS[-1],
            scale=text_config.EMBEDDING_SCALE,
            rngs=rngs,
        )
        self.letters = Letters(config.letter_width, E, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.gru: Any = nnx.data(None)
        self.stack: Any = nnx.data(None)
        if config.model == "gru":
            self.gru = GRU(
                E, E, config.depth, bidirectional=True, dropout_rate=config.dropout, rngs=rngs
            )
        else:
            self.stack = Stack(text_config.layers(config), causal=False, rngs=rngs)
        self.classify = Linear(E, tags, rngs=rngs)

    def __call__(self, inputs: Any) -> jax.Array:
        """Logits ``[B T tags]`` of words and letters."""
        words, letters = inputs
        real = jnp.asarray(words) != PAD
        x = self.dropout(self.embed(self.noise(words)) + self.letters(letters))
        if self.gru is None:
            x = self.stack(x, real=real)
        else:
            x = self.gru(x, jnp.sum(real, axis=-1, dtype=jnp.int32))
        return self.classify(self.dropout(x))
