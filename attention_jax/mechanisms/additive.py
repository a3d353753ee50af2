"""Additive attention (Bahdanau): a small network scores each query and key::

out_i = sum_j softmax_j(v . tanh(q_i + k_j)) value_j
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attention_jax.core import softmax
from attention_jax.core.axes import (
    AnyArray,
    Output,
    Query,
    Sizes,
    accumulation_dtype,
    bool_array,
    check_broadcastable,
    check_float_array,
    with_sizes,
)
from attention_jax.masks import Mask


def weights_of_one_head(
    q: Float[Array, "T H"],
    k: Float[Array, "S H"],
    v: Float[Array, " H"],
    visible: Bool[Array, "T S"],
) -> Float[Array, "T S"]:
    """``softmax_j(v . tanh(q_i + k_j))``, over the visible keys of each query."""
    k = jnp.where(visible.any(axis=0)[:, None], k, 0)  # fully masked keys may be NaN
    logits = jnp.tanh(q[:, None] + k[None]) @ v
    return softmax.softmax_rows(jnp.where(visible, logits, -jnp.inf))


def additive_attention(
    query: Query,
    key: Float[AnyArray, "..."],
    value: Float[AnyArray, "..."],
    vector: Float[AnyArray, "..."],
    *,
    mask: Bool[AnyArray, "..."] | None = None,
) -> Output:
    """``softmax_j(v . tanh(q_i + k_j)) value_j``, the attention of Bahdanau.

    ``query`` is ``W q`` and ``key`` is ``U k`` of the paper: both are already projected, the keys
    once for all queries. Time and memory are ``O(T S N H)``, one ``tanh`` per pair and feature.

    Args:
      query, key, value: ``[*B T N H]``, ``[*B S N H]``, ``[*B S N D]``.
      vector: ``v [N H]``.
      mask: bool, broadcasts to ``[*B N T S]``; True is visible.

    Returns:
      ``[*B T N D]`` in ``query.dtype``; 0 for a query with no visible key.

    Raises:
      ValueError: shapes that do not fit.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import additive_attention
    >>> q, k = np.zeros((1, 1, 2), np.float32), np.zeros((2, 1, 2), np.float32)
    >>> v = np.array([[[1.0]], [[3.0]]], np.float32)
    >>> additive_attention(q, k, v, np.ones((1, 2), np.float32)).tolist()  # equal weights
    [[[2.0]]]

    Source: Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and
    Translate", appendix A.1.2.
    """
    weights = additive_weights(query, key, vector, mask=mask)
    check_float_array("value", value)
    if value.ndim != query.ndim or value.shape[:-1] != key.shape[:-1]:
        *batch, S, N, _ = key.shape
        expected = with_sizes("[*B S N D]", {"*B": tuple(batch), "S": S, "N": N})
        raise ValueError(f"value must have shape {expected}, got {value.shape}")
    dtype = jnp.asarray(query).dtype
    # Fully masked values may be NaN.
    visible = jnp.swapaxes((weights > 0).any(axis=-2), -1, -2)[..., None]
    values = jnp.where(visible, jnp.asarray(value, weights.dtype), 0)
    return jnp.einsum("...nts,...snd->...tnd", weights, values).astype(dtype)


def additive_weights(
    query: Query,
    key: Float[AnyArray, "..."],
    vector: Float[AnyArray, "..."],
    *,
    mask: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*B N T S"]:
    """``softmax_j(v . tanh(q_i + k_j))``; 0 for a query with no visible key.

    Args:
      query, key, vector, mask: as for ``additive_attention``.

    Returns:
      ``[*B N T S]`` in float32 or wider.

    Raises:
      ValueError: shapes that do not fit.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import additive_weights
    >>> q, k = np.zeros((1, 1, 2), np.float32), np.zeros((4, 1, 2), np.float32)
    >>> additive_weights(q, k, np.ones((1, 2), np.float32)).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]

    Source: Bahdanau et al. 2015, appendix A.1.2.
    """
    for name, x in (("query", query), ("key", key), ("vector", vector)):
        check_float_array(name, x)
    if query.ndim < 3:
        raise ValueError(
            f"query must have at least 3 axes [*B T N H], got shape {tuple(query.shape)}"
        )
    *batch, T, N, H = query.shape
    if key.ndim != query.ndim or key.shape != (*batch, key.shape[-3], N, H):
        expected = with_sizes("[*B S N H]", {"*B": tuple(batch), "N": N, "H": H})
        raise ValueError(f"key must have shape {expected}, as the query, got {key.shape}")
    if vector.shape != (N, H):
        expected = with_sizes("[N H]", {"N": N, "H": H})
        raise ValueError(f"vector must have shape {expected}, got {vector.shape}")
    S = key.shape[-3]
    sizes = Sizes(B=tuple(batch), T=T, S=S, K=N, G=1, H=H, D=0)
    visible = jnp.ones((*batch, N, T, S), bool)
    if mask is not None:
        if isinstance(mask, Mask):
            raise TypeError(
                "mask must be a bool array here, got a Mask: convert it with mask.to_dense(T, S)"
            )
        bool_array("mask", mask, 0)
        check_broadcastable("mask", mask.shape, sizes)
        visible = jnp.broadcast_to(jnp.asarray(mask), visible.shape)
    wide = accumulation_dtype(jnp.asarray(query).dtype)
    q, k, v = (jnp.asarray(x, wide) for x in (query, key, vector))
    lifted = jax.vmap(weights_of_one_head, in_axes=(-2, -2, 0, 0))  # over the heads N
    for _ in batch:
        lifted = jax.vmap(lifted, in_axes=(0, 0, None, 0))
    return lifted(q, k, v, visible)
