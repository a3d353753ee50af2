"""Positions of queries and keys in one sequence, in place of their indices within a call.

Masks, scores and dropout are rules of indices. A ``Positioned`` value holds what these indices
stand for, where they do not count from 0: a call may have some of a sequence's queries and keys, in
any order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.core.axes import Shape, is_array, kind, with_sizes
from attention_jax.core.pytree import Value

MOST = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contiguous:
    """Positions ``start, start + 1, ...``, an int or an int array ``[*B]``.

    It says more than an array of positions: the blocks of a mask are intervals, and scores of
    distances need only ``t + s - 1`` of them for a tile.
    """

    start: Any


class Positioned(Value):
    """What a rule is given in place of the indices of a query, a key and a head.

    Attributes:
      query_positions, key_positions: ``[*B T]`` and ``[*B S]``; None: they count from a start.
      query_start, key_start: the position of the first query and key, an int or ``[*B]``.
      examples, head_numbers: ``[*B]`` and ``[N]``, the numbers of the examples and query heads;
        None: they are their indices.
    """

    AXES = {
        "query_positions": "*B T",
        "key_positions": "*B S",
        "query_start": "*B",
        "key_start": "*B",
        "examples": "*B",
        "head_numbers": "N",
    }
    query_positions: Any
    key_positions: Any
    query_start: Any
    key_start: Any
    examples: Any
    head_numbers: Any

    @property
    def contiguous(self) -> bool:
        """Whether the positions of queries and of keys count up one by one."""
        return self.query_positions is None and self.key_positions is None

    def queries(self, q: Any) -> Any:
        """The positions of the queries of a tile, given their indices."""
        return _counted(self.query_positions, q, self.query_start)

    def keys(self, k: Any) -> Any:
        """The positions of the keys of a tile, given their indices."""
        return _counted(self.key_positions, k, self.key_start)

    def example(self, b: Any) -> Any:
        """The number of an example, given its index."""
        return b if self.examples is None else self.examples

    def head(self, n: Any) -> Any:
        """The number of a query head, given its index."""
        return n if self.head_numbers is None else self.head_numbers


def _counted(positions: Any, index: Any, start: Any) -> Any:
    if positions is not None:
        return positions
    return index if isinstance(start, int) and start == 0 else index + start


def positioned(
    queries: Any, keys: Any, examples: Any = None, head_numbers: Any = None
) -> dict[str, Any]:
    """The fields of a ``Positioned`` value.

    Args:
      queries, keys: arrays, ``Contiguous``, or None for 0, 1, 2, ...
      examples, head_numbers: int32 ``[*B]`` and ``[N]``, or None for their indices.
    """
    fields: dict[str, Any] = {"examples": examples, "head_numbers": head_numbers}
    for side, x in (("query", queries), ("key", keys)):
        counted = isinstance(x, Contiguous) or x is None
        fields[f"{side}_positions"] = None if counted else x
        fields[f"{side}_start"] = x.start if isinstance(x, Contiguous) else 0
    return fields


def checked_positions(name: str, x: Any, shape: Shape | None) -> Any:
    """Positions as int32, after a check.

    Args:
      name: of the argument.
      x: an array, ``Contiguous`` or None, which are returned as they are.
      shape: the expected ``(*B, length)``; ``(length,)`` is accepted too. None: not known yet.

    Raises:
      TypeError: not a signed integer array.
      ValueError: another shape, or a number beyond int32.
    """
    if x is None:
        return x
    if isinstance(x, Contiguous):
        if not isinstance(x.start, int) and not is_array(x.start):
            raise TypeError(f"{name} must start at an int or an int array, got {kind(x.start)}")
        return x
    if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.signedinteger):
        raise TypeError(
            f"{name} must be an int32 array, got {kind(x)}: pass jnp.arange(start, stop), for "
            f"example"
        )
    letter = "T" if name == "query_positions" else "S"
    if shape is not None and tuple(x.shape) not in (shape, shape[-1:]):
        sizes = {"*B": shape[:-1], letter: shape[-1]}
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected [{letter}] or "
            f"{with_sizes(f'[*B {letter}]', sizes)}"
        )
    if isinstance(x, np.ndarray) and x.size and not (x.max() <= MOST and x.min() >= -MOST):
        raise ValueError(f"{name} must be within int32, got {x.min()} to {x.max()}")
    return x.astype(np.int32)
