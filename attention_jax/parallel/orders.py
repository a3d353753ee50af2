"""Orders of a sequence in which every device has the same share of causal work."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from attention_jax.core.axes import int_at_least


class Order(NamedTuple):
    """A permutation of positions: shard ``x[permutation]``; ``[inverse]`` undoes it.

    Attributes:
      permutation: int32 ``[T]``, the position of each entry: as ``query_positions``, sharded too.
      inverse: int32 ``[T]``.
    """

    permutation: Int[np.ndarray, " T"]
    inverse: Int[np.ndarray, " T"]


def zigzag(T: int, n: int) -> Order:
    """Of ``2 n`` parts of a sequence, device ``i`` has parts ``i`` and ``2 n - 1 - i``.

    Under a causal mask all devices then have equally much to compute, and parts stay contiguous, so
    that whole blocks are skipped.

    Args:
      T: length, a multiple of ``2 n``.
      n: devices along the mesh axis.

    Raises:
      TypeError, ValueError: not ints of at least 1, or T is not a multiple of ``2 n``.

    >>> from attention_jax.parallel import zigzag
    >>> order = zigzag(8, 2)
    >>> order.permutation.tolist(), order.inverse.tolist()
    ([0, 1, 6, 7, 2, 3, 4, 5], [0, 1, 4, 5, 6, 7, 2, 3])

    Source: Zhu 2024, "ring-flash-attention"; Llama Team 2024, "The Llama 3 Herd of Models", 3.3.2.
    """
    parts = _parts(T, n, 2)
    return _order(np.concatenate([np.r_[parts[i], parts[2 * n - 1 - i]] for i in range(n)]))


def striped(T: int, n: int) -> Order:
    """Device ``i`` has positions ``i``, ``i + n``, ``i + 2 n``, ...

    Balanced for every mask of distances; but no block of a causal mask is empty or full away from
    the diagonal, so prefer ``zigzag`` where it is enough.

    Args:
      T: length, a multiple of ``n``.
      n: devices along the mesh axis.

    Raises:
      TypeError, ValueError: not ints of at least 1, or T is not a multiple of ``n``.

    >>> from attention_jax.parallel import striped
    >>> striped(6, 2).permutation.tolist()
    [0, 2, 4, 1, 3, 5]

    Source: Brandon et al. 2023, "Striped Attention".
    """
    _parts(T, n, 1)
    return _order(np.arange(T, dtype=np.int32).reshape(-1, n).T.reshape(-1))


def _parts(T: int, n: int, per_device: int) -> np.ndarray:
    T, n = int_at_least("T", T, 1), int_at_least("n", n, 1)
    if T % (per_device * n):
        multiple = "n" if per_device == 1 else f"{per_device} n"
        raise ValueError(f"T must be a multiple of {multiple} = {per_device * n}, got {T}: pad it")
    return np.arange(T, dtype=np.int32).reshape(per_device * n, -1)


def _order(permutation: np.ndarray) -> Order:
    return Order(permutation, np.argsort(permutation).astype(np.int32))
