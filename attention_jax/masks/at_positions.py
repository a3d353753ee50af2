"""Masks evaluated at explicit positions of queries and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax.numpy as jnp

from attention_jax.core.axes import Size
from attention_jax.core.positions import AtPositions, position_fields
from attention_jax.masks.base import Mask, parts
from attention_jax.masks.grid import Grid


@dataclasses.dataclass(frozen=True)
class PositionGrid(Grid):
    """A grid whose bounds are the smallest and largest position in each block.

    The positions between these bounds need not all occur.
    """

    query_low: Any
    query_high: Any
    key_low: Any
    key_high: Any

    q0 = property(lambda self: self.query_low)
    q1 = property(lambda self: self.query_high)
    k0 = property(lambda self: self.key_low)
    k1 = property(lambda self: self.key_high)


class MaskAtPositions(AtPositions, Mask):
    """``mask`` evaluated at positions; keys at negative positions are masked."""

    NAME = "a mask of positions"
    ARGUMENTS = {"mask_": "mask"}
    BY_INTERVALS = True
    mask_: Mask
    resolved: bool  # mask_ is already resolved for the whole sequence

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        return self.resolve_in_sequence(N)

    def resolve_in_sequence(self, N: int) -> Self:
        if self.resolved:
            return self
        return dataclasses.replace(self, mask_=self.mask_.resolve_in_sequence(N), resolved=True)

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        visible = self.mask_.rule(self.example(b), self.head(n), self.queries(q), self.keys(k))
        return visible if self.key_positions is None else visible & (self.key_positions >= 0)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        k = None if self.key_positions is None else jnp.asarray(self.key_positions)
        real = None if k is None else jnp.where(k < 0, jnp.iinfo(k.dtype).max, k)
        positions = PositionGrid(
            grid.T,
            grid.S,
            grid.block_q,
            grid.block_k,
            _bound(grid.over_queries, jnp.min, self.query_positions, self.queries, grid.q0),
            _bound(grid.over_queries, jnp.max, self.query_positions, self.queries, grid.q1),
            _bound(grid.over_keys, jnp.min, real, self.keys, grid.k0),
            _bound(grid.over_keys, jnp.max, k, self.keys, grid.k1),
        )
        by_intervals = all(part.BY_INTERVALS for part in parts(self.mask_))
        block = self.mask_.block if by_intervals else super().block
        some, every = block(positions, self.example(b), self.head(n))
        if k is None:
            return some, every
        return some & (positions.k1 >= 0), every & grid.over_keys(jnp.all, k >= 0)


def _bound(
    over: Callable[..., Any],
    reduce: Callable[..., Any],
    positions: Any,
    position_of: Callable[[Any], Any],
    index: Any,
) -> Any:
    """The smallest or largest position of each block."""
    return position_of(index) if positions is None else over(reduce, jnp.asarray(positions))


def mask_at_positions(
    mask: Mask, queries: Any, keys: Any, *, resolved: bool = False, **numbers: Any
) -> Mask:
    """``mask`` evaluated at positions; keys at negative positions are masked.

    Query ``i`` attends to key ``j`` where ``mask`` lets the position of ``i`` attend to the
    position of ``j``, and that is not negative. The mask's own arrays stay in the order of the
    queries and keys of the call.

    Args:
      mask: a mask whose rule takes positions in the whole sequence.
      queries, keys: int32 arrays ``[*B T]`` and ``[*B S]``, ``Contiguous``, or None: 0, 1, 2, ...
      resolved: whether the mask is already resolved; else ``align="end"`` means
        ``align="start"``.
      **numbers: of examples and heads, see ``position_fields``.

    >>> import numpy as np
    >>> from attention_jax.masks import window
    >>> from attention_jax.masks.at_positions import mask_at_positions
    >>> print(mask_at_positions(window(2, 0), np.array([4, 5]), np.array([4, 5, -1, 3])))
    █··█
    ██·█
    """
    if isinstance(mask, MaskAtPositions) and queries is None and keys is None:
        return dataclasses.replace(mask, **numbers)
    return MaskAtPositions(
        mask_=mask, resolved=resolved, **position_fields(queries, keys, **numbers)
    )
