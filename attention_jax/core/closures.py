"""Turns arrays that functions of ``mask_fn`` and ``score_fn`` close over into arguments.

A function may close over arrays: tracers, parameters, tables. They must become operands of the
program; otherwise gradients and ``vmap`` miss them, and so does a second call with other values.
``hoist`` traces the function for one pair of query and key, and makes the arrays that its jaxpr
closes over arguments::

    fn(s, b, n, q, k)  ->  fn(s, b, n, q, k, *closed_over)

``jnp.vectorize`` then applies the jaxpr of one pair to a tile.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from attention_jax.core.axes import AnyArray, HasDtype, Shape, broadcasts_to, same_rank
from attention_jax.core.compat import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun, run_again, varies
from attention_jax.core.fingerprint import array_key, fingerprint

CUSTOM_JVP = "custom_jvp_call"
# Primitives that call another jaxpr.
CALLS = ("jit", CUSTOM_JVP)

# What a function may close over, or take as an argument.
ArrayOrScalar: TypeAlias = AnyArray | np.generic
# Floating arrays, and others.
Split: TypeAlias = tuple[tuple[ArrayLike, ...], tuple[ArrayLike, ...]]
A = TypeVar("A", bound=ArrayLike)
V = TypeVar("V")

# The tile for which functions and rules are traced; unequal lengths reveal swapped axes.
TILE = (16, 32)


def tile_arguments(dtypes: Sequence[DTypeLike]) -> list[jax.ShapeDtypeStruct]:
    """The arguments ``(s, b, n, q, k)`` of a rule on ``TILE``, or the last of them.

    Args:
      dtypes: one for each argument.
    """
    t, s = TILE
    shapes = [(t, s), (), (), (t, 1), (1, s)][-len(dtypes) :]
    return [jax.ShapeDtypeStruct(shape, d) for shape, d in zip(shapes, dtypes, strict=True)]


class Traced:
    """A function that has been traced; two are equal if they are the same program.

    It is part of a tree structure, which ``jit`` compares. So a lambda that each call creates anew
    compiles once, and a function that closes over a Python number compiles again when that changes.
    """

    def __init__(self, fn: Callable[..., Any], run: Callable[..., Any], *key: Hashable) -> None:
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self.closes_over = run is not fn  # whether hoisted arrays are its last arguments
        self._run = run
        self._key = (getattr(fn, "__code__", type(fn)), *key)

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Traced) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def hoist(
    fn: Callable[..., Any],
    arrays: tuple[ArrayOrScalar, ...],
    dtypes: Sequence[DTypeLike],
    name: str,
) -> tuple[Traced, tuple[ArrayOrScalar, ...]]:
    """``fn`` and ``arrays``, with the arrays that ``fn`` closes over added to the latter.

    Args:
      fn: ``fn(s, b, n, q, k, *arrays)``, or without ``s``.
      arrays: its arrays.
      dtypes: of ``(s, b, n, q, k)``, or of ``(b, n, q, k)``.
      name: of the function that made the mask or score, for messages.

    Raises:
      TypeError: ``fn`` closes over traced arrays and cannot be traced for a single pair; or it
        does not return one array.
    """
    if isinstance(fn, Traced):
        return fn, arrays
    _check_arguments(name, fn, len(dtypes), len(arrays))
    tile = tile_arguments(dtypes)
    # Without shardings, because a kernel gets whole arrays.
    kinds = [jax.ShapeDtypeStruct(x.shape, jax.typeof(x).dtype) for x in arrays]
    with conversions_explained(f"{name}: fn"):
        whole = _jaxpr(fn, (*tile, *kinds))
    if len(whole.out_avals) != 1:
        raise TypeError(
            f"{name}: fn must return one array, got {len(whole.out_avals)} (None counts as none)"
        )
    key = _key(fn, whole, (*tile, *kinds))
    if not whole.consts:
        return Traced(fn, fn, key), arrays
    try:
        pair = _jaxpr(fn, (*(jax.ShapeDtypeStruct((), d) for d in dtypes), *kinds))
        if pair.out_avals[0].shape:
            raise ValueError(f"it returns an array of shape {pair.out_avals[0].shape}")
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        if any(isinstance(x, jax.core.Tracer) for x in whole.consts):
            raise TypeError(
                f"{name}: fn closes over traced arrays and cannot be traced for a single pair, "
                f"with scalar q and k ({error}): pass these arrays as arguments, after the function"
            ) from error
        return Traced(fn, fn, key, *map(array_key, whole.consts)), arrays
    closed_over = tuple(x if isinstance(x, jax.Array) else np.asarray(x) for x in pair.consts)
    run = _over_tile(_pair(pair, (*arrays, *closed_over)), dtypes)
    return Traced(fn, run, key, fingerprint(pair.jaxpr)), (*arrays, *closed_over)


def apply(name: str, fn: Callable[..., Any], indices: Sequence[Any], arrays: Sequence[Any]) -> Any:
    """``fn(*indices, *arrays)``, with errors that say how to write such a function.

    Args:
      name: of the function that made the mask or score, for messages.
      fn: as it was given, or as ``hoist`` returns it.
      indices: ``(s, b, n, q, k)`` or ``(b, n, q, k)``.
      arrays: its arrays.
    """
    if not isinstance(fn, Traced):
        _check_arguments(name, fn, len(indices), len(arrays))
    with conversions_explained(f"{name}: fn"):
        return fn(*indices, *arrays)


# Messages of NumPy and JAX when Python needs the value of an array, for errors without a class of
# their own.
_NEEDS_A_VALUE = (
    "truth value of an array",
    "only scalar arrays can be converted",
    "only integer scalar arrays can be converted",
)


@contextlib.contextmanager
def conversions_explained(name: str) -> Iterator[None]:
    """Explains the errors of a user's function that treats an array as a Python value.

    Args:
      name: of the function, for the message.

    Raises:
      TypeError: an array is used in ``if``, ``and``, ``max`` or ``range``, or by NumPy.

    >>> import jax.numpy as jnp
    >>> from attention_jax.core.closures import conversions_explained
    >>> with conversions_explained("mask_fn: fn"):
    ...     jnp.arange(3) > 1 and True  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    TypeError: mask_fn: fn is traced by JAX, ... write & | ~ for and, or, not, ...
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        tracers = jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError
        known = isinstance(error, (*tracers, jax.errors.TracerIntegerConversionError))
        if not known and not any(x in str(error).lower() for x in _NEEDS_A_VALUE):
            raise
        raise TypeError(
            f"{name} is traced by JAX, so its arrays have no Python values: write & | ~ for and, "
            f"or, not, jnp.where for if, and jnp functions in place of Python's and NumPy's, such "
            f"as jnp.maximum for max"
        ) from error


