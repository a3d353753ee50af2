"""Spans of tokens from tags, and how well one set of them agrees with another.

Tags are those of the BIO scheme: ``B-Disease`` begins a span, ``I-Disease`` goes on with it, ``O``
is outside of all. What breaks the scheme is repaired by one rule, that of the CoNLL scorer: an
``I-`` that goes on with nothing of its kind begins a span.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Tokens ``start .. stop - 1`` of one kind."""

    kind: str
    start: int
    stop: int


class Agreement(NamedTuple):
    """Of spans with kind and both ends right."""

    precision: float
    recall: float
    f1: float
    repaired: int
    """How many guessed tags broke the scheme."""


def spans(tags: Sequence[str]) -> tuple[list[Span], int]:
    """The spans of a sentence, and how many tags had to be repaired.

    >>> [tuple(span) for span in spans(["B-x", "I-x", "O", "I-y", "I-x"])[0]]
    [('x', 0, 2), ('y', 3, 4), ('x', 4, 5)]
    """
    found: list[Span] = []
    repaired = 0
    open_kind, start = "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        goes_on = mark == "I" and kind == open_kind
        if open_kind and not goes_on:
            found.append(Span(open_kind, start, i))
            open_kind = ""
        if mark in ("B", "I") and not goes_on:
            repaired += mark == "I"
            open_kind, start = kind, i
    return found, repaired


def agreement(right: Iterable[Sequence[str]], guessed: Iterable[Sequence[str]]) -> Agreement:
    """Precision, recall and F1 over all sentences together.

    >>> round(agreement([["B-x", "I-x", "O", "B-x"]], [["B-x", "I-x", "O", "O"]]).f1, 3)
    0.667
    """
    both = of_right = of_guessed = repaired = 0
    for ours, theirs in zip(right, guessed, strict=True):
        if len(ours) != len(theirs):
            raise ValueError(f"guessed has {len(theirs)} tags for a sentence of {len(ours)}")
        are, (say, broken) = spans(ours)[0], spans(theirs)
        both += len(set(are) & set(say))
        of_right, of_guessed, repaired = (
            of_right + len(are),
            of_guessed + len(say),
            repaired + broken,
        )
    precision, recall = both / max(of_guessed, 1), both / max(of_right, 1)
    return Agreement(precision, recall, 2 * both / max(of_right + of_guessed, 1), repaired)
