"""Linformer: softmax attention to ``R`` learned mixtures of the keys and values::

out = softmax(scale * Q (E K)^T) (F V)          E, F: [R S]
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from attention_jax.api import attention
from attention_jax.backends.arguments import MaskLike, Scale, check_types
from attention_jax.core.axes import (
    AnyArray,
    Key,
    Output,
    Query,
    Sizes,
    Value,
    accumulation_dtype,
    check_float_array,
    check_query_key_value,
)
from attention_jax.mechanisms.causal_padding import as_causal_padding, zero_padding


def linformer_attention(
    query: Query,
    key: Key,
    value: Value,
    key_mixing: Float[AnyArray, "*K R S"],
    value_mixing: Float[AnyArray, "*K R S"],
    *,
    mask: MaskLike = None,
    scale: Scale = None,
) -> Output:
    """Softmax attention to ``R`` mixtures of the keys and the matching mixtures of the values.

    For one head, with ``E`` and ``F`` the mixings::

        out = softmax(scale * Q (E K)^T) (F V)

    Time and memory are ``O((T + S) R)``. Each mixture contains keys from all positions, so the
    mechanism cannot be causal.

    Args:
      query, key, value: as for ``attention``.
      key_mixing, value_mixing: learned, ``[R S]`` for all heads or ``[K R S]``, of the query's
        dtype.
      mask: None, ``masks.lengths`` or ``masks.padding``: padding enters no mixture.
      scale: as for ``attention``.

    Returns:
      ``[*B T N D]`` in the query's dtype; 0 for queries that are padding, or whose keys all are.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: any other mask.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import linformer_attention
    >>> x, mean = np.float32([1, 2, 6]).reshape(3, 1, 1), np.full((1, 3), 1 / 3, np.float32)
    >>> linformer_attention(x, x, x, mean, mean).ravel().tolist()
    [3.0, 3.0, 3.0]

    Source: Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity".
    """
    check_types({"query": query, "key": key, "value": value, "scale": scale})
    sizes = check_query_key_value(query, key, value)
    padding = as_causal_padding(mask, sizes, "linformer_attention")
    if padding.causal:
        raise NotImplementedError(
            "linformer_attention mixes keys from all positions and cannot be causal: use attention"
        )
    _check_mixings(key_mixing, value_mixing, sizes)
    dtype = accumulation_dtype(query.dtype)
    query_wide = zero_padding(jnp.asarray(query, dtype), padding.queries)
    keys = _mixed(key_mixing, zero_padding(jnp.asarray(key, dtype), padding.keys))
    values = _mixed(value_mixing, zero_padding(jnp.asarray(value, dtype), padding.keys))
    out = zero_padding(attention(query_wide, keys, values, scale=scale), padding.queries)
    if padding.keys is not None:
        has_keys = padding.keys.any(axis=-1, keepdims=True)
        out = zero_padding(out, jnp.broadcast_to(has_keys, (*has_keys.shape[:-1], sizes.T)))
    return out.astype(query.dtype)


def _mixed(mixing: Any, x: jax.Array) -> jax.Array:
    """``E K``: ``[R S]`` or ``[K R S]`` times ``[*B S K H]``, to ``[*B R K H]``."""
    axes = "krs,...skh->...rkh" if jnp.ndim(mixing) == 3 else "rs,...skh->...rkh"
    return jnp.einsum(axes, jnp.asarray(mixing, x.dtype), x, precision="highest")


def _check_mixings(key_mixing: Any, value_mixing: Any, sizes: Sizes) -> None:
    for name, x in {"key_mixing": key_mixing, "value_mixing": value_mixing}.items():
        check_float_array(name, x)
    R = jnp.shape(key_mixing)[-2] if jnp.ndim(key_mixing) > 1 else 0
    for name, x in {"key_mixing": key_mixing, "value_mixing": value_mixing}.items():
        if jnp.shape(x) not in ((R, sizes.S), (sizes.K, R, sizes.S)):
            raise ValueError(
                f"{name} must have shape [R S] or [K R S] with S = {sizes.S}, K = {sizes.K} and "
                f"the same R in both mixings, got {jnp.shape(x)}"
            )
