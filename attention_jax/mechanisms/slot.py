"""Slot attention: inverted attention, normalized to a mean over the keys of each slot::

A_ij  = exp(s_ij) / sum_i' exp(s_i'j)        s: the logits of ``attention``
out_i = sum_j A_ij v_j / sum_j A_ij
"""

from __future__ import annotations

from jaxtyping import Array, Float

from attention_jax.backends.arguments import MaskLike, Scale, ScoreLike, bind
from attention_jax.backends.call import Head, complete
from attention_jax.backends.heads import over_heads_and_examples
from attention_jax.backends.xla import logits
from attention_jax.core import softmax
from attention_jax.core.axes import Key, Output, Query, Value
from attention_jax.core.softmax import product
from attention_jax.mechanisms.inverted import log_softmax_over_queries


def slot_head(head: Head) -> tuple[Float[Array, "T D"]]:
    """``out_i = sum_j A_ij v_j / sum_j A_ij`` for one head of one example.

    ``A / sum_j A`` is computed as ``softmax_j(log A)``, which is accurate for a slot whose ``A``
    underflows.
    """
    s, v, _ = logits(head)
    log_A = log_softmax_over_queries(s)
    return (product(softmax.softmax_rows(log_A), v, 1, 0),)


def slot_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    scale: Scale = None,
) -> Output:
    """For each query, a slot, the mean of the values for which it competes with other slots.

    With ``A``, the softmax over queries of ``inverted_attention``::

        out_i = sum_j A_ij v_j / sum_j A_ij

    The paper iterates this, with a recurrent unit that updates each slot from its mean.

    Args:
      query, key, value, mask, score, scale: as for ``attention``.

    Returns:
      ``[*B T N D]`` in the query's dtype; 0 for a query with no visible key.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import slot_attention
    >>> q, v = np.zeros((2, 1, 1), np.float32), np.ones((3, 1, 1), np.float32)
    >>> slot_attention(q, v, v).ravel().tolist()
    [1.0, 1.0]

    Source: Locatello et al. 2020, "Object-Centric Learning with Slot Attention", section 2.1.
    """
    call, sizes = complete(bind(query, key, value, mask=mask, score=score, scale=scale))
    (out,) = over_heads_and_examples(slot_head, call, sizes, ("*B T N D",))
    return out.astype(call.query.dtype)
