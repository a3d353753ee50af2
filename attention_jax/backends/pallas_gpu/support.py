"""Which masks and scores a kernel can compute: those whose rule is elementwise arithmetic.

A kernel runs the ``rule`` of a mask or score on one tile. Every rule, built-in or not, is traced
once on a tile, and refused with its name if it uses an operation that a kernel does not support.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.core.closures import CALLS, TILE, Traced, tile_arguments
from attention_jax.core.compat import Jaxpr
from attention_jax.core.pytree import Leaf, Lookup, StaticArray, Value, children, leaves
from attention_jax.masks import Mask, MaskFn
from attention_jax.scores import Score, ScoreFn

# Elementwise operations, and those that broadcast and reshape.
POINTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type
    broadcast_in_dim cbrt ceil clamp convert_element_type cos cosh div eq exp exp2 expm1 floor
    ge gt integer_pow iota is_finite le log log1p logistic lt max min mul ne neg not
    one_minus_square or pow rem reshape reshard rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square squeeze stop_gradient
    sub tan tanh xor""".split()  # noqa: SIM905
)


def as_operands(mask: Mask | None) -> Mask | None:
    """``mask`` with its static arrays as leaves, because a kernel cannot close over arrays."""

    def change(x: Any) -> Any:
        if isinstance(x, StaticArray):
            return x.array
        if isinstance(x, tuple):
            return tuple(map(change, x))
        return as_operands(x) if isinstance(x, Mask) else x

    if mask is None:
        return None
    changes = {field.name: change(getattr(mask, field.name)) for field in dataclasses.fields(mask)}
    return dataclasses.replace(mask, **changes)


def why_unsupported(mask: Mask | None, score: tuple[Score, ...]) -> str | None:
    """Why a kernel cannot compute the mask or one of the scores; None if it can."""
    mask = as_operands(mask)
    values = score if mask is None else (mask, *score)
    return next((problem for value in values if (problem := _named_problem(value))), None)


def _named_problem(value: Value) -> str | None:
    """Why a kernel cannot compute a mask or score, with the name of the innermost one at fault."""
    problem = _problem(value)
    if problem is None:
        return None
    inner = (_named_problem(child) for child in children(value))
    return next((found for found in inner if found), f"{_name(value)} {problem}")


def _name(value: Value) -> str:
    if isinstance(value, (MaskFn, ScoreFn)):
        return "mask_fn" if isinstance(value, MaskFn) else "score_fn"
    return f"{'mask' if isinstance(value, Mask) else 'score'} {type(value).__name__}"


def _problem(value: Any) -> str | None:
    """Why a kernel cannot compute the rule of a mask or score or its derivative; None if it can."""
    arrays, structure = jax.tree.flatten(value)
    if isinstance(value, (MaskFn, ScoreFn)):
        fn = value.fn
        if isinstance(fn, Traced) and fn.closes_over and any(np.ndim(x) for x in arrays):
            return (
                "closes over an array, or over a number while it takes arrays: pass it as an "
                "argument, after the function"
            )
    in_tile = [_in_tile(x, leaf) for x, leaf in zip(arrays, leaves(value), strict=True)]
    loaded = [x for x in in_tile if not isinstance(x, Lookup)]

    def rule(s: Any, loaded: Any, *indices: Any) -> Any:
        given = iter(loaded)
        entries = [x if isinstance(x, Lookup) else next(given) for x in in_tile]
        cut = jax.tree.unflatten(structure, entries)
        return cut.rule(*indices) if isinstance(value, Mask) else cut.rule(s, *indices)

    def with_derivative(s: Any, loaded: Any, *indices: Any) -> Any:
        floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in loaded]

        def of_floats(s: Any, xs: Any) -> Any:
            changed = iter(xs)
            both = zip(loaded, floats, strict=True)
            return rule(s, [next(changed) if is_float else x for x, is_float in both], *indices)

        point = s, [x for x, is_float in zip(loaded, floats, strict=True) if is_float]
        return jax.jvp(of_floats, point, point)

    s, *indices = tile_arguments((jnp.float32, *(jnp.int32,) * 4))
    try:
        jaxpr = jax.make_jaxpr(with_derivative)(s, loaded, *indices)
    except NotImplementedError as error:
        return f"cannot run in a kernel: {error}"
    except (AttributeError, TypeError):  # a Lookup only supports indexing
        return "does more with its arrays than look up entries: x[q], x[q, k]"
    if any(np.ndim(x) for x in jaxpr.consts):
        return "closes over an array: pass it as an argument, after the function"
    if unknown := sorted({*_primitives(jaxpr.jaxpr)} - POINTWISE):
        return f"uses {', '.join(unknown)}, which a kernel does not support"
    return None


def _in_tile(x: Any, leaf: Leaf) -> Any:
    """The shape and dtype of an array inside a kernel; a ``Lookup`` for a table."""
    batch = x.ndim - len([a for a in leaf.axes if a != "B"])
    axes = [a for letter in leaf.axes for a in (["B"] * batch if letter == "B" else [letter])]
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    core = [
        (a, n) for a, n in zip(axes or "?" * x.ndim, x.shape, strict=True) if a not in ("B", "N")
    ]
    shape = tuple(n for _, n in core)
    if not core:
        return jax.ShapeDtypeStruct((), dtype)
    if not {a for a, _ in core} <= {"T", "S"}:

        def entry(*index: Any) -> Any:
            return jnp.zeros(jnp.broadcast_shapes(*map(jnp.shape, index)), dtype)

        return Lookup(entry, shape, dtype)
    sizes = dict(zip("TS", TILE, strict=True))
    cut = {a: sizes[a] if n > 1 else 1 for a, n in core}
    return jax.ShapeDtypeStruct((cut.get("T", 1), cut.get("S", 1)), dtype)


def _primitives(jaxpr: Jaxpr) -> Iterator[str]:
    """The names of all operations of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in CALLS:
            params = equation.params
            inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
            yield from _primitives(inner.jaxpr)
        else:
            yield equation.primitive.name
