"""How the words of a question and a passage match: features of each word."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.tasks.qa.answers import Passage

FEATURES = 20  # per word; see ``features``
FAR = 1000  # a distance in words beyond any reach


def stem(word: str) -> str:
    """The first five letters in lower case, a crude stem; numbers are kept whole.

    >>> stem("invented") == stem("Invention"), stem("1,950,000")
    (True, '1,950,000')
    """
    return word if word[0].isdigit() else word.lower()[:5]


class Rarity(NamedTuple):
    """Inverse document frequency, ``log(n / n_stem)``: ``n_stem`` of ``n`` passages have the stem.

    A stem that no passage has gets ``log n``.
    """

    of: Mapping[str, float]
    maximum: float

    @staticmethod
    def among(passages: Sequence[Passage]) -> Rarity:
        """Counted over passages."""
        n = len(passages)
        counts = collections.Counter(x for p in passages for x in {stem(w) for w in p.words})
        return Rarity({x: math.log(n / count) for x, count in counts.items()}, math.log(n))

    def __call__(self, stem: str) -> float:
        """The rarity of one stem."""
        return self.of.get(stem, self.maximum)


class Match(NamedTuple):
    """How a passage of T words in S sentences matches a question.

    The weight of a stem is its rarity, divided by the total rarity of the stems of the question.
    """

    rarity: np.ndarray
    """Rarity of the stem of each word, ``[T]``."""
    weight: np.ndarray
    """Weight of each word whose stem is in the question, 0 for the other words, ``[T]``."""
    sentence: np.ndarray
    """Index of the sentence of each word, ``[T]``."""
    coverage: np.ndarray
    """Total weight of the question's stems that each sentence has, ``[S]``."""


def match(question: Iterable[str], words: list[str], rarity: Rarity) -> Match:
    """Matches the words of a passage with those of a question."""
    asked = {x: rarity(x) for x in (stem(w) for w in question if w[0].isalnum())}
    total = sum(asked.values()) or 1.0
    stems = [stem(word) for word in words]
    sentence = sentences(words)
    coverage = np.zeros(sentence[-1] + 1, np.float32)
    # A dict removes duplicates and, unlike a set, keeps the order and so the rounding of the sums.
    for i, x in dict.fromkeys(zip(sentence.tolist(), stems, strict=True)):
        coverage[i] += asked.get(x, 0.0) / total
    return Match(
        np.array([rarity(x) for x in stems], np.float32),
        np.array([asked.get(x, 0.0) / total for x in stems], np.float32),
        sentence,
        coverage,
    )


def sentences(words: list[str]) -> np.ndarray:
    """Index of the sentence of each word, ``[T]``; a full stop after an initial ends no sentence.

    >>> sentences(["I", "saw", "J", ".", "Doe", ".", "He", "left", "."]).tolist()
    [0, 0, 0, 0, 0, 0, 1, 1, 1]
    """
    starts = np.zeros(len(words), np.int32)
    for i in range(2, len(words)):
        ends = words[i - 1] in "?!" or (words[i - 1] == "." and len(words[i - 2]) > 2)
        starts[i] = ends and not words[i][0].islower()
    return np.cumsum(starts, dtype=np.int32)


def features(
    question: list[str], words: list[str], rarity: Rarity
) -> tuple[np.ndarray, np.ndarray]:
    """Features of the words of a question ``[Q FEATURES]`` and of a passage ``[T FEATURES]``.

    Of every word: its shape, its rarity, whether the other text has it (as written, in lower case)
    and its weight in the question. Of a word of the passage also whether its stem is in the
    question, how often the passage has the word, how near the question's words are on either side,
    and how well its sentence covers the question.
    """
    matched = match(question, words, rarity)
    own = match(question, question, rarity)
    of_question = np.stack(
        [*_word_shape(question, own), *_in_both(question, words), own.weight], axis=1
    )
    counts = collections.Counter(words)
    (hits,) = np.nonzero(matched.weight)
    weight = matched.weight[hits]
    after = np.arange(len(words), dtype=np.float32)[:, None] - hits.astype(np.float32)
    proximity = []
    for side in (after, -after):  # [T hits]: distance after, or before, each word of the question
        distance = np.where(side > 0, side, FAR)
        proximity += [np.exp(-distance / reach) @ weight for reach in (3, 10)]
        proximity.append(1 / np.where(weight > 0.05, distance, FAR).min(axis=1, initial=FAR))
    coverage = matched.coverage[matched.sentence]
    best = matched.coverage.max()
    columns = [
        *_word_shape(words, matched),
        *_in_both(words, question),
        matched.weight,
        matched.weight > 0,
        np.log1p([counts[word] for word in words]) / 3,
        *proximity,
        coverage,
        coverage / max(best, 1e-6),
        coverage == best,
    ]
    of_passage = np.stack([np.asarray(x, np.float32) for x in columns], axis=1)
    missing = of_passage.shape[1] - of_question.shape[1]
    return np.pad(of_question, ((0, 0), (0, missing))), of_passage


def _word_shape(words: list[str], matched: Match) -> list[np.ndarray]:
    """Of each word by itself: capitals, digits, punctuation, rarity."""
    return [
        np.array([w[0].isupper() for w in words], np.float32),
        np.array([len(w) > 1 and w.isupper() for w in words], np.float32),
        np.array([w[0].isdigit() for w in words], np.float32),
        np.array([len(w) == 4 and w.isdigit() for w in words], np.float32),
        np.array([not w[0].isalnum() for w in words], np.float32),
        matched.rarity / 8,
    ]


def _in_both(words: list[str], others: list[str]) -> list[np.ndarray]:
    """Whether the other text has each word: as written, in lower case."""
    columns = []
    for form in (str, str.lower):
        known = {form(w) for w in others}
        columns.append(np.array([form(w) in known for w in words], np.float32))
    return columns
