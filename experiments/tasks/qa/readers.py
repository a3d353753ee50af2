"""Readers that answer a question by a span of a passage: words, how they match, three models."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax import masks
from attention_jax.models.layers import Stack
from attention_jax.nn import MultiHeadAttention
from attention_jax.nn.embeddings import Embeddings
from attention_jax.nn.linear import Linear
from experiments.datasets import text
from experiments.datasets.text import END, PAD, START
from experiments.models.recurrent import GRU
from experiments.models.sentences import WordDropout
from experiments.tasks.qa.answers import Passage, Question, Split
from experiments.training import text_config

NEVER = -1e9  # the score of a span that is none
FEATURES = 20  # of a word; see ``features``
FAR = 1000  # words
ZEROS = str.maketrans("123456789", "000000000")


# --- How question and passage match.


def stem(word: str) -> str:
    """Its first five letters, in lower case: words that begin alike are one. Numbers stay whole.

    >>> stem("invented") == stem("Invention"), stem("1,950,000")
    (True, '1,950,000')
    """
    return word if word[0].isdigit() else word.lower()[:5]


class Rarity(NamedTuple):
    """``log(n / n_stem)`` of stems: of n passages, n_stem have it. For one that none has, log n."""

    of: Mapping[str, float]
    most: float

    @staticmethod
    def among(passages: Sequence[Passage]) -> Rarity:
        """Counted in passages."""
        n = len(passages)
        counts = collections.Counter(x for p in passages for x in {stem(w) for w in p.words})
        return Rarity({x: math.log(n / count) for x, count in counts.items()}, math.log(n))

    def __call__(self, stem: str) -> float:
        """Of one stem."""
        return self.of.get(stem, self.most)


class Match(NamedTuple):
    """What a passage of T words, in S sentences, has of a question."""

    rarity: np.ndarray
    """Of each word's stem, ``[T]``."""
    share: np.ndarray
    """``[T]``: of the rarity of all stems of the question, that of this word where its stem is
    among them, else 0."""
    sentence: np.ndarray
    """The sentence that each word is in, ``[T]``."""
    shares: np.ndarray
    """Of the same rarity what each sentence has, each stem once, ``[S]``."""


def match(question: Iterable[str], words: list[str], rarity: Rarity) -> Match:
    """How a passage matches a question."""
    asked = {x: rarity(x) for x in (stem(w) for w in question if w[0].isalnum())}
    total = sum(asked.values()) or 1.0
    stems = [stem(word) for word in words]
    sentence = sentences(words)
    shares = np.zeros(sentence[-1] + 1, np.float32)
    for i, x in dict.fromkeys(zip(sentence.tolist(), stems, strict=True)):  # in a fixed order
        shares[i] += asked.get(x, 0.0) / total
    return Match(
        np.array([rarity(x) for x in stems], np.float32),
        np.array([asked.get(x, 0.0) / total for x in stems], np.float32),
        sentence,
        shares,
    )


def sentences(words: list[str]) -> np.ndarray:
    """The number of each word's sentence, ``[T]``, by a rule that takes initials for no end.

    >>> sentences(["I", "saw", "J", ".", "Doe", ".", "He", "left", "."]).tolist()
    [0, 0, 0, 0, 0, 0, 1, 1, 1]
    """
    found = np.zeros(len(words), np.int32)
    for i in range(2, len(words)):
        ends = words[i - 1] in "?!" or (words[i - 1] == "." and len(words[i - 2]) > 2)
        found[i] = ends and not words[i][0].islower()
    return np.cumsum(found, dtype=np.int32)


def features(
    question: list[str], words: list[str], rarity: Rarity
) -> tuple[np.ndarray, np.ndarray]:
    """What is counted of the words of question and passage, ``[Q FEATURES]`` and ``[T FEATURES]``.

    Of each word: its shape, its rarity, whether the other text has it (as it is written, in lower
    case) and its share of the question. Of a word of the passage also whether the question has its
    stem, how often it is there, how near words of the question are on either side, and how its
    sentence matches.
    """
    found = match(question, words, rarity)
    asked = match(question, question, rarity)
    ours = np.stack([*_alone(question, asked), *_in_both(question, words), asked.share], axis=1)
    counts = collections.Counter(words)
    (said,) = np.nonzero(found.share)
    share = found.share[said]
    after = np.arange(len(words), dtype=np.float32)[:, None] - said.astype(np.float32)
    near = []
    for side in (after, -after):  # [T said]: how far after, or before, each word of the question
        far = np.where(side > 0, side, FAR)
        near += [np.exp(-far / reach) @ share for reach in (3, 10)]
        near.append(1 / np.where(share > 0.05, far, FAR).min(axis=1, initial=FAR))
    mine = found.shares[found.sentence]
    best = found.shares.max()
    columns = [
        *_alone(words, found),
        *_in_both(words, question),
        found.share,
        found.share > 0,
        np.log1p([counts[word] for word in words]) / 3,
        *near,
        mine,
        mine / max(best, 1e-6),
        mine == best,
    ]
    theirs = np.stack([np.asarray(x, np.float32) for x in columns], axis=1)
    return np.pad(ours, ((0, 0), (0, theirs.shape[1] - ours.shape[1]))), theirs


