"""Mechanisms in the place of ``attention`` in modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from attention_jax.mechanisms.gated_linear import retention
from attention_jax.mechanisms.inverted import inverted_attention, slot_attention
from attention_jax.mechanisms.linear import linear_attention, performer_features
from attention_jax.mechanisms.topk import topk_attention

OPTIONS = ("mask", "score", "scale")


def as_attention(mechanism: Callable[..., Any]) -> Callable[..., Any]:
    """A mechanism for ``MultiHeadAttention(attention=...)``: what it cannot do, it refuses.

    Args:
      mechanism: a function of query, key, value, and some of ``mask``, ``score`` and ``scale``;
        what else it needs by ``functools.partial``.

    Returns:
      A function with the arguments of ``attention``. It raises NotImplementedError for scores,
      sinks, dropout and so on that the mechanism has no argument for, where they are asked for.
      A module that has it raises that too where its weights are asked for.

    >>> import functools, numpy as np
    >>> from flax import nnx
    >>> from attention_jax.mechanisms import topk_attention
    >>> from attention_jax.nn import MultiHeadAttention
    >>> best = as_attention(functools.partial(topk_attention, k=2))
    >>> module = MultiHeadAttention(8, num_heads=2, attention=best, rngs=nnx.Rngs(0))
    >>> module(np.ones((1, 5, 8), np.float32)).shape
    (1, 5, 8)
    """
    takes = [name for name in OPTIONS if name in inspect.signature(mechanism).parameters]
    called = mechanism.func if isinstance(mechanism, functools.partial) else mechanism
    name = getattr(called, "__name__", str(called))

    @functools.wraps(called)
    def attend(query: Any, key: Any, value: Any, **options: Any) -> jax.Array:
        given = {k: x for k, x in options.items() if not _nothing(k, x)}
        if refused := sorted(set(given) - set(takes)):
            raise NotImplementedError(
                f"{name} takes {', '.join(takes)}, not {', '.join(refused)}: take attention"
            )
        out: jax.Array = mechanism(query, key, value, **given)
        return out

    attend.mechanism = name  # type: ignore[attr-defined]  # see ``check_weights``
    return attend


def check_weights(attention: Callable[..., Any]) -> None:
    """Raises where the ``attention`` of a module has no weights that could be shown.

    Args:
      attention: of a module, or ``functools.partial`` of it.

    Raises:
      NotImplementedError: ``as_attention`` made it, so that it is no softmax over all keys.
    """
    while isinstance(attention, functools.partial):
        attention = attention.func
    if (name := getattr(attention, "mechanism", None)) is not None:
        raise NotImplementedError(
            f"{name} has no weights of a softmax over keys to look at: take a model with attention "
            f"at its default"
        )


def _nothing(name: str, x: Any) -> bool:
    """Whether an option of ``attention`` has the value that means nothing."""
    if name == "dropout_key":  # it comes with a rate
        return True
    return x is None or (isinstance(x, (tuple, float, bool)) and not x)


def performer(query: Any, key: Any, value: Any, *, mask: Any = None) -> Any:
    """``linear_attention`` with four times as many random features as a head has numbers."""
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
"""Those that need nothing but query, key and value: by name, for an option."""
