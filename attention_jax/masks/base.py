"""``Mask``, the base class of masks, and the operators that combine masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from attention_jax.core.axes import int_at_least, is_array, kind
from attention_jax.core.closures import conversions_explained
from attention_jax.core.pytree import Value, children
from attention_jax.masks.grid import Grid
from attention_jax.masks.reach import UNBOUNDED, Reach


class Mask(Value):
    """The keys that each query may attend to.

    **Writing your own.** Subclass ``Mask``, annotate the fields, and define ``rule``, which returns
    True for the visible pairs of a tile of ``t x s``. The other declarations have safe but slower
    defaults:

    - ``AXES``: the axes of each field that holds an array. They determine the shape in which
      ``rule`` gets it: a scalar for ``"N"``, ``[t, 1]`` for ``"*B T"``, ``[1, s]`` for ``"*B S"``,
      ``[t, s]`` for ``"*B N T S"`` (see ``core.pytree``). An array that declares no axes is passed
      whole to every tile. With ``BROADCAST = True`` axes ``T``, ``S`` and ``N`` may have size 1.
    - ``block``: which blocks are certainly empty, and skipped, or certainly full. By default every
      block is partial.
    - ``BY_INTERVALS = True`` if ``block`` uses only the bounds ``grid.q0 .. grid.k1`` and
      ``grid.over_*``, and is still correct if not every position between these bounds occurs. By
      default every block is partial with ``query_positions`` or ``key_positions``, and in a cache.
    - ``reach``: how far queries look ahead and back. By default nothing is known, and a cache
      refuses the mask unless it is combined, by ``&``, with ``causal()`` or a ``window``.
    - ``natural_size``: the ``T`` and ``S`` that the mask is made for.
    - ``resolve`` and ``resolve_in_sequence``, for fields that depend on ``T``, ``S`` or ``N``.

    ``rule`` cannot be overridden in a further subclass, because ``block`` and kernels rely on the
    class. GPU kernels accept every mask whose ``rule`` is elementwise arithmetic; ``explain`` says
    which masks they do not accept, and why.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from attention_jax import attention, masks
    >>> from attention_jax.masks import Mask, Reach
    >>> class Delayed(Mask):
    ...     '''Keys that are at least ``gap`` positions before the query.'''
    ...     BY_INTERVALS = True
    ...     gap: int
    ...     def rule(self, b, n, q, k):
    ...         return k + self.gap <= q
    ...     def block(self, grid, b, n):
    ...         return grid.k0 + self.gap <= grid.q1, grid.k1 + self.gap <= grid.q0
    ...     def reach(self):
    ...         return Reach(ahead=0, back=None)
    >>> mask = Delayed(2) | masks.window(0, 0)
    >>> print(mask)
    █·······
    ·█······
    █·█·····
    ██·█····
    ███·█···
    ████·█··
    █████·█·
    ██████·█
    >>> x = np.random.default_rng(0).normal(size=(300, 2, 8)).astype(np.float32)  # T N H
    >>> out = attention(x, x, x, mask=mask, implementation="blockwise")
    >>> np.allclose(out, attention(x, x, x, mask=mask.to_dense(300, 300)), atol=1e-6)
    True
    """

    BY_INTERVALS: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "block" in vars(cls) and "BY_INTERVALS" not in vars(cls):
            cls.BY_INTERVALS = False  # what a base class declares is about its own block
        if "rule" in vars(cls):
            cls.rule = _returning_bools(cls.__name__, cls.rule)  # type: ignore[method-assign]

    def mask(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        """True where query ``q`` of head ``n`` in example ``b`` may attend to key ``k``.

        Args:
          b, n: example (counted over the flattened ``*B``) and query head.
          q, k: positions; ints or integer arrays that broadcast.

        >>> import numpy as np
        >>> from attention_jax.masks import causal
        >>> causal().mask(0, 0, np.arange(3)[:, None], np.arange(3)[None, :]).astype(int)
        array([[1, 0, 0],
               [1, 1, 0],
               [1, 1, 1]])
        """
        return self.at(b, n, q, k).rule(b, n, q, k)

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        """True where visible, on one tile; the arrays of the mask are already cut to it."""
        raise NotImplementedError(f"{type(self).__name__} must define rule(b, n, q, k)")

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        """``(some, every)`` for each block: may a pair be visible, are all pairs certainly visible.

        Both broadcast to ``[rows, columns]`` of the grid. They are bounds: ``some`` may be True for
        an empty block and ``every`` False for a full one, never the reverse.

        Args:
          grid: the blocks.
          b, n: example and query head. The arrays of the mask are already cut to them.
        """
        return np.True_, np.False_

    def reach(self) -> Reach:
        """How far queries look ahead and back, for any contents of the mask's arrays.

        >>> from attention_jax.masks import causal, chunked, prefix, window
        >>> (prefix(3) | causal()).reach(), (chunked(4) & window(2, None)).reach()
        (Reach(ahead=3, back=None), Reach(ahead=None, back=2))
        """
        return UNBOUNDED

    def natural_size(self) -> tuple[int | None, int | None]:
        """The ``T`` and ``S`` that the mask is made for, apart from those of arrays in ``AXES``."""
        return None, None

    # With this, an operator with a NumPy array on the left calls ours, which raises a clear error.
    __array_ufunc__ = None

    def __bool__(self) -> bool:
        raise TypeError(
            "a mask has no truth value: combine masks with &, | and ~ instead of and, or and not"
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

        >>> import numpy as np
        >>> from attention_jax.masks import segments
        >>> segments(np.array([0, 0, 1])).to_dense(3, 3).astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
        """
        T, S = int_at_least("T", T, 0), int_at_least("S", S, 0)
        mask = self.resolve(T, S, N or 1)
        # Not jitted: JAX caches traces by function, even if what it closes over has changed.
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
        """A picture of example 0, head 0: ``█`` visible, ``▒`` partly, ``·`` masked."""
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
        """The size to draw: the natural one, else large enough to show the largest int."""
        T = S = None
        largest = 3
        for part in parts(self):
            sizes = _array_sizes(part)
            natural_T, natural_S = part.natural_size()
            T, S = T or sizes.get("T") or natural_T, S or sizes.get("S") or natural_S
            for x in vars(part).values():
                if isinstance(x, int) and not isinstance(x, bool):
                    largest = max(largest, abs(x))
        length = 8 if largest < 8 else 4 * largest
        return T or S or length, S or T or length