def _alone(words: list[str], found: Match) -> list[np.ndarray]:
    """Of each word by itself: capitals, digits, punctuation, rarity."""
    return [
        np.array([w[0].isupper() for w in words], np.float32),
        np.array([len(w) > 1 and w.isupper() for w in words], np.float32),
        np.array([w[0].isdigit() for w in words], np.float32),
        np.array([len(w) == 4 and w.isdigit() for w in words], np.float32),
        np.array([not w[0].isalnum() for w in words], np.float32),
        found.rarity / 8,
    ]


def _in_both(words: list[str], others: list[str]) -> list[np.ndarray]:
    """Whether the other text has a word: as it is written, in lower case."""
    found = []
    for form in (str, str.lower):
        there = {form(w) for w in others}
        found.append(np.array([form(w) in there for w in words], np.float32))
    return found


# --- What a model is given.


class Lexicon(NamedTuple):
    """Words and endings that have a vector, and how rare stems are."""

    words: text.Words
    endings: text.Words
    rarity: Rarity

    @staticmethod
    def of(passages: Sequence[Passage], questions: Sequence[Question], least: int) -> Lexicon:
        """Of the words that are there at least so many times, the endings three times that."""
        texts = [*(x.words for x in passages), *(x.words for x in questions)]
        return Lexicon(
            text.Words.of(map(shapes, texts), least),
            text.Words.of(map(endings, texts), 3 * least),
            Rarity.among(passages),
        )


def shapes(words: list[str]) -> str:
    """How words are looked up: in lower case, digits as 0.

    >>> shapes(["In", "1992"])
    'in 0000'
    """
    return " ".join(words).lower().translate(ZEROS)


def endings(words: list[str]) -> str:
    """The last three letters of each.

    >>> endings(["Nations", "in", "1992"])
    'ons in 000'
    """
    return " ".join(word[-3:] for word in shapes(words).split())


class Window(NamedTuple):
    """Words ``start`` to ``stop`` of the passage of a question, both by number."""

    question: int
    start: int
    stop: int


def windows(split: Split, reads: int, stride: int) -> list[Window]:
    """Of each question: each of up to ``reads`` words, each ``stride`` after the one before."""
    found = []
    for i, question in enumerate(split.questions):
        n = len(split.passages[question.passage].words)
        starts = range(0, max(n - reads, 0) + stride, stride)
        found += [Window(i, start, min(start + reads, n)) for start in starts]
    return found


def length_of(split: Split, window: Window) -> int:
    """Words of a question and a window together, with a start and an end of the question."""
    return len(split.questions[window.question].words) + 2 + window.stop - window.start


class Inputs(NamedTuple):
    """A question and a window of its passage as one sequence.

    Words and their endings as numbers, ``[B T]``; whether a word is of the passage, ``[B T]``;
    what is counted of it, ``[B T FEATURES]``.
    """

    words: Any
    endings: Any
    passage: Any
    features: Any


def inputs_of(
    lexicon: Lexicon, split: Split, some: list[Window], length: int, count: int | None = None
) -> Inputs:
    """Windows as arrays, padded to a length and a count of rows."""
    asked = [split.questions[window.question] for window in some]
    about = [split.passages[question.passage].words for question in asked]
    arrays = []
    for known, form in ((lexicon.words, shapes), (lexicon.endings, endings)):
        cut = [words[x.start : x.stop] for words, x in zip(about, some, strict=True)]
        rows = known.encode_all(form(words) for words in (*(q.words for q in asked), *cut))
        both = zip(rows[: len(some)], rows[len(some) :], strict=True)
        arrays.append(text.padded([[START, *q, END, *p] for q, p in both], length, count))
    passage = np.zeros_like(arrays[0])
    counted = np.zeros((*passage.shape, FEATURES), np.float32)
    for i, (question, words, window) in enumerate(zip(asked, about, some, strict=True)):
        ours, theirs = features(question.words, words, lexicon.rarity)
        begin, end = len(ours) + 2, length_of(split, window)
        passage[i, begin:end] = 1
        counted[i, 1 : begin - 1] = ours
        counted[i, begin:end] = theirs[window.start : window.stop]
    return Inputs(arrays[0], arrays[1], passage, counted)


# --- Models.


