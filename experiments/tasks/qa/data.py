"""Questions as arrays: vocabularies, overlapping windows of passages, the splits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.datasets import text
from experiments.datasets.files import path
from experiments.datasets.text import END, START
from experiments.models import finetuning
from experiments.tasks.qa.answers import Passage, Question, Split, parse
from experiments.tasks.qa.config import Config
from experiments.tasks.qa.features import FEATURES, Rarity, features
from experiments.training.task import Array

WIKIPEDIA, XQUAD = "squadshifts/new_wiki_v1.0.json", "xquad_en/xquad.en.json"
DIGITS_TO_ZERO = str.maketrans("123456789", "000000000")


class Lexicon(NamedTuple):
    """Words and suffixes that have an embedding, and how rare stems are."""

    words: text.Words
    suffixes: text.Words
    rarity: Rarity

    @staticmethod
    def of(passages: Sequence[Passage], questions: Sequence[Question], least: int) -> Lexicon:
        """Words with at least ``least`` occurrences, suffixes with at least three times as many."""
        texts = [*(x.words for x in passages), *(x.words for x in questions)]
        return Lexicon(
            text.Words.of(map(normalized, texts), least),
            text.Words.of(map(suffixes, texts), 3 * least),
            Rarity.among(passages),
        )


def normalized(words: list[str]) -> str:
    """Words as they are looked up: in lower case, every digit as 0.

    >>> normalized(["In", "1992"])
    'in 0000'
    """
    return " ".join(words).lower().translate(DIGITS_TO_ZERO)


def suffixes(words: list[str]) -> str:
    """The last three letters of each word.

    >>> suffixes(["Nations", "in", "1992"])
    'ons in 000'
    """
    return " ".join(word[-3:] for word in normalized(words).split())


class Window(NamedTuple):
    """Words ``start`` to ``stop - 1`` of the passage of a question, given by its index."""

    question: int
    start: int
    stop: int


def windows(split: Split, reads: int, stride: int) -> list[Window]:
    """Windows of up to ``reads`` words of each question's passage, ``stride`` words apart."""
    found = []
    for i, question in enumerate(split.questions):
        n = len(split.passages[question.passage].words)
        starts = range(0, max(n - reads, 0) + stride, stride)
        found += [Window(i, start, min(start + reads, n)) for start in starts]
    return found


def input_length(split: Split, window: Window) -> int:
    """Tokens of a question and a window with the two separators around the question."""
    return len(split.questions[window.question].words) + 2 + window.stop - window.start


class Inputs(NamedTuple):
    """A question and a window of its passage as one sequence: ``<s> question </s> window``.

    Words and suffixes as indices, ``[B T]``; whether a word is of the passage, ``[B T]``; features
    of each word, ``[B T FEATURES]``.
    """

    words: Array
    suffixes: Array
    passage: Array
    features: Array


def encode(
    lexicon: Lexicon, split: Split, batch: list[Window], length: int, count: int | None = None
) -> Inputs:
    """Windows as arrays, padded to ``length`` tokens and, if given, ``count`` rows."""
    questions = [split.questions[window.question] for window in batch]
    passages = [split.passages[question.passage].words for question in questions]
    arrays = []
    for vocabulary, form in ((lexicon.words, normalized), (lexicon.suffixes, suffixes)):
        cut = [words[x.start : x.stop] for words, x in zip(passages, batch, strict=True)]
        rows = vocabulary.encode_all(form(words) for words in (*(q.words for q in questions), *cut))
        pairs = zip(rows[: len(batch)], rows[len(batch) :], strict=True)
        arrays.append(text.padded([[START, *q, END, *p] for q, p in pairs], length, count))
    passage = np.zeros_like(arrays[0])
    counted = np.zeros((*passage.shape, FEATURES), np.float32)
    for i, (question, words, window) in enumerate(zip(questions, passages, batch, strict=True)):
        of_question, of_passage = features(question.words, words, lexicon.rarity)
        begin, end = len(of_question) + 2, input_length(split, window)
        passage[i, begin:end] = 1
        counted[i, 1 : begin - 1] = of_question
        counted[i, begin:end] = of_passage[window.start : window.stop]
    return Inputs(arrays[0], arrays[1], passage, counted)


class Batch(NamedTuple):
    """Inputs, and which spans are reference answers, bool ``[B T longest]``; see ``spans``."""

    inputs: Any  # Inputs, or finetuned.TokenInputs
    right: Array


class Data(NamedTuple):
    """The vocabularies of the training split, and all splits."""

    lexicon: Any  # a Lexicon, or the tokenizer of pretrained
    splits: dict[str, Split]


def load(config: Config) -> Data:
    """The splits, with the vocabularies of the training split, or a tokenizer."""
    splits = {name: parse(articles) for name, articles in read(config).items()}
    for name, split in splits.items():
        if split.unaligned:
            total = sum(len(question.answers) for question in split.questions)
            print(
                f"{name}: {split.unaligned} of {total} reference answers start or end within a word"
            )
    if config.model == "pretrained":
        return Data(finetuning.tokenizer(config), splits)
    train = splits["train"]
    return Data(Lexicon.of(train.passages, train.questions, config.least), splits)


def read(config: Config) -> dict[str, list[Any]]:
    """Articles of the splits and of the second test set, the same for every seed."""
    if config.synthetic:
        names = ("train", "validation", "test", "xquad")
        return {name: synthetic(64 if name == "train" else 16, i) for i, name in enumerate(names)}
    articles = json.loads(path(WIKIPEDIA).read_text(encoding="utf-8"))["data"]
    order = np.random.default_rng(0).permutation(len(articles))
    tenth = round(len(articles) / 10)
    parts = {
        "test": order[:tenth],
        "validation": order[tenth : 2 * tenth],
        "train": np.sort(order[2 * tenth :]),
    }
    splits = {name: [articles[i] for i in index] for name, index in parts.items()}
    return {**splits, "xquad": json.loads(path(XQUAD).read_text(encoding="utf-8"))["data"]}


def synthetic(n: int, seed: int) -> list[Any]:
    """Generated articles of one paragraph and one question each; needs no files."""
    rng = np.random.default_rng(seed)
    articles = []
    for i in range(n):
        things = rng.permutation(8)[:3]
        facts = [(f"{j}th", f"N{rng.integers(99)}") for j in things]
        context = " ".join(f"The {thing} is called {name}." for thing, name in facts)
        thing, name = facts[rng.integers(3)]
        answer = {"text": name, "answer_start": context.index(f"{name}.")}
        question = {"id": f"{i}", "question": f"What is the {thing} called?", "answers": [answer]}
        articles.append({"paragraphs": [{"context": context, "qas": [question]}]})
    return articles


def references(config: Config, split: Split, window: Window) -> list[tuple[int, int]]:
    """Reference answers of up to ``longest`` words that a window holds in full.

    Each is its first word, counted from the start of the window, and the number of words after it.
    """
    return [
        (first - window.start, last - first)
        for first, last in split.questions[window.question].spans
        if window.start <= first and last < window.stop and last - first < config.longest
    ]
