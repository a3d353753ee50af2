"""Extractive baselines, which take the summary from the text."""

from __future__ import annotations

import re


def sentences(source: str) -> list[str]:
    """The lines of a text; a text of one line is split after sentence-final punctuation.

    >>> sentences("A man ran. He fell!"), sentences("A man ran. He fell!\\nWhy")
    (['A man ran.', 'He fell!'], ['A man ran. He fell!', 'Why'])
    """
    parts = source.split("\n") if "\n" in source else re.split(r"(?<=[.!?])\s+", source)
    return [x for x in parts if x.strip()] or [source]


class Lead:
    """The first ``words`` words, or the first sentence."""

    def __init__(self, words: int | None) -> None:
        self.words = words

    def __call__(self, source: str) -> str:
        """The summary of a text."""
        if self.words is None:
            return sentences(source)[0]
        return " ".join(source.split()[: self.words])


class BestSentence:
    """The sentence most similar to the whole text, by cosine similarity of tf-idf vectors.

    Source: Radev et al. 2004, "Centroid-based summarization of multiple documents".
    """

    def __init__(self, texts: list[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectors = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit(texts)

    def __call__(self, source: str) -> str:
        """The summary of a text."""
        candidates = sentences(source)
        rows = self.vectors.transform([source, *candidates])
        return candidates[int((rows[1:] @ rows[0].T).toarray().argmax())]