def uses_arguments(fn: Callable[..., Any], *arguments: ArrayLike) -> bool:
    """Whether the result of a function may depend on its arguments, found by tracing it.

    >>> from attention_jax.core.closures import uses_arguments
    >>> uses_arguments(lambda b, n: b + 1, 0, 0), uses_arguments(lambda b, n: 1, 0, 0)
    (True, False)
    """
    jaxpr = _jaxpr(lambda *args: jnp.asarray(fn(*args)), arguments).jaxpr
    used = [x for e in jaxpr.eqns for x in e.invars] + list(jaxpr.outvars)
    return any(x is argument for x in used for argument in jaxpr.invars)


def _jaxpr(
    fn: Callable[..., Any], arguments: Sequence[ArrayLike | jax.ShapeDtypeStruct]
) -> ClosedJaxpr:
    # A new function each time, because JAX caches traces by function, even if the values that it
    # closes over have changed.
    return jax.make_jaxpr(lambda *args: fn(*args))(*arguments)


def _key(
    fn: Callable[..., Any], traced: ClosedJaxpr, arguments: Sequence[jax.ShapeDtypeStruct]
) -> Hashable:
    """The fingerprint of a program and, if it has custom derivative rules, that of its gradient.

    Each trace creates new functions for such rules, so only their programs can be compared.
    """
    program = fingerprint(traced.jaxpr)
    if not any(_rules(traced.jaxpr)) or not _is_float(traced.out_avals[0]):
        return program
    floating = [i for i, x in enumerate(arguments) if _is_float(x)]

    def gradient(cotangent: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
        def of_floats(*floats: jax.Array) -> jax.Array:
            given = list(args)
            for i, x in zip(floating, floats, strict=True):
                given[i] = x
            return fn(*given)

        return jax.vjp(of_floats, *(args[i] for i in floating))[1](cotangent)

    shape, dtype = traced.out_avals[0].shape, traced.out_avals[0].dtype
    return program, fingerprint(
        _jaxpr(gradient, (jax.ShapeDtypeStruct(shape, dtype), *arguments)).jaxpr
    )


def _check_arguments(name: str, fn: Callable[..., Any], indices: int, arrays: int) -> None:
    """Raises if a function cannot take this number of indices and arrays."""
    letters, count = ", ".join(("s", "b", "n", "q", "k")[-indices:]), indices + arrays
    try:
        signature = inspect.signature(fn)
    except ValueError:  # a function written in C may have none
        return
    try:
        signature.bind(*(None,) * count)
    except TypeError as error:
        raise TypeError(
            f"{name}: fn is called as fn({letters}, *arrays), with {count} arguments here, and "
            f"takes {signature}: {error}"
        ) from None


def _over_tile(
    pair: Callable[..., ArrayLike], dtypes: Sequence[DTypeLike]
) -> Callable[..., jax.Array]:
    """Applies a function of one pair to a tile."""

    def run(*args: ArrayLike) -> jax.Array:
        indices, arrays = args[: len(dtypes)], args[len(dtypes) :]
        indices = same_rank(*(jnp.asarray(x, d) for x, d in zip(indices, dtypes, strict=True)))
        return jnp.vectorize(lambda *xs: pair(*xs, *arrays))(*indices)

    return run


def _pair(traced: ClosedJaxpr, arrays: tuple[ArrayOrScalar, ...]) -> Callable[..., ArrayLike]:
    """The traced program as a function of indices, arrays and the arrays it closes over.

    JAX traces rules of ``jax.custom_jvp`` late, with the types of the first trace, which differ
    from those inside ``shard_map``. There, a derivative that is traced here replaces them. (Not for
    a program that also has rules of ``jax.custom_vjp``, which has no forward-mode derivative.)
    """
    jaxpr = traced.jaxpr
    count = len(jaxpr.invars)
    kinds = [_is_float(x.aval) for x in (*jaxpr.invars, *jaxpr.constvars)]

    def pair(*operands: ArrayLike) -> ArrayLike:
        return _evaluate(jaxpr, operands)[0]

    rules = set(_rules(jaxpr))
    if CUSTOM_JVP not in rules or len(rules) > 1 or not _is_float(traced.out_avals[0]):
        return pair

    def split(operands: Sequence[V]) -> tuple[tuple[V, ...], tuple[V, ...]]:
        both = list(zip(operands, kinds, strict=True))
        return tuple(x for x, kind in both if kind), tuple(x for x, kind in both if not kind)

    def join(floats: Sequence[V], others: Sequence[V]) -> list[V]:
        each = {True: iter(floats), False: iter(others)}
        return [next(each[kind]) for kind in kinds]

    def along(
        floats: tuple[ArrayLike, ...], dots: tuple[ArrayLike, ...], others: tuple[ArrayLike, ...]
    ) -> jax.Array:
        def program(*floats: ArrayLike) -> jax.Array:
            operands = join(floats, others)
            return jaxpr_as_fun(ClosedJaxpr(jaxpr, operands[count:]))(*operands[:count])[0]

        return jax.jvp(program, floats, dots)[1]

    indices = jaxpr.invars[: len(kinds) - len(arrays)]
    scalars = [jax.ShapeDtypeStruct((), x.aval.dtype) for x in indices]
    floats, others = split([*scalars, *arrays])
    derivative = jax.make_jaxpr(along)(floats, floats, others)

    @jax.custom_jvp
    def with_rule(floats: tuple[ArrayLike, ...], others: tuple[ArrayLike, ...]) -> ArrayLike:
        return _evaluate(jaxpr, join(floats, others), inline=CALLS)[0]

    @with_rule.defjvp
    def _(primals: Split, tangents: Split) -> tuple[ArrayLike, ArrayLike]:
        (floats, others), (dots, _) = primals, tangents
        out = with_rule(floats, others)
        (dot,) = _evaluate(derivative.jaxpr, (*floats, *dots, *others, *derivative.consts))
        out, dot = varying_together((out, dot))
        return out, dot

    def run(*operands: ArrayLike) -> ArrayLike:
        inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
        return with_rule(*split(operands)) if inside else pair(*operands)

    return run


def _is_float(aval: HasDtype) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _rules(jaxpr: Jaxpr) -> Iterator[str]:
    """The primitives by which a program calls functions with custom derivatives."""
    for e in jaxpr.eqns:
        if "call_jaxpr" in e.params:
            yield e.primitive.name
        elif e.primitive.name == "jit":
            yield from _rules(e.params["jaxpr"].jaxpr)


def _evaluate(
    jaxpr: Jaxpr, operands: Sequence[ArrayLike], inline: tuple[str, ...] = ("jit",)
) -> list[ArrayLike]:
    """Evaluates a program, operation by operation.

    ``jaxpr_as_fun`` would run each operation under the mesh of its trace, but inside ``shard_map``
    the axes of that mesh are manual.

    Args:
      operands: the inputs, then the constants.
      inline: primitives whose programs are evaluated here too.
    """
    values = dict(zip((*jaxpr.invars, *jaxpr.constvars), operands, strict=True))

    def read(x: Any) -> ArrayLike:
        return x.val if isinstance(x, Literal) else values[x]

    for e in jaxpr.eqns:
        inputs, params = varying_together([read(x) for x in e.invars]), dict(e.params)
        call = next((name for name in ("jaxpr", "call_jaxpr") if name in params), "")
        program = params.get(call)

        def inner(*xs: ArrayLike, program: Any = program) -> list[ArrayLike]:
            return _evaluate(program.jaxpr, (*xs, *program.consts), inline)

        if e.primitive.name in inline:
            outputs = inner(*inputs)
        else:
            if call == "call_jaxpr":
                params[call] = jax.make_jaxpr(inner)(*inputs)
            outputs = run_again(e.primitive, inputs, params)
        values |= zip(e.outvars, outputs, strict=True)
    return [read(x) for x in jaxpr.outvars]


def varying_together(arrays: Iterable[A]) -> list[A]:
    """``arrays``, each cast to vary along all mesh axes along which some of them vary.

    ``shard_map`` tracks in the type of an array the mesh axes along which it varies. Functions of
    ``jax.numpy`` cast their arguments, primitives do not. The transpose of the cast sums over these
    axes, as the gradient of a replicated array requires.
    """
    arrays = list(arrays)
    varying = [varies(jax.typeof(x)) for x in arrays]
    every = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(every - axes)), to="varying") if every - axes else x
        for x, axes in zip(arrays, varying, strict=True)
    ]


def of_tile(name: str, x: Any, shape: Shape, dtype: DTypeLike) -> AnyArray:
    """The result of a function, broadcast and cast to the shape and dtype of a tile.

    Raises:
      TypeError: numbers in place of bools, or the reverse.
      ValueError: it does not broadcast to the tile.
    """
    xp = jnp if isinstance(x, jax.Array) else np  # a NumPy array stays a static value
    x, dtype = xp.asarray(x), jnp.dtype(dtype)
    is_bool = x.dtype == jnp.bool_
    if is_bool != (dtype == jnp.bool_) or jnp.issubdtype(x.dtype, jnp.complexfloating):
        expected = "bools, True where visible" if dtype == jnp.bool_ else "real logits"
        raise TypeError(f"{name}: fn must return {expected}, got dtype {x.dtype}")
    if x.shape == shape:
        return x.astype(dtype)
    if not broadcasts_to(x.shape, shape):
        raise ValueError(
            f"{name}: fn must return an array that broadcasts to the tile {list(shape)} [t s], got "
            f"shape {list(x.shape)}"
        )
    return xp.broadcast_to(x.astype(dtype), shape)
