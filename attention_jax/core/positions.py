"""Values evaluated at explicit positions of queries and keys rather than at their indices.

The rules of masks, scores and dropout take the indices of queries and keys. A call may hold only
some of a sequence's queries and keys, in any order: then the rule must be evaluated at their
positions in the sequence, which an ``AtPositions`` value holds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.core.axes import Shape, is_array, kind, with_sizes
from attention_jax.core.pytree import Value

MAX_POSITION = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contiguous:
    """Positions ``start, start + 1, ...``, an int or an int array ``[*B]``.

    Cheaper than an array of positions: a mask knows the range of each block without reading the
    positions, and a score of distances needs only ``t + s - 1`` of them for a tile.
    """

    start: Any


class AtPositions(Value):
    """Base of masks, scores and dropout whose rule is evaluated at positions, not at indices.

    Attributes:
      query_positions, key_positions: ``[*B T]`` and ``[*B S]``; None if they are contiguous.
      query_start, key_start: the first position where positions are contiguous, an int or ``[*B]``.
      examples, head_numbers: ``[*B]`` and ``[N]``: which examples and query heads of the whole
        computation these are; None if their indices already say so.
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
        """Whether the positions of both queries and keys are contiguous."""
        return self.query_positions is None and self.key_positions is None

    def queries(self, q: Any) -> Any:
        """The positions of the queries of a tile, given their indices."""
        return _positions(self.query_positions, q, self.query_start)

    def keys(self, k: Any) -> Any:
        """The positions of the keys of a tile, given their indices."""
        return _positions(self.key_positions, k, self.key_start)

    def example(self, b: Any) -> Any:
        """The number of an example, given its index."""
        return b if self.examples is None else self.examples

    def head(self, n: Any) -> Any:
        """The number of a query head, given its index."""
        return n if self.head_numbers is None else self.head_numbers


def _positions(positions: Any, index: Any, start: Any) -> Any:
    if positions is not None:
        return positions
    return index if isinstance(start, int) and start == 0 else index + start


def position_fields(
    queries: Any, keys: Any, examples: Any = None, head_numbers: Any = None
) -> dict[str, Any]:
    """The fields of an ``AtPositions`` value.

    Args:
      queries, keys: position arrays, ``Contiguous``, or None for 0, 1, 2, ...
      examples, head_numbers: int32 ``[*B]`` and ``[N]``, or None for their indices.
    """
    fields: dict[str, Any] = {"examples": examples, "head_numbers": head_numbers}
    for side, x in (("query", queries), ("key", keys)):
        contiguous = isinstance(x, Contiguous) or x is None
        fields[f"{side}_positions"] = None if contiguous else x
        fields[f"{side}_start"] = x.start if isinstance(x, Contiguous) else 0
    return fields


def checked_positions(name: str, x: Any, shape: Shape | None, *, abstract: bool = False) -> Any:
    """Checks positions and returns them as int32.

    Args:
      name: of the argument.
      x: an array; ``Contiguous`` and None are returned unchanged.
      shape: the expected ``(*B, length)``; ``(length,)`` is accepted too. None if not known yet.
      abstract: allow ``jax.ShapeDtypeStruct``.

    Raises:
      TypeError: not a signed integer array.
      ValueError: an unexpected shape, or a position that does not fit into int32.
    """
    if x is None:
        return x
    if isinstance(x, Contiguous):
        if not isinstance(x.start, int) and not is_array(x.start):
            raise TypeError(f"{name} must start at an int or an int array, got {kind(x.start)}")
        return x
    is_struct = isinstance(x, jax.ShapeDtypeStruct)
    if is_struct and not abstract:
        raise TypeError(f"{name} must be an array, got ShapeDtypeStruct: only explain takes it")
    if not (is_array(x) or is_struct) or not jnp.issubdtype(x.dtype, jnp.signedinteger):
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
    if (
        isinstance(x, np.ndarray)
        and x.size
        and not (x.max() <= MAX_POSITION and x.min() >= -MAX_POSITION)
    ):
        raise ValueError(f"{name} must be within int32, got {x.min()} to {x.max()}")
    return jax.ShapeDtypeStruct(x.shape, np.int32) if is_struct else x.astype(np.int32)
