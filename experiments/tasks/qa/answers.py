"""The SQuAD format for questions with reference answers, and its scores, exact match and F1.

Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text",
section 6.1; the scores are those of version 1.1.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

WORD = re.compile(r"\w+(?:[.,]\d+)*|[^\w\s]")
LONGEST_QUESTION = 46  # words; one question in the data ends in 117 commas
ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Passage(NamedTuple):
    """A text and its words; ``places`` are start and end of each word in the text."""

    text: str
    words: list[str]
    places: list[tuple[int, int]]

    @staticmethod
    def of(text: str) -> Passage:
        """Splits a text into words: runs of letters and digits, or one other character.

        >>> Passage.of("In 1,200 B.C.").words
        ['In', '1,200', 'B', '.', 'C', '.']
        """
        found = list(WORD.finditer(text))
        return Passage(text, [x[0] for x in found], [x.span() for x in found])

    def cut(self, first: int, last: int) -> str:
        """The text from word ``first`` to word ``last``, both included."""
        return self.text[self.places[first][0] : self.places[last][1]]

    def around(self, first: int, last: int, words: int = 12) -> str:
        """``cut`` in brackets, in the context of a few words on each side, on one line.

        >>> Passage.of("one two three four five").around(2, 2, words=1)
        'two [three] four'
        """
        before = self.cut(max(first - words, 0), last)
        after = self.cut(first, min(last + words, len(self.words) - 1))
        inside = self.cut(first, last)
        return " ".join(f"{before[: -len(inside)]}[{inside}]{after[len(inside) :]}".split())

    def overlapping(self, start: int, stop: int) -> tuple[int, int]:
        """The first and the last word that characters ``start`` to ``stop - 1`` overlap.

        Raises:
          ValueError: they overlap none.

        >>> Passage.of("one two three").overlapping(4, 9)
        (1, 2)
        """
        inside = [i for i, (a, b) in enumerate(self.places) if a < stop and b > start]
        if not inside:
            raise ValueError(f"characters {start} to {stop} must overlap a word")
        return inside[0], inside[-1]


class Question(NamedTuple):
    """A question about a passage, given by its index, and its reference answers.

    ``spans`` are the first and the last word of each distinct answer.
    """

    text: str
    words: list[str]
    passage: int
    answers: list[str]
    spans: list[tuple[int, int]]


class Split(NamedTuple):
    """Passages, questions about them, and how many reference answers start or end within a word."""

    passages: list[Passage]
    questions: list[Question]
    unaligned: int


def parse(articles: Sequence[Any]) -> Split:
    """Parses articles in the SQuAD format; questions are cut to ``LONGEST_QUESTION`` words.

    Raises:
      ValueError: a question has no words or no answer, or the passage does not contain an answer at
        its ``answer_start``.
    """
    passages: list[Passage] = []
    questions: list[Question] = []
    unaligned = 0
    for paragraph in (x for article in articles for x in article["paragraphs"]):
        passage = Passage.of(paragraph["context"])
        for item in paragraph["qas"]:
            spans = []
            for answer in item["answers"]:
                start, stripped = answer["answer_start"], answer["text"].strip()
                start += len(answer["text"]) - len(answer["text"].lstrip())
                if not stripped or not passage.text.startswith(stripped, start):
                    raise ValueError(
                        f"question {item['id']}: {stripped!r} is not at character {start}"
                    )
                first, last = passage.overlapping(start, start + len(stripped))
                unaligned += passage.cut(first, last) != stripped
                spans.append((first, last))
            words = Passage.of(item["question"]).words[:LONGEST_QUESTION]
            if not spans or not words:
                raise ValueError(f"question {item['id']} has no {'words' if spans else 'answer'}")
            answers = [answer["text"] for answer in item["answers"]]
            questions.append(
                Question(item["question"], words, len(passages), answers, [*dict.fromkeys(spans)])
            )
        passages.append(passage)
    return Split(passages, questions, unaligned)


# --- Scores.


def normalized(answer: str) -> list[str]:
    """The words of an answer in lower case, without ASCII punctuation and articles.

    >>> normalized("The U.S. Army, an army")
    ['us', 'army', 'army']
    """
    return ARTICLES.sub(" ", answer.lower().translate(WITHOUT_PUNCTUATION)).split()


def exact(answer: str, reference: str) -> float:
    """1 if both have the same normalized words in the same order, else 0.

    >>> exact("the Army", "army!"), exact("army", "armies")
    (1.0, 0.0)
    """
    return float(normalized(answer) == normalized(reference))


def f1(answer: str, reference: str) -> float:
    """F1 of two bags of words; 0 if either is empty, even if both are.

    >>> round(f1("the red cat", "a cat"), 3)  # precision 1 / 2, recall 1 / 1
    0.667
    """
    ours, theirs = normalized(answer), normalized(reference)
    shared = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def best(measure: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    """The largest score against any of the references."""
    return max(measure(answer, reference) for reference in references)


def agreement(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1 and exact match over questions, each against the best of its references.

    >>> agreement(["cat", "dog"], [["a cat", "pet"], ["red dog"]])
    {'f1': 0.8333333333333333, 'exact': 0.5}

    Raises:
      ValueError: there are no questions, a question has no references, or the numbers of answers
        and questions differ.
    """
    if not answers or len(answers) != len(references) or not all(references):
        raise ValueError(
            f"expected one answer and at least one reference for each question, got "
            f"{len(answers)} answers and {len(references)} lists of references, "
            f"{sum(not x for x in references)} of them empty"
        )
    pairs = list(zip(answers, references, strict=True))
    return {
        "f1": sum(best(f1, answer, right) for answer, right in pairs) / len(pairs),
        "exact": sum(best(exact, answer, right) for answer, right in pairs) / len(pairs),
    }
