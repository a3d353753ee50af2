"""Masks around a diagonal: causal, window, dilated."""

from __future__ import annotations

from typing import Any, Self

from attention_jax.core.axes import PerExample, Size, checked_align, int_at_least, per_example
from attention_jax.masks.base import Mask
from attention_jax.masks.grid import Grid


class Band(Mask):
    """``i - left <= j - offset <= i + right``; None is unbounded on that side."""

    AXES = {"offset": "*B"}
    left: int | None
    right: int | None
    offset: Any  # an int, symbolic after align="end" of symbolic lengths; or an array
    align: str

    def resolve(self, T: Size, S: Size, N: int) -> Self:
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
        Another int compiles again, another array does not.
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
    return Band(None, 0, per_example("offset", offset), checked_align(align))


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
            int_at_least(name, x, 0)
    return Band(left, right, per_example("offset", offset), checked_align(align))


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
    return Dilated(int_at_least("stride", stride, 1))


class Dilated(Mask):
    """Every ``stride``-th distance."""

    stride: int

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return (q - k) % self.stride == 0

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        lowest, highest = grid.q0 - grid.k1, grid.q1 - grid.k0
        some = highest // self.stride * self.stride >= lowest
        return some, some & ((lowest == highest) | (self.stride == 1))
