"""Additive attention (Bahdanau): a small network scores each query and key::

out_i = sum_j softmax_j(v . tanh(q_i + k_j)) value_j
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attention_jax.core import softmax
from attention_jax.core.axes import AnyArray, Output, Query, accumulation_dtype


def weights_of_one_head(
    q: Float[Array, "T H"],
    k: Float[Array, "S H"],
    v: Float[Array, " H"],
    visible: Bool[Array, "T S"],
) -> Float[Array, "T S"]:
    """``softmax_j(v . tanh(q_i + k_j))``, over the visible keys of each query."""
    k = jnp.where(visible.any(axis=0)[:, None], k, 0)  # fully masked keys may hold anything
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
    >>> q, k = np.zeros((1, 1, 2), np.float32), np.zeros((2, 1, 2), np.float32)
    >>> v = np.array([[[1.0]], [[3.0]]], np.float32)
    >>> additive_attention(q, k, v, np.ones((1, 2), np.float32)).tolist()  # equal weights
    [[[2.0]]]

    Source: Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and
    Translate", appendix A.1.2.
    """
    weights = additive_weights(query, key, vector, mask=mask)
    if value.ndim != query.ndim or value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must have shape [*B S N D] with [*B S N] of the key, {key.shape[:-1]}, got "
            f"{value.shape}"
        )
    dtype = jnp.asarray(query).dtype
    # Fully masked values may hold anything, NaN included.
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
    >>> q, k = np.zeros((1, 1, 2), np.float32), np.zeros((4, 1, 2), np.float32)
    >>> additive_weights(q, k, np.ones((1, 2), np.float32)).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]

    Source: Bahdanau et al. 2015, appendix A.1.2.
    """
    *batch, T, N, H = query.shape
    expected = (*batch, key.shape[-3] if key.ndim > 2 else 0, N, H)
    if key.shape != expected:
        raise ValueError(
            f"key must have shape [*B S N H] with *B, N and H of the query {query.shape}, got "
            f"{key.shape}"
        )
    if vector.shape != (N, H):
        raise ValueError(f"vector must have shape [N H], {(N, H)}, got {vector.shape}")
    S = key.shape[-3]
    visible = jnp.ones((*batch, N, T, S), bool)
    if mask is not None:
        visible = jnp.broadcast_to(jnp.asarray(mask), visible.shape)
    wide = accumulation_dtype(jnp.asarray(query).dtype)
    q, k, v = (jnp.asarray(x, wide) for x in (query, key, vector))
    lifted = jax.vmap(weights_of_one_head, in_axes=(-2, -2, 0, 0))  # over the heads N
    for _ in batch:
        lifted = jax.vmap(lifted, in_axes=(0, 0, None, 0))
    return lifted(q, k, v, visible)
