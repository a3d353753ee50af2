"""Counting instead of learning: the probability of a character after the few before it."""

from __future__ import annotations

import dataclasses

import numpy as np

BYTES = 256


@dataclasses.dataclass(frozen=True)
class NGrams:
    """Interpolated n-grams with Witten-Bell smoothing::

        p(c | h) = (count(h c) + types(h) p(c | h')) / (count(h) + types(h))

    ``h'`` is ``h`` without its first character, ``types(h)`` how many different characters followed
    ``h``, and under the shortest history all characters are equally likely.

    Source: Witten and Bell 1991, "The Zero-Frequency Problem"; Chen and Goodman 1999.
    """

    tables: tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], ...]
    """For each length of a history from 0: histories with a character, and their counts; histories,
    their counts and types. Both are sorted, each as one number."""

    @staticmethod
    def count(text: np.ndarray, order: int) -> NGrams:
        """Of a text of bytes."""
        tables = []
        for h in range(order):
            grams, counts = np.unique(_numbers(text, h + 1), return_counts=True)
            histories, first = np.unique(grams // BYTES, return_index=True)
            totals = np.add.reduceat(counts, first)
            types = np.diff(np.append(first, len(grams)))
            tables.append((grams, counts, histories, totals, types))
        return NGrams(tuple(tables))

    def probability(self, histories: np.ndarray, characters: np.ndarray) -> np.ndarray:
        """Of characters ``[n]`` after histories ``[n L]``, of which the last few count."""
        p = np.full(len(characters), 1 / BYTES)
        for h, (grams, counts, seen, totals, types) in enumerate(self.tables):
            if h > histories.shape[1]:
                break
            last = histories[:, histories.shape[1] - h :]
            number = last.astype(np.int64) @ BYTES ** np.arange(h - 1, -1, -1, dtype=np.int64)
            total, kinds = _found(seen, totals, number), _found(seen, types, number)
            count = _found(grams, counts, number * BYTES + characters)
            known = total > 0
            p = np.where(known, (count + kinds * p) / np.where(known, total + kinds, 1), p)
        return p

    def nats(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """``-log p`` of each of ``targets [B T]`` after ``tokens [B T]`` up to its place.

        The first of a row, with fewer characters before them than counted, are asked with those.
        """
        most = len(self.tables) - 1
        out = np.empty(targets.shape)
        for t in range(min(most - 1, targets.shape[1])):
            out[:, t] = -np.log(self.probability(tokens[:, : t + 1], targets[:, t]))
        if most and targets.shape[1] >= most:
            windows = np.lib.stride_tricks.sliding_window_view(tokens, most, axis=1)
            rest = targets[:, most - 1 :]
            p = self.probability(windows.reshape(-1, most), rest.reshape(-1))
            out[:, most - 1 :] = -np.log(p).reshape(rest.shape)
        elif not most:
            p = self.probability(np.empty((targets.size, 0), int), targets.reshape(-1))
            out[:] = -np.log(p).reshape(targets.shape)
        return out

    def logits(self, history: np.ndarray) -> np.ndarray:
        """``log p`` of all 256 characters after a history ``[L]``."""
        most = len(self.tables) - 1
        history = history[max(0, len(history) - most) :]
        histories = np.broadcast_to(history, (BYTES, len(history)))
        return np.log(self.probability(histories, np.arange(BYTES))).astype(np.float32)


def _numbers(text: np.ndarray, length: int) -> np.ndarray:
    """Every piece of this length as one number."""
    pieces = np.lib.stride_tricks.sliding_window_view(text.astype(np.int64), length)
    return pieces @ BYTES ** np.arange(length - 1, -1, -1, dtype=np.int64)


def _found(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each key that is wanted, 0 where there is none."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
