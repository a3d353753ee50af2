"""Materialised attention: the readable implementation, and the fast one for short sequences.

One head of one example below, in the order that the whole library keeps; ``lift`` maps it over
heads and examples. It makes arrays of ``T x S``, and JAX differentiates it as often as one likes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax import dropout
from attention_jax.axes import Sizes, accumulation_dtype
from attention_jax.lift import Call, Head, over_heads_and_examples
from attention_jax.softmax import finite
from attention_jax.tiles import (
    apply_scores,
    clean,
    product,
    rows_or_zero,
    seen_values,
    visible,
    whole,
)


def weights(head: Head) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Probabilities ``p [T S]``, ``m [T]`` and ``log l [T]``, and values without hidden rows.

    s = scale * q k^T -> scores -> mask
    lse = log(sum_j exp s_j + exp sink),  p = exp(s - lse)
    """
    dtype = accumulation_dtype(head.query.dtype)
    q, k, v = (x.astype(dtype) for x in head[:3])
    T, S = q.shape[0], k.shape[0]
    scores = whole(head.score)
    seen = visible(whole(head.mask), scores, head.b, head.n, (T, S), 0, 0)
    if seen is not None:
        q, k, v = (
            rows_or_zero(r, x)
            for r, x in zip((seen.queries, seen.keys, seen.keys), (q, k, v), strict=True)
        )
        scores = clean(scores, seen)
    s = product(q * head.scale.astype(dtype), k, 1, 1)
    s = apply_scores(s, scores, seen, head.b, head.n, 0, 0)
    v = seen_values(s, v, head.score)

    m = s.max(axis=-1, initial=-jnp.inf)
    if head.sink is not None:
        m = jnp.maximum(m, head.sink.astype(dtype))
    # The result does not depend on what is subtracted, so its gradient must not either.
    m = jax.lax.stop_gradient(finite(m))
    e = jnp.exp(s - m[:, None])
    total = e.sum(axis=-1)
    if head.sink is not None:
        total = total + jnp.exp(head.sink.astype(dtype) - m)
    empty = total == 0
    total = jnp.where(empty, jnp.ones_like(total), total)
    log_l = jnp.where(empty, -jnp.inf, jnp.log(total))
    return e / total[:, None], m, log_l, v


def attend(head: Head, *, dropout_rate: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output ``[T D]``, ``m [T]`` and ``log l [T]``: ``out_i = sum_j p_ij v_j``."""
    p, m, log_l, v = weights(head)
    some = None if head.mask is None and not head.score else (p > 0).any(axis=-1)
    if head.seed is not None:
        q, k = jnp.arange(p.shape[0])[:, None], jnp.arange(p.shape[1])[None, :]
        kept = dropout.keep(head.seed, head.b, head.n, q, k, rate=dropout_rate)
        p = jnp.where(kept, p / (1.0 - dropout_rate), jnp.zeros_like(p))
    # A row that sees nothing is 0 whatever its cotangent holds.
    return rows_or_zero(some, product(p, v, 1, 0)), m, log_l


def run(call: Call, sizes: Sizes, *, dropout_rate: float) -> tuple[jax.Array, jax.Array]:
    """Output ``[*B T N D]`` and lse ``[*B T N]``."""

    def head(one: Head) -> tuple[jax.Array, jax.Array]:
        out, m, log_l = attend(one, dropout_rate=dropout_rate)
        return out.astype(one.query.dtype), m + log_l

    out, lse = over_heads_and_examples(head, call, sizes, ("*B T N D", "*B T N"))
    return out, lse


def attention_weights(call: Call, sizes: Sizes) -> jax.Array:
    """Probabilities ``[*B N T S]``."""
    (p,) = over_heads_and_examples(lambda head: weights(head)[:1], call, sizes, ("*B N T S",))
    return p


def extra_bytes(sizes: Sizes, dtype: Any) -> int:
    """Logits and probabilities."""
    return 2 * math.prod(sizes.B) * sizes.N * sizes.T * sizes.S * accumulation_dtype(dtype).itemsize
