"""``as_attention``: lets a mechanism replace ``attention`` in a module."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from attention_jax.core.axes import kind
from attention_jax.mechanisms.inverted import inverted_attention
from attention_jax.mechanisms.linear import linear_attention
from attention_jax.mechanisms.performer import performer_features
from attention_jax.mechanisms.retentive import retention
from attention_jax.mechanisms.slot import slot_attention
from attention_jax.mechanisms.topk import topk_attention

OPTIONS = ("mask", "score", "scale")


def as_attention(mechanism: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a mechanism the signature of ``attention``, for ``MultiHeadAttention(attention=...)``.

    Args:
      mechanism: a function of query, key, value, and some of ``mask``, ``score`` and ``scale``;
        bind its other arguments with ``functools.partial``.

    Returns:
      A function with the arguments of ``attention``. It raises NotImplementedError if a call uses
      an argument that the mechanism does not have (scores, sinks, dropout and so on). So does a
      module that holds it when asked for attention weights.

    >>> import functools, numpy as np
    >>> from flax import nnx
    >>> from attention_jax.mechanisms import as_attention, topk_attention
    >>> from attention_jax.nn import MultiHeadAttention
    >>> top2 = as_attention(functools.partial(topk_attention, k=2))
    >>> module = MultiHeadAttention(8, num_heads=2, attention=top2, rngs=nnx.Rngs(0))
    >>> module(np.ones((1, 5, 8), np.float32)).shape
    (1, 5, 8)
    """
    parameters = inspect.signature(mechanism).parameters
    takes = [name for name in OPTIONS if name in parameters]
    called = mechanism.func if isinstance(mechanism, functools.partial) else mechanism
    name = getattr(called, "__name__", str(called))
    if missing := [x.name for x in list(parameters.values())[3:] if _is_required(x)]:
        bound = ", ".join(f"{x}=..." for x in missing)
        raise TypeError(
            f"mechanism must need only query, key and value, but {name} also needs "
            f"{', '.join(missing)}: use as_attention(functools.partial({name}, {bound}))"
        )

    @functools.wraps(called)
    def attend(query: Any, key: Any, value: Any, **options: Any) -> jax.Array:
        given = {k: x for k, x in options.items() if not _is_default(k, x)}
        if refused := sorted(set(given) - set(takes)):
            raise NotImplementedError(
                f"{name} takes {', '.join(takes)}, not {', '.join(refused)}: use attention"
            )
        out: jax.Array = mechanism(query, key, value, **given)
        return out

    attend.mechanism = name  # type: ignore[attr-defined]  # see ``check_weights``
    return attend


def _is_required(parameter: inspect.Parameter) -> bool:
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return parameter.default is parameter.empty and parameter.kind not in several


def check_attention(attention: Any) -> None:
    """Raises unless ``attention`` is a function that takes the arguments modules pass to it.

    Raises:
      TypeError: it is not a function, or a mechanism without ``as_attention``.
    """
    if not callable(attention) or isinstance(attention, type):
        raise TypeError(f"attention must be a function, got {kind(attention)}")
    parameters = inspect.signature(attention, follow_wrapped=False).parameters
    if any(x.kind == inspect.Parameter.VAR_KEYWORD for x in parameters.values()):
        return
    if missing := [x for x in ("mask", "score", "sinks", "scale") if x not in parameters]:
        name = getattr(attention, "__name__", "it")
        raise TypeError(
            f"attention must take the arguments of attention_jax.attention, but {name} does not "
            f"take {', '.join(missing)}: wrap a mechanism, mechanisms.as_attention({name})"
        )


def check_weights(attention: Callable[..., Any]) -> None:
    """Raises if the ``attention`` of a module has no softmax weights to return.

    Args:
      attention: of a module, or ``functools.partial`` of it.

    Raises:
      NotImplementedError: it is a mechanism, made by ``as_attention``.
    """
    while isinstance(attention, functools.partial):
        attention = attention.func
    if (name := getattr(attention, "mechanism", None)) is not None:
        raise NotImplementedError(
            f"{name} has no softmax weights over keys to return: use a model with the default "
            f"attention"
        )


def _is_default(name: str, x: Any) -> bool:
    """Whether an option of ``attention`` has its default value, which has no effect."""
    if name == "dropout_key":  # only used together with a rate
        return True
    return x is None or (isinstance(x, (tuple, float, bool)) and not x)


def performer(query: Any, key: Any, value: Any, *, mask: Any = None) -> Any:
    """``linear_attention`` with ``4 H`` random features."""
    H = query.shape[-1]
    features = performer_features(jax.random.key(0), H, 4 * H)
    return linear_attention(query, key, value, mask=mask, features=features)


NAMED: dict[str, Callable[..., Any]] = {
    "inverted": as_attention(inverted_attention),
    "linear": as_attention(linear_attention),
    "performer": as_attention(performer),
    "retention": as_attention(retention),
    "slot": as_attention(slot_attention),
    "topk": as_attention(functools.partial(topk_attention, k=8)),
}
"""Mechanisms that need only query, key and value, by the name that a command line gives them."""
