"""Texts and what people made of them, and the rules that take a summary from its text."""

from __future__ import annotations

import csv
import html
import json
import re
from typing import NamedTuple

import numpy as np

from experiments.datasets.files import lines, path


class Text(NamedTuple):
    """What to summarise, sentences on lines where they are known; and how people did."""

    source: str
    summaries: list[str]


def clean(written: str) -> str:
    """A text of AG news without what is left of HTML in it.

    >>> clean("Yahoo #39;s  &lt;b&gt;")
    "Yahoo's <b>"
    """
    said = re.sub(r"\s*(?<!&)#39;", "'", written)
    said = re.sub(r"(?<!&)(#\d+|\bquot);", r"&\1;", said)
    return " ".join(html.unescape(said.replace("\\", " ")).split())


def titles() -> dict[str, list[Text]]:
    """News articles and their titles; the splits are the same for every seed."""
    with path("ag_news_test_only/test.csv").open(encoding="utf-8", newline="") as file:
        texts = [Text(clean(body), [clean(title)]) for _, title, body in csv.reader(file)]
    order = np.random.default_rng(0).permutation(len(texts))
    n = len(texts) // 10
    parts = {"train": order[: 8 * n], "validation": order[8 * n : 9 * n], "test": order[9 * n :]}
    return {name: [texts[i] for i in part] for name, part in parts.items()}


def scitldr() -> dict[str, list[Text]]:
    """Abstracts, and what their authors and reviewers made of them in a sentence."""
    files = {"train": "train", "validation": "dev", "test": "test"}
    return {
        name: [
            Text("\n".join(x["source"]), x["target"])
            for x in map(json.loads, lines(f"scitldr_a/{file}.jsonl"))
        ]
        for name, file in files.items()
    }


def made_up() -> dict[str, list[Text]]:
    """Titles that are two words of the text: for ``smoke``, without any file."""
    rng = np.random.default_rng(0)

    def some(n: int) -> list[Text]:
        found = []
        for _ in range(n):
            words = [f"w{i}" for i in rng.integers(0, 30, 12)]
            found.append(Text(f"the {' '.join(words)} .", [f"{words[0]} {words[3]}"]))
        return found

    return {"train": some(64), "validation": some(16), "test": some(16)}


def sentences(source: str) -> list[str]:
    """The lines of a text, or of a text of one line what ends like a sentence.

    >>> sentences("A man ran. He fell!"), sentences("A man ran. He fell!\\nWhy")
    (['A man ran.', 'He fell!'], ['A man ran. He fell!', 'Why'])
    """
    found = source.split("\n") if "\n" in source else re.split(r"(?<=[.!?])\s+", source)
    return [x for x in found if x.strip()] or [source]


class Lead:
    """The beginning: so many words, or the first sentence."""

    def __init__(self, words: int | None) -> None:
        self.words = words

    def __call__(self, source: str) -> str:
        """Of a text."""
        if self.words is None:
            return sentences(source)[0]
        return " ".join(source.split()[: self.words])


class BestSentence:
    """The sentence whose words are most like those of the whole text: cosine of tf-idf vectors.

    Source: Radev et al. 2004, "Centroid-based summarization of multiple documents".
    """

    def __init__(self, texts: list[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectors = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit(texts)

    def __call__(self, source: str) -> str:
        """Of a text."""
        some = sentences(source)
        rows = self.vectors.transform([source, *some])
        return some[int((rows[1:] @ rows[0].T).toarray().argmax())]
