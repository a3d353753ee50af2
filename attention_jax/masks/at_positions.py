"""A mask of positions rather than of indices into the arrays."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
from jaxtyping import Int

from attention_jax.core.axes import AnyArray, Size, check_position_arrays, kind
from attention_jax.masks.base import Mask, parts
from attention_jax.masks.grid import Grid


@dataclasses.dataclass(frozen=True)
class PlacedGrid(Grid):
    """A grid whose bounds are those of the positions in each block, which may have gaps."""

    query_low: Any
    query_high: Any
    key_low: Any
    key_high: Any

    q0 = property(lambda self: self.query_low)
    q1 = property(lambda self: self.query_high)
    k0 = property(lambda self: self.key_low)
    k1 = property(lambda self: self.key_high)


class Placed(Mask):
    """``mask`` applied to positions; keys at negative positions are masked."""

    NAME = "masks.at_positions"
    ARGUMENTS = {"mask_": "mask"}
    AXES = {"query_positions": "*B T", "key_positions": "*B S"}
    BY_INTERVALS = True
    mask_: Mask
    query_positions: Any
    key_positions: Any

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        return self.resolve_in_sequence(N)

    def resolve_in_sequence(self, N: int) -> Self:
        return dataclasses.replace(self, mask_=self.mask_.resolve_in_sequence(N))

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        visible = self.mask_.rule(b, n, self.query_positions, self.key_positions)
        return visible & (self.key_positions >= 0)

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
    """``mask`` applied to positions in place of indices; keys at negative positions are masked.

    Query ``i`` attends to key ``j`` where ``mask`` lets position ``query_positions[i]`` attend to
    position ``key_positions[j]``, and the latter is not negative. Both are positions in one
    sequence, so ``align="end"`` means the same as ``align="start"``.

    Use it for keys that are not in the order of their positions, as in a cache that wraps around,
    and for queries that do not start at position 0.

    Args:
      mask: its rule gets positions in place of indices, while its arrays stay in the order of the
        call's queries and keys.
      query_positions, key_positions: int arrays ``[*B T]`` and ``[*B S]``, of one dtype.

    >>> import numpy as np
    >>> from attention_jax.masks import at_positions, window
    >>> print(at_positions(window(2, 0), np.array([4, 5]), np.array([4, 5, -1, 3])))
    █··█
    ██·█
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a Mask, got {kind(mask)}")
    check_position_arrays(query_positions, key_positions)
    return Placed(mask, query_positions, key_positions)
