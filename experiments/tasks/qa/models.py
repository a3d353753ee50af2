"""Models that answer a question by a span of a passage: a rule and two readers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax import masks
from attention_jax.models.stack import Stack
from attention_jax.nn import MultiHeadAttention
from attention_jax.nn.embeddings import Embeddings
from attention_jax.nn.linear import Linear
from experiments.datasets.text import PAD
from experiments.models.recurrent import GRU
from experiments.models.sentences import WordDropout
from experiments.tasks.qa.config import Config
from experiments.tasks.qa.data import Lexicon
from experiments.tasks.qa.features import FEATURES, Rarity, match
from experiments.training import text_config

MASKED = -1e9  # the score of a span outside the passage


class Overlap:
    """A rule: the new words nearest to the question's, in the sentence that covers it best.

    The sentence is the one with the largest ``Match.coverage``. Candidates are its runs of words
    that are not in the question, without punctuation, with words of more than a tenth of the
    passages stripped from both ends. The candidate with the largest ``sum_i weight_i / distance_i``
    over the question's words i is the answer.
    """

    def __init__(self, rarity: Rarity, longest: int) -> None:
        self.rarity, self.longest = rarity, longest

    def answer(self, question: list[str], words: list[str]) -> tuple[int, int]:
        """The first and the last word of the answer."""
        matched = match(question, words, self.rarity)
        in_sentence = matched.sentence == matched.coverage.argmax()
        (sentence,) = np.nonzero(in_sentence)
        new = (matched.weight == 0) & np.array([w[0].isalnum() for w in words])
        rare = matched.rarity > math.log(10)
        (hits,) = np.nonzero((matched.weight > 0) & in_sentence)
        best, best_score = (int(sentence[0]), int(sentence[0])), -1.0
        run: list[int] = []
        for i in [*sentence.tolist(), None]:
            if i is not None and new[i]:
                run.append(i)
                continue
            while run and not rare[run[0]]:
                run.pop(0)
            while run and not rare[run[-1]]:
                run.pop()
            run = run[: self.longest]
            if run:
                distance = np.minimum(abs(hits - run[0]), abs(hits - run[-1]))
                score = float(np.sum(matched.weight[hits] / distance))
                if score > best_score:
                    best, best_score = (run[0], run[-1]), score
            run = []
        return best


class Reader(nnx.Module):
    """Reads question and passage as one sequence and scores each span of the passage::

        x        = e(word) + e(suffix) + W features + weighted mean of the question
        h        = Transformer(x), or GRU([g, attention(g to the question)]) with g = GRU(x)
        score_ij = start . h_i + end . h_j + length_{j - i}

    Source: Chen et al. 2017, "Reading Wikipedia to Answer Open-Domain Questions", section 3.2, for
    the features and the weighted mean; Lee et al. 2016, "Learning Recurrent Span Representations
    for Extractive Question Answering", for one softmax over all spans.
    """

    def __init__(self, config: Config, lexicon: Lexicon, rngs: nnx.Rngs) -> None:
        E = config.width
        self.noise = WordDropout(config.word_dropout, rngs=rngs)
        self.embed = Embeddings(
            len(lexicon.words),
            E,
            positions=config.vectors,
            max_length=config.max_length,
            types=2,
            scale=text_config.EMBEDDING_SCALE,
            rngs=rngs,
        )
        self.endings = Embeddings(
            len(lexicon.suffixes), E, scale=text_config.EMBEDDING_SCALE, rngs=rngs
        )
        self.features = Linear(FEATURES, E, rngs=rngs)
        self.weigh = Linear(E, 1, rngs=rngs)
        self.mean = Linear(E, E, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.stack: Any = nnx.data(None)
        self.first: Any = nnx.data(None)
        if config.model == "gru":
            options: Any = {"bidirectional": True, "dropout_rate": config.dropout, "rngs": rngs}
            self.first = GRU(E, E, config.depth, **options)
            self.second = GRU(2 * E, E, 1, **options)
            self.attention = MultiHeadAttention(
                E, config.heads, **text_config.attention_options(config), rngs=rngs
            )
        else:
            self.stack = Stack(text_config.layers(config), causal=False, rngs=rngs)
        self.ends = Linear(E, 2, rngs=rngs)
        self.lengths = nnx.Param(jnp.zeros(config.longest))

    def __call__(self, inputs: Any) -> jax.Array:
        """Scores ``[B T longest]`` of spans by first word and number of words after it."""
        words, suffixes, passage, features = inputs
        real = jnp.asarray(words) != PAD
        passage = jnp.asarray(passage)
        question = real & (passage == 0)
        x = self.embed(self.noise(words), types=passage) + self.endings(suffixes)
        x = x + self.features(jnp.asarray(features).astype(x.dtype))
        weights = jnp.where(question, self.weigh(x)[..., 0].astype(jnp.float32), MASKED)
        weights = jax.nn.softmax(weights, axis=-1).astype(x.dtype)
        x = self.dropout(x + self.mean(jnp.einsum("bt,bte->be", weights, x))[:, None])
        if self.first is None:
            x = self.stack(x, real=real)
        else:
            lengths = jnp.sum(real, axis=-1, dtype=jnp.int32)
            x = self.first(x, lengths)
            attended = self.attention(x, x, mask=masks.padding(question, queries=question.shape[1]))
            x = self.second(jnp.concatenate([x, attended], axis=-1), lengths)
        ends = self.ends(self.dropout(x)).astype(jnp.float32)
        return spans(ends, self.lengths[...].astype(jnp.float32), passage != 0)


def spans(ends: jax.Array, lengths: jax.Array, passage: jax.Array) -> jax.Array:
    """``ends_i0 + ends_j1 + lengths_{j - i}``, as ``[B T L]`` indexed by i and j - i.

    Args:
      ends: scores of first and last words, ``[B T 2]``.
      lengths: ``[L]``.
      passage: bool ``[B T]``; where i or j is not in the passage, the result is ``MASKED``.
    """
    T, L = passage.shape[1], lengths.shape[0]
    last = jnp.where(passage, ends[..., 1], MASKED)
    last = jnp.pad(last, ((0, 0), (0, L)), constant_values=MASKED)
    last = jnp.stack([last[:, i : i + T] for i in range(L)], axis=-1)
    first = jnp.where(passage, ends[..., 0], MASKED)[..., None]
    return jnp.maximum(first + last + lengths, MASKED)
