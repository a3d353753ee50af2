"""Text to batches: words and subwords, padding to a few lengths, and the order of examples.

The order is a function of the seed and the step: ``shuffled`` and ``alike`` give the batches from
any step on without computing those before it, which makes runs resumable.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

PAD, UNKNOWN, START, END = range(4)
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")

# Lengths that sequences are padded to. Each compiles another program, so there are few.
BUCKETS = (16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Words:
    """A vocabulary of words, the most frequent first; other words are unknown.

    >>> words = Words.of(["a b a", "c a"], least=2)
    >>> words.encode("b a"), words.decode([1, 4])
    ([1, 4], '<unk> a')
    """

    words: tuple[str, ...]

    @staticmethod
    def of(texts: Iterable[str], least: int = 1) -> Words:
        """The vocabulary of words that occur at least ``least`` times."""
        counts = collections.Counter(word for text in texts for word in text.split())
        kept = sorted((w for w, n in counts.items() if n >= least), key=lambda w: (-counts[w], w))
        return Words((*SPECIAL, *kept))

    def __len__(self) -> int:
        return len(self.words)

    def numbers(self) -> dict[str, int]:
        """The number of each word."""
        return {word: i for i, word in enumerate(self.words)}

    def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        """The numbers of each text's words."""
        number = self.numbers()
        return [[number.get(word, UNKNOWN) for word in text.split()] for text in texts]

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's words."""
        (numbers,) = self.encode_all([text])
        return numbers

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of numbers."""
        return " ".join(self.words[i] for i in numbers)


def subwords(texts: Iterable[str], size: int) -> Any:
    """Byte-level byte-pair encoding, trained on texts: a ``tokenizers.Tokenizer``.

    Any text can be encoded, since every byte is a token; ``SPECIAL`` come first.

    Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# Spellings of the Penn Treebank and those of ordinary text, which checkpoints were trained on.
TREEBANK = {
    "-lrb-": "(",
    "-rrb-": ")",
    " n't": "n't",
    "``": '"',
    "''": '"',
    "`": "'",
    "\\/": "/",
    "\\*": "*",
}


def ordinary(text: str) -> str:
    r"""A lower-cased text of the Penn Treebank as ordinary text, for a pretrained tokenizer.

    Spaces before punctuation stay, since such a tokenizer splits there in any case.

    >>> ordinary("`` it does n't work '' -lrb- yet -rrb-")
    '" it doesn\'t work " ( yet )'
    """
    for treebank, usual in TREEBANK.items():
        text = text.replace(treebank, usual)
    return text


def bucket(length: int, sizes: Sequence[int] = BUCKETS) -> int:
    """The shortest bucket that holds a sequence.

    >>> bucket(9)
    16
    """
    for size in sizes:
        if length <= size:
            return size
    raise ValueError(f"a sequence may have at most {sizes[-1]} tokens, got {length}")


def padded(
    rows: Sequence[Sequence[int]], length: int | None = None, count: int | None = None
) -> np.ndarray:
    """Rows of different lengths as one array ``[B T]``, padded with ``PAD``.

    Args:
      rows: of integers.
      length: T; default the bucket of the longest row.
      count: B, with empty rows added; default the number of rows.

    >>> padded([[5, 6], [7]], length=3).tolist()
    [[5, 6, 0], [7, 0, 0]]
    """
    if length is None:
        length = bucket(max(map(len, rows), default=1))
    array = np.full((len(rows) if count is None else count, length), PAD, np.int32)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return array


def epochs(per_epoch: int, seed: int, step: int) -> Iterator[tuple[np.random.Generator, int]]:
    """For each epoch from that of ``step`` on: its generator, and the batch to start at."""
    first, skip = divmod(step, per_epoch)
    for epoch in itertools.count(first):
        yield np.random.default_rng([seed, epoch]), skip if epoch == first else 0


