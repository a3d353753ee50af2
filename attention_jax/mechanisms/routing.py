"""Routing attention: softmax attention within clusters of queries and keys::

cluster(x) = argmax_c x . centroid_c
out_i = sum_j softmax_j(scale * q_i . k_j) v_j        over j with cluster(k_j) = cluster(q_i)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attention_jax import masks
from attention_jax.api import attention
from attention_jax.backends.arguments import MaskLike, Scale, check_types
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
from attention_jax.mechanisms.causal_padding import as_causal_padding

Centroids = Float[AnyArray, "K C H"]


def clusters(x: Float[AnyArray, "... H"], centroids: Float[AnyArray, "C H"]) -> Int[Array, "..."]:
    """``argmax_c x . centroid_c``: the cluster of each vector, the first of several.

    Args:
      x: queries or keys of one head.
      centroids: ``[C H]``, of that head.

    Returns:
      int32, ``x.shape[:-1]``.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import clusters
    >>> clusters(np.float32([[1, 0], [0.2, 1]]), np.eye(2, dtype=np.float32)).tolist()
    [0, 1]
    """
    dtype = accumulation_dtype(x.dtype)
    x, centroids = jnp.asarray(x, dtype), jnp.asarray(centroids, dtype)
    similarity = jnp.einsum("...h,ch->...c", x, centroids, precision="highest")
    return jnp.argmax(similarity, axis=-1).astype(jnp.int32)


def routing_attention(
    query: Query,
    key: Key,
    value: Value,
    centroids: Centroids,
    *,
    mask: MaskLike = None,
    scale: Scale = None,
    implementation: Any = None,
) -> Output:
    """Softmax attention of each query to the keys of its own cluster.

    With ``cluster(x) = argmax_c x . centroid_c``, query ``i`` attends to key ``j`` if
    ``cluster(q_i) == cluster(k_j)`` and the mask allows it. Queries and keys are first sorted by
    cluster, so that blocks of pairs without a common cluster are skipped: with ``sqrt(S)`` clusters
    of equal size, ``T sqrt(S)`` of the ``T S`` pairs remain.

    Args:
      query, key, value, scale: as for ``attention``. Routing suits queries and keys of norm 1.
      centroids: ``[K C H]``, for each key-value head; see ``update_centroids``. They receive no
        gradient.
      mask: None, ``masks.causal()``, ``masks.lengths``, ``masks.padding``, joined by ``&``; applied
        in addition to the clusters.
      implementation: of ``attention``.

    Returns:
      ``[*B T N D]`` in the query's dtype; 0 for a query whose cluster has no visible key.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: any other mask.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import routing_attention
    >>> q = np.float32([[1], [-1]]).reshape(2, 1, 1)
    >>> v = np.float32([[5], [7]]).reshape(2, 1, 1)
    >>> routing_attention(q, q, v, np.float32([[[1], [-1]]])).ravel().tolist()  # one cluster each
    [5.0, 7.0]

    Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers".
    """
    check_types({"query": query, "key": key, "value": value, "scale": scale})
    sizes = check_query_key_value(query, key, value)
    _check_centroids(centroids, sizes.K, sizes.H)
    padding = as_causal_padding(mask, sizes, "routing_attention")
    q_ids = _clusters_of_heads(query, centroids, padding.queries)  # [*B N T]
    k_ids = jnp.repeat(_clusters_of_heads(key, centroids, padding.keys), sizes.G, axis=-2)
    q_order, k_order = (jnp.argsort(ids, axis=-1).astype(jnp.int32) for ids in (q_ids, k_ids))

    # Heads become examples of one head, since each is sorted in its own order.
    def sort(x: Any, order: jax.Array) -> jax.Array:
        heads = jnp.swapaxes(jnp.asarray(x), -2, -3)
        heads = jnp.repeat(heads, sizes.N // heads.shape[-3], axis=-3)
        return jnp.take_along_axis(heads, order[..., None], axis=-2)[..., None, :]

    same_cluster = masks.segments(
        jnp.take_along_axis(q_ids, q_order, axis=-1), jnp.take_along_axis(k_ids, k_order, axis=-1)
    )
    out = attention(
        sort(query, q_order),
        sort(key, k_order),
        sort(value, k_order),
        mask=same_cluster & masks.causal() if padding.causal else same_cluster,
        scale=scale,
        implementation=implementation,
        query_positions=q_order if padding.causal else None,
        key_positions=k_order if padding.causal else None,
    )[..., 0, :]
    inverse = jnp.argsort(q_order, axis=-1)
    return jnp.swapaxes(jnp.take_along_axis(out, inverse[..., None], axis=-2), -2, -3)


def update_centroids(
    centroids: Centroids,
    query: Query,
    key: Key,
    *,
    decay: float = 0.999,
    mask: MaskLike = None,
) -> Float[Array, "K C H"]:
    """One step of k-means on the queries and keys of a batch::

        centroid_c' = decay centroid_c + (1 - decay) (mean of queries of c + mean of keys of c) / 2

    A cluster without queries moves toward the mean of its keys, and the other way round; one with
    neither stays.

    Args:
      centroids: ``[K C H]``.
      query, key: ``[*B T N H]`` and ``[*B S K H]``.
      decay: of the moving average, in [0, 1].
      mask: None, ``masks.lengths`` or ``masks.padding``: padding does not count.

    Returns:
      The new centroids ``[K C H]``.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: any other mask.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import update_centroids
    >>> x = np.float32([[1, 0], [3, 0], [0, 1]])[:, None]
    >>> update_centroids(np.eye(2, dtype=np.float32)[None], x, x, decay=0.5)[0].tolist()
    [[1.5, 0.0], [0.0, 1.0]]

    Source: Roy et al. 2021, section 4.1.
    """
    check_types({"query": query, "key": key})
    sizes = check_query_key_value(query, key, key)
    _check_centroids(centroids, sizes.K, sizes.H)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    padding = as_causal_padding(mask, sizes, "update_centroids")
    centroids = jnp.asarray(centroids)
    total, sources = jnp.zeros_like(centroids), jnp.zeros(centroids.shape[:2], centroids.dtype)
    for x, real in ((query, padding.queries), (key, padding.keys)):
        ids = jnp.moveaxis(_clusters_of_heads(x, centroids, real), -2, 0)  # [N *B t]
        heads = jnp.moveaxis(jnp.asarray(x, centroids.dtype), -2, 0)
        heads = jnp.where(ids[..., None] >= 0, heads, 0).reshape(sizes.K, -1, sizes.H)
        own = jax.nn.one_hot(ids.reshape(sizes.K, -1), centroids.shape[1], dtype=centroids.dtype)
        count = own.sum(axis=1)
        mean = jnp.einsum("krc,krh->kch", own, heads) / jnp.maximum(count, 1)[..., None]
        total, sources = total + mean, sources + (count > 0).astype(sources.dtype)
    mean = total / jnp.maximum(sources, 1)[..., None]
    moved = decay * centroids + (1 - decay) * mean
    return jax.lax.stop_gradient(jnp.where(sources[..., None] > 0, moved, centroids))


def _clusters_of_heads(
    x: Any, centroids: Any, real: Bool[Array, "*B t"] | None
) -> Int[Array, "*B N t"]:
    """The cluster of each query or key ``[*B t N H]``; -1 for padding."""
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
