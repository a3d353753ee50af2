"""``Mask``: what all masks have in common, and how they combine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from attention_jax.core.axes import is_array
from attention_jax.core.pytree import Value
from attention_jax.masks.grid import Grid


class Mask(Value):
    """Which query may see which key. Subclasses give ``rule`` and, to skip blocks, ``block``."""

    # True where ``block`` is right for any intervals ``q0 .. q1``, ``k0 .. k1`` that hold the
    # positions of a block, also where those have gaps.
    BY_INTERVALS: ClassVar[bool] = True

    def mask(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        """True where query ``q`` of head ``n`` in example ``b`` sees key ``k``.

        Args:
          b, n: example (counted over the flattened ``*B``) and query head.
          q, k: positions; ints or integer arrays that broadcast.

        >>> from attention_jax.masks import causal
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

    # NumPy arrays on the left leave the operators to the mask, which says what to do.
    __array_ufunc__ = None

    def __bool__(self) -> bool:
        raise TypeError(
            "a mask has no truth value: combine masks by &, | and ~ in place of and, or and not"
        )

    def __and__(self, other: Mask) -> Mask:
        return And(self, _as_mask(other, "&"))

    def __rand__(self, other: Any) -> Mask:
        return And(_as_mask(other, "&"), self)

    def __ror__(self, other: Any) -> Mask:
        return Or(_as_mask(other, "|"), self)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _as_mask(other, "|"))

    def __invert__(self) -> Mask:
        return Not(self)

    def to_dense(
        self, T: int, S: int, *, B: int | None = None, N: int | None = None
    ) -> Bool[Array, "..."]:
        """The mask as a bool array ``[T S]``; with ``B`` and ``N`` given, ``[B N T S]``.

        >>> from attention_jax.masks import segments
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

    def natural_size(self) -> tuple[int | None, int | None]:
        """``T`` and ``S`` where the mask itself fixes them, as an array with such an axis does."""
        sizes: dict[str, int] = {}
        for name, axes in self.AXES.items():
            letters = axes.split()
            for letter in ("T", "S"):
                if letter in letters and is_array(x := getattr(self, name)):
                    sizes[letter] = x.shape[letters.index(letter) - len(letters)]
        return sizes.get("T"), sizes.get("S")

    def _drawn_size(self) -> tuple[int, int]:
        """Sizes to draw at: the natural ones, else enough for the largest int."""
        T = S = None
        largest = 3
        for part in parts(self):
            natural_T, natural_S = part.natural_size()
            T, S = T or natural_T, S or natural_S
            for x in vars(part).values():
                if isinstance(x, int) and not isinstance(x, bool):
                    largest = max(largest, abs(x))
        length = 8 if largest < 8 else 4 * largest
        return T or S or length, S or T or length


def parts(mask: Mask) -> Iterator[Mask]:
    """The mask, and all those it is made of."""
    yield mask
    for x in vars(mask).values():
        if isinstance(x, Mask):
            yield from parts(x)


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


def conjuncts(mask: Mask | None) -> Iterator[Mask]:
    """The masks that must all hold, those joined by ``&``; none where there is no mask."""
    if isinstance(mask, And):
        yield from conjuncts(mask.left)
        yield from conjuncts(mask.right)
    elif mask is not None:
        yield mask
