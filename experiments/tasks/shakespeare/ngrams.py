"""Interpolated n-grams of bytes, counted instead of learned."""

from __future__ import annotations

import dataclasses

import numpy as np

BYTES = 256


@dataclasses.dataclass(frozen=True)
class NGrams:
    """Interpolated n-grams with Witten-Bell smoothing::

        p(c | h) = (count(h c) + types(h) p(c | h')) / (count(h) + types(h))

    ``h'`` is the history ``h`` without its first character, ``types(h)`` the number of distinct
    characters that follow ``h``. The empty history backs off to the uniform distribution.

    Source: Witten and Bell 1991, "The Zero-Frequency Problem"; Chen and Goodman 1999.
    """

    tables: tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], ...]
    """For each history length from 0: n-grams and their counts; histories, their counts and types.
    N-grams and histories are sorted, each encoded as one integer."""

    @staticmethod
    def count(text: np.ndarray, order: int) -> NGrams:
        """Counts the n-grams of a text of bytes, up to ``order`` characters."""
        tables = []
        for h in range(order):
            grams, counts = np.unique(_encoded(text, h + 1), return_counts=True)
            histories, first = np.unique(grams // BYTES, return_index=True)
            totals = np.add.reduceat(counts, first)
            types = np.diff(np.append(first, len(grams)))
            tables.append((grams, counts, histories, totals, types))
        return NGrams(tuple(tables))

    def probability(self, histories: np.ndarray, characters: np.ndarray) -> np.ndarray:
        """``p(c | h)`` of characters ``[n]`` after histories ``[n L]``."""
        p = np.full(len(characters), 1 / BYTES)
        for h, (grams, counts, known, totals, types) in enumerate(self.tables):
            if h > histories.shape[1]:
                break
            last = histories[:, histories.shape[1] - h :]
            number = last.astype(np.int64) @ BYTES ** np.arange(h - 1, -1, -1, dtype=np.int64)
            total, kinds = _lookup(known, totals, number), _lookup(known, types, number)
            count = _lookup(grams, counts, number * BYTES + characters)
            counted = total > 0
            p = np.where(counted, (count + kinds * p) / np.where(counted, total + kinds, 1), p)
        return p

    def nats(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """``-log p`` of each of ``targets [B T]`` given ``tokens [B T]`` up to the same position.

        The first targets of a row have shorter histories.
        """
        longest = len(self.tables) - 1  # history
        out = np.empty(targets.shape)
        for t in range(min(longest - 1, targets.shape[1])):
            out[:, t] = -np.log(self.probability(tokens[:, : t + 1], targets[:, t]))
        if longest and targets.shape[1] >= longest:
            windows = np.lib.stride_tricks.sliding_window_view(tokens, longest, axis=1)
            rest = targets[:, longest - 1 :]
            p = self.probability(windows.reshape(-1, longest), rest.reshape(-1))
            out[:, longest - 1 :] = -np.log(p).reshape(rest.shape)
        elif not longest:
            p = self.probability(np.empty((targets.size, 0), int), targets.reshape(-1))
            out[:] = -np.log(p).reshape(targets.shape)
        return out

    def logits(self, history: np.ndarray) -> np.ndarray:
        """``log p`` of all 256 bytes after a history ``[L]``."""
        longest = len(self.tables) - 1  # history
        history = history[max(0, len(history) - longest) :]
        histories = np.broadcast_to(history, (BYTES, len(history)))
        return np.log(self.probability(histories, np.arange(BYTES))).astype(np.float32)


def _encoded(text: np.ndarray, length: int) -> np.ndarray:
    """Every substring of this length as one integer."""
    windows = np.lib.stride_tricks.sliding_window_view(text.astype(np.int64), length)
    return windows @ BYTES ** np.arange(length - 1, -1, -1, dtype=np.int64)


def _lookup(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The value of each query in sorted ``keys``, 0 if it is not there."""
    at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[at] == queries, values[at], 0)
