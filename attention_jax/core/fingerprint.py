"""Hashable keys that tell whether two traced functions are the same program."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.core.compat import ClosedJaxpr, Jaxpr, Literal
from attention_jax.core.pytree import StaticArray


def fingerprint(jaxpr: Jaxpr) -> Hashable:
    """A key that is equal for programs of the same operations, ignoring custom derivative rules.

    >>> import jax
    >>> from attention_jax.core.fingerprint import fingerprint
    >>> f = jax.make_jaxpr(lambda x: 2.0 * x + 1.0)(3.0)
    >>> g = jax.make_jaxpr(lambda y: 2.0 * y + 1.0)(4.0)
    >>> h = jax.make_jaxpr(lambda y: 2.0 * y + 1.5)(4.0)
    >>> fingerprint(f.jaxpr) == fingerprint(g.jaxpr), fingerprint(f.jaxpr) == fingerprint(h.jaxpr)
    (True, False)
    """
    numbers: dict[Any, int] = {}

    def atom(x: Any) -> Hashable:
        if isinstance(x, Literal):
            return str(x.aval), np.asarray(x.val).tobytes()
        return numbers.setdefault(x, len(numbers)), str(x.aval)

    def param(x: Any) -> Hashable:
        if isinstance(x, ClosedJaxpr):
            return fingerprint(x.jaxpr), *map(array_key, x.consts)
        if isinstance(x, Jaxpr):
            return fingerprint(x)
        if isinstance(x, (tuple, list)):
            return tuple(map(param, x))
        try:
            hash(x)
        except TypeError:
            return object()  # unequal to everything, so the program is compiled again
        return type(x), x

    def equation(e: Any) -> Hashable:
        # Without custom derivative rules, see `closures._key`.
        names = ["call_jaxpr"] if "call_jaxpr" in e.params else sorted(e.params)
        params = tuple((name, param(e.params[name])) for name in names)
        return e.primitive, tuple(map(atom, e.invars)), params, tuple(map(atom, e.outvars))

    return (
        tuple(map(atom, (*jaxpr.constvars, *jaxpr.invars))),
        tuple(map(equation, jaxpr.eqns)),
        tuple(map(atom, jaxpr.outvars)),
    )


def array_key(x: Any) -> Hashable:
    """A key that is equal for arrays with equal entries, and unequal to any other if traced."""
    if isinstance(x, jax.core.Tracer) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return object()
    return StaticArray(np.array(x))
