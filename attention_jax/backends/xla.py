"""Materialized attention: the formula in plain JAX, and the fast path for short sequences.

``attend`` computes one head of one example, and ``heads`` maps it over heads and examples. It
creates arrays of ``T x S``, and JAX can differentiate it to any order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attention_jax.backends import chunks
from attention_jax.backends.call import Backend, Call, Head, Results, Spec
from attention_jax.backends.heads import over_heads_and_examples
from attention_jax.backends.tile import (
    Visible,
    apply_scores,
    scores_of_visible,
    unmasked_values,
    visible_pairs,
    whole,
)
from attention_jax.core import dropout, softmax
from attention_jax.core.axes import LSE_NAME, OUT_NAME, Sizes, accumulation_dtype
from attention_jax.core.softmax import product, zero_rows
from attention_jax.scores import Masking


def attend(head: Head) -> tuple[Float[Array, "T D"], Float[Array, " T"], Float[Array, " T"]]:
    """``softmax(scores(scale * q k^T), masked) v`` of one head: output, ``m`` and ``log l``.

    ``m`` is the largest logit of each row, and ``lse = m + log l``.
    """
    s, v, rows = logits(head)
    kept = None
    if head.dropout is not None:
        kept = dropout.keep_pairs(whole(head.dropout), head.b, head.n, s.shape)
        v = v / head.dropout.keep_probability
    out, m, log_l = softmax.average(s, v, visible_rows=rows, sink=head.sink, kept=kept)
    return zero_rows(rows, out), m, log_l


def logits(
    head: Head,
) -> tuple[Float[Array, "T S"], Float[Array, "S D"], Array | None]:
    """``s = scale * q k^T``, then the scores in order, then ``-inf`` where masked.

    Returns:
      The logits in float32 or wider, the values without masked rows, and which rows have a visible
      key, bool ``[T]`` (None: all).
    """
    q, k, v = (x.astype(accumulation_dtype(x.dtype)) for x in (head.query, head.key, head.value))
    mask, scores = whole(head.mask), whole(head.score)
    visible = visible_pairs(mask, scores, head.b, head.n, (q.shape[0], k.shape[0]), 0, 0)
    if visible is not None:  # NaN in masked rows must not reach a product
        q, k, v = visible.zero_rows(q, k, v)
        scores = scores_of_visible(scores, visible)
    s = head.scale.astype(q.dtype) * product(q, k, 1, 1)
    s = apply_scores(s, scores, visible, head.b, head.n, 0, 0)
    return s, unmasked_values(s, v, head.score), _rows(s, visible, head)


def _rows(s: jax.Array, visible: Visible | None, head: Head) -> jax.Array | None:
    """Which rows have a visible key; None: all."""
    if any(score.MASKING is Masking.UNKNOWN for score in head.score) or s.shape[1] == 0:
        return s.max(axis=-1, initial=-jnp.inf) != -jnp.inf
    return None if visible is None else visible.queries


@dataclasses.dataclass(frozen=True)
class XLA(Backend):
    """``attend`` on every head of every example, for any mask and score."""

    CHUNKS = True

    def why_unsupported(self, spec: Spec) -> str | None:
        return None

    def run(self, call: Call, spec: Spec) -> tuple[jax.Array, jax.Array]:
        def head(one: Head) -> tuple[jax.Array, jax.Array]:
            out, m, log_l = attend(one)
            return out.astype(one.query.dtype), m + log_l

        # Heads first: a batched product reads its batch from the outermost axes.
        query, key, value = (jnp.swapaxes(x, -2, -3) for x in (call.query, call.key, call.value))
        out, lse = over_heads_and_examples(
            head,
            call._replace(query=query, key=key, value=value),
            spec.sizes,
            ("*B N T D", "*B T N"),
            inputs=("*B N T H", "*B K S H", "*B K S D"),
        )
        out = checkpoint_name(jnp.swapaxes(out, -2, -3), OUT_NAME)
        return out, checkpoint_name(lse, LSE_NAME)

    def chunk(self, call: Call, spec: Spec) -> Results:
        return Results(*over_heads_and_examples(attend, call, spec.sizes, chunks.OUTPUTS))

    def chunk_cotangents(
        self, call: Call, spec: Spec, results: Results, wrt: Sequence[int], cotangents: Any
    ) -> list[jax.Array]:
        return chunks.cotangents_materialized(logits, call, spec, results, wrt, cotangents)

    def extra_bytes(self, spec: Spec) -> int:
        """Logits and probabilities."""
        z, itemsize = spec.sizes, accumulation_dtype(spec.dtype).itemsize
        return 2 * math.prod(z.B) * z.N * z.T * z.S * itemsize


def attention_weights(call: Call, sizes: Sizes) -> Float[Array, "*B N T S"]:
    """The attention probabilities of all heads of all examples."""

    def weights(head: Head) -> tuple[jax.Array]:
        s, _, rows = logits(head)
        return (softmax.probabilities(s, visible_rows=rows, sink=head.sink),)

    (p,) = over_heads_and_examples(weights, call, sizes, ("*B N T S",))
    return p