def shuffled(n: int, size: int, seed: int, step: int) -> Iterator[np.ndarray]:
    """Batches of ``size`` indices of ``n`` examples, shuffled anew in each epoch.

    The last, incomplete batch of an epoch is dropped.

    >>> from_0, from_2 = shuffled(10, 3, seed=0, step=0), shuffled(10, 3, seed=0, step=2)
    >>> _ = next(from_0), next(from_0)
    >>> all((next(from_0) == next(from_2)).all() for _ in range(9))
    True
    """
    size = min(size, n)
    for rng, skip in epochs(n // size, seed, step):
        order = rng.permutation(n)
        for start in range(skip * size, n - size + 1, size):
            yield order[start : start + size]


def alike(
    lengths: np.ndarray, size: int, seed: int, step: int, sizes: Sequence[int] = BUCKETS
) -> Iterator[tuple[np.ndarray, int]]:
    """Like ``shuffled``, with examples of similar length in a batch, to reduce padding.

    Shuffled examples are sorted by length in pools of 50 batches, and the batches are shuffled.
    Each comes with the length to pad it to, the smallest of ``sizes`` that holds it.
    """
    n = len(lengths)
    size = min(size, n)
    for rng, skip in epochs(n // size, seed, step):
        order = rng.permutation(n)[: n // size * size]
        pools = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
        by_length = np.concatenate(
            [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
        )
        batches = by_length.reshape(-1, size)
        for batch in batches[rng.permutation(len(batches))][skip:]:
            yield batch, bucket(int(lengths[batch].max()), sizes)


def edges(lengths: np.ndarray, count: int) -> tuple[int, ...]:
    """The ``count`` lengths to pad sequences to that need the least padding, in increasing order.

    Every sequence is padded to the smallest of them that holds it; the last is the longest length.
    There are fewer where there are not that many lengths.

    >>> edges(np.array([3, 3, 3, 4, 9, 10]), 2)
    (4, 10)
    """
    sizes, numbers = np.unique(lengths, return_counts=True)
    below = np.concatenate([[0], np.cumsum(numbers)])  # sequences shorter than each size
    n = len(sizes)
    # cost[j]: tokens after padding all sequences up to the j-th size with the edges so far, of
    # which size j - 1 is the last; the first axis of ``tokens`` is the edge before it.
    tokens = np.where(
        np.arange(n + 1)[:, None] < np.arange(n + 1),
        (below[None] - below[:, None]) * np.concatenate([[0], sizes]),
        np.inf,
    )
    cost = np.where(np.arange(n + 1) == 0, 0.0, np.inf)
    before = []
    for _ in range(min(count, n)):
        total = cost[:, None] + tokens
        before.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    chosen, j = [], n
    for best in reversed(before):
        chosen.append(int(sizes[j - 1]))
        j = int(best[j])
    return tuple(reversed(chosen))


def few_edges(lengths: np.ndarray, padding: float) -> tuple[int, ...]:
    """The fewest ``edges`` with which at most this fraction of the tokens is padding."""
    for count in range(1, len(np.unique(lengths)) + 1):
        sizes = edges(lengths, count)
        padded_to = np.asarray(sizes)[np.searchsorted(sizes, lengths)]
        if 1 - lengths.sum() / padded_to.sum() <= padding:
            break
    return sizes


def bucketed(
    lengths: np.ndarray, size: int, seed: int, step: int, sizes: Sequence[int]
) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of ``size`` indices with the length to pad each to, shuffled anew in each epoch.

    Shuffled examples are sorted by the bucket of ``sizes`` that holds them, and the batches are
    shuffled: only a batch between two buckets has examples of both. The last, incomplete batch of
    an epoch is dropped, from the shuffled examples.

    Raises:
      ValueError: ``size`` is above the number of examples.
    """
    n = len(lengths)
    if size > n:
        raise ValueError(
            f"batch_size must be at most {n}, the number of training examples, got {size}"
        )
    places = np.searchsorted(np.asarray(sizes), lengths)
    for rng, skip in epochs(n // size, seed, step):
        order = rng.permutation(n)[: n // size * size]
        batches = order[np.argsort(places[order], kind="stable")].reshape(-1, size)
        for batch in batches[rng.permutation(len(batches))][skip:]:
            yield batch, int(sizes[places[batch].max()])


def covering(lengths: Sequence[int], size: int) -> list[np.ndarray]:
    """Batches of indices that cover every example exactly once, sorted by length.

    >>> [batch.tolist() for batch in covering([3, 1, 2], 2)]
    [[1, 2], [0]]
    """
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def check(text: str) -> str:
    """Returns the text.

    Raises:
      ValueError: it is empty or blank.
    """
    if not text.strip():
        raise ValueError(f"text must not be empty or blank, got {text!r}")
    return text
