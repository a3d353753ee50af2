"""Materialised attention: the readable implementation, and the fast one for short sequences.

One head of one example below, in the order that the whole library keeps; ``lift`` maps it over
heads and examples. It makes arrays of ``T x S``, and JAX differentiates it as often as one likes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attention_jax.backends.call import Call, Head
from attention_jax.backends.heads import over_heads_and_examples
from attention_jax.backends.tile import (
    apply_scores,
    clean,
    product,
    rows_or_zero,
    seen_values,
    visible,
    whole,
)
from attention_jax.core import dropout
from attention_jax.core.axes import LSE_NAME, OUT_NAME, Sizes, accumulation_dtype
from attention_jax.core.softmax import finite
from attention_jax.scores import Masking


class Logits(NamedTuple):
    """What output, weights and lse of one head of one example are made of."""

    s: jax.Array  # [T S], less m; -inf where hidden
    sink: jax.Array | None  # [T], less m
    m: jax.Array  # [T], the largest of a row
    sees: jax.Array | None  # bool [T]: the query sees some key; None: every query does
    value: jax.Array  # [S D], without hidden rows


def scored(head: Head) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """``s = scale * q k^T -> scores -> mask``: logits, which queries see, values that are seen."""
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
    s = head.scale.astype(dtype) * product(q, k, 1, 1)
    s = apply_scores(s, scores, seen, head.b, head.n, 0, 0)
    v = seen_values(s, v, head.score)
    return s, None if seen is None else seen.queries, v


def logits(head: Head) -> Logits:
    """The logits of ``scored``, less the largest of each row."""
    s, sees, v = scored(head)
    dtype = s.dtype
    m = s.max(axis=-1, initial=-jnp.inf)
    if any(score.MASKING is Masking.UNKNOWN for score in head.score) or s.shape[1] == 0:
        sees = m != -jnp.inf
    sink = None if head.sink is None else head.sink.astype(dtype)
    if sink is not None:
        m = finite(jnp.maximum(m, sink))
    elif sees is not None:  # a maximum rather than a selection: XLA fuses it with the products
        m = jnp.maximum(m, jnp.where(sees, -jnp.inf, 0.0).astype(dtype))
    # The result does not depend on what is subtracted, so its gradient must not either.
    m = jax.lax.stop_gradient(m)
    return Logits(s - m[:, None], None if sink is None else sink - m, m, sees, v)


def exponentials(
    s: jax.Array, sink: jax.Array | None, sees: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``e_ij = exp s_ij``, ``total_i = sum_j e_ij + exp sink``, 1 where that is 0, and its log."""
    e = jnp.exp(s)
    total = e.sum(axis=-1)
    empty = None if sees is None else ~sees
    if sink is not None:
        total = total + jnp.exp(sink)
        empty = total == 0
    if empty is None:
        return e, total, jnp.log(total)
    total = total + empty.astype(s.dtype)
    return e, total, jnp.where(empty, -jnp.inf, jnp.log(total))


@jax.custom_jvp
def average(
    s: jax.Array,
    sink: jax.Array | None,
    v: jax.Array,
    sees: jax.Array | None,
    kept: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """``out_i = sum_j kept_ij p_ij v_j`` with ``p = e / total``, and ``log total``.

    Divided last, where it is smaller.
    """
    e, total, log_l = exponentials(s, sink, sees)
    return product(only(kept, e), v, 1, 0) / total[:, None], log_l


@average.defjvp
def _average_jvp(primals: Any, tangents: Any) -> Any:
    """``dp = p (ds - sum_j p_j ds_j)``: of all that is ``T x S`` only ``p`` need be remembered.

    Where one key has all the weight the difference is exactly 0.
    """
    (s, sink, v, sees, kept), (ds, dsink, dv, _, _) = primals, tangents
    e, total, _ = exponentials(s, sink, sees)
    p = e / total[:, None]
    mean = (p * ds).sum(axis=-1)
    if sink is not None:
        mean = mean + jnp.exp(sink) / total * dsink
    dp = only(kept, p * (ds - mean[:, None]))
    dout = product(dp, v, 1, 0) + product(only(kept, p), dv, 1, 0)
    return average(s, sink, v, sees, kept), (dout, mean)


def only(kept: jax.Array | None, x: jax.Array) -> jax.Array:
    """``x`` with zeros for what dropout drops."""
    return x if kept is None else jnp.where(kept, x, jnp.zeros_like(x))


def attend(head: Head) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output ``[T D]``, ``m [T]`` and ``log l [T]``: ``out_i = sum_j p_ij v_j``."""
    s, sink, m, sees, v = logits(head)
    kept = None
    if head.dropout is not None:
        seed, threshold, keep_probability = head.dropout
        q, k = jnp.arange(s.shape[0])[:, None], jnp.arange(s.shape[1])[None, :]
        kept = dropout.keep(seed, head.b, head.n, q, k, threshold=threshold)
        v = v / keep_probability
    out, log_l = average(s, sink, v, sees, kept)
    # A row that sees nothing is 0 whatever its cotangent holds.
    return rows_or_zero(sees, out), m, log_l


def run(call: Call, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Output ``[*B T N D]`` and lse ``[*B T N]``."""

    def head(one: Head) -> tuple[jax.Array, jax.Array]:
        out, m, log_l = attend(one)
        return out.astype(one.query.dtype), m + log_l

    # Heads first: a batched product reads its batch from the outermost axes.
    query, key, value = (jnp.swapaxes(x, -2, -3) for x in call[:3])
    out, lse = over_heads_and_examples(
        head,
        call._replace(query=query, key=key, value=value),
        sizes,
        ("*B N T D", "*B T N"),
        inputs=("*B N T H", "*B K S H", "*B K S D"),
    )
    out = checkpoint_name(jnp.swapaxes(out, -2, -3), OUT_NAME)
    return out, checkpoint_name(lse, LSE_NAME)


def attention_weights(call: Call, sizes: Sizes) -> jax.Array:
    """Probabilities ``[*B N T S]``."""

    def weights(head: Head) -> tuple[jax.Array]:
        s, sink, _, sees, _ = logits(head)
        e, total, _ = exponentials(s, sink, sees)
        return (e / total[:, None],)

    (p,) = over_heads_and_examples(weights, call, sizes, ("*B N T S",))
    return p


def extra_bytes(sizes: Sizes, dtype: Any) -> int:
    """Logits and probabilities."""
    return 2 * math.prod(sizes.B) * sizes.N * sizes.T * sizes.S * accumulation_dtype(dtype).itemsize
