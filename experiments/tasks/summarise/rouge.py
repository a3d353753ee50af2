"""ROUGE: overlap of a summary with a reference, in words, bigrams and common subsequences.

Words are runs of ``a-z0-9`` in lower case, as in the package rouge-score, without stemming. Each
score is an F1, the harmonic mean of precision and recall of the summary against the reference.

Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import NamedTuple

WORD = re.compile(r"[a-z0-9]+")


class Rouge(NamedTuple):
    """F1 of words, of bigrams and of the longest common subsequence, from 0 to 1."""

    rouge1: float
    rouge2: float
    rouge_l: float


def words(text: str) -> list[str]:
    """The words of a text that ROUGE compares.

    >>> words("Don't stop: U.S. 3-2")
    ['don', 't', 'stop', 'u', 's', '3', '2']
    """
    return WORD.findall(text.lower())


def rouge(reference: str, summary: str) -> Rouge:
    """ROUGE of one summary against one reference.

    >>> [round(x, 3) for x in rouge("the cat sat on the mat", "the cat on a mat")]
    [0.727, 0.222, 0.727]
    """
    right, ours = words(reference), words(summary)
    return Rouge(
        _f1(_common_ngrams(right, ours, 1), len(right), len(ours)),
        _f1(_common_ngrams(right, ours, 2), len(right) - 1, len(ours) - 1),
        _f1(longest_common(right, ours), len(right), len(ours)),
    )


def mean(references: Sequence[Sequence[str]], summaries: Sequence[str]) -> Rouge:
    """Mean over summaries; with several references, each score is that of the best one."""
    each = [
        [max(scores) for scores in zip(*(rouge(x, summary) for x in several), strict=True)]
        for several, summary in zip(references, summaries, strict=True)
    ]
    return Rouge(*(sum(column) / len(each) for column in zip(*each, strict=True)))


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    >>> longest_common("a b c d".split(), "b x d a".split())
    2
    """
    row = [0] * (len(other) + 1)
    for x in one:
        before = row
        row = [0]
        for j, y in enumerate(other):
            row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
    return row[-1]


def _common_ngrams(one: list[str], other: list[str], n: int) -> int:
    """Number of common n-grams, each counted as often as it occurs in both."""
    ours, theirs = (
        collections.Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1))
        for x in (one, other)
    )
    return (ours & theirs).total()


def _f1(both: int, one: int, other: int) -> float:
    return 2 * both / (one + other) if both else 0.0
