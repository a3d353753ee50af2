"""Softmax-weighted averages: of whole rows, and running over blocks of keys.

For whole rows: ``average`` and ``probabilities``. For a running softmax: ``start``, ``update`` for
each block, ``merge`` and ``finish``. The state of a set of keys with logits ``s`` is

    m = max s,   l = sum exp(s - m),   a = sum exp(s - m) v

Two states are merged by rescaling both to the larger maximum, and at the end ``out = a / l`` and
``lse = m + log l``. Logits of any size are safe, since no exponential exceeds 1.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax";
Rabe and Staats 2021, "Self-attention Does Not Need O(n^2) Memory".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def finite(m: jax.Array) -> jax.Array:
    """``m`` with 0 for ``-inf``, so that ``s - m`` is not NaN where both are ``-inf``."""
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
    >>> import numpy as np
    >>> from attention_jax.core.softmax import average
    >>> s, v = jnp.array([[0.0, 1.0]]), jnp.array([[1.0], [2.0]])
    >>> out, m, log_l = average(s, v)
    >>> np.allclose(out, jax.nn.softmax(s) @ v)
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
    elif visible_rows is not None:
        # A maximum rather than a select, because XLA fuses it with the products.
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
    """``average`` of logits less their maximum. Divides ``[T D]`` rather than ``[T S]``."""
    e, total, log_l = _exponentials(s, sink, visible_rows)
    return product(_dropped(kept, e), v, 1, 0) / total[:, None], log_l


@_average.defjvp
def _average_jvp(primals: Any, tangents: Any) -> Any:
    """``dp = p (ds - sum_j p_j ds_j)``: the only residual of size ``t x s`` is ``p``.

    The difference is exactly 0 if one key has all the weight.
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
    """``x`` with zeros where dropout drops a probability."""
    return x if kept is None else jnp.where(kept, x, jnp.zeros_like(x))


def zero_rows(keep: Bool[Array, "*r"] | None, x: Float[Array, "*r ..."]) -> Any:
    """``x`` with zeros in the rows that are not kept; None keeps all.

    Masked queries, keys and values may hold NaN or inf, and ``0 * nan`` is ``nan``, so they are
    replaced before any product.

    Args:
      keep: bool, broadcasts to the first axes of ``x``.
      x: rows, along one or more axes.

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
    """The running softmax of ``t`` queries over the keys so far."""

    maximum: Float[Array, " t"]  # m
    total: Float[Array, " t"]  # l
    weighted: Float[Array, "t D"]  # a


def start(t: int, D: int, dtype: Any) -> State:
    """The state before the first key."""
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
      dropout_factor: the factor of each probability; it does not affect the normalizer.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from attention_jax.core.softmax import finish, start, update
    >>> s, v = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[1.0], [2.0], [3.0]])
    >>> halves = update(update(start(1, 1, jnp.float32), s[:, :1], v[:1]), s[:, 1:], v[1:])
    >>> out, m, log_l = finish(halves)
    >>> lse = m + log_l
    >>> np.allclose(out, jax.nn.softmax(s) @ v), np.allclose(lse, jax.nn.logsumexp(s))
    (True, True)
    """
    m = jnp.maximum(state.maximum, logits.max(axis=-1))
    shift = finite(m)
    p = jnp.exp(logits - shift[:, None])
    rescale = jnp.exp(state.maximum - shift)
    return State(
        m,
        state.total * rescale + p.sum(axis=-1),
        state.weighted * rescale[:, None]
        + (p if dropout_factor is None else p * dropout_factor) @ value,
    )


def merge(a: State, b: State) -> State:
    """The state of the union of two sets of keys.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from attention_jax.core.softmax import finish, merge, start, update
    >>> s, v = jnp.array([[0.0, 1.0]]), jnp.array([[1.0], [2.0]])
    >>> empty = start(1, 1, jnp.float32)
    >>> merged = merge(update(empty, s[:, :1], v[:1]), update(empty, s[:, 1:], v[1:]))
    >>> np.allclose(finish(merged)[0], jax.nn.softmax(s) @ v)
    True
    """
    m = jnp.maximum(a.maximum, b.maximum)
    rescale_a, rescale_b = jnp.exp(a.maximum - finite(m)), jnp.exp(b.maximum - finite(m))
    return State(
        m,
        a.total * rescale_a + b.total * rescale_b,
        a.weighted * rescale_a[:, None] + b.weighted * rescale_b[:, None],
    )


def finish(state: State, sink: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output ``[t D]``, ``m [t]`` and ``log l [t]`` with ``lse = m + log l``.

    A query with no visible key gives output 0 and ``log l = -inf``; ``m`` is finite.

    Args:
      state: of all keys.
      sink: a further logit in the denominator, a scalar or ``[t]``, one for each query.
    """
    m, total, weighted = state
    if sink is not None:
        m = jnp.maximum(m, sink)
        rescale = jnp.exp(state.maximum - finite(m))
        total, weighted = total * rescale + jnp.exp(sink - finite(m)), weighted * rescale[:, None]
    empty = total == 0
    safe = jnp.where(empty, jnp.ones_like(total), total)
    return weighted / safe[:, None], finite(m), jnp.where(empty, -jnp.inf, jnp.log(safe))
