"""ROUGE: how much of a reference summary is in another, by words, pairs of words, and their order.

Words are runs of ``a-z0-9`` in lower case, as in the package rouge-score; nothing is stemmed. Each
score is an F1, the harmonic mean of the part of the summary that is in the reference and the part
of the reference that is in the summary.

Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import NamedTuple

WORD = re.compile(r"[a-z0-9]+")


class Rouge(NamedTuple):
    """The three F1s, from 0 to 1."""

    rouge1: float
    rouge2: float
    rouge_l: float


def words(text: str) -> list[str]:
    """What is compared.

    >>> words("Don't stop: U.S. 3-2")
    ['don', 't', 'stop', 'u', 's', '3', '2']
    """
    return WORD.findall(text.lower())


def rouge(reference: str, summary: str) -> Rouge:
    """Of one summary against one reference.

    >>> [round(x, 3) for x in rouge("the cat sat on the mat", "the cat on a mat")]
    [0.727, 0.222, 0.727]
    """
    right, made = words(reference), words(summary)
    return Rouge(
        _f1(_common(right, made, 1), len(right), len(made)),
        _f1(_common(right, made, 2), len(right) - 1, len(made) - 1),
        _f1(longest_common(right, made), len(right), len(made)),
    )


def mean(references: Sequence[Sequence[str]], summaries: Sequence[str]) -> Rouge:
    """Of many summaries; where there are several references, each score is the best of them."""
    each = [
        [max(found) for found in zip(*(rouge(x, made) for x in some), strict=True)]
        for some, made in zip(references, summaries, strict=True)
    ]
    return Rouge(*(sum(column) / len(each) for column in zip(*each, strict=True)))


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest sequence of words that is in both, gaps allowed.

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


def _common(one: list[str], other: list[str], n: int) -> int:
    """How many runs of ``n`` words both have, each as often as in the one that has it less."""
    ours, theirs = (
        collections.Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1))
        for x in (one, other)
    )
    return (ours & theirs).total()


def _f1(both: int, one: int, other: int) -> float:
    return 2 * both / (one + other) if both else 0.0
