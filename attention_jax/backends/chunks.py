"""A chunk of the keys: its share of the results, and of the cotangents given those of all keys.

With ``m`` and ``log_l`` those of all keys, sinks included, the probabilities of a chunk are final::

    p_ij  = exp(s_ij - m_i - log_l_i)

and so are its terms of every sum of the backward pass: the normalizer is not recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.backends.call import Call, Head, Results, Spec
from attention_jax.backends.heads import as_arrays, lift, over_heads_and_examples
from attention_jax.backends.primitive import HeadAttention
from attention_jax.backends.tile import whole
from attention_jax.core import dropout
from attention_jax.core.axes import Sizes
from attention_jax.core.pytree import leaves
from attention_jax.core.softmax import finite, product, zero_rows
from attention_jax.scores import Score

OUTPUTS = ("*B T N D", "*B T N", "*B T N")
Plan = Callable[[Head], tuple[Head, Any, Any]]  # -> what the primitives take


def operand_axes(call: Call) -> list[Any]:
    """The axes of query, key, value, the arrays of the scores, and the scale."""
    return ["*B T N H", "*B S K H", "*B S K D", *(x.axes for x in leaves(call.score)), ""]


def operands(call: Call) -> list[Any]:
    """Query, key, value, the arrays of the scores, and the scale."""
    return [*call[:3], *jax.tree.leaves(call.score), call.scale]


def by_primitive(attend: HeadAttention, plan: Plan, call: Call, sizes: Sizes) -> Results:
    """The results of a chunk."""

    def head(one: Head) -> Any:
        return attend.forward(*plan(one))

    return Results(*over_heads_and_examples(head, call, sizes, OUTPUTS))


def cotangents_by_primitive(
    attend: HeadAttention,
    plan: Plan,
    call: Call,
    sizes: Sizes,
    results: Results,
    wrt: Sequence[int],
    cotangents: Any,
    planned: Callable[[Head, Score], Score] | None = None,
) -> list[jax.Array]:
    """The transpose of the primitive ``tangent``, mapped over all heads of all examples.

    Args:
      planned: what the plan makes of each score of a head; None: it keeps them.
    """
    flat, axes, structure = as_arrays(call, sizes)
    every, every_axes = operands(call), operand_axes(call)

    def one(*xs: Any) -> Any:
        head: Head = jax.tree.unflatten(structure, xs[: len(flat)])
        rest = xs[len(flat) :]
        moving = dict(zip(wrt, rest[len(OUTPUTS) :], strict=True))
        if planned is not None:
            moving = _of_planned_scores(planned, head, moving)
        return attend.tangent(*plan(head), rest[: len(OUTPUTS)], moving)

    def tangents(*moving: Any) -> Any:
        letters = [*axes, *OUTPUTS, *(every_axes[i] for i in wrt)]
        return lift(one, [*flat, *results, *moving], sizes, letters, OUTPUTS[:2])

    return list(jax.linear_transpose(tangents, *(every[i] for i in wrt))(tuple(cotangents)))


def _of_planned_scores(
    planned: Callable[[Head, Score], Score], head: Head, moving: dict[int, Any]
) -> dict[int, Any]:
    """Tangents of operands after ``planned``, given those before it, by the number of the operand.

    A score none of whose arrays moves has no tangents: a kernel may lack some of its derivatives.
    """
    before = after = 3  # query, key and value come first
    result = {i: x for i, x in moving.items() if i < before}
    for score in head.score:
        given, structure = jax.tree.flatten(score)
        inner = [i for i in range(len(given)) if before + i in moving]

        def arrays(
            *changed: Any, given: Any = given, structure: Any = structure, inner: Any = inner
        ) -> list[Any]:
            every = list(given)
            for i, x in zip(inner, changed, strict=True):
                every[i] = x
            return jax.tree.leaves(planned(head, jax.tree.unflatten(structure, every)))

        primals = [given[i] for i in inner]
        found = jax.eval_shape(arrays, *primals)
        if inner:
            _, tangents = jax.jvp(arrays, primals, [moving[before + i] for i in inner])
            floats = (i for i, x in enumerate(found) if jnp.issubdtype(x.dtype, jnp.inexact))
            result |= {after + i: tangents[i] for i in floats}
        before += len(given)
        after += len(found)
    return result | {after + i - before: x for i, x in moving.items() if i >= before}


def materialized(
    logits: Callable[[Head], Any], head: Head, results: Results
) -> tuple[jax.Array, jax.Array]:
    """``sum_j p_ij v_j - (sum_j p_ij) out_i`` and ``sum_j p_ij`` over the keys of a chunk.

    Its vjp is the chunk's contribution to the gradient. The results, of all keys, are constant.
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

    def fn(*moving: Any) -> Any:
        given = list(every)
        for i, x in zip(wrt, moving, strict=True):
            given[i] = x
        query, key, value, *arrays, scale = given
        score = jax.tree.unflatten(structure, arrays)
        changed = call._replace(query=query, key=key, value=value, score=score, scale=scale)
        flat, axes, heads = as_arrays(changed, spec.sizes)

        def one(*xs: Any) -> Any:
            head: Head = jax.tree.unflatten(heads, xs[: len(flat)])
            return materialized(logits, head, Results(*xs[len(flat) :]))

        return lift(one, [*flat, *results], spec.sizes, [*axes, *OUTPUTS], OUTPUTS[:2])

    _, pull = jax.vjp(fn, *(every[i] for i in wrt))
    return list(pull(tuple(cotangents)))
