"""Additive attention: the score of a query and a key is a small network, not their product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attention_jax.core import softmax
from attention_jax.core.axes import AnyArray, accumulation_dtype


def additive_attention(
    query: Float[AnyArray, "*B T N H"],
    key: Float[AnyArray, "..."],
    value: Float[AnyArray, "..."],
    vector: Float[AnyArray, "..."],
    *,
    mask: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*B T N D"]:
    """``softmax_j(v . tanh(q_i + k_j)) values_j``, the attention of Bahdanau.

    ``query`` is ``W q`` and ``key`` is ``U k`` of the paper: projected, which for the keys is done
    once for all queries. Time and memory are ``O(T S N H)``: the ``tanh`` is of every pair.

    Args:
      query, key, value: ``[*B T N H]``, ``[*B S N H]``, ``[*B S N D]``.
      vector: ``v [N H]``.
      mask: bool, broadcasts to ``[*B N T S]``; True is visible.

    Returns:
      ``[*B T N D]`` in ``query.dtype``; 0 for a query that sees no key.

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
    # What no query sees may hold anything: it is not read.
    seen = jnp.swapaxes((weights > 0).any(axis=-2), -1, -2)[..., None]
    values = jnp.where(seen, jnp.asarray(value, weights.dtype), 0)
    return jnp.einsum("...nts,...snd->...tnd", weights, values).astype(dtype)


def additive_weights(
    query: Float[AnyArray, "*B T N H"],
    key: Float[AnyArray, "..."],
    vector: Float[AnyArray, "..."],
    *,
    mask: Bool[AnyArray, "..."] | None = None,
) -> Float[Array, "*B N T S"]:
    """``softmax_j(v . tanh(q_i + k_j))``; a row that sees nothing is 0. See ``additive_attention``.

    >>> import numpy as np
    >>> q, k = np.zeros((1, 1, 2), np.float32), np.zeros((4, 1, 2), np.float32)
    >>> additive_weights(q, k, np.ones((1, 2), np.float32)).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
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

    def one_head(q: Any, k: Any, v: Any, visible: Any) -> jax.Array:
        """``q [T H]``, ``k [S H]``, ``v [H]``, ``visible [T S]``."""
        k = jnp.where(visible.any(axis=0)[:, None], k, 0)
        logits = jnp.where(visible, jnp.tanh(q[:, None] + k[None]) @ v, -jnp.inf)
        return softmax.rows(logits)

    lifted = jax.vmap(one_head, in_axes=(-2, -2, 0, 0))
    for _ in batch:
        lifted = jax.vmap(lifted, in_axes=(0, 0, None, 0))
    return lifted(q, k, v, visible)
