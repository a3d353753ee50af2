"""Softmax-weighted averages: of whole rows, and running over blocks of keys.

Whole rows: ``average`` and ``probabilities``. Running: ``start``, ``update`` block by block,
``merge``, ``finish``. Over any split of the keys into blocks, with ``s`` the logits of one block,

    m = max s,   l = sum exp(s - m),   a = sum exp(s - m) v

describe the block. Two of them merge by rescaling both to the larger maximum, and at the end
``out = a / l`` and ``lse = m + log l``. Exact for logits of any size.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax";
Rabe and Staats 2021, "Self-attention Does Not Need O(n^2) Memory".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def finite(m: jax.Array) -> jax.Array:
    """``m``, or 0 where ``m`` is ``-inf``: safe to subtract from ``-inf``, which gives no NaN."""
    return jnp.where(m == -jnp.inf, jnp.zeros_like(m), m)


def softmax_rows(s: Float[Array, "t s"]) -> Float[Array, "t s"]:
    """The softmax of each row; 0 for a row of ``-inf``.

    >>> import jax.numpy as jnp
    >>> from attention_jax.core.softmax import softmax_rows
    >>> softmax_rows(jnp.array([[0.0, 0.0, -jnp.inf], [-jnp.inf] * 3])).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    """
    e = jnp.exp(s - jax.lax.stop_gradient(finite(s.max(axis=-1, initial=-jnp.inf)))[:, None])
    total = e.sum(axis=-1)
    return e / (total + (total == 0).astype(s.dtype))[:, None]


def average(
    s: Float[Array, "t s"],
    v: Float[Array, "s D"],
    *,
    visible_rows: Bool[Array, " t"] | None = None,
    sink: Float[Array, ""] | None = None,
    kept: Bool[Array, "t s"] | None = None,
) -> tuple[Float[Array, "t D"], Float[Array, " t"], Float[Array, " t"]]:
    """``out_i = sum_j kept_ij p_ij v_j`` with ``p_ij = exp(s_ij - lse_i)``, and the lse.

    Args:
      s: logits; ``-inf`` where masked.
      v: values.
      visible_rows: which rows have a visible key; None: all. The output of the others is arbitrary.
      sink: a further logit in the denominator.
      kept: the dropout mask; it does not change the lse. The caller divides ``v`` by the keep
        probability.

    Returns:
      Output, ``m`` and ``log l`` with ``lse = m + log l``; ``m`` is finite and counts as a constant
      in derivatives, because only the sum matters.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from attention_jax.core.softmax import average
    >>> s, v = jnp.array([[0.0, 1.0]]), jnp.array([[1.0], [2.0]])
    >>> out, m, log_l = average(s, v)
    >>> bool(jnp.allclose(out, jax.nn.softmax(s) @ v))
    True
    """
    s, sink, m = _less_maximum(s, sink, visible_rows)
    out, log_l = _average(s, sink, v, visible_rows, kept)
    return out, m, log_l


def probabilities(
    s: Float[Array, "t s"],
    *,
    visible_rows: Bool[Array, " t"] | None = None,
    sink: Float[Array, ""] | None = None,
) -> Float[Array, "t s"]:
    """``p_ij = exp(s_ij - lse_i)``; arguments as for ``average``."""
    s, sink, _ = _less_maximum(s, sink, visible_rows)
    e, total, _ = _exponentials(s, sink, visible_rows)
    return e / total[:, None]


def _less_maximum(
    s: jax.Array, sink: jax.Array | None, visible_rows: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Logits and sink less the largest logit ``m`` of each row, and ``m``."""
    m = s.max(axis=-1, initial=-jnp.inf)
    sink = None if sink is None else sink.astype(s.dtype)
    if sink is not None:
        m = finite(jnp.maximum(m, sink))
    elif (
        visible_rows is not None
    ):  # a maximum rather than a selection: XLA fuses it with the products
        m = jnp.maximum(m, jnp.where(visible_rows, -jnp.inf, 0.0).astype(s.dtype))
    m = jax.lax.stop_gradient(m)
    return s - m[:, None], None if sink is None else sink - m, m


