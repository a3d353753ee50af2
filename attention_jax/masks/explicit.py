"""Masks defined by grids, block layouts, arrays and functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from attention_jax.core.axes import (
    AnyArray,
    Size,
    bool_array,
    check_function,
    int_at_least,
)
from attention_jax.core.closures import apply, hoist, of_tile
from attention_jax.core.pytree import StaticArray, indexable
from attention_jax.masks.base import Mask
from attention_jax.masks.grid import Grid


class Neighborhood(Mask):
    """A box around each cell of an n-d grid, shifted inward at the borders."""

    NAME = "masks.neighborhood"
    shape: tuple[int, ...]
    size: tuple[int, ...]

    def natural_size(self) -> tuple[int | None, int | None]:
        cells = math.prod(self.shape)
        return cells, cells

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        cells = math.prod(self.shape)
        if cells != T or cells != S:
            raise ValueError(
                f"mask: neighborhood of shape {self.shape} has {cells} cells, but query has length "
                f"{T} (T) and key {S} (S): all must be equal"
            )
        return self

    def resolve_in_sequence(self, N: int) -> Self:
        return self

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        visible = (q == q) & (k == k)
        for i, j, length, size in zip(
            self._coordinates(q), self._coordinates(k), self.shape, self.size, strict=True
        ):
            visible = visible & (abs(_inwards(i, length, size) - j) <= size // 2)
        return visible

    def _coordinates(self, index: Any) -> list[Any]:
        steps = [math.prod(self.shape[a + 1 :]) for a in range(len(self.shape))]
        return [index // step % n for step, n in zip(steps, self.shape, strict=True)]

    def _intervals(self, first: Any, last: Any) -> list[tuple[Any, Any]]:
        """Per axis, an interval that holds the coordinates of cells ``first`` to ``last``."""
        intervals, whole = [], np.False_  # whole: whether an outer coordinate changes
        for i0, i1, n in zip(
            self._coordinates(first), self._coordinates(last), self.shape, strict=True
        ):
            intervals.append((np.where(whole, 0, i0), np.where(whole, n - 1, i1)))
            whole = whole | (i0 != i1)
        return intervals

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        some = every = np.True_
        for (i0, i1), (j0, j1), length, size in zip(
            self._intervals(grid.q0, grid.q1),
            self._intervals(grid.k0, grid.k1),
            self.shape,
            self.size,
            strict=True,
        ):
            i0, i1, r = _inwards(i0, length, size), _inwards(i1, length, size), size // 2
            some = some & (j0 <= i1 + r) & (i0 - r <= j1)
            every = every & (i1 - j0 <= r) & (j1 - i0 <= r)
        return some, every


def _inwards(i: Any, length: int, size: int) -> Any:
    """``clamp(i, size // 2, length - 1 - size // 2)``: the center of the box of query ``i``."""
    clip = np.clip if isinstance(i, np.ndarray) else jnp.clip
    return clip(i, size // 2, length - 1 - size // 2)


def neighborhood(shape: tuple[int, ...], size: int | tuple[int, ...]) -> Mask:
    """On every axis of a grid, ``|clamp(i, size//2, n-1-size//2) - j| <= size//2``.

    Args:
      shape: the shape of the grid, whose cells are numbered in row-major order; ``T`` and ``S``
        are the number of cells.
      size: the width of the neighborhood, odd and at most that of the grid; an int for all axes,
        or one per axis.

    >>> from attention_jax.masks import neighborhood
    >>> print(neighborhood((2, 4), (1, 3)))
    ███·····
    ███·····
    ·███····
    ·███····
    ····███·
    ····███·
    ·····███
    ·····███

    Source: Hassani et al. 2023, "Neighborhood Attention Transformer".
    """
    shape = tuple(int_at_least("shape", n, 1) for n in shape)
    size = tuple(size) if isinstance(size, Sequence) else (size,) * len(shape)
    if len(size) != len(shape):
        raise ValueError(f"size must have one entry per axis of shape {shape}, got {size}")
    for n, w in zip(shape, size, strict=True):
        if int_at_least("size", w, 1) % 2 == 0 or w > n:
            raise ValueError(f"size must be odd and at most its axis of shape {shape}, got {size}")
    return Neighborhood(shape, size)


class BlockSparse(Mask):
    """``layout[i // block_size, j // block_size]``."""

    NAME = "masks.block_sparse"
    ARGUMENTS = {"block_size": "block"}
    layout: Any  # an array, or a StaticArray
    block_size: int

    def natural_size(self) -> tuple[int | None, int | None]:
        rows, columns = self._layout().shape
        return rows * self.block_size, columns * self.block_size

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        rows, columns = self._layout().shape
        if rows * self.block_size < T or columns * self.block_size < S:
            raise ValueError(
                f"mask: layout has shape {(rows, columns)} and block {self.block_size}, which does "
                f"not cover T = {T} queries and S = {S} keys"
            )
        return self

    def resolve_in_sequence(self, N: int) -> Self:
        return self

    def _layout(self) -> Any:
        return self.layout.array if isinstance(self.layout, StaticArray) else self.layout

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return indexable(self._layout())[q // self.block_size, k // self.block_size]

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        layout = self._layout()
        xp = np if isinstance(layout, np.ndarray) else jnp
        # Prefix sums in both directions give the sum over any rectangle.
        sums = xp.pad(xp.cumsum(xp.cumsum(layout, 0, dtype=np.int32), 1), ((1, 0), (1, 0)))
        r0, r1 = grid.q0 // self.block_size, grid.q1 // self.block_size + 1
        c0, c1 = grid.k0 // self.block_size, grid.k1 // self.block_size + 1
        visible = sums[r1, c1] - sums[r0, c1] - sums[r1, c0] + sums[r0, c0]
        return visible > 0, visible == (r1 - r0) * (c1 - c0)


def block_sparse(layout: Bool[AnyArray, "rows columns"], block: int) -> Mask:
    """Query ``i`` attends to key ``j`` where ``layout[i // block, j // block]``, as in BigBird.

    Args:
      layout: bool array ``[ceil(T / block), ceil(S / block)]``. A NumPy array is a constant of the
        program, so that its blocks are known while tracing; a JAX array may be traced.
      block: positions per entry of the layout.

    >>> import numpy as np
    >>> from attention_jax.masks import block_sparse
    >>> print(block_sparse(np.array([[1, 0, 1], [0, 1, 1]], bool), 2))
    ██··██
    ██··██
    ··████
    ··████

    Source: Zaheer et al. 2020, "Big Bird".
    """
    bool_array("layout", layout, 2)
    if layout.ndim != 2:
        raise ValueError(f"layout must have 2 axes [rows, columns], got shape {layout.shape}")
    known = isinstance(layout, np.ndarray)
    return BlockSparse(
        StaticArray(layout) if known else layout,  # type: ignore[arg-type]
        int_at_least("block", block, 1),
    )


class Dense(Mask):
    """A mask given by a bool array."""

    NAME = "masks.dense"
    AXES = {"array": "*B N T S"}
    BROADCAST = True
    BY_INTERVALS = True
    array: Any

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.array

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        x = jnp.asarray(self.array)
        return grid.over_pairs(jnp.any, x), grid.over_pairs(jnp.all, x)


def dense(array: Bool[AnyArray, "..."]) -> Mask:
    """Query ``i`` attends to key ``j`` where ``array[b, n, i, j]``.

    Args:
      array: bool array broadcastable to ``[*B N T S]``.

    >>> import numpy as np
    >>> from attention_jax.masks import dense
    >>> print(dense(np.array([[1, 0, 1], [0, 1, 1]], bool)))
    █·█
    ·██
    """
    bool_array("array", array, 0)
    return Dense(array)


class MaskFn(Mask):
    """A mask given by a function."""

    NAME = "masks.mask_fn"
    DEFAULTS = {"arrays": (), "evaluate": False}
    fn: Callable[..., Any]
    arrays: tuple[Any, ...]
    evaluate: bool

    def hoisted(self, dtype: Any, numbers: bool) -> Self:
        fn, arrays = hoist(self.fn, self.arrays, (jnp.int32,) * 4, "mask_fn")
        return type(self)(fn, arrays, self.evaluate)

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        # JAX arrays: traced integers cannot index a NumPy array.
        arrays = [indexable(x) for x in self.arrays]
        visible = apply("mask_fn", self.fn, (b, n, q, k), arrays)
        return of_tile("mask_fn", visible, jnp.broadcast_shapes(np.shape(q), np.shape(k)), bool)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        if not self.evaluate:
            return np.True_, np.False_

        def one(q0: Any, k0: Any) -> tuple[Any, Any]:
            q, k = q0 + np.arange(grid.block_q)[:, None], k0 + np.arange(grid.block_k)[None, :]
            inside = (q < grid.T) & (k < grid.S)
            visible = jnp.asarray(self.rule(b, n, q, k))
            return jnp.any(visible & inside), jnp.all(visible | ~inside)

        def row(q0: Any) -> tuple[Any, Any]:
            return jax.lax.map(lambda k0: one(q0, k0), jnp.asarray(grid.k0[0]))

        some, every = jax.lax.map(row, jnp.asarray(grid.q0[:, 0]))
        return some, every


def mask_fn(fn: Callable[..., Any], *arrays: AnyArray, evaluate: bool = False) -> Mask:
    """Query ``q`` attends to key ``k`` where ``fn(b, n, q, k, *arrays)``, as in FlexAttention.

    Args:
      fn: takes int scalars ``b``, ``n`` and int arrays ``q [t, 1]``, ``k [1, s]``; returns a bool
        array that broadcasts to ``[t, s]``. It is traced: write ``&``, ``|``, ``~`` and
        ``jnp.where`` for ``and``, ``or``, ``not`` and ``if``. It may close over arrays, even
        traced ones.
      *arrays: arrays for ``fn`` to index, which may be traced. GPU kernels accept these, but not
        arrays that ``fn`` closes over.
      evaluate: evaluate ``fn`` once on all pairs, tile by tile, to find empty and full blocks.
        Otherwise every block counts as partial.

    >>> from attention_jax.masks import mask_fn
    >>> print(mask_fn(lambda b, n, q, k: (q - k) ** 2 <= 2))
    ██······
    ███·····
    ·███····
    ··███···
    ···███··
    ····███·
    ·····███
    ······██
    """
    check_function(fn, "b, n, q, k", arrays)
    return MaskFn(fn, tuple(arrays), bool(evaluate))
