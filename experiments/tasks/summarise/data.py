"""Texts with reference summaries: the files, the vocabulary, both sides as token indices."""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from attention_jax.models.pretrained import Tokenizer
from experiments.datasets import text
from experiments.datasets.files import lines, path
from experiments.datasets.text import END, START, UNKNOWN
from experiments.models import finetuning
from experiments.tasks.summarise import finetuned
from experiments.tasks.summarise.config import BUCKETS, Config

WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
OTHERS = 48  # distinct words of a source outside the vocabulary that can be copied


class Text(NamedTuple):
    """A source, with its sentences on lines where they are known, and reference summaries."""

    source: str
    summaries: list[str]


class Split(NamedTuple):
    """Texts, the words of their sources, and both sides as token indices.

    For the model pretrained, the words are cut into the tokens of its checkpoint.
    """

    texts: list[Text]
    words: list[list[str]]
    sources: list[list[int]]
    targets: list[list[int]]

    def take(self, index: np.ndarray) -> Split:
        """The texts at these indices."""
        words, sources, targets = ([column[i] for i in index] for column in self[1:])
        return Split([self.texts[i] for i in index], words, sources, targets)


class Data(NamedTuple):
    """The vocabulary of the training split, all splits, and the lengths to pad sources to."""

    vocabulary: Any  # text.Words, or the tokenizer of pretrained
    splits: dict[str, Split]
    sizes: Sequence[int] = BUCKETS


# --- Files.


def clean(raw: str) -> str:
    """A text of AG News without remnants of HTML.

    >>> clean("Yahoo #39;s  &lt;b&gt;")
    "Yahoo's <b>"
    """
    raw = re.sub(r"\s*(?<!&)#39;", "'", raw)
    raw = re.sub(r"(?<!&)(#\d+|\bquot);", r"&\1;", raw)
    return " ".join(html.unescape(raw.replace("\\", " ")).split())


def titles() -> dict[str, list[Text]]:
    """News articles and their titles; the splits are the same for every seed."""
    with path("ag_news_test_only/test.csv").open(encoding="utf-8", newline="") as file:
        texts = [Text(clean(body), [clean(title)]) for _, title, body in csv.reader(file)]
    order = np.random.default_rng(0).permutation(len(texts))
    n = len(texts) // 10
    parts = {"train": order[: 8 * n], "validation": order[8 * n : 9 * n], "test": order[9 * n :]}
    return {name: [texts[i] for i in part] for name, part in parts.items()}


def scitldr() -> dict[str, list[Text]]:
    """Abstracts, and one-sentence summaries by authors and reviewers."""
    files = {"train": "train", "validation": "dev", "test": "test"}
    return {
        name: [
            Text("\n".join(x["source"]), x["target"])
            for x in map(json.loads, lines(f"scitldr_a/{file}.jsonl"))
        ]
        for name, file in files.items()
    }


def synthetic() -> dict[str, list[Text]]:
    """Generated texts whose summary is two of their words; needs no files."""
    rng = np.random.default_rng(0)

    def texts(n: int) -> list[Text]:
        rows = [[f"w{i}" for i in rng.integers(0, 30, 12)] for _ in range(n)]
        return [Text(f"the {' '.join(words)} .", [f"{words[0]} {words[3]}"]) for words in rows]

    return {"train": texts(64), "validation": texts(16), "test": texts(16)}


# --- Token indices.


def tokens(raw: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return WORD.findall(raw.lower())


def numbers(known: dict[str, int], words: list[str], others: dict[str, int]) -> list[int]:
    """Indices of words, looked up in ``known``, then in ``others``.

    >>> numbers({"a": 4, "b": 5}, ["a", "c", "d"], {"c": 6})
    [4, 6, 1]
    """
    return [known.get(word, others.get(word, UNKNOWN)) for word in words]


def others_of(known: dict[str, int], words: list[str]) -> dict[str, int]:
    """Indices for the first ``OTHERS`` distinct words of a source outside the vocabulary."""
    others = dict.fromkeys(word for word in words if word not in known)
    return {word: len(known) + i for i, word in enumerate([*others][:OTHERS])}


def load(config: Config) -> Data:
    """The splits, encoded with the vocabulary of the training split; prints how many are cut."""
    read = {"titles": titles, "scitldr": scitldr}[config.corpus]
    corpus = synthetic() if config.synthetic else read()
    if config.model == "pretrained":
        vocabulary: Any = finetuned.tokenizer(config)
        splits = _splits(config, vocabulary, corpus)
        lengths = [np.array([len(row) for row in split.sources]) for split in splits.values()]
        return Data(vocabulary, splits, finetuning.sizes(*lengths))
    both = [" ".join(tokens(x)) for t in corpus["train"] for x in (t.source, *t.summaries)]
    vocabulary = text.Words.of(both, config.least)
    return Data(vocabulary, _splits(config, vocabulary, corpus))


def _splits(config: Config, vocabulary: Any, corpus: dict[str, list[Text]]) -> dict[str, Split]:
    splits = {}
    for name, texts in corpus.items():
        words = [tokens(t.source) for t in texts]
        summaries = [tokens(t.summaries[0]) for t in texts]
        for what, rows, limit in (
            ("sources", words, config.reads),
            ("training summaries", summaries if name == "train" else [], config.writes),
        ):
            if cut := sum(len(row) > limit for row in rows):
                print(f"{name}: {cut} of {len(rows)} {what} have more than {limit} words: cut")
        splits[name] = encode(config, vocabulary, texts, words, summaries)
    return splits


def encode(
    config: Config,
    vocabulary: Any,
    texts: list[Text],
    words: list[list[str]],
    summaries: list[list[str]],
) -> Split:
    """Sources and summaries, given as words, as indices; both are cut to the model's limits."""
    words = [row[: config.reads] for row in words]
    if isinstance(vocabulary, Tokenizer):
        sources = finetuned.tokens(vocabulary, words)
        cut = finetuned.tokens(vocabulary, [row[: config.writes] for row in summaries])
        targets = [[START, *row, END] for row in cut]
        return Split(texts, [vocabulary.strings(row) for row in sources], sources, targets)
    known = vocabulary.numbers()
    sources, targets = [], []
    for row, summary in zip(words, summaries, strict=True):
        others = others_of(known, row) if config.model == "copier" else {}
        sources.append(numbers(known, row, others))
        targets.append([START, *numbers(known, summary[: config.writes], others), END])
    return Split(texts, words, sources, targets)
