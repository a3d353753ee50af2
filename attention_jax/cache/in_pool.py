"""Attention of several rows to one pool of keys, in which each row sees its own."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from attention_jax import api, backends
from attention_jax.backends.arguments import bind
from attention_jax.backends.call import call_at_positions
from attention_jax.core.pytree import Leaf, Value, leaves, map_leaves
from attention_jax.masks import Mask
from attention_jax.scores import Score

V = TypeVar("V", bound=Value)


def attention_in_pool(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Mask,
    score: tuple[Score, ...],
    positions: tuple[Any, Any],
    implementation: Any = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """For each row ``r``::

        attention(query[r], key, value, mask=mask[r], score=score[r],
                  query_positions=positions[0][r], key_positions=positions[1][r])

    Args:
      query: ``[R T N H]``.
      key, value: ``[S K H]`` and ``[S K D]``, the pool, without the axis of rows.
      mask, score: with arrays ``[R ...]``, in the order of these queries and keys.
      positions: of the queries ``[R T]`` and of the keys ``[R S]``; -1 for keys of other rows.
      implementation, return_lse, **options: of ``attention``.
    """
    asked = backends.as_backends(implementation)
    constants = api.static_numbers(asked, backends.platform())

    def one_row(query: Any, rules: Any, positions: Any, row: Any) -> tuple[Any, Any]:
        mask, score = rules
        call = bind(
            query,
            key,
            value,
            mask=mask,
            score=score,
            query_positions=positions[0],
            key_positions=positions[1],
            static_numbers=constants,
            **options,
        )
        call = call_at_positions(call, None, None, examples=row)
        return api.run(call, asked, return_lse=return_lse)

    rows = len(query)
    rules = _squeezed(mask, "mask", rows), tuple(_squeezed(x, "score", rows) for x in score)
    mapped = jax.vmap(one_row, in_axes=(0, _axes_of_rows(rules), 0, 0))
    out, lse = mapped(query, rules, tuple(positions), jnp.arange(rows, dtype=jnp.int32))
    return (out, lse) if return_lse else out


def _has_rows(x: Any, leaf: Leaf) -> bool:
    """Whether the first axis of an array of a mask or score is that of the rows."""
    return "B" in leaf.axes and x.ndim == len(leaf.axes)


def _squeezed(value: V, argument: str, rows: int) -> V:
    """A mask or score without the axes of rows that have size 1."""

    def squeezed(x: Any, leaf: Leaf) -> Any:
        if not _has_rows(x, leaf) or x.shape[0] == rows:
            return x
        if x.shape[0] != 1:
            raise ValueError(
                f"{argument}: {leaf.name} has batch axes {x.shape[:1]}, expected ({rows},) (rows)"
            )
        return x[0]

    return map_leaves(squeezed, value)


def _axes_of_rows(rules: Any) -> Any:
    """Of each array, 0 if it has an axis of rows, else None."""
    arrays, structure = jax.tree.flatten(rules)
    every = zip(arrays, leaves(rules), strict=True)
    axes = [0 if _has_rows(x, leaf) else None for x, leaf in every]
    return jax.tree.unflatten(structure, axes)
