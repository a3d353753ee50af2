"""One head on plain arrays, without primitives, to debug a formula, a mask or a score.

``one_head_forward`` and ``one_head_backward`` run the same formulas and loops as the backend. Under
``jax.disable_jit()`` the loops run in Python, so a ``print`` or a breakpoint in ``formulas``, in a
mask's ``rule`` or in a score function shows concrete values, tile by tile.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.backends import primitive
from attention_jax.backends.arguments import MaskLike, Scale, ScoreLike, bind
from attention_jax.backends.blockwise import formulas
from attention_jax.backends.blockwise.run import Blockwise, plan
from attention_jax.backends.call import Head, complete, spec_of
from attention_jax.backends.primitive import RESULTS, Static
from attention_jax.core.axes import AnyArray


class Cotangents(NamedTuple):
    """The gradients of one head's operands."""

    query: Float[Array, "T H"]
    key: Float[Array, "S H"]
    value: Float[Array, "S D"]
    score: list[Any]  # for each floating array of the scores, and the cap of a softcap
    sink: Float[Array, ""] | None
    scale: Float[Array, ""]


def one_head_forward(
    query: Float[AnyArray, "T H"],
    key: Float[AnyArray, "S H"],
    value: Float[AnyArray, "S D"],
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sink: Any = None,
    scale: Scale = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    block: tuple[int, int] | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, " T"]]:
    """Output and lse of one head, in float32 or wider.

    Args:
      query, key, value: arrays without batch and head axes.
      mask, score: as for ``attention``; their arrays have no axes ``*B``, and ``N`` of size 1.
      sink: a scalar.
      scale, dropout_rate, dropout_key: as for ``attention``.
      block: queries and keys per block, at most the lengths; None chooses.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from attention_jax.backends.blockwise.one_head import one_head_forward
    >>> q = jnp.eye(4)
    >>> with jax.disable_jit():  # a breakpoint in formulas.forward stops at every tile
    ...     out, lse = one_head_forward(q, q, q, block=(2, 2))
    >>> np.allclose(out, jax.nn.softmax(q / 2) @ q)
    True
    """
    options = {"mask": mask, "score": score, "scale": scale}
    options |= {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
    static, arrays = _operands(query, key, value, sink=sink, block=block, options=options)
    out, m, log_l = formulas.forward(static, *arrays)
    return out, m + log_l


def one_head_backward(
    query: Float[AnyArray, "T H"],
    key: Float[AnyArray, "S H"],
    value: Float[AnyArray, "S D"],
    d_out: Float[AnyArray, "T D"],
    d_lse: Float[AnyArray, " T"] | None = None,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sink: Any = None,
    scale: Scale = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    block: tuple[int, int] | None = None,
) -> Cotangents:
    """Gradients of one head, given those of its output and optionally of its lse.

    Args:
      query, key, value, mask, score, sink, scale, dropout_rate, dropout_key, block: as for
        ``one_head_forward``.
      d_out: cotangent of the output.
      d_lse: cotangent of the lse; None is zero.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from attention_jax.backends.blockwise.one_head import one_head_backward
    >>> q = jnp.eye(4)
    >>> def loss(v):
    ...     return (jax.nn.softmax(q / 2) @ v).sum()
    >>> got = one_head_backward(q, q, q, jnp.ones((4, 4)), block=(2, 2))
    >>> np.allclose(got.value, jax.grad(loss)(q), atol=1e-6)
    True
    """
    options = {"mask": mask, "score": score, "scale": scale}
    options |= {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
    static, arrays = _operands(query, key, value, sink=sink, block=block, options=options)
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
    sink: Any,
    block: tuple[int, int] | None,
    options: dict[str, Any],
) -> tuple[Static, list[jax.Array]]:
    """One head as the flat operands of the formulas."""
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    sinks = None if sink is None else jnp.reshape(jnp.asarray(sink, query.dtype), (1,))
    with_heads = (x[:, None, :] for x in (query, key, value))
    call, sizes = complete(bind(*with_heads, sinks=sinks, **options))
    if 0 in (sizes.T, sizes.S):
        raise ValueError(f"query and key must not be empty, got lengths {sizes.T} and {sizes.S}")
    backend = Blockwise() if block is None else Blockwise(*block)
    block = backend.block(spec_of(call, sizes, platform="cpu"))

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
    schedule, loops = plan(head, block)
    leaves, structure = jax.tree.flatten(primitive.operands(head, schedule))
    static = Static(structure, loops, (), ((),) * len(leaves), ((),) * RESULTS)
    return static, [jnp.asarray(x) for x in leaves]
