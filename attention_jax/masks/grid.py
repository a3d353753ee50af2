"""The blocks that the ``T x S`` pairs are divided into, as index intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Grid:
    """Query blocks of ``block_q`` rows by key blocks of ``block_k`` columns.

    The first and last index of every block are NumPy arrays, ``q0, q1 [rows, 1]`` and
    ``k0, k1 [1, columns]``, so that a mask bounds all blocks in one expression.

    >>> from attention_jax.masks.grid import Grid
    >>> grid = Grid(T=5, S=8, block_q=3, block_k=4)
    >>> grid.q0.tolist(), grid.q1.tolist()
    ([[0], [3]], [[2], [4]])
    >>> grid.k0.tolist(), grid.k1.tolist()
    ([[0, 4]], [[3, 7]])
    """

    T: int
    S: int
    block_q: int
    block_k: int

    @property
    def rows(self) -> int:
        """Number of query blocks."""
        return -(-self.T // self.block_q)

    @property
    def columns(self) -> int:
        """Number of key blocks."""
        return -(-self.S // self.block_k)

    @property
    def q0(self) -> np.ndarray:
        """First query of each block."""
        return (np.arange(self.rows, dtype=np.int32) * self.block_q)[:, None]

    @property
    def q1(self) -> np.ndarray:
        """Last query of each block."""
        return np.minimum(self.q0 + self.block_q, self.T) - 1

    @property
    def k0(self) -> np.ndarray:
        """First key of each block."""
        return (np.arange(self.columns, dtype=np.int32) * self.block_k)[None, :]

    @property
    def k1(self) -> np.ndarray:
        """Last key of each block."""
        return np.minimum(self.k0 + self.block_k, self.S) - 1

    def over_queries(self, reduce: Callable[..., Any], x: Any) -> Any:
        """``reduce`` (``jnp.min``, say) of ``x [T]`` over each query block: ``[rows, 1]``."""
        return reduce(_blocks(x, 0, self.rows, self.block_q), axis=1)[:, None]

    def over_keys(self, reduce: Callable[..., Any], x: Any) -> Any:
        """``reduce`` of ``x [S]`` over each key block: ``[1, columns]``."""
        return reduce(_blocks(x, 0, self.columns, self.block_k), axis=1)[None, :]

    def over_pairs(self, reduce: Callable[..., Any], x: Any) -> Any:
        """``reduce`` of ``x [T S]`` over each block: ``[rows, columns]``; size 1 broadcasts."""
        if x.shape[0] > 1:
            x = reduce(_blocks(x, 0, self.rows, self.block_q), axis=1)
        if x.shape[1] > 1:
            x = reduce(_blocks(x, 1, self.columns, self.block_k), axis=2)
        return x


def _blocks(x: jax.Array, axis: int, count: int, size: int) -> jax.Array:
    """Splits ``axis`` into ``count`` blocks; the last block is padded with its last entry."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, pad, mode="edge")
    return x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
