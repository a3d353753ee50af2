"""Top-k attention: each query attends only to the keys with its ``k`` largest logits::

out_i = sum_{j in top_i} exp(s_ij) v_j / sum_{j in top_i} exp(s_ij)
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.backends.arguments import MaskLike, Scale, ScoreLike, bind
from attention_jax.backends.call import Head, complete
from attention_jax.backends.heads import over_heads_and_examples
from attention_jax.backends.xla import logits
from attention_jax.core import softmax
from attention_jax.core.axes import Key, Output, Query, Value, int_at_least


def topk_head(head: Head, *, k: int) -> tuple[Float[Array, "T D"]]:
    """The softmax over the ``k`` largest logits of each query, for one head of one example."""
    s, v, _ = logits(head)
    largest, top = jax.lax.top_k(s, min(k, s.shape[1]))  # [T k]
    return (jnp.einsum("tk,tkd->td", softmax.softmax_rows(largest), v[top]),)


def topk_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    k: int,
    mask: MaskLike = None,
    score: ScoreLike = (),
    scale: Scale = None,
) -> Output:
    """Softmax attention over the ``k`` largest logits of each query.

    With the logits ``s_ij`` of ``attention``, and ``top_i`` the visible keys with the ``k`` largest
    logits of query ``i`` (of equal logits, the first)::

        out_i = sum_{j in top_i} exp(s_ij) v_j / sum_{j in top_i} exp(s_ij)

    Logits still take ``O(T S)`` time and memory; the rest is ``O(T k D)``.

    Args:
      query, key, value, mask, score, scale: as for ``attention``.
      k: the largest number of keys a query attends to.

    Returns:
      ``[*B T N D]`` in the query's dtype; 0 for a query with no visible key.

    Raises:
      TypeError, ValueError: as ``attention``, or ``k`` is not an int of at least 1.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import topk_attention
    >>> q, key = np.ones((1, 1, 1), np.float32), np.float32([0, 9, 5]).reshape(3, 1, 1)
    >>> topk_attention(q, key, key, k=1).item()
    9.0

    Source: Gupta et al. 2021, "Memory-efficient Transformers via Top-k Attention".
    """
    int_at_least("k", k, 1)
    call, sizes = complete(bind(query, key, value, mask=mask, score=score, scale=scale))
    head = functools.partial(topk_head, k=k)
    (out,) = over_heads_and_examples(head, call, sizes, ("*B T N D",))
    return out.astype(call.query.dtype)
