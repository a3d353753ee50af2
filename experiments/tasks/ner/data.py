"""Tagged sentences: the files, the vocabularies, words and characters as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attention_jax.models.pretrained import Tokenizer
from experiments.datasets import text
from experiments.datasets.files import lines
from experiments.models import finetuning
from experiments.tasks.ner import finetuned
from experiments.tasks.ner.config import BUCKETS, Config
from experiments.training.task import Array

FILES = {
    "ncbi": {
        "train": "ner_ncbi_disease/train.tsv",
        "validation": "ner_ncbi_disease/devel.tsv",
        "test": "ner_ncbi_disease/test.tsv",
    },
    "wnut17": {
        "train": "wnut17/wnut17train.conll",
        "validation": "wnut17/emerging.dev.conll",
        "test": "wnut17/emerging.test.annotated",
    },
}
IGNORED = -1  # the tag of tokens that continue a word
LETTERS = 16  # bytes read of each word: of a longer word the first and the last eight


class Sentence(NamedTuple):
    """Words, and a tag for each."""

    words: list[str]
    tags: list[str]


class Split(NamedTuple):
    """Sentences, and their words and tags as indices.

    For the model pretrained, these are tokens: the first token of a word has its tag, the others
    have ``IGNORED``.
    """

    sentences: list[Sentence]
    words: list[list[int]]
    tags: list[list[int]]


class Data(NamedTuple):
    """Words and tags of the training split, all splits, and the lengths to pad sentences to."""

    vocabulary: Any  # text.Words, or the tokenizer of pretrained
    tags: tuple[str, ...]
    splits: dict[str, Split]
    sizes: Sequence[int] = BUCKETS
    shapes: Mapping[str, list[list[int]]] = {}
    """pretrained: the shape of each token's word, by split."""


class Batch(NamedTuple):
    """Words ``[B T]``, their bytes ``[B T LETTERS]`` and tags ``[B T]``; or tokens and shapes."""

    words: Array
    letters: Array
    tags: Array


def load(config: Config) -> Data:
    """The splits, encoded with the words and tags of the training split."""
    if config.synthetic:
        corpus = synthetic()
    else:
        corpus = {name: parse(lines(file)) for name, file in FILES[config.corpus].items()}
    tags = tuple(sorted({tag for s in corpus["train"] for tag in s.tags}))
    if config.model == "pretrained":
        return _with_tokens(finetuning.tokenizer(config), tags, corpus)
    vocabulary = text.Words.of((normalized(s.words) for s in corpus["train"]), config.least)
    splits = {}
    for name, sentences in corpus.items():
        words = vocabulary.encode_all(normalized(s.words) for s in sentences)
        splits[name] = Split(
            sentences, words, [[tags.index(tag) for tag in s.tags] for s in sentences]
        )
    return Data(vocabulary, tags, splits)


def _with_tokens(
    tokenizer: Tokenizer, tags: tuple[str, ...], corpus: dict[str, list[Sentence]]
) -> Data:
    splits, shapes = {}, {}
    for name, sentences in corpus.items():
        encoded = finetuned.encode(tokenizer, [s.words for s in sentences])
        labels = [[IGNORED] * len(x.tokens) for x in encoded]
        for row, sentence, x in zip(labels, sentences, encoded, strict=True):
            for tag, start in zip(sentence.tags, x.starts, strict=True):
                if start >= 0:
                    row[start] = tags.index(tag)
        splits[name] = Split(sentences, [x.tokens for x in encoded], labels)
        shapes[name] = [x.shapes for x in encoded]
    lengths = [np.array([len(row) for row in split.words]) for split in splits.values()]
    return Data(tokenizer, tags, splits, finetuning.sizes(*lengths), shapes)


def parse(rows: list[str]) -> list[Sentence]:
    """Parses lines ``word TAB tag``; an empty line ends a sentence.

    Raises:
      ValueError: a line is neither.
    """
    sentences: list[Sentence] = []
    current = Sentence([], [])
    for number, row in enumerate([*rows, ""], 1):
        if not row.strip():
            if current.words:
                sentences.append(current)
            current = Sentence([], [])
            continue
        word, _, tag = row.rstrip("\r").partition("\t")
        if tag != "O" and tag[:2] not in ("B-", "I-"):
            raise ValueError(f"line {number} must be a word, a tab and a BIO tag, got {row!r}")
        current.words.append(word)
        current.tags.append(tag)
    return sentences


def synthetic() -> dict[str, list[Sentence]]:
    """Generated sentences with a name that starts with a capital X; needs no files."""
    rng = np.random.default_rng(0)

    def sentence() -> Sentence:
        words = [f"w{i}" for i in rng.integers(0, 20, 8)]
        at = int(rng.integers(0, 7))
        words[at : at + 2] = [f"X{rng.integers(50)}", f"y{rng.integers(50)}"]
        tags = ["O"] * 8
        tags[at : at + 2] = ["B-name", "I-name"]
        return Sentence(words, tags)

    sizes = {"train": 64, "validation": 16, "test": 16}
    return {name: [sentence() for _ in range(n)] for name, n in sizes.items()}


def normalized(words: list[str]) -> str:
    """Words as they are looked up: in lower case, digits as 0, spaces within a word removed.

    >>> normalized(["In", "1992", "a\u00a0b"])
    'in 0000 ab'
    """
    plain = ("".join(word.lower().split()) for word in words)
    return " ".join("".join("0" if c.isdigit() else c for c in word) for word in plain)


def letters(words: list[list[str]], length: int, count: int | None = None) -> np.ndarray:
    """Bytes of words plus one, padded with 0: ``[B length LETTERS]``."""
    array = np.zeros((count or len(words), length, LETTERS), np.int32)
    for i, row in enumerate(words):
        for j, word in enumerate(row):
            raw = word.encode()
            if len(raw) > LETTERS:
                raw = raw[: LETTERS // 2] + raw[-LETTERS // 2 :]
            array[i, j, : len(raw)] = np.frombuffer(raw, np.uint8).astype(np.int32) + 1
    return array
