"""Inverted attention: the softmax runs over the queries, which compete for each key::

A_ij  = exp(s_ij) / sum_i' exp(s_i'j)        s: the logits of ``attention``
out_i = sum_j A_ij v_j
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.backends.arguments import MaskLike, Scale, ScoreLike, bind
from attention_jax.backends.call import Head, complete
from attention_jax.backends.heads import over_heads_and_examples
from attention_jax.backends.xla import logits
from attention_jax.core import softmax
from attention_jax.core.axes import Key, Output, Query, Value
from attention_jax.core.softmax import product


def log_softmax_over_queries(s: Float[Array, "T S"]) -> Float[Array, "T S"]:
    """``log A_ij = s_ij - log sum_i' exp s_i'j``; ``-inf`` for masked pairs."""
    m = jax.lax.stop_gradient(softmax.finite(s.max(axis=0, initial=-jnp.inf, keepdims=True)))
    total = jnp.exp(s - m).sum(axis=0, keepdims=True)
    return s - m - jnp.log(total + (total == 0).astype(s.dtype))


def inverted_head(head: Head) -> tuple[Float[Array, "T D"]]:
    """``out_i = sum_j A_ij v_j`` for one head of one example."""
    s, v, _ = logits(head)
    A = jnp.exp(log_softmax_over_queries(s))
    return (product(A, v, 1, 0),)


def inverted_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    scale: Scale = None,
) -> Output:
    """Softmax over the queries: each key distributes a weight of 1 among them.

    With the logits ``s_ij`` of ``attention``::

        A_ij  = exp(s_ij) / sum_i' exp(s_i'j)
        out_i = sum_j A_ij v_j

    Time and memory are ``O(T S)``.

    Args:
      query, key, value, mask, score, scale: as for ``attention``.

    Returns:
      ``[*B T N D]`` in the query's dtype; 0 for a query with no visible key.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import inverted_attention
    >>> q, v = np.zeros((2, 1, 1), np.float32), np.ones((3, 1, 1), np.float32)
    >>> inverted_attention(q, v, v).ravel().tolist()  # two queries share three ones
    [1.5, 1.5]

    Source: Tsai et al. 2020, "Capsules with Inverted Dot-Product Attention Routing".
    """
    call, sizes = complete(bind(query, key, value, mask=mask, score=score, scale=scale))
    (out,) = over_heads_and_examples(inverted_head, call, sizes, ("*B T N D",))
    return out.astype(call.query.dtype)
