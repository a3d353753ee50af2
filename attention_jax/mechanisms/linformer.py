"""Attention to a fixed number of mixtures of the keys."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from attention_jax.api import attention
from attention_jax.backends.call import Scale, check_types
from attention_jax.core.axes import (
    AnyArray,
    Key,
    Output,
    Query,
    Value,
    accumulation_dtype,
    check_query_key_value,
)
from attention_jax.mechanisms.causal_padding import only_seen, seen


def linformer_attention(
    query: Query,
    key: Key,
    value: Value,
    key_mixing: Float[AnyArray, "*K R S"],
    value_mixing: Float[AnyArray, "*K R S"],
    *,
    mask: Any = None,
    scale: Scale = None,
) -> Output:
    """Softmax attention to ``R`` mixtures of the keys, with the like mixtures of the values.

    For one head, with ``E`` and ``F`` the mixings::

        out = softmax(scale * Q (E K)^T) (F V)

    Time and memory are ``O((T + S) R)``. A mixture holds keys of all positions, so that nothing
    can be causal.

    Args:
      query, key, value: as for ``attention``.
      key_mixing, value_mixing: learned, ``[R S]`` for all heads or ``[K R S]``, of the query's
        dtype.
      mask: None, ``masks.lengths``, ``masks.padding``: padding is in no mixture.
      scale: as for ``attention``.

    Returns:
      ``[*B T N D]`` in the query's dtype; 0 for a query that is padding or sees only that.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: a mask that says something else.

    >>> import numpy as np
    >>> x, mean = np.float32([1, 2, 6]).reshape(3, 1, 1), np.full((1, 3), 1 / 3, np.float32)
    >>> linformer_attention(x, x, x, mean, mean).ravel().tolist()
    [3.0, 3.0, 3.0]

    Source: Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity".
    """
    check_types({"query": query, "key": key, "value": value, "scale": scale})
    sizes = check_query_key_value(query, key, value)
    found = seen(mask, sizes, "linformer_attention")
    if found.causal:
        raise NotImplementedError(
            "linformer_attention mixes keys of all positions and cannot be causal: take attention"
        )
    mixings = {"key_mixing": key_mixing, "value_mixing": value_mixing}
    for name, x in mixings.items():
        R = jnp.shape(key_mixing)[-2] if jnp.ndim(key_mixing) > 1 else 0
        if jnp.shape(x) not in ((R, sizes.S), (sizes.K, R, sizes.S)):
            raise ValueError(
                f"{name} must have shape [R S] or [K R S] with S = {sizes.S}, K = {sizes.K} and "
                f"one R for both, got {jnp.shape(x)}"
            )
    dtype = accumulation_dtype(query.dtype)
    key, value = (
        jnp.einsum(
            "krs,...skh->...rkh" if jnp.ndim(mixing) == 3 else "rs,...skh->...rkh",
            jnp.asarray(mixing, dtype),
            only_seen(jnp.asarray(x, dtype), found.keys),
            precision="highest",
        )
        for mixing, x in ((key_mixing, key), (value_mixing, value))
    )
    wide = only_seen(jnp.asarray(query, dtype), found.queries)
    out = only_seen(attention(wide, key, value, scale=scale), found.queries)
    if found.keys is not None:
        some = found.keys.any(axis=-1, keepdims=True)
        out = only_seen(out, jnp.broadcast_to(some, (*some.shape[:-1], sizes.T)))
    return out.astype(query.dtype)
