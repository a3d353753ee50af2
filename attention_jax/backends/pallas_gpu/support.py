"""Which masks and scores a kernel can compute: those that are arithmetic on indices and look-ups.

A rule runs inside a kernel on one tile. Built-in ones are known to; a function is traced once, and
refused by name if it does more than a kernel can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax import masks
from attention_jax.core.closures import Traced
from attention_jax.core.compat import Jaxpr
from attention_jax.core.pytree import Lookup, StaticArray
from attention_jax.masks import Mask
from attention_jax.masks.base import parts
from attention_jax.scores import RelativeEmbedding, Score, ScoreFn, unwrapped

# Operations on single entries, and what brings them to one shape.
POINTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type
    broadcast_in_dim cbrt ceil clamp convert_element_type cos cosh div eq exp exp2 expm1 floor
    ge gt integer_pow iota is_finite le log log1p logistic lt max min mul ne neg not or pow
    rem reshape reshard rsqrt select_n shift_left shift_right_arithmetic shift_right_logical
    sign sin sinh sqrt square squeeze stop_gradient sub tan tanh xor""".split()  # noqa: SIM905
)
CALLS = frozenset({"jit", "custom_jvp_call"})


def as_operands(mask: Mask | None) -> Mask | None:
    """``mask`` with the arrays that are part of the program as data: a kernel holds no arrays."""
    if mask is None:
        return None
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(mask):
        x = getattr(mask, field.name)
        if isinstance(x, StaticArray):
            changes[field.name] = jnp.asarray(x.array)
        elif isinstance(x, Mask):
            changes[field.name] = as_operands(x)
    return dataclasses.replace(mask, **changes)


def why_unsupported(mask: Mask | None, score: tuple[Score, ...]) -> str | None:
    """What of a mask or scores a kernel cannot compute, in words; None where it can all."""
    for part in () if mask is None else parts(mask):
        if isinstance(part, masks.MaskFn) and (
            problem := _problem(part.fn, part.arrays, mask=True)
        ):
            return f"mask_fn {problem}"
    for each in map(unwrapped, score):
        if isinstance(each, RelativeEmbedding):
            return "relative_embedding: a product of its own for every tile"
        if isinstance(each, ScoreFn) and (problem := _problem(each.fn, each.arrays)):
            return f"score_fn {problem}"
    return None


def _problem(fn: Callable[..., Any], arrays: tuple[Any, ...], mask: bool = False) -> str | None:
    """What ``fn(s, b, n, q, k, *arrays)``, or its derivative, does that a kernel cannot.

    Args:
      mask: it takes no ``s``.
    """

    if isinstance(fn, Traced) and fn.closes_over and any(np.ndim(x) for x in arrays):
        return (
            "closes over an array, or a number beside one: pass it as an argument, after the "
            "function"
        )

    def looked_up(x: Any) -> Any:
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        if not x.shape:
            return jnp.zeros((), dtype)
        entry = lambda *index: jnp.zeros(jnp.broadcast_shapes(*map(jnp.shape, index)), dtype)  # noqa: E731
        return Lookup(entry, x.shape, dtype)

    def rule(s: Any, *indices: Any) -> Any:
        rest = (*indices, *map(looked_up, arrays))
        return jax.jvp(lambda s: fn(*rest) if mask else fn(s, *rest), (s,), (s,))

    shapes = (16, 32), (), (), (16, 1), (1, 32)
    s, *indices = (
        jax.ShapeDtypeStruct(shape, jnp.float32 if i == 0 else jnp.int32)
        for i, shape in enumerate(shapes)
    )
    try:
        jaxpr = jax.make_jaxpr(rule)(s, *indices)
    except NotImplementedError as error:
        return f"cannot run in a kernel: {error}"
    except TypeError:  # what is no array cannot be given to most of JAX's functions
        return "does more with its arrays than look entries up: x[q], x[q, k]"
    if any(np.ndim(x) for x in jaxpr.consts):
        return "holds an array from outside: pass it as an argument, after the function"
    if unknown := sorted({*_primitives(jaxpr.jaxpr)} - POINTWISE):
        return f"uses {', '.join(unknown)}, which a kernel does not have"
    return None


def _primitives(jaxpr: Jaxpr) -> Iterator[str]:
    """The names of all operations of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in CALLS:
            params = equation.params
            inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
            yield from _primitives(inner.jaxpr)
        else:
            yield equation.primitive.name