def _exponentials(
    s: jax.Array, sink: jax.Array | None, visible_rows: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``e_ij = exp s_ij``, ``total_i = sum_j e_ij + exp sink``, 1 where that is 0, and its log."""
    e = jnp.exp(s)
    total = e.sum(axis=-1)
    empty = None if visible_rows is None else ~visible_rows
    if sink is not None:
        total = total + jnp.exp(sink)
        empty = total == 0
    if empty is None:
        return e, total, jnp.log(total)
    total = total + empty.astype(s.dtype)
    return e, total, jnp.where(empty, -jnp.inf, jnp.log(total))


@jax.custom_jvp
def _average(
    s: jax.Array,
    sink: jax.Array | None,
    v: jax.Array,
    visible_rows: jax.Array | None,
    kept: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """``average`` of logits less their maximum. Divided last, where it is smaller."""
    e, total, log_l = _exponentials(s, sink, visible_rows)
    return product(_dropped(kept, e), v, 1, 0) / total[:, None], log_l


@_average.defjvp
def _average_jvp(primals: Any, tangents: Any) -> Any:
    """``dp = p (ds - sum_j p_j ds_j)``: of all that is ``t x s`` only ``p`` is saved.

    If one key has all the weight the difference is exactly 0.
    """
    (s, sink, v, visible_rows, kept), (ds, dsink, dv, _, _) = primals, tangents
    e, total, _ = _exponentials(s, sink, visible_rows)
    p = e / total[:, None]
    mean = (p * ds).sum(axis=-1)
    if sink is not None:
        mean = mean + jnp.exp(sink) / total * dsink
    dp = _dropped(kept, p * (ds - mean[:, None]))
    dout = product(dp, v, 1, 0) + product(_dropped(kept, p), dv, 1, 0)
    return _average(s, sink, v, visible_rows, kept), (dout, mean)


def _dropped(kept: jax.Array | None, x: jax.Array) -> jax.Array:
    """``x`` with zeros where dropout drops."""
    return x if kept is None else jnp.where(kept, x, jnp.zeros_like(x))


def zero_rows(keep: Bool[Array, "*r"] | None, x: Float[Array, "*r ..."]) -> Any:
    """``x`` with zeros in the rows that are not kept; None keeps all.

    A selection, because masked queries, keys and values may hold NaN or inf, and ``0 * nan`` is
    ``nan``: they are zeroed before any product.

    Args:
      keep: the shape of the first axes of ``x``, or of size 1.
      x: rows of one or more axes.

    >>> import jax.numpy as jnp
    >>> from attention_jax.core.softmax import zero_rows
    >>> x = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
    >>> zero_rows(jnp.array([True, False]), x).tolist()
    [[1.0, 2.0], [0.0, 0.0]]
    """
    if keep is None:
        return x
    keep = jnp.expand_dims(keep, tuple(range(keep.ndim, x.ndim)))
    return jnp.where(keep, x, jnp.zeros_like(x))


def product(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """A matrix product over the given axes, in full precision of the operands' dtype."""
    return jax.lax.dot_general(
        a,
        b,
        (((contract_a,), (contract_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )


# --- Running over blocks of keys.


class State(NamedTuple):
    """What is known of the keys seen so far, for ``t`` queries."""

    maximum: Float[Array, " t"]  # m
    total: Float[Array, " t"]  # l
    weighted: Float[Array, "t D"]  # a


def start(t: int, D: int, dtype: Any) -> State:
    """No key seen yet."""
    return State(jnp.full((t,), -jnp.inf, dtype), jnp.zeros((t,), dtype), jnp.zeros((t, D), dtype))


def update(
    state: State,
    logits: Float[Array, "t s"],
    value: Float[Array, "s D"],
    dropout_factor: Float[Array, "t s"] | None = None,
) -> State:
    """The state after one more block of keys.

    Args:
      state: of the keys so far.
      logits: ``[t s]``; ``-inf`` masks a key.
      value: ``[s D]``.
      dropout_factor: what dropout multiplies each probability by; the normalizer leaves it out.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from attention_jax.core.softmax import finish, start, update
    >>> s, v = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[1.0], [2.0], [3.0]])
    >>> halves = update(update(start(1, 1, jnp.float32), s[:, :1], v[:1]), s[:, 1:], v[1:])
    >>> out, m, log_l = finish(halves)
    >>> lse = m + log_l
    >>> bool(jnp.allclose(out, jax.nn.softmax(s) @ v)), bool(jnp.allclose(lse, jax.nn.logsumexp(s)))
    (True, True)
    """
    m = jnp.maximum(state.maximum, logits.max(axis=-1))
    shift = finite(m)
    p = jnp.exp(logits - shift[:, None])
    shrink = jnp.exp(state.maximum - shift)
    return State(
        m,
        state.total * shrink + p.sum(axis=-1),
        state.weighted * shrink[:, None]
        + (p if dropout_factor is None else p * dropout_factor) @ value,
    )


def merge(a: State, b: State) -> State:
    """The state of both sets of keys together.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from attention_jax.core.softmax import finish, merge, start, update
    >>> s, v = jnp.array([[0.0, 1.0]]), jnp.array([[1.0], [2.0]])
    >>> empty = start(1, 1, jnp.float32)
    >>> merged = merge(update(empty, s[:, :1], v[:1]), update(empty, s[:, 1:], v[1:]))
    >>> bool(jnp.allclose(finish(merged)[0], jax.nn.softmax(s) @ v))
    True
    """
    m = jnp.maximum(a.maximum, b.maximum)
    shrink_a, shrink_b = jnp.exp(a.maximum - finite(m)), jnp.exp(b.maximum - finite(m))
    return State(
        m,
        a.total * shrink_a + b.total * shrink_b,
        a.weighted * shrink_a[:, None] + b.weighted * shrink_b[:, None],
    )


def finish(state: State, sink: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output ``[t D]``, ``m [t]`` and ``log l [t]`` with ``lse = m + log l``.

    A query with no visible key gives output 0 and ``log l = -inf``; ``m`` is finite.

    Args:
      state: of all keys.
      sink: an extra logit in the denominator, a scalar or ``[t]``: one for each query.
    """
    m, total, weighted = state
    if sink is not None:
        m = jnp.maximum(m, sink)
        shrink = jnp.exp(state.maximum - finite(m))
        total, weighted = total * shrink + jnp.exp(sink - finite(m)), weighted * shrink[:, None]
    empty = total == 0
    safe = jnp.where(empty, jnp.ones_like(total), total)
    return weighted / safe[:, None], finite(m), jnp.where(empty, -jnp.inf, jnp.log(safe))
