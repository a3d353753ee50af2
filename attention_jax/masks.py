"""Masks: frozen values that say which query may see which key, and compose.

A mask is a pytree with ``&``, ``|``, ``~`` and one method, ``mask(b, n, q, k)``:
True where query ``q`` of head ``n`` in example ``b`` sees key ``k``. The indices
are integers or integer arrays that broadcast. ``T x S`` is never materialised;
``to_dense`` does so on request, and ``print(mask)`` draws a small picture.

>>> print(causal() & window(3, 0))
█·······
██······
███·····
████····
·████···
··████··
···████·
····████

Each class says three things: its fields, its ``rule`` for one tile of pairs (see
``values`` for what a field looks like there), and ``block``: for whole blocks of
pairs, whether some pair may be visible and whether every pair surely is. ``block``
is interval arithmetic: on static ints it runs in NumPy while tracing, on arrays in
JAX at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attention_jax.axes import AnyArray, is_array
from attention_jax.grid import Grid
from attention_jax.values import StaticArray, Value

__all__ = [
    "Mask",
    "block_sparse",
    "causal",
    "chunked",
    "dense",
    "dilated",
    "global_tokens",
    "lengths",
    "mask_fn",
    "neighborhood",
    "prefix",
    "segments",
    "window",
]

# An int, or one int per example.
PerExample = int | Int[AnyArray, "*B"]


class Mask(Value):
    """Which query may see which key. Subclasses give ``rule`` and, to skip blocks, ``block``."""

    def mask(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        """True where query ``q`` of head ``n`` in example ``b`` sees key ``k``.

        Args:
          b, n: example (counted over the flattened ``*B``) and query head.
          q, k: positions; ints or integer arrays that broadcast.

        >>> import numpy as np
        >>> causal().mask(0, 0, np.arange(3)[:, None], np.arange(3)[None, :]).astype(int)
        array([[1, 0, 0],
               [1, 1, 0],
               [1, 1, 1]])
        """
        return self.at(b, n, q, k).rule(b, n, q, k)

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        """The rule for one tile: the fields are already cut to it."""
        raise NotImplementedError(f"{type(self).__name__} must define rule(b, n, q, k)")

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        """``(some, every)`` for each block: is a pair perhaps visible, are all pairs surely."""
        return np.True_, np.False_

    def __and__(self, other: Mask) -> Mask:
        return And(self, _as_mask(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _as_mask(other, "|"))

    def __invert__(self) -> Mask:
        return Not(self)

    def to_dense(
        self, T: int, S: int, *, B: int | None = None, N: int | None = None
    ) -> Bool[Array, "..."]:
        """The mask as a bool array ``[T S]``; with ``B`` and ``N`` given, ``[B N T S]``.

        >>> segments(np.array([0, 0, 1])).to_dense(3, 3).astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
        """
        mask = self.resolve(T, S, N or 1)
        q, k = jnp.arange(T)[:, None], jnp.arange(S)[None, :]

        def one(b: Any, n: Any) -> Any:
            return jnp.broadcast_to(jnp.asarray(mask.mask(b, n, q, k)), (T, S))

        fn: Callable[..., Any] = one
        if N is not None:
            fn = jax.vmap(fn, in_axes=(None, 0))
        if B is not None:
            fn = jax.vmap(fn, in_axes=(0, None))
        result: jax.Array = fn(0 if B is None else jnp.arange(B), 0 if N is None else jnp.arange(N))
        return result

    def __str__(self) -> str:
        """A picture of example 0, head 0: ``█`` visible, ``▒`` partly, ``·`` hidden."""
        T, S = self._drawn_size()
        visible = np.asarray(self.to_dense(T, S))
        rows, columns = -(-T // 16), -(-S // 16)
        cells = [
            [visible[i : i + rows, j : j + columns] for j in range(0, S, columns)]
            for i in range(0, T, rows)
        ]
        return "\n".join(
            "".join("█" if c.all() else "▒" if c.any() else "·" for c in row) for row in cells
        )

    def _drawn_size(self) -> tuple[int, int]:
        """Sizes to draw at: those of an array with that axis, else enough for the largest int."""
        T = S = None
        largest = 3
        for part in _parts(self):
            for name in vars(part):
                x, axes = getattr(part, name), part.AXES.get(name, "").split()
                T = x.shape[axes.index("T") - len(axes)] if is_array(x) and "T" in axes else T
                S = x.shape[axes.index("S") - len(axes)] if is_array(x) and "S" in axes else S
                if isinstance(x, int) and not isinstance(x, bool):
                    largest = max(largest, abs(x))
            if isinstance(part, Neighborhood):
                T = S = math.prod(part.shape)
            if isinstance(part, BlockSparse):
                T, S = (n * part.block_size for n in part._layout().shape)
        length = 8 if largest < 8 else 4 * largest
        return T or S or length, S or T or length


def _parts(mask: Mask) -> Iterator[Mask]:
    yield mask
    for x in vars(mask).values():
        if isinstance(x, Mask):
            yield from _parts(x)


def _as_mask(x: Any, operator: str) -> Mask:
    if isinstance(x, Mask):
        return x
    raise TypeError(
        f"a mask can be combined by {operator} with another mask, got {type(x).__name__}: wrap a "
        f"bool array in masks.dense(array)"
    )


# --- Combinations: three-valued logic over (some, every).


class And(Mask):
    """Visible where both are."""

    left: Mask
    right: Mask

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.left.rule(b, n, q, k) & self.right.rule(b, n, q, k)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        (some, every), (some2, every2) = self.left.block(grid, b, n), self.right.block(grid, b, n)
        return some & some2, every & every2


class Or(Mask):
    """Visible where one of the two is."""

    left: Mask
    right: Mask

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.left.rule(b, n, q, k) | self.right.rule(b, n, q, k)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        (some, every), (some2, every2) = self.left.block(grid, b, n), self.right.block(grid, b, n)
        return some | some2, every | every2


class Not(Mask):
    """Visible where the other is not."""

    mask_: Mask

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return ~jnp.asarray(self.mask_.rule(b, n, q, k))

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        some, every = self.mask_.block(grid, b, n)
        return ~every, ~some


# --- Bands around a diagonal.


class Band(Mask):
    """``i - left <= j - offset <= i + right``; None is unbounded on that side."""

    AXES = {"offset": "*B"}
    left: int | None
    right: int | None
    offset: PerExample
    align: str

    def resolve(self, T: int, S: int, N: int) -> Self:
        if self.align == "start":
            return self
        return type(self)(self.left, self.right, self.offset + (S - T), "start")

    def _offset(self) -> Any:
        if self.align != "start":
            raise ValueError(
                'a mask with align="end" has a rule only once T and S are known: use '
                "mask.resolve(T, S, N)"
            )
        return self.offset

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self._within(lowest=k - q - self._offset(), highest=k - q - self._offset())

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        lowest, highest = (
            grid.k0 - grid.q1 - self._offset(),
            grid.k1 - grid.q0 - self._offset(),
        )
        # A block holds every distance from lowest to highest: it meets the band where the
        # intervals overlap, and lies in it where both ends do.
        return self._within(lowest=highest, highest=lowest), self._within(lowest, highest)

    def _within(self, lowest: Any, highest: Any) -> Any:
        inside = (lowest == lowest) & (highest == highest)  # all True, of the right shape
        if self.left is not None:
            inside = inside & (lowest >= -self.left)
        if self.right is not None:
            inside = inside & (highest <= self.right)
        return inside


def causal(offset: PerExample = 0, *, align: str = "start") -> Mask:
    """Query ``i`` sees key ``j`` where ``j <= i + offset``.

    Args:
      offset: an int, or an int array ``[*B]``; 0 is top-left: the first query sees the first key.
      align: ``"end"`` adds ``S - T`` to the offset: the last query sees the last key.

    >>> print(causal())
    █·······
    ██······
    ███·····
    ████····
    █████···
    ██████··
    ███████·
    ████████

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.3.
    """
    return Band(None, 0, _per_example("offset", offset), _align(align))


def window(
    left: int | None, right: int | None, *, offset: PerExample = 0, align: str = "start"
) -> Mask:
    """Query ``i`` sees key ``j`` where ``i - left <= j - offset <= i + right``.

    ``left`` and ``right`` count keys beside self, as in ``jax.nn`` and FlashAttention: a Hugging
    Face ``sliding_window`` of ``W`` keys is ``window(W - 1, 0)``.

    Args:
      left, right: ints >= 0, or None for no bound on that side.
      offset, align: as for ``causal``.

    >>> print(window(2, 1))
    ██······
    ███·····
    ████····
    ·████···
    ··████··
    ···████·
    ····████
    ·····███

    Source: Beltagy et al. 2020, "Longformer", section 3.1.
    """
    for name, x in (("left", left), ("right", right)):
        if x is not None:
            _int_at_least(name, x, 0)
    return Band(left, right, _per_example("offset", offset), _align(align))


def dilated(stride: int) -> Mask:
    """Query ``i`` sees key ``j`` where ``(i - j) % stride == 0``.

    >>> print(dilated(3) & causal())
    █·······
    ·█······
    ··█·····
    █··█····
    ·█··█···
    ··█··█··
    █··█··█·
    ·█··█··█

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers" (strided).
    """
    return Dilated(_int_at_least("stride", stride, 1))


class Dilated(Mask):
    """Every ``stride``-th distance."""

    stride: int

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return (q - k) % self.stride == 0

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        lowest, highest = grid.q0 - grid.k1, grid.q1 - grid.k0
        some = highest // self.stride * self.stride >= lowest
        return some, some & ((lowest == highest) | (self.stride == 1))


# --- Parts of the sequence.


class Lengths(Mask):
    """The first ``query`` queries see the first ``key`` keys; None is no bound."""

    AXES = {"query": "*B", "key": "*B"}
    query: PerExample | None
    key: PerExample | None

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self._below(q, k)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        return self._below(grid.q0, grid.k0), self._below(grid.q1, grid.k1)

    def _below(self, q: Any, k: Any) -> Any:
        inside = (q == q) & (k == k)  # all True, of the right shape
        if self.query is not None:
            inside = inside & (q < self.query)
        if self.key is not None:
            inside = inside & (k < self.key)
        return inside


def prefix(length: PerExample) -> Mask:
    """Query ``i`` sees key ``j`` where ``j < length``; or-ed with ``causal`` it is prefix-LM.

    Args:
      length: an int, or an int array ``[*B]``.

    >>> print(prefix(3) | causal())
    ███·····
    ███·····
    ███·····
    ████····
    █████···
    ██████··
    ███████·
    ████████

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (T5), section 3.2.1.
    """
    return Lengths(None, _per_example("length", length))


def lengths(query: PerExample | None = None, key: PerExample | None = None) -> Mask:
    """Query ``i`` sees key ``j`` where ``i < query`` and ``j < key``; None is no bound.

    Args:
      query, key: how many queries and keys are real, ints or int arrays ``[*B]``; the rest is
        padding, and whatever it holds reaches nothing.

    >>> print(lengths(query=6, key=5))
    █████···
    █████···
    █████···
    █████···
    █████···
    █████···
    ········
    ········
    """
    return Lengths(
        None if query is None else _per_example("query", query),
        None if key is None else _per_example("key", key),
    )


class Segments(Mask):
    """Equal ids, none negative."""

    AXES = {"query_ids": "*B T", "key_ids": "*B S"}
    query_ids: Any
    key_ids: Any

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return (self.query_ids == self.key_ids) & (self.query_ids >= 0)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        # The interval of the ids that are no padding; it is empty (low > high) where all are.
        def intervals(over: Callable[..., Any], ids: Any) -> tuple[Any, Any, Any]:
            unpadded = jnp.where(ids < 0, jnp.iinfo(ids.dtype).max, ids)
            return over(jnp.min, unpadded), over(jnp.max, ids), over(jnp.all, ids >= 0)

        q_low, q_high, q_real = intervals(grid.over_queries, jnp.asarray(self.query_ids))
        k_low, k_high, k_real = intervals(grid.over_keys, jnp.asarray(self.key_ids))
        some = (q_low <= k_high) & (k_low <= q_high) & (q_high >= 0) & (k_high >= 0)
        same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        return some, same & q_real & k_real


def segments(
    query_ids: Int[AnyArray, "*B T"], key_ids: Int[AnyArray, "*B S"] | None = None
) -> Mask:
    """Query ``i`` sees key ``j`` where their ids are equal and not negative (packed documents).

    Args:
      query_ids: int array ``[*B T]``; a negative id is padding, which sees and is seen by nothing.
      key_ids: int array ``[*B S]``; None takes ``query_ids``.

    >>> print(segments(np.array([0, 0, 0, 1, 1, 2, -1, -1])))
    ███·····
    ███·····
    ███·····
    ···██···
    ···██···
    ·····█··
    ········
    ········

    Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination".
    """
    key_ids = query_ids if key_ids is None else key_ids
    for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
        _int_array(name, ids, 1)
    if query_ids.dtype != key_ids.dtype:
        raise TypeError(
            f"query_ids and key_ids must have one dtype, got {query_ids.dtype} and {key_ids.dtype}"
        )
    return Segments(query_ids, key_ids)


class Chunked(Mask):
    """The same chunk of ``size`` positions."""

    size: int

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return q // self.size == k // self.size

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        q0, q1 = grid.q0 // self.size, grid.q1 // self.size
        k0, k1 = grid.k0 // self.size, grid.k1 // self.size
        return (q0 <= k1) & (k0 <= q1), (q0 == q1) & (k0 == k1) & (q0 == k0)


def chunked(size: int) -> Mask:
    """Query ``i`` sees key ``j`` where ``i // size == j // size``.

    >>> print(chunked(3))
    ███·····
    ███·····
    ███·····
    ···███··
    ···███··
    ···███··
    ······██
    ······██

    Source: Qiu et al. 2020, "Blockwise Self-Attention for Long Document Understanding".
    """
    return Chunked(_int_at_least("size", size, 1))


class GlobalTokens(Mask):
    """Flagged queries see all keys, flagged keys are seen by all queries."""

    AXES = {"query_flags": "*B T", "key_flags": "*B S"}
    query_flags: Any
    key_flags: Any

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.query_flags | self.key_flags

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        q, k = jnp.asarray(self.query_flags), jnp.asarray(self.key_flags)
        return (
            grid.over_queries(jnp.any, q) | grid.over_keys(jnp.any, k),
            grid.over_queries(jnp.all, q) | grid.over_keys(jnp.all, k),
        )


def global_tokens(flags: Bool[AnyArray, "*B T"]) -> Mask:
    """Query ``i`` sees key ``j`` where ``flags[i] or flags[j]``; for self-attention, ``T == S``.

    Args:
      flags: bool array ``[*B T]``.

    >>> print(global_tokens(np.arange(8) == 0) | window(1, 1))
    ████████
    ███·····
    ████····
    █·███···
    █··███··
    █···███·
    █····███
    █·····██

    Source: Beltagy et al. 2020, "Longformer", section 3.1.
    """
    _bool_array("flags", flags, 1)
    return GlobalTokens(flags, flags)


# --- Layouts.


class Neighborhood(Mask):
    """A box around each cell of an n-d grid, shifted inwards at the borders."""

    shape: tuple[int, ...]
    size: tuple[int, ...]

    def resolve(self, T: int, S: int, N: int) -> Self:
        cells = math.prod(self.shape)
        if cells != T or cells != S:
            raise ValueError(
                f"mask: neighborhood of shape {self.shape} has {cells} cells, but query has length "
                f"{T} (T) and key {S} (S): all must be equal"
            )
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
        intervals, whole = [], np.False_  # whole: an outer coordinate changes in between
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
    """``clamp(i, size // 2, length - 1 - size // 2)``: the centre of the box that query i sees."""
    clip = np.clip if isinstance(i, np.ndarray) else jnp.clip
    return clip(i, size // 2, length - 1 - size // 2)


def neighborhood(shape: tuple[int, ...], size: int | tuple[int, ...]) -> Mask:
    """On every axis of a grid, ``|clamp(i, size//2, n-1-size//2) - j| <= size//2``.

    Args:
      shape: the grid's axes; positions count its cells in row-major order, ``T == S == prod``.
      size: odd, at most the axis; an int for all axes, or one per axis.

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
    shape = tuple(_int_at_least("shape", n, 1) for n in shape)
    size = (size,) * len(shape) if isinstance(size, int) else tuple(size)
    if len(size) != len(shape):
        raise ValueError(f"size must have one entry per axis of shape {shape}, got {size}")
    for n, w in zip(shape, size, strict=True):
        if _int_at_least("size", w, 1) % 2 == 0 or w > n:
            raise ValueError(f"size must be odd and at most its axis of shape {shape}, got {size}")
    return Neighborhood(shape, size)


class BlockSparse(Mask):
    """``layout[i // block_size, j // block_size]``."""

    layout: Any  # an array, or a StaticArray
    block_size: int

    def resolve(self, T: int, S: int, N: int) -> Self:
        rows, columns = self._layout().shape
        if rows * self.block_size < T or columns * self.block_size < S:
            raise ValueError(
                f"mask: layout has shape {(rows, columns)} and block {self.block_size}, which does "
                f"not cover T = {T} queries and S = {S} keys"
            )
        return self

    def _layout(self) -> Any:
        return self.layout.array if isinstance(self.layout, StaticArray) else self.layout

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return jnp.asarray(self._layout())[q // self.block_size, k // self.block_size]

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        layout = self._layout()
        xp = np if isinstance(layout, np.ndarray) else jnp
        # Sums over all rectangles from the corner give the sum over any rectangle.
        sums = xp.pad(xp.cumsum(xp.cumsum(layout, 0, dtype=np.int32), 1), ((1, 0), (1, 0)))
        r0, r1 = grid.q0 // self.block_size, grid.q1 // self.block_size + 1
        c0, c1 = grid.k0 // self.block_size, grid.k1 // self.block_size + 1
        visible = sums[r1, c1] - sums[r0, c1] - sums[r1, c0] + sums[r0, c0]
        return visible > 0, visible == (r1 - r0) * (c1 - c0)


def block_sparse(layout: Bool[AnyArray, "rows columns"], block: int) -> Mask:
    """Query ``i`` sees key ``j`` where ``layout[i // block, j // block]`` (BigBird, tiles).

    Args:
      layout: bool array ``[ceil(T / block), ceil(S / block)]``. A NumPy array is part of the
        program (its blocks are known while tracing), a JAX array is data.
      block: positions per entry.

    >>> print(block_sparse(np.array([[1, 0, 1], [0, 1, 1]], bool), 2))
    ██··██
    ██··██
    ··████
    ··████

    Source: Zaheer et al. 2020, "Big Bird".
    """
    _bool_array("layout", layout, 2)
    if layout.ndim != 2:
        raise ValueError(f"layout must have 2 axes [rows, columns], got shape {layout.shape}")
    known = isinstance(layout, np.ndarray)
    return BlockSparse(
        StaticArray(layout) if known else layout,  # type: ignore[arg-type]
        _int_at_least("block", block, 1),
    )


class Dense(Mask):
    """A bool array."""

    AXES = {"array": "*B N T S"}
    BROADCAST = True
    array: Any

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.array

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        x = jnp.asarray(self.array)
        return grid.over_pairs(jnp.any, x), grid.over_pairs(jnp.all, x)


def dense(array: Bool[AnyArray, "..."]) -> Mask:
    """Query ``i`` sees key ``j`` where ``array[b, n, i, j]``.

    Args:
      array: bool array broadcastable to ``[*B N T S]``.

    >>> print(dense(np.array([[1, 0, 1], [0, 1, 1]], bool)))
    █·█
    ·██
    """
    _bool_array("array", array, 0)
    return Dense(array)


class MaskFn(Mask):
    """Any function."""

    fn: Callable[..., Any]
    arrays: tuple[Any, ...]
    evaluate: bool

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.fn(b, n, q, k, *self.arrays)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        if not self.evaluate:
            return np.True_, np.False_

        def one(q0: Any, k0: Any) -> tuple[Any, Any]:
            q, k = q0 + np.arange(grid.block_q)[:, None], k0 + np.arange(grid.block_k)[None, :]
            inside = (q < grid.T) & (k < grid.S)
            seen = jnp.asarray(self.fn(b, n, q, k, *self.arrays))
            return jnp.any(seen & inside), jnp.all(seen | ~inside)

        def row(q0: Any) -> tuple[Any, Any]:
            return jax.lax.map(lambda k0: one(q0, k0), jnp.asarray(grid.k0[0]))

        some, every = jax.lax.map(row, jnp.asarray(grid.q0[:, 0]))
        return some, every


def mask_fn(fn: Callable[..., Any], *arrays: AnyArray, evaluate: bool = False) -> Mask:
    """Query ``q`` sees key ``k`` where ``fn(b, n, q, k, *arrays)``: the FlexAttention contract.

    Args:
      fn: takes int scalars ``b``, ``n`` and int arrays ``q [t, 1]``, ``k [1, s]``; returns a bool
        array that broadcasts to ``[t, s]``. Pass the same function object again to compile once.
      *arrays: what ``fn`` looks things up in; they may be traced.
      evaluate: evaluate ``fn`` once on all pairs, tile by tile, to find the blocks it leaves empty.
        Otherwise every block counts as partial.

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
    if not callable(fn):
        raise TypeError(f"fn must be a function of (b, n, q, k, *arrays), got {type(fn).__name__}")
    for x in arrays:
        if not is_array(x):
            raise TypeError(f"arrays must be JAX or NumPy arrays, got {type(x).__name__}")
    return MaskFn(fn, tuple(arrays), bool(evaluate))


# --- Checks of arguments.


def _int_at_least(name: str, x: Any, least: int) -> int:
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(x).__name__} {x!r}")
    if x < least:
        raise ValueError(f"{name} must be at least {least}, got {x}")
    return int(x)


def _int_array(name: str, x: Any, rank: int) -> None:
    if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.signedinteger):
        raise TypeError(f"{name} must be a signed integer array, got {_describe(x)}")
    if x.ndim < rank:
        raise ValueError(f"{name} must have at least {rank} axes, got shape {x.shape}")


def _bool_array(name: str, x: Any, rank: int) -> None:
    if not is_array(x) or x.dtype != np.bool_:
        raise TypeError(f"{name} must be a bool array (True = visible), got {_describe(x)}")
    if x.ndim < rank:
        raise ValueError(f"{name} must have at least {rank} axes, got shape {x.shape}")


def _describe(x: Any) -> str:
    return f"dtype {x.dtype}" if is_array(x) else type(x).__name__


def _per_example(name: str, x: Any) -> Any:
    """An int stays an int; an int array is data."""
    if isinstance(x, (int, np.integer)) and not isinstance(x, bool):
        return int(x)
    _int_array(name, x, 0)
    return x


def _align(align: str) -> str:
    if align not in ("start", "end"):
        raise ValueError(f'align must be "start" or "end", got {align!r}')
    return align
