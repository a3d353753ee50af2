"""A mask in terms of positions rather than of places in the arrays."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
from jaxtyping import Int

from attention_jax.core.axes import AnyArray, Size, int_array
from attention_jax.masks.base import Mask, parts
from attention_jax.masks.grid import Grid


@dataclasses.dataclass(frozen=True)
class PlacedGrid(Grid):
    """A grid whose intervals are those of the positions in each block, which may have gaps."""

    query_low: Any
    query_high: Any
    key_low: Any
    key_high: Any

    q0 = property(lambda self: self.query_low)
    q1 = property(lambda self: self.query_high)
    k0 = property(lambda self: self.key_low)
    k1 = property(lambda self: self.key_high)


class Placed(Mask):
    """``mask`` of the positions of query and key; keys at negative ones are hidden."""

    AXES = {"query_positions": "*B T", "key_positions": "*B S"}
    mask_: Mask
    query_positions: Any
    key_positions: Any

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        # Positions are those of one sequence, as long as masks of a fixed size say, if any.
        fixed = [part.natural_size() for part in parts(self.mask_) if not part.AXES]
        length = min((n for sizes in fixed for n in sizes if n is not None), default=1)
        return dataclasses.replace(self, mask_=self.mask_.resolve(length, length, N))

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        seen = self.mask_.rule(b, n, self.query_positions, self.key_positions)
        return seen & (self.key_positions >= 0)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        q, k = jnp.asarray(self.query_positions), jnp.asarray(self.key_positions)
        placed = PlacedGrid(
            grid.T,
            grid.S,
            grid.block_q,
            grid.block_k,
            grid.over_queries(jnp.min, q),
            grid.over_queries(jnp.max, q),
            grid.over_keys(jnp.min, jnp.where(k < 0, jnp.iinfo(k.dtype).max, k)),
            grid.over_keys(jnp.max, k),
        )
        by_intervals = all(part.BY_INTERVALS for part in parts(self.mask_))
        block = self.mask_.block if by_intervals else super().block
        some, every = block(placed, b, n)
        return some & (placed.k1 >= 0), every & grid.over_keys(jnp.all, k >= 0)


def at_positions(
    mask: Mask,
    query_positions: Int[AnyArray, "*B T"],
    key_positions: Int[AnyArray, "*B S"],
) -> Mask:
    """``mask`` of the positions of queries and keys; keys at negative ones are hidden.

    Query ``i`` sees key ``j`` where ``mask`` lets position ``query_positions[i]`` see position
    ``key_positions[j]``, and that is not negative. They are positions in one sequence:
    ``align="end"`` is ``align="start"``.

    For keys that do not lie in the order of their positions, as in a cache that wraps around, and
    for queries that do not start at position 0.

    Args:
      mask: its rule sees positions in place of indices; arrays it holds stay in the order of the
        queries and keys of the call.
      query_positions, key_positions: int arrays ``[*B T]`` and ``[*B S]``, of one dtype.

    >>> import numpy as np
    >>> from attention_jax.masks import window
    >>> print(at_positions(window(2, 0), np.array([4, 5]), np.array([4, 5, -1, 3])))
    █··█
    ██·█
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a Mask, got {type(mask).__name__}")
    for name, x in (("query_positions", query_positions), ("key_positions", key_positions)):
        int_array(name, x, 1)
    if query_positions.dtype != key_positions.dtype:
        raise TypeError(
            f"query_positions and key_positions must have one dtype, got {query_positions.dtype} "
            f"and {key_positions.dtype}"
        )
    return Placed(mask, query_positions, key_positions)
