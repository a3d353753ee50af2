"""Spans of BIO tags, and precision, recall and F1 of predicted spans.

``B-Disease`` starts a span, ``I-Disease`` continues it, ``O`` is outside any span. Invalid
sequences are repaired as in the CoNLL scorer: an ``I-`` tag that continues no span of its type
starts one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Tokens ``start`` to ``stop - 1`` of one type."""

    kind: str
    start: int
    stop: int


class Agreement(NamedTuple):
    """Scores of predicted spans, right if type, start and stop are."""

    precision: float
    recall: float
    f1: float
    repaired: int
    """How many predicted ``I-`` tags continued no span."""


def spans(tags: Sequence[str]) -> tuple[list[Span], int]:
    """The spans of a sentence, and how many tags had to be repaired.

    >>> [tuple(span) for span in spans(["B-x", "I-x", "O", "I-y", "I-x"])[0]]
    [('x', 0, 2), ('y', 3, 4), ('x', 4, 5)]
    """
    result: list[Span] = []
    repaired = 0
    open_kind, start = "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        continues = mark == "I" and kind == open_kind
        if open_kind and not continues:
            result.append(Span(open_kind, start, i))
            open_kind = ""
        if mark in ("B", "I") and not continues:
            repaired += mark == "I"
            open_kind, start = kind, i
    return result, repaired


def agreement(right: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> Agreement:
    """Precision, recall and F1 of the spans of all sentences together.

    >>> round(agreement([["B-x", "I-x", "O", "B-x"]], [["B-x", "I-x", "O", "O"]]).f1, 3)
    0.667
    """
    hits = n_right = n_predicted = repaired = 0
    for labels, guesses in zip(right, predicted, strict=True):
        if len(labels) != len(guesses):
            raise ValueError(f"predicted has {len(guesses)} tags for a sentence of {len(labels)}")
        (expected, _), (found, invalid) = spans(labels), spans(guesses)
        hits += len(set(expected) & set(found))
        n_right += len(expected)
        n_predicted += len(found)
        repaired += invalid
    precision, recall = hits / max(n_predicted, 1), hits / max(n_right, 1)
    return Agreement(precision, recall, 2 * hits / max(n_right + n_predicted, 1), repaired)
