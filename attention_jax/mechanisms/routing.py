"""Attention within clusters of queries and keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention_jax import masks
from attention_jax.api import attention
from attention_jax.backends.call import Scale, check_types
from attention_jax.core.axes import (
    AnyArray,
    Key,
    Output,
    Query,
    Value,
    accumulation_dtype,
    check_float_array,
    check_query_key_value,
)
from attention_jax.mechanisms.causal_padding import seen

Centroids = Float[AnyArray, "K C H"]


def routing_attention(
    query: Query,
    key: Key,
    value: Value,
    centroids: Centroids,
    *,
    mask: Any = None,
    scale: Scale = None,
    implementation: Any = None,
) -> Output:
    """Softmax attention of each query to the keys of its own cluster.

    With ``cluster(x) = argmax_c x . centroid_c``, query ``i`` sees key ``j`` where
    ``cluster(q_i) == cluster(k_j)``, and the mask lets it. Queries and keys are put in the order of
    their clusters first, so that blocks of pairs that have no cluster in common are skipped: with
    ``sqrt(S)`` clusters of equal size, of ``T S`` pairs there are ``T sqrt(S)``.

    Args:
      query, key, value, scale: as for ``attention``. Routing suits queries and keys of norm 1.
      centroids: ``[K C H]``, for each key-value head; see ``update_centroids``. Attention gives
        them no gradient.
      mask: None, ``masks.causal()``, ``masks.lengths``, ``masks.padding``, joined by ``&``; beside
        the clusters.
      implementation: of ``attention``.

    Returns:
      ``[*B T N D]`` in the query's dtype; 0 for a query whose cluster has no key that it sees.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: a mask that says something else.

    >>> import numpy as np
    >>> q = np.float32([[1], [-1]]).reshape(2, 1, 1)
    >>> v = np.float32([[5], [7]]).reshape(2, 1, 1)
    >>> routing_attention(q, q, v, np.float32([[[1], [-1]]])).ravel().tolist()  # each sees its like
    [5.0, 7.0]

    Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers".
    """
    check_types({"query": query, "key": key, "value": value, "scale": scale})
    sizes = check_query_key_value(query, key, value)
    _check_centroids(centroids, sizes.K, sizes.H)
    found = seen(mask, sizes, "routing_attention")
    q_ids = _clusters_of_heads(query, centroids, found.queries)  # [*B N T]
    k_ids = jnp.repeat(_clusters_of_heads(key, centroids, found.keys), sizes.G, axis=-2)
    q_order, k_order = (jnp.argsort(ids, axis=-1).astype(jnp.int32) for ids in (q_ids, k_ids))

    # A head is an example of its own, as its order is.
    def in_order(x: Any, order: jax.Array) -> jax.Array:
        heads = jnp.swapaxes(jnp.asarray(x), -2, -3)
        heads = jnp.repeat(heads, sizes.N // heads.shape[-3], axis=-3)
        return jnp.take_along_axis(heads, order[..., None], axis=-2)[..., None, :]

    within = masks.segments(
        jnp.take_along_axis(q_ids, q_order, axis=-1), jnp.take_along_axis(k_ids, k_order, axis=-1)
    )
    if found.causal:
        within = within & masks.at_positions(masks.causal(), q_order, k_order)
    out = attention(
        in_order(query, q_order),
        in_order(key, k_order),
        in_order(value, k_order),
        mask=within,
        scale=scale,
        implementation=implementation,
    )[..., 0, :]
    back = jnp.argsort(q_order, axis=-1)
    return jnp.swapaxes(jnp.take_along_axis(out, back[..., None], axis=-2), -2, -3)


def clusters(x: Float[AnyArray, "... H"], centroids: Float[AnyArray, "C H"]) -> Int[Array, "..."]:
    """``argmax_c x . centroid_c``, the first of equal ones.

    >>> import numpy as np
    >>> clusters(np.float32([[1, 0], [0.2, 1]]), np.eye(2, dtype=np.float32)).tolist()
    [0, 1]
    """
    dtype = accumulation_dtype(x.dtype)
    x, centroids = jnp.asarray(x, dtype), jnp.asarray(centroids, dtype)
    near = jnp.einsum("...h,ch->...c", x, centroids, precision="highest")
    return jnp.argmax(near, axis=-1).astype(jnp.int32)


def update_centroids(
    centroids: Centroids,
    query: Query,
    key: Key,
    *,
    decay: float = 0.999,
    mask: Any = None,
) -> Float[Array, "K C H"]:
    """One step of k-means on the queries and keys of a batch::

        centroid_c' = decay centroid_c + (1 - decay) (mean of queries of c + mean of keys of c) / 2

    A cluster without queries, or without keys, takes the mean of the others; one without both
    stays.

    Args:
      centroids: ``[K C H]``.
      query, key: ``[*B T N H]`` and ``[*B S K H]``.
      decay: how slowly centroids move, in [0, 1].
      mask: None, ``masks.lengths``, ``masks.padding``: padding does not count.

    >>> import numpy as np
    >>> x = np.float32([[1, 0], [3, 0], [0, 1]])[:, None]
    >>> update_centroids(np.eye(2, dtype=np.float32)[None], x, x, decay=0.5)[0].tolist()
    [[1.5, 0.0], [0.0, 1.0]]
    """
    check_types({"query": query, "key": key})
    sizes = check_query_key_value(query, key, key)
    _check_centroids(centroids, sizes.K, sizes.H)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    found = seen(mask, sizes, "update_centroids")
    centroids = jnp.asarray(centroids)
    total, kinds = jnp.zeros_like(centroids), jnp.zeros(centroids.shape[:2], centroids.dtype)
    for x, real in ((query, found.queries), (key, found.keys)):
        ids = jnp.moveaxis(_clusters_of_heads(x, centroids, real), -2, 0)  # [N *B t]
        heads = jnp.moveaxis(jnp.asarray(x, centroids.dtype), -2, 0)
        heads = jnp.where(ids[..., None] >= 0, heads, 0).reshape(sizes.K, -1, sizes.H)
        own = jax.nn.one_hot(ids.reshape(sizes.K, -1), centroids.shape[1], dtype=centroids.dtype)
        count = own.sum(axis=1)
        mean = jnp.einsum("krc,krh->kch", own, heads) / jnp.maximum(count, 1)[..., None]
        total, kinds = total + mean, kinds + (count > 0).astype(kinds.dtype)
    mean = total / jnp.maximum(kinds, 1)[..., None]
    moved = decay * centroids + (1 - decay) * mean
    return jax.lax.stop_gradient(jnp.where(kinds[..., None] > 0, moved, centroids))


def _clusters_of_heads(x: Any, centroids: Any, real: Any) -> jax.Array:
    """``[*B t N H]`` to ids ``[*B N t]``, -1 for what is not real."""
    heads = jnp.swapaxes(jnp.asarray(x), -2, -3)
    of_head = jnp.repeat(jnp.asarray(centroids), x.shape[-2] // len(centroids), axis=0)
    ids = jax.vmap(clusters, in_axes=(-3, 0), out_axes=-2)(heads, of_head)
    return ids if real is None else jnp.where(real[..., None, :], ids, -1)


def _check_centroids(centroids: Any, K: int, H: int) -> None:
    check_float_array("centroids", centroids)
    if centroids.ndim != 3 or centroids.shape[0] != K or centroids.shape[2] != H:
        raise ValueError(
            f"centroids must have shape [K C H] with K = {K} and H = {H}, got {centroids.shape}"
        )
