"""The backward pass of a chunk of the keys, given the results of all keys.

With ``m`` and ``log_l`` those of all keys, sinks included, a chunk has the final probabilities::

    p_ij = exp(s_ij - m_i - log_l_i)

so the gradients are plain sums over chunks, and no normalizer is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.backends.call import Call, Head, Results, Spec
from attention_jax.backends.heads import as_arrays, lift
from attention_jax.backends.tile import whole
from attention_jax.core import dropout
from attention_jax.core.pytree import leaves
from attention_jax.core.softmax import finite, product, zero_rows

OUTPUTS = ("*B T N D", "*B T N", "*B T N")


def operand_axes(call: Call) -> list[Any]:
    """The axes of query, key, value, the arrays of the scores, and the scale."""
    return ["*B T N H", "*B S K H", "*B S K D", *(x.axes for x in leaves(call.score)), ""]


def operands(call: Call) -> list[Any]:
    """Query, key, value, the arrays of the scores, and the scale."""
    return [*call[:3], *jax.tree.leaves(call.score), call.scale]


def materialized(
    logits: Callable[[Head], Any], head: Head, results: Results
) -> tuple[jax.Array, jax.Array]:
    """``sum_j p_ij v_j - (sum_j p_ij) out_i`` and ``sum_j p_ij`` over the keys of a chunk.

    With ``results``, of all keys, held constant, its vjp is the chunk's contribution to the
    gradients.

    Args:
      logits: from a head to its logits ``[T S]``, values and the rows with a visible key.
    """
    s, v, rows = logits(head)
    out, m, log_l = results
    p = jnp.exp((s - m[:, None]) - finite(log_l)[:, None])
    dropped = p
    if head.dropout is not None:
        kept = dropout.keep_pairs(whole(head.dropout), head.b, head.n, s.shape)
        dropped = jnp.where(kept, p / head.dropout.keep_probability, jnp.zeros_like(p))
    total = p.sum(-1)
    weighted = product(dropped, v, 1, 0) - total[:, None] * out
    return zero_rows(rows, weighted), zero_rows(rows, total)


def cotangents_materialized(
    logits: Callable[[Head], Any],
    call: Call,
    spec: Spec,
    results: Results,
    wrt: Sequence[int],
    cotangents: Any,
) -> list[jax.Array]:
    """The cotangents of ``materialized``, for all heads of all examples."""
    every = operands(call)
    structure = jax.tree.structure(call.score)

    def fn(*varying: Any) -> Any:
        given = list(every)
        for i, x in zip(wrt, varying, strict=True):
            given[i] = x
        query, key, value, *arrays, scale = given
        score = jax.tree.unflatten(structure, arrays)
        changed = call._replace(query=query, key=key, value=value, score=score, scale=scale)
        flat, axes, heads = as_arrays(changed, spec.sizes)

        def one(*xs: Any) -> Any:
            head: Head = jax.tree.unflatten(heads, xs[: len(flat)])
            return materialized(logits, head, Results(*xs[len(flat) :]))

        return lift(one, [*flat, *results], spec.sizes, [*axes, *OUTPUTS], OUTPUTS[:2])

    _, vjp = jax.vjp(fn, *(every[i] for i in wrt))
    return list(vjp(tuple(cotangents)))
