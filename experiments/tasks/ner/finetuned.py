"""Tagging with a pretrained encoder: the tokens of words, their shapes, and the tagger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.models import tagger
from attention_jax.models.pretrained import Tokenizer
from experiments.datasets.text import PAD
from experiments.models import finetuning
from experiments.tasks.ner.config import Config

SHAPES = 6


class Tokens(NamedTuple):
    """A sentence as tokens: their indices, the shape of each one's word, and where words start.

    A word without tokens, or past the end of what the encoder reads, starts at
    ``finetuning.NONE``.
    """

    tokens: list[int]
    shapes: list[int]
    starts: list[int]


def shape(word: str) -> int:
    """How a word is capitalized, which an uncased vocabulary does not tell; 0 for special tokens.

    >>> [shape(word) for word in ("the", "The", "DNA", "mRNA", "p53")]
    [1, 2, 3, 4, 5]
    """
    if any(c.isdigit() for c in word):
        return 5
    if word.islower() or not any(c.isupper() for c in word):
        return 1
    if word.isupper():
        return 3
    return 2 if word[:1].isupper() and word[1:].islower() else 4


def encode(tokenizer: Tokenizer, sentences: Sequence[list[str]]) -> list[Tokens]:
    """Sentences, given as words, as tokens."""
    found = []
    for words, row in zip(sentences, tokenizer(sentences).rows, strict=True):
        starts = finetuning.first_tokens(row, len(words))
        shapes = [0 if i < 0 else shape(words[i]) for i in row.words.tolist()]
        found.append(Tokens(row.tokens.tolist(), shapes, starts))
    return found


class PretrainedTagger(nnx.Module):
    """A pretrained encoder that also reads the shapes of words, and a head of tags.

    ::

        x = e(token) + s(shape),    s initially 0
    """

    def __init__(self, config: Config, tags: Sequence[str], rngs: nnx.Rngs) -> None:
        encoder = finetuning.encoder(config)
        rate = config.feature_dropout
        self.model = tagger(encoder, tags, dropout_rate=rate, rngs=rngs)
        self.shapes = nnx.Embed(
            SHAPES,
            encoder.config.layers.features,
            embedding_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )
        self.train()

    def __call__(self, inputs: Any) -> jax.Array:
        """Logits ``[B T tags]`` of tokens and shapes, ``[B T]`` each."""
        tokens, shapes = (jnp.asarray(x) for x in inputs)
        real = tokens != PAD
        encoder = self.model.encoder
        x = encoder.embed(tokens, real=real) + self.shapes(shapes)
        x = encoder.stack(x, real=real)
        return self.model.classify(self.model.dropout(x))
