"""Frozen values that compose: what masks and scores have in common.

A ``Value`` is a frozen dataclass and a pytree. A field that holds an array is
a leaf: it may be traced, batched and differentiated. A field that holds
anything else (an int, ``None``, a function) is part of the tree's structure:
two values with equal structure share one compilation.

Array fields say what their axes are, in the letters of ``axes``::

    AXES = {"query_ids": "*B T", "key_ids": "*B S"}

That one line is all the rest of the library needs to cut the part of an array
that one head, one example and one block can see (``lift`` strips ``B`` and
``N``; the blocks cut ``T`` and ``S``), so a formula is written once, for one
tile:

=============  =======================================
axes           what ``rule`` sees for ``t x s`` pairs
=============  =======================================
``*B``, ``N``  a scalar
``*B T``       ``[t, 1]``
``*B S``       ``[1, s]``
``*B N T S``   ``[t, s]``
anything else  the array with its other axes, whole
=============  =======================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.core.axes import Size, Sizes, is_array

T_ = TypeVar("T_")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a value: its name for messages, its axes, whether axes of size 1 broadcast."""

    name: str
    axes: tuple[str, ...]
    broadcast: bool


@dataclass_transform(frozen_default=True, eq_default=False)
class Value:
    """Base of masks and scores: a frozen pytree whose arrays declare their axes."""

    AXES: ClassVar[Mapping[str, str]] = {}
    # Arrays whose T, S and N axes may have size 1 (bias, dense masks).
    BROADCAST: ClassVar[bool] = False

    _arrays: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # repr=False: a mask draws itself, and pytest must be able to print a tracer's.
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, _unflattener(cls))

    def __post_init__(self) -> None:
        names = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        object.__setattr__(
            self, "_arrays", tuple(n for n in names if _is_dynamic(getattr(self, n)))
        )

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        mine, structure = jax.tree.flatten(self)
        theirs, other_structure = jax.tree.flatten(other)
        return structure == other_structure and all(  # type: ignore[operator]
            a is b or (_is_concrete(a) and _is_concrete(b) and np.array_equal(a, b))
            for a, b in zip(mine, theirs, strict=True)
        )

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self))

    def __repr__(self) -> str:
        def show(x: Any) -> str:
            if not is_array(x):
                return getattr(x, "__name__", None) or repr(x)
            concrete = _is_concrete(x) and x.size <= 8
            return str(np.asarray(x).tolist()) if concrete else f"{x.dtype}{list(x.shape)}"

        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        arguments = ", ".join(f"{f.name}={show(getattr(self, f.name))}" for f in fields)
        return f"{type(self).__name__}({arguments})"

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        """This value with everything that waits for ``T``, ``S`` or ``N`` filled in."""
        changes = {
            f.name: _map_values(lambda v: v.resolve(T, S, N), getattr(self, f.name))
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
        }
        return self._replaced(changes)

    def hoisted(self, dtype: Any, numbers: bool) -> Self:
        """This value with arrays in place of what need not be part of the program.

        That is what functions close over, and with ``numbers`` the Python numbers that no table of
        blocks depends on: another value of theirs is not compiled again.

        Args:
          dtype: of the logits.
          numbers: False leaves numbers as they are.
        """
        changes = {
            f.name: _map_values(lambda v: v.hoisted(dtype, numbers), getattr(self, f.name))
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
        }
        return self._replaced(changes)

    def _replaced(self, changes: dict[str, Any]) -> Self:
        if all(changes[name] is getattr(self, name) for name in changes):
            return self
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def at(self, b: Any, n: Any, q: Any, k: Any) -> Self:
        """This value with its arrays looked up at batch ``b``, head ``n``, query ``q``, key ``k``.

        The general, slow way (a gather). Inside a kernel the same parts are cut as slices.
        """
        index = {"B": b, "N": n, "T": q, "S": k}

        def look_up(x: Any, leaf: Leaf) -> Any:
            if not set(leaf.axes) & index.keys():
                return x
            axes = [a for a in leaf.axes if a != "B"]
            x = jnp.asarray(x)
            if "B" in leaf.axes and x.ndim > len(axes):  # one number counts the examples of *B
                batch = x.shape[: x.ndim - len(axes)]
                x, axes = x.reshape(math.prod(batch), *x.shape[len(batch) :]), ["B", *axes]
            axes = axes[len(axes) - x.ndim :]

            def where(a: str, size: int) -> Any:
                i = index.get(a, slice(None))
                return i * 0 if size == 1 and not isinstance(i, slice) else i

            return x[tuple(where(a, size) for a, size in zip(axes, x.shape, strict=True))]

        return map_leaves(look_up, self)


def _flatten_with_keys(value: Any) -> tuple[tuple[tuple[Any, Any], ...], Any]:
    children = tuple((jax.tree_util.GetAttrKey(n), getattr(value, n)) for n in value._arrays)
    static = tuple(
        (f.name, getattr(value, f.name))
        for f in dataclasses.fields(value)
        if f.name not in value._arrays
    )
    return children, (value._arrays, static)


def _unflattener(cls: type[T_]) -> Callable[[Any, Any], T_]:
    # Not through __init__: jax unflattens with placeholders that no check would accept.
    def unflatten(aux: Any, children: Any) -> T_:
        arrays, static = aux
        value = object.__new__(cls)
        for name, x in (*zip(arrays, children, strict=True), *static):
            object.__setattr__(value, name, x)
        object.__setattr__(value, "_arrays", arrays)
        return value

    return unflatten