def _array_sizes(mask: Mask) -> dict[str, int]:
    """``T`` and ``S`` of the mask's own arrays that have such axes."""
    sizes: dict[str, int] = {}
    for name, axes in mask.AXES.items():
        letters = axes.split()
        for letter in ("T", "S"):
            if letter in letters and is_array(x := getattr(mask, name)):
                sizes[letter] = x.shape[letters.index(letter) - len(letters)]
    return sizes


def parts(mask: Mask) -> Iterator[Mask]:
    """The mask and all masks that it is composed of."""
    yield mask
    for child in children(mask):
        if isinstance(child, Mask):
            yield from parts(child)


def _as_mask(x: Any, operator: str) -> Mask:
    if isinstance(x, Mask):
        return x
    hint = "wrap a bool array in masks.dense(array), a function in masks.mask_fn(fn)"
    if callable(x) and getattr(x, "__module__", "").startswith("attention_jax.masks"):
        hint = f"call masks.{x.__name__}(...)"
    raise TypeError(
        f"a mask can be combined by {operator} with another mask, got {kind(x)}: {hint}"
    )


# --- Combinations: three-valued logic over (some, every).


def _returning_bools(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    """``rule`` with a check that it returns bools, since ``&`` and ``~`` of ints are bitwise."""

    @functools.wraps(rule)
    def checked(self: Mask, b: Any, n: Any, q: Any, k: Any) -> Any:
        with conversions_explained(f"the rule of {name}"):
            visible = rule(self, b, n, q, k)
        if not (isinstance(visible, bool) or (is_array(visible) and visible.dtype == np.bool_)):
            got = f"dtype {visible.dtype}" if is_array(visible) else type(visible).__name__
            raise TypeError(f"the rule of {name} must return bools, True where visible, got {got}")
        return visible

    return checked


class And(Mask):
    """Pairs that are visible under both masks."""

    NAME = "a mask of masks joined by &"
    BY_INTERVALS = True
    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return f"{_in_parentheses(self.left)} & {_in_parentheses(self.right)}"

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.left.rule(b, n, q, k) & self.right.rule(b, n, q, k)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        (some, every), (some2, every2) = self.left.block(grid, b, n), self.right.block(grid, b, n)
        return some & some2, every & every2

    def reach(self) -> Reach:
        return self.left.reach() & self.right.reach()


class Or(Mask):
    """Pairs that are visible under at least one of the masks."""

    NAME = "a mask of masks joined by |"
    BY_INTERVALS = True
    left: Mask
    right: Mask

    def __repr__(self) -> str:
        return f"{self.left!r} | {self.right!r}"  # & binds more strongly

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.left.rule(b, n, q, k) | self.right.rule(b, n, q, k)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        (some, every), (some2, every2) = self.left.block(grid, b, n), self.right.block(grid, b, n)
        return some | some2, every | every2

    def reach(self) -> Reach:
        return self.left.reach() | self.right.reach()


class Not(Mask):
    """Pairs that are not visible under the other mask."""

    NAME = "an inverted mask"
    BY_INTERVALS = True
    mask_: Mask

    def __repr__(self) -> str:
        inner = self.mask_
        return f"~({inner!r})" if isinstance(inner, (And, Or)) else f"~{inner!r}"

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return ~jnp.asarray(self.mask_.rule(b, n, q, k))

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        some, every = (_as_array(x) for x in self.mask_.block(grid, b, n))
        return ~every, ~some


def _in_parentheses(mask: Mask) -> str:
    return f"({mask!r})" if isinstance(mask, Or) else repr(mask)


def _as_array(x: Any) -> Any:
    """``x`` as an array: a custom ``block`` may return a Python bool, and ``~True`` is -2."""
    return x if isinstance(x, jax.Array) else np.asarray(x)


def conjuncts(mask: Mask | None) -> Iterator[Mask]:
    """The masks joined by ``&``; none for None."""
    if isinstance(mask, And):
        yield from conjuncts(mask.left)
        yield from conjuncts(mask.right)
    elif mask is not None:
        yield mask