class Overlap:
    """A rule: in the sentence that has most of the question, the new words nearest to its words.

    Sentences are compared by ``Match.shares``. In the best, runs of words that the question does
    not have, without punctuation and without words that are in more than every tenth passage at
    their ends, are compared by ``sum_i share_i / distance_i`` over the words i of the question.
    """

    def __init__(self, rarity: Rarity, longest: int) -> None:
        self.rarity, self.longest = rarity, longest

    def answer(self, question: list[str], words: list[str]) -> tuple[int, int]:
        """The first and the last word of the answer."""
        found = match(question, words, self.rarity)
        (inside,) = np.nonzero(found.sentence == found.shares.argmax())
        new = (found.share == 0) & np.array([w[0].isalnum() for w in words])
        rare = found.rarity > math.log(10)
        (said,) = np.nonzero((found.share > 0) & (found.sentence == found.shares.argmax()))
        best, most = (int(inside[0]), int(inside[0])), -1.0
        run: list[int] = []
        for i in [*inside.tolist(), None]:
            if i is not None and new[i]:
                run.append(i)
                continue
            while run and not rare[run[0]]:
                run.pop(0)
            while run and not rare[run[-1]]:
                run.pop()
            run = run[: self.longest]
            if run:
                distance = np.minimum(abs(said - run[0]), abs(said - run[-1]))
                near = float(np.sum(found.share[said] / distance))
                if near > most:
                    best, most = (run[0], run[-1]), near
            run = []
        return best


class Reader(nnx.Module):
    """Question and passage read together, a score for each span of the passage::

        x        = e(word) + e(ending) + W features + the question's mean, weighted
        h        = Transformer(x), or GRU([g, attention(g to the question)]) of g = GRU(x)
        score_ij = start . h_i + end . h_j + length_{j - i}

    Source: for the features and the weighted mean, Chen et al. 2017, "Reading Wikipedia to Answer
    Open-Domain Questions", section 3.2; for one softmax over all spans, Lee et al. 2016, "Learning
    Recurrent Span Representations for Extractive Question Answering".
    """

    def __init__(self, config: Any, lexicon: Lexicon, rngs: nnx.Rngs) -> None:
        E = config.width
        self.noise = WordDropout(config.word_dropout, rngs=rngs)
        self.embed = Embeddings(
            len(lexicon.words),
            E,
            positions=config.vectors,
            max_length=config.most,
            types=2,
            scale=text_config.EMBEDDING_SCALE,
            rngs=rngs,
        )
        self.endings = Embeddings(
            len(lexicon.endings), E, scale=text_config.EMBEDDING_SCALE, rngs=rngs
        )
        self.features = Linear(FEATURES, E, rngs=rngs)
        self.weigh = Linear(E, 1, rngs=rngs)
        self.mean = Linear(E, E, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.stack: Any = nnx.data(None)
        self.first: Any = nnx.data(None)
        if config.model == "gru":
            options = {"bidirectional": True, "dropout_rate": config.dropout, "rngs": rngs}
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
        """Scores ``[B T longest]`` of spans by their first word and how many follow it."""
        words, endings, passage, features = inputs
        real = jnp.asarray(words) != PAD
        passage = jnp.asarray(passage)
        asked = real & (passage == 0)
        x = self.embed(self.noise(words), types=passage) + self.endings(endings)
        x = x + self.features(jnp.asarray(features).astype(x.dtype))
        weights = jnp.where(asked, self.weigh(x)[..., 0].astype(jnp.float32), NEVER)
        weights = jax.nn.softmax(weights, axis=-1).astype(x.dtype)
        x = self.dropout(x + self.mean(jnp.einsum("bt,bte->be", weights, x))[:, None])
        if self.first is None:
            x = self.stack(x, real=real)
        else:
            length = jnp.sum(real, axis=-1, dtype=jnp.int32)
            x = self.first(x, length)
            seen = self.attention(x, x, mask=masks.padding(asked, asked.shape[1]))
            x = self.second(jnp.concatenate([x, seen], axis=-1), length)
        ends = self.ends(self.dropout(x)).astype(jnp.float32)
        return spans(ends, self.lengths[...].astype(jnp.float32), passage != 0)


def spans(ends: jax.Array, lengths: jax.Array, passage: jax.Array) -> jax.Array:
    """``ends_i0 + ends_j1 + lengths_{j - i}``, as ``[B T L]`` by i and j - i.

    Args:
      ends: scores of first and last words, ``[B T 2]``.
      lengths: ``[L]``.
      passage: bool ``[B T]``; where i or j is not of it, the result is ``NEVER``.
    """
    T, L = passage.shape[1], lengths.shape[0]
    last = jnp.pad(jnp.where(passage, ends[..., 1], NEVER), ((0, 0), (0, L)), constant_values=NEVER)
    last = jnp.stack([last[:, i : i + T] for i in range(L)], axis=-1)
    first = jnp.where(passage, ends[..., 0], NEVER)[..., None]
    return jnp.maximum(first + last + lengths, NEVER)
