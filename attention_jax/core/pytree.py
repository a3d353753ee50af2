"""``Value``, the base of masks and scores: composable frozen pytrees.

A ``Value`` is a frozen dataclass and a pytree. A field that holds an array is a leaf, which may be
traced, batched and differentiated. A field that holds anything else (an int, ``None``, a function)
is part of the tree structure: values with equal structure share a compilation.

Array fields declare their axes, in the letters of ``axes``::

    AXES = {"query_ids": "*B T", "key_ids": "*B S"}

By these the library selects the slice of an array for one head, one example and one tile: ``heads``
maps over ``B`` and ``N``, and tiles slice ``T`` and ``S``. So a formula is written once, for one
tile:

=============  =======================================
axes           what ``rule`` gets for ``t x s`` pairs
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

from attention_jax.core.axes import Size, Sizes, is_array, weights_hint, with_sizes

T_ = TypeVar("T_")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a value.

    Attributes:
      name: for messages.
      axes: its axis letters, without ``*``.
      broadcast: whether axes of size 1 broadcast.
      new_tokens: whether, with a cache, its axis ``T`` covers the new tokens only.
    """

    name: str
    axes: tuple[str, ...]
    broadcast: bool
    new_tokens: bool


@dataclass_transform(frozen_default=True, eq_default=False)
class Value:
    """Base of masks and scores: a frozen pytree whose arrays declare their axes.

    Attributes:
      AXES: the axes of each field that holds an array.
      BROADCAST: whether axes ``T``, ``S`` and ``N`` of these arrays may have size 1.
      NAME: what users call it, such as ``masks.lengths``; default the name of the class.
      ARGUMENTS: the constructor's arguments that fields come from, where the names differ.
      DEFAULTS: values of fields that ``repr`` leaves out.
      NEW_TOKENS: fields whose arrays, with a cache, cover only the new tokens along ``T``. Other
        arrays cover the whole sequence, and a cache selects the entries that it needs.
    """

    AXES: ClassVar[Mapping[str, str]] = {}
    BROADCAST: ClassVar[bool] = False
    NAME: ClassVar[str] = ""
    ARGUMENTS: ClassVar[Mapping[str, str]] = {}
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    NEW_TOKENS: ClassVar[frozenset[str]] = frozenset()

    _arrays: tuple[str, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "NAME" not in vars(cls):
            cls.NAME = cls.__name__
        # Mask and Score define rule only to raise NotImplementedError.
        defined = [base for base in cls.__mro__[1:] if "rule" in vars(base)]
        if "rule" in vars(cls) and len(defined) > 1:
            raise TypeError(
                f"{cls.__name__} must not change the rule of {defined[0].__name__}, by which "
                f"blocks are skipped and kernels are chosen: subclass Mask or Score, or combine "
                f"masks by &, | and ~"
            )
        # repr=False keeps our own __repr__, which also works for tracers.
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(cls.AXES.keys() - fields):
            raise TypeError(
                f"AXES of {cls.__name__} names {', '.join(unknown)}, which must be a field"
            )
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

        shown = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name, x = field.name, getattr(self, field.name)
            if is_array(x) or name not in self.DEFAULTS or x != self.DEFAULTS[name]:
                shown[self.ARGUMENTS.get(name, name)] = show(x)
        arguments = ", ".join(f"{name}={x}" for name, x in shown.items())
        return f"{self.public_name}({arguments})"

    @property
    def public_name(self) -> str:
        """What users call it, for messages."""
        return self.NAME

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        """This value with all fields that depend on ``T``, ``S`` or ``N`` set."""
        changes = {
            f.name: _map_values(lambda v: v.resolve(T, S, N), getattr(self, f.name))
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
        }
        return self._replaced(changes)

    def resolve_in_sequence(self, N: int) -> Self:
        """``resolve`` for a value that is evaluated at positions in a sequence of unknown length.

        Here ``align="end"`` means the same as ``align="start"``.

        Raises:
          NotImplementedError: the class has a ``resolve`` of its own and not this.
        """
        if type(self).resolve is not Value.resolve:
            raise NotImplementedError(
                f"{self.public_name} depends on T, S or N, and must define resolve_in_sequence(N) "
                f"to be used with query_positions, key_positions or a cache, where T and S are not "
                f"the sequence's length"
            )
        changes = {
            f.name: _map_values(lambda v: v.resolve_in_sequence(N), getattr(self, f.name))
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
        }
        return self._replaced(changes)

    def hoisted(self, dtype: Any, numbers: bool) -> Self:
        """This value with leaves in place of all that need not be constants of the program.

        These are the arrays that functions close over and, with ``numbers``, the Python numbers
        that no block map depends on, so that new ones do not compile again.

        Args:
          dtype: of the logits.
          numbers: whether to replace Python numbers.
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

        This is general but slow (a gather). Kernels slice the arrays instead.
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
    # Bypasses __init__, because JAX unflattens with placeholders that its checks would reject.
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
    return is_array(x) or isinstance(x, (Value, jax.ShapeDtypeStruct))


def _is_concrete(x: Any) -> bool:
    return is_array(x) and not isinstance(x, jax.core.Tracer)


def _map_values(fn: Callable[[Value], Value], x: Any) -> Any:
    """Applies ``fn`` to a value or to the values in a tuple; returns anything else unchanged."""
    if isinstance(x, Value):
        return fn(x)
    if isinstance(x, tuple) and any(isinstance(y, Value) for y in x):
        mapped = tuple(_map_values(fn, y) for y in x)
        return x if all(a is b for a, b in zip(mapped, x, strict=True)) else mapped
    return x


def children(value: Value) -> Iterator[Value]:
    """The values among the fields of a value, also in tuples.

    >>> from attention_jax import masks
    >>> from attention_jax.core.pytree import children
    >>> [type(child).__name__ for child in children(masks.causal() & masks.prefix(3))]
    ['Band', 'Prefix']
    """

    def inside(x: Any) -> Iterator[Value]:
        if isinstance(x, Value):
            yield x
        elif isinstance(x, tuple):
            for y in x:
                yield from inside(y)

    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        yield from inside(getattr(value, field.name))


def leaves(value: Any) -> list[Leaf]:
    """The arrays of a value, or of a tuple of values, in the order of ``jax.tree.leaves``.

    >>> import numpy as np
    >>> from attention_jax import masks
    >>> from attention_jax.core.pytree import leaves
    >>> [leaf.axes for leaf in leaves(masks.lengths(key=np.array([3, 5])))]
    [('B',)]
    """
    return list(_walk(value, Leaf("", (), False, False)))


def _walk(x: Any, about: Leaf) -> Iterator[Leaf]:
    if isinstance(x, tuple):
        for y in x:
            yield from _walk(y, about)
    elif isinstance(x, Value):
        for name in x._arrays:
            axes = tuple(a.lstrip("*") for a in x.AXES.get(name, "").split())
            label = f"{x.ARGUMENTS.get(name, name)} of {x.public_name}"
            leaf = Leaf(label, axes, x.BROADCAST, name in x.NEW_TOKENS)
            yield from _walk(getattr(x, name), leaf)
    elif x is not None:
        yield about


def map_leaves(fn: Callable[[Any, Leaf], Any], value: T_) -> T_:
    """``value`` with ``fn(array, leaf)`` in place of each array."""
    arrays, structure = jax.tree.flatten(value)
    mapped = [fn(x, leaf) for x, leaf in zip(arrays, leaves(value), strict=True)]
    return jax.tree.unflatten(structure, mapped)


def full_rank(value: T_, sizes: Sizes, argument: str) -> T_:
    """``value`` with every array checked, and with axes of size 1 for those that it lacks.

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
            layout = " ".join("*B" if a == "B" else a for a in leaf.axes)
            hint = weights_hint("array", x.shape, sizes) if layout == "*B N T S" else ""
            raise ValueError(
                f"{argument}: {leaf.name} has shape {tuple(x.shape)}, expected "
                f"{with_sizes(f'[{layout}]', sizes.of_letters())}{hint}"
            )
        if isinstance(x, jax.ShapeDtypeStruct):  # positions in a call of explain
            return jax.ShapeDtypeStruct(shape, x.dtype)
        x = jnp.reshape(x, shape)
        # Lengths and offsets are compared with positions, which are always int32.
        return x.astype(jnp.int32) if leaf.axes == ("B",) else x

    return map_leaves(complete, value)


class StaticArray:
    """A NumPy array as part of a tree structure, compared by its contents and hashed once."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.array(array, order="C")  # a copy, so that the hash stays valid
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
    """An array inside a kernel, where a rule can only look up entries: ``x[i]``, ``x[i, j]``.

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
    """``x`` as an array that traced integers can index; a NumPy array cannot be."""
    return x if isinstance(x, Lookup) else jnp.asarray(x)