def _is_dynamic(x: Any) -> bool:
    if isinstance(x, tuple):
        return any(_is_dynamic(y) for y in x)
    return is_array(x) or isinstance(x, Value)


def _is_concrete(x: Any) -> bool:
    return is_array(x) and not isinstance(x, jax.core.Tracer)


def _map_values(fn: Callable[[Value], Value], x: Any) -> Any:
    """``fn`` on a Value or a tuple that holds some; anything else, or unchanged, as it is."""
    if isinstance(x, Value):
        return fn(x)
    if isinstance(x, tuple) and any(isinstance(y, Value) for y in x):
        mapped = tuple(_map_values(fn, y) for y in x)
        return x if all(a is b for a, b in zip(mapped, x, strict=True)) else mapped
    return x


def leaves(value: Any) -> list[Leaf]:
    """The arrays of a value, or of a tuple of values, in the order of ``jax.tree.leaves``.

    >>> from attention_jax import masks
    >>> [leaf.axes for leaf in leaves(masks.lengths(key=np.array([3, 5])))]
    [('B',)]
    """
    return list(_walk(value, Leaf("", (), False)))


def _walk(x: Any, about: Leaf) -> Iterator[Leaf]:
    if isinstance(x, tuple):
        for y in x:
            yield from _walk(y, about)
    elif isinstance(x, Value):
        for name in x._arrays:
            axes = tuple(a.lstrip("*") for a in x.AXES.get(name, "").split())
            label = f"{name} of {type(x).__name__.lower()}"
            yield from _walk(getattr(x, name), Leaf(label, axes, x.BROADCAST))
    elif x is not None:
        yield about


def map_leaves(fn: Callable[[Any, Leaf], Any], value: T_) -> T_:
    """``value`` with ``fn(array, leaf)`` in place of each array."""
    arrays, structure = jax.tree.flatten(value)
    mapped = [fn(x, leaf) for x, leaf in zip(arrays, leaves(value), strict=True)]
    return jax.tree.unflatten(structure, mapped)


def full_rank(value: T_, sizes: Sizes, argument: str) -> T_:
    """``value`` with every array checked, and axes of size 1 put where it has none.

    Raises:
      ValueError: an array whose shape does not fit the call's sizes.
    """

    def complete(x: Any, leaf: Leaf) -> Any:
        if not leaf.axes:
            return x
        expected: list[int | None] = []
        for a in leaf.axes:
            expected += sizes.B if a == "B" else [getattr(sizes, a, None)]
        shape = (1,) * (len(expected) - x.ndim) + tuple(x.shape)
        may_broadcast = [leaf.broadcast or a in ("B", "N") for a in leaf.axes]
        may_broadcast = [True] * (len(expected) - len(may_broadcast)) + may_broadcast
        if "B" in leaf.axes and not sizes.B:
            may_broadcast = [leaf.broadcast or a == "N" for a in leaf.axes if a != "B"]
        fits = len(shape) == len(expected) and all(
            e is None or s == e or (s == 1 and ok)
            for s, e, ok in zip(shape, expected, may_broadcast, strict=True)
        )
        if not fits:
            letters = " ".join("*B" if a == "B" else a for a in leaf.axes)
            want = tuple("any" if e is None else e for e in expected)
            raise ValueError(
                f"{argument}: {leaf.name} has shape {tuple(x.shape)}, expected [{letters}] = "
                f"({', '.join(map(str, want))})"
            )
        x = jnp.reshape(x, shape)
        # Counts and offsets are compared with positions, which are int32 throughout.
        return x.astype(jnp.int32) if leaf.axes == ("B",) else x

    return map_leaves(complete, value)


class StaticArray:
    """A NumPy array that may stand in a tree's structure: compared by its bytes, hashed once."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.array(array, order="C")  # a copy: it must not change any more
        self.array.setflags(write=False)
        digest = hashlib.sha256(self.array.tobytes()).digest()
        self._key = (self.array.shape, str(self.array.dtype), digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticArray) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"{self.array.dtype}{list(self.array.shape)}"


class Lookup:
    """An array inside a kernel, of which a rule can only look up entries: ``x[i]``, ``x[i, j]``.

    Indices are ints or integer arrays that broadcast, as many as there are axes; as in JAX, they
    are clipped to the array and negative ones count from its end.
    """

    def __init__(self, entry: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> None:
        self._entry, self.shape, self.dtype = entry, shape, dtype

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        integers = all(
            (is_array(i) or type(i) is int) and jnp.issubdtype(jnp.result_type(i), jnp.integer)
            for i in index
        )
        if not integers or len(index) != len(self.shape):
            raise NotImplementedError(
                f"an array of shape {self.shape} can only be indexed by {len(self.shape)} integers "
                f"or integer arrays inside a kernel"
            )
        where = []
        for i, n in zip(index, self.shape, strict=True):
            i = jnp.asarray(i, jnp.int32)
            where.append(
                jnp.clip(jnp.where(i < 0, i + np.int32(n), i), np.int32(0), np.int32(n - 1))
            )
        return self._entry(*where)


def indexable(x: Any) -> Any:
    """An array that can be indexed by what is being traced, as a NumPy array cannot."""
    return x if isinstance(x, Lookup) else jnp.asarray(x)
