"""Raises clear errors for transformations that a third-party kernel does not support.

Without them users would see an error from an internal function that does not say what to do.
"""

from __future__ import annotations

from typing import Any

from attention_jax.core.compat import Primitive, ad, batching, mlir


def guard(
    arrays: tuple[Any, ...],
    name: str,
    instead: str,
    *,
    argument: str = "implementation",
    forward_mode: bool = True,
    batched: str | None = None,
) -> tuple[Any, ...]:
    """The arrays unchanged, except that a second derivative raises ``NotImplementedError``.

    Args:
      arrays: floating arrays.
      name: the implementation.
      instead: what to ask for instead, as it is written in a call.
      argument: the argument that selects the implementation.
      forward_mode: whether the first derivative may be taken in forward mode.
      batched: why ``vmap`` is not supported; None if it is.
    """
    about = f"{argument} {name!r} cannot: {{}}. Ask for {argument}={instead}"
    params = {
        "second": about.format("it can be differentiated only once"),
        "forward": None
        if forward_mode
        else about.format("it has no forward-mode derivative (jvp, linearize, jacfwd, hessian)"),
        "batched": None if batched is None else about.format(batched),
    }
    return tuple(_guard.bind(*arrays, order=0, **params))


_guard = Primitive("attention_guard")
# Marks the tangent of an array that has derivatives in reverse mode only: it can be transposed, but
# not computed.
_reverse = Primitive("attention_reverse_only")

_guard.multiple_results = True
_guard.def_impl(lambda *arrays, **params: list(arrays))
_guard.def_abstract_eval(lambda *avals, **params: list(avals))
mlir.register_lowering(_guard, lambda ctx, *values, **params: values)


def _jvp(primals: Any, tangents: Any, *, order: int, **params: Any) -> Any:
    if order:  # these are the primals of a derivative already
        raise NotImplementedError(params["second"])

    def tangent(t: Any) -> Any:
        if type(t) is ad.Zero or params["forward"] is None:
            return t
        return _reverse.bind(t, message=params["forward"])

    return _guard.bind(*primals, order=order + 1, **params), list(map(tangent, tangents))


def _batch(args: Any, dims: Any, **params: Any) -> Any:
    if params["batched"] is not None:
        raise NotImplementedError(params["batched"])
    return _guard.bind(*args, **params), dims


ad.primitive_jvps[_guard] = _jvp
batching.primitive_batchers[_guard] = _batch


def _refused(*_: Any, message: str, **others: Any) -> Any:
    raise NotImplementedError(message)


def _reverse_jvp(primals: Any, tangents: Any, *, message: str) -> Any:
    (x,), (t,) = primals, tangents
    return _reverse.bind(x, message=message), _reverse.bind(
        ad.instantiate_zeros(t), message=message
    )


def _reverse_transpose(cotangent: Any, x: Any, *, message: str) -> Any:
    return [cotangent]


_reverse.def_impl(_refused)
_reverse.def_abstract_eval(lambda aval, message: aval)
mlir.register_lowering(_reverse, _refused)
ad.primitive_jvps[_reverse] = _reverse_jvp
ad.primitive_transposes[_reverse] = _reverse_transpose
# Tangents are mapped in forward mode only.
batching.primitive_batchers[_reverse] = _refused
