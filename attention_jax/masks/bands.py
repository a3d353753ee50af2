"""Masks around a diagonal: causal, window, dilated."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import numpy as np

from attention_jax.core.axes import PerExample, Size, checked_align, int_at_least, per_example
from attention_jax.masks.base import Mask
from attention_jax.masks.grid import Grid
from attention_jax.masks.reach import UNBOUNDED, Reach


class Band(Mask):
    """``i - left <= j - offset <= i + right``; None means no bound on that side."""

    AXES = {"offset": "*B"}
    DEFAULTS = {"offset": 0, "align": "start"}
    BY_INTERVALS = True
    left: int | None
    right: int | None
    offset: Any  # an int, symbolic after align="end" of symbolic lengths; or an array
    align: str

    @property
    def public_name(self) -> str:
        return "masks.causal" if (self.left, self.right) == (None, 0) else "masks.window"

    def __repr__(self) -> str:
        text = super().__repr__()
        return (
            text.replace("left=None, right=0, ", "").replace("left=None, right=0", "")
            if (self.public_name == "masks.causal")
            else text
        )

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        if self.align == "start":
            return self
        return dataclasses.replace(self, offset=self.offset + (S - T), align="start")

    def resolve_in_sequence(self, N: int) -> Self:
        return dataclasses.replace(self, align="start")

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
        # The distances in a block go from lowest to highest: some lie in the band where the two
        # intervals overlap, all of them where both ends do.
        return self._within(lowest=highest, highest=lowest), self._within(lowest, highest)

    def reach(self) -> Reach:
        if isinstance(self.offset, jax.core.Tracer):
            return UNBOUNDED
        offset = np.asarray(self.offset)  # align="end" adds S - T, which is 0 in one sequence
        least, most = int(offset.min(initial=0)), int(offset.max(initial=0))
        if offset.ndim == 0:
            least = most = int(offset)
        ahead = 0 if self.right is not None and self.right + most <= 0 else None
        return Reach(ahead, None if self.left is None else max(self.left - least, 0))

    def _within(self, lowest: Any, highest: Any) -> Any:
        inside = (lowest == lowest) & (highest == highest)  # all True, of the right shape
        if self.left is not None:
            inside = inside & (lowest >= -self.left)
        if self.right is not None:
            inside = inside & (highest <= self.right)
        return inside


def causal(offset: PerExample = 0, *, align: str = "start") -> Mask:
    """Query ``i`` attends to key ``j`` where ``j <= i + offset``.

    Args:
      offset: an int, or an int array ``[*B]``. With 0 the mask is aligned top-left: the first
        query attends to the first key only. A new int recompiles, a new array does not.
      align: ``"end"`` adds ``S - T`` to the offset, which aligns the mask bottom-right: the last
        query attends up to the last key.

    >>> from attention_jax.masks import causal
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
    return Band(None, 0, per_example("offset", offset), checked_align(align))


def window(
    left: int | None, right: int | None, *, offset: PerExample = 0, align: str = "start"
) -> Mask:
    """Query ``i`` attends to key ``j`` where ``i - left <= j - offset <= i + right``.

    ``left`` and ``right`` do not count the query itself, as in ``jax.nn`` and FlashAttention: a
    Hugging Face ``sliding_window`` of ``W`` keys is ``window(W - 1, 0)``.

    Args:
      left, right: ints >= 0, or None for no bound on that side. They are constants of the program
        and cannot be traced. For widths that change at run time use ``mask_fn``, which skips no
        blocks.
      offset, align: as for ``causal``.

    >>> from attention_jax.masks import window
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
            int_at_least(name, x, 0)
    return Band(left, right, per_example("offset", offset), checked_align(align))


def dilated(stride: int) -> Mask:
    """Query ``i`` attends to key ``j`` where ``(i - j) % stride == 0``.

    >>> from attention_jax.masks import causal, dilated
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
    return Dilated(int_at_least("stride", stride, 1))


class Dilated(Mask):
    """Every ``stride``-th distance."""

    NAME = "masks.dilated"
    BY_INTERVALS = True
    stride: int

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return (q - k) % self.stride == 0

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        lowest, highest = grid.q0 - grid.k1, grid.q1 - grid.k0
        some = highest // self.stride * self.stride >= lowest
        return some, some & ((lowest == highest) | (self.stride == 1))
