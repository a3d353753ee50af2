"""One head on plain arrays, without primitives: to debug a formula, a mask or a score.

``one_head_forward`` and ``one_head_backward`` run the same formulas and loops as the backend. Under
``jax.disable_jit()`` the loops run in Python, so a ``print`` or a breakpoint in ``formulas``, in a
mask's ``rule`` or in a score function shows concrete numbers, tile by tile.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.backends import primitive
from attention_jax.backends.blockwise import formulas
from attention_jax.backends.blockwise.run import block_sizes, plan
from attention_jax.backends.call import Head, bind, complete
from attention_jax.backends.primitive import RESULTS, Static
from attention_jax.core.axes import AnyArray


class Cotangents(NamedTuple):
    """The gradients of one head's operands."""

    query: Float[Array, "T H"]
    key: Float[Array, "S H"]
    value: Float[Array, "S D"]
    score: list[Any]  # one for each floating array of the scores
    sink: Float[Array, ""] | None
    scale: Float[Array, ""]


def one_head_forward(
    query: Float[AnyArray, "T H"],
    key: Float[AnyArray, "S H"],
    value: Float[AnyArray, "S D"],
    *,
    block: tuple[int, int] | None = None,
    **options: Any,
) -> tuple[Float[Array, "T D"], Float[Array, " T"]]:
    """Output and lse of one head, in float32 or wider.

    Args:
      query, key, value: arrays without batch and head axes.
      block: queries and keys per block; None chooses.
      **options: ``mask``, ``score``, ``scale``, ``dropout_rate`` and ``dropout_key`` as for
        ``attention``; ``sink``, a number.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> q = jnp.eye(4)
    >>> with jax.disable_jit():  # a breakpoint in formulas.forward stops at every tile
    ...     out, lse = one_head_forward(q, q, q, block=(2, 2))
    >>> bool(jnp.allclose(out, jax.nn.softmax(q / 2) @ q))
    True
    """
    static, arrays = _operands(query, key, value, block=block, **options)
    out, m, log_l = formulas.forward(static, *arrays)
    return out, m + log_l


def one_head_backward(
    query: Float[AnyArray, "T H"],
    key: Float[AnyArray, "S H"],
    value: Float[AnyArray, "S D"],
    d_out: Float[AnyArray, "T D"],
    d_lse: Float[AnyArray, " T"] | None = None,
    *,
    block: tuple[int, int] | None = None,
    **options: Any,
) -> Cotangents:
    """Gradients of one head, given those of its output and, if it is used, of its lse.

    Args:
      query, key, value, block, **options: as for ``one_head_forward``.
      d_out: cotangent of the output.
      d_lse: cotangent of the lse; None is zero.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> q = jnp.eye(4)
    >>> def loss(v):
    ...     return (jax.nn.softmax(q / 2) @ v).sum()
    >>> got = one_head_backward(q, q, q, jnp.ones((4, 4)), block=(2, 2))
    >>> bool(jnp.allclose(got.value, jax.grad(loss)(q), atol=1e-6))
    True
    """
    static, arrays = _operands(query, key, value, block=block, **options)
    out, m, log_l = formulas.forward(static, *arrays)
    d_lse = jnp.zeros_like(log_l) if d_lse is None else jnp.asarray(d_lse, log_l.dtype)
    count = primitive.num_differentiable(static.structure)
    wrt = tuple(i for i in range(count) if jnp.issubdtype(arrays[i].dtype, jnp.inexact))
    one = ((),)  # no mapped axes
    static = dataclasses.replace(
        static, in_dims=static.in_dims + one * (RESULTS + 2), out_dims=one * len(wrt), wrt=wrt
    )
    d_out = jnp.asarray(d_out, out.dtype)
    found = dict(
        zip(wrt, formulas.backward(static, *arrays, out, m, log_l, d_out, d_lse), strict=True)
    )
    index = formulas.operand_index(static)
    return Cotangents(
        found[index.query],
        found[index.key],
        found[index.value],
        [found[i] for i in index.score if i in found],
        None if index.sink is None else found[index.sink],
        found[index.scale],
    )


def _operands(
    query: Any,
    key: Any,
    value: Any,
    *,
    block: tuple[int, int] | None,
    sink: Any = None,
    **options: Any,
) -> tuple[Static, list[jax.Array]]:
    """One head as the flat operands of the formulas."""
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    sinks = None if sink is None else jnp.reshape(jnp.asarray(sink, query.dtype), (1,))
    with_heads = (x[:, None, :] for x in (query, key, value))
    call, sizes = complete(bind(*with_heads, sinks=sinks, **options))

    def of_head(x: Any) -> Any:
        return x.at(0, 0, slice(None), slice(None))

    head = Head(
        query,
        key,
        value,
        mask=None if call.mask is None else of_head(call.mask),
        score=tuple(map(of_head, call.score)),
        sink=None if sinks is None else sinks[0],
        scale=call.scale,
        dropout=call.dropout,
        b=jnp.int32(0),
        n=jnp.int32(0),
    )
    schedule, loops = plan(head, block or block_sizes(sizes.T, sizes.S, head.mask))
    leaves, structure = jax.tree.flatten(primitive.operands(head, schedule))
    static = Static(structure, loops, (), ((),) * len(leaves), ((),) * RESULTS)
    return static, [jnp.asarray(x) for x in leaves]
