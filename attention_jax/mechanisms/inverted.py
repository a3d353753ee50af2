"""Attention whose softmax runs over the queries: they compete for the keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.backends.call import Head, MaskLike, Scale, ScoreLike, bind, complete
from attention_jax.backends.heads import over_heads_and_examples
from attention_jax.backends.xla import logits
from attention_jax.core import softmax
from attention_jax.core.axes import Key, Output, Query, Value
from attention_jax.core.softmax import product


def inverted_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    scale: Scale = None,
) -> Output:
    """What each query wins of the keys: a key's weights over all queries sum to 1.

    With the logits ``s_ij`` of ``attention``::

        A_ij  = exp(s_ij) / sum_i' exp(s_i'j)
        out_i = sum_j A_ij v_j

    Time and memory are ``O(T S)``.

    Args:
      query, key, value, mask, score, scale: as for ``attention``.

    Returns:
      ``[*B T N D]`` in the query's dtype; 0 for a query that sees no key.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> import numpy as np
    >>> q, v = np.zeros((2, 1, 1), np.float32), np.ones((3, 1, 1), np.float32)
    >>> inverted_attention(q, v, v).ravel().tolist()  # two queries share three ones
    [1.5, 1.5]

    Source: Tsai et al. 2020, "Capsules with Inverted Dot-Product Attention Routing".
    """
    return _run(_inverted, query, key, value, mask=mask, score=score, scale=scale)


def slot_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    scale: Scale = None,
) -> Output:
    """The mean of what each query, a slot, wins of the keys.

    With ``A`` of ``inverted_attention``, which says whose a key is::

        out_i = sum_j A_ij v_j / sum_j A_ij

    Computed as a softmax over keys of ``log A``, so that a slot that wins next to nothing still has
    the mean of it. The paper repeats this, with a recurrent unit from a slot and its mean to the
    next slot.

    Args:
      query, key, value, mask, score, scale: as for ``attention``.

    Returns:
      ``[*B T N D]`` in the query's dtype; 0 for a query that sees no key.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> import numpy as np
    >>> q, v = np.zeros((2, 1, 1), np.float32), np.ones((3, 1, 1), np.float32)
    >>> slot_attention(q, v, v).ravel().tolist()
    [1.0, 1.0]

    Source: Locatello et al. 2020, "Object-Centric Learning with Slot Attention", section 2.1.
    """
    return _run(_slots, query, key, value, mask=mask, score=score, scale=scale)


def _log_shares(s: jax.Array) -> jax.Array:
    """``log A = s_ij - log sum_i' exp s_i'j``, ``-inf`` where hidden."""
    m = jax.lax.stop_gradient(softmax.finite(s.max(axis=0, initial=-jnp.inf, keepdims=True)))
    total = jnp.exp(s - m).sum(axis=0, keepdims=True)
    return s - m - jnp.log(total + (total == 0).astype(s.dtype))


def _inverted(head: Head) -> tuple[jax.Array]:
    s, v, _ = logits(head)
    return (product(jnp.exp(_log_shares(s)), v, 1, 0),)


def _slots(head: Head) -> tuple[jax.Array]:
    s, v, _ = logits(head)
    return (product(softmax.rows(_log_shares(s)), v, 1, 0),)


def _run(head: Any, query: Any, key: Any, value: Any, **options: Any) -> jax.Array:
    call, sizes = complete(bind(query, key, value, **options))
    (out,) = over_heads_and_examples(head, call, sizes, ("*B T N D",))
    return out.astype(call.query.dtype)
