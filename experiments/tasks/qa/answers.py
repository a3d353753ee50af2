"""Questions with reference answers: the format of SQuAD, and its scores, exact match and F1.

Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text",
section 6.1; the scores are those of its version 1.1.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

WORD = re.compile(r"\w+(?:[.,]\d+)*|[^\w\s]")
LONGEST_QUESTION = 46  # words: one in the data ends in 117 commas
ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Passage(NamedTuple):
    """A text and its words, each with where it begins and ends in the text."""

    text: str
    words: list[str]
    places: list[tuple[int, int]]

    @staticmethod
    def of(text: str) -> Passage:
        """A text's words: letters and digits, or one other character.

        >>> Passage.of("In 1,200 B.C.").words
        ['In', '1,200', 'B', '.', 'C', '.']
        """
        found = list(WORD.finditer(text))
        return Passage(text, [x[0] for x in found], [x.span() for x in found])

    def cut(self, first: int, last: int) -> str:
        """The text from one word to another, both included, as it is written."""
        return self.text[self.places[first][0] : self.places[last][1]]

    def around(self, first: int, last: int, words: int = 12) -> str:
        """The same in brackets, between some of the words before and after it, in one line.

        >>> Passage.of("one two three four five").around(2, 2, words=1)
        'two [three] four'
        """
        before = self.cut(max(first - words, 0), last)
        after = self.cut(first, min(last + words, len(self.words) - 1))
        inside = self.cut(first, last)
        found = f"{before[: -len(inside)]}[{inside}]{after[len(inside) :]}"
        return " ".join(found.split())

    def touched(self, start: int, stop: int) -> tuple[int, int]:
        """The first and the last word of which characters ``start`` to ``stop`` have a part.

        >>> Passage.of("one two three").touched(4, 9)
        (1, 2)
        """
        inside = [i for i, (a, b) in enumerate(self.places) if a < stop and b > start]
        if not inside:
            raise ValueError(f"characters {start} to {stop} must touch a word, they touch none")
        return inside[0], inside[-1]


class Question(NamedTuple):
    """A question about one of the passages, its reference answers, and the words they are."""

    text: str
    words: list[str]
    passage: int
    answers: list[str]
    spans: list[tuple[int, int]]


class Split(NamedTuple):
    """Passages, questions about them, and how many reference answers break a word."""

    passages: list[Passage]
    questions: list[Question]
    unaligned: int


def parsed(articles: Sequence[Any]) -> Split:
    """Of articles in the format of SQuAD; of a long question the first words.

    Raises:
      ValueError: a question that has no words or no answer, or an answer that its passage does not
        have where it says.
    """
    passages: list[Passage] = []
    questions: list[Question] = []
    unaligned = 0
    for paragraph in (x for article in articles for x in article["paragraphs"]):
        passage = Passage.of(paragraph["context"])
        for one in paragraph["qas"]:
            found = []
            for answer in one["answers"]:
                start, said = answer["answer_start"], answer["text"].strip()
                start += len(answer["text"]) - len(answer["text"].lstrip())
                if not said or not passage.text.startswith(said, start):
                    raise ValueError(f"question {one['id']}: {said!r} is not at character {start}")
                first, last = passage.touched(start, start + len(said))
                unaligned += passage.cut(first, last) != said
                found.append((first, last))
            words = Passage.of(one["question"]).words[:LONGEST_QUESTION]
            if not found or not words:
                raise ValueError(f"question {one['id']} has no {'words' if found else 'answer'}")
            said = [answer["text"] for answer in one["answers"]]
            questions.append(
                Question(one["question"], words, len(passages), said, list(dict.fromkeys(found)))
            )
        passages.append(passage)
    return Split(passages, questions, unaligned)


# --- Scores.


def plain(answer: str) -> list[str]:
    """An answer's words: in lower case, without ASCII punctuation and articles.

    >>> plain("The U.S. Army, an army")
    ['us', 'army', 'army']
    """
    return ARTICLES.sub(" ", answer.lower().translate(WITHOUT_PUNCTUATION)).split()


def exact(answer: str, reference: str) -> float:
    """1 where both have the same words in the same order, else 0.

    >>> exact("the Army", "army!"), exact("army", "armies")
    (1.0, 0.0)
    """
    return float(plain(answer) == plain(reference))


def f1(answer: str, reference: str) -> float:
    """F1 of two bags of words; 0 where either has none, even if both have.

    >>> round(f1("the red cat", "a cat"), 3)  # precision 1 / 2, recall 1 / 1
    0.667
    """
    said, right = plain(answer), plain(reference)
    shared = (collections.Counter(said) & collections.Counter(right)).total()
    return 2 * shared / (len(said) + len(right)) if shared else 0.0


def best(measure: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    """The largest agreement with any of the references."""
    return max(measure(answer, reference) for reference in references)


def agreement(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1 and exact match over questions, each with its answer and its references.

    >>> agreement(["cat", "dog"], [["a cat", "pet"], ["red dog"]])
    {'f1': 0.8333333333333333, 'exact': 0.5}

    Raises:
      ValueError: there is no question, not one answer for each, or one without references.
    """
    if not answers or len(answers) != len(references) or not all(references):
        raise ValueError(
            f"answers must be one for each question, of which there is one at least, each with "
            f"references: got {len(answers)} answers and {len(references)} lists of references, "
            f"{sum(not some for some in references)} of them empty"
        )
    both = list(zip(answers, references, strict=True))
    return {
        "f1": sum(best(f1, said, some) for said, some in both) / len(both),
        "exact": sum(best(exact, said, some) for said, some in both) / len(both),
    }
