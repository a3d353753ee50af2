"""The running softmax: start, update block by block, merge, finish; and zeros for masked rows.

Over any split of the keys into blocks, with ``s`` the logits of one block,

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
from jaxtyping import Array, Float


def zero_masked(x: Any, keep: Any | None) -> Any:
    """``x`` with zeros where ``keep`` is False; None keeps everything.

    Masked queries, keys and values may hold NaN or inf, and ``0 * nan`` is ``nan``: they are zeroed
    before any product.

    Args:
      x: an array ``[r ...]``.
      keep: bool, the shape of the first axes of ``x``: ``[r]`` keeps or zeros whole rows.

    >>> x = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
    >>> zero_masked(x, jnp.array([True, False])).tolist()
    [[1.0, 2.0], [0.0, 0.0]]
    """
    if keep is None:
        return x
    keep = jnp.expand_dims(keep, tuple(range(jnp.ndim(keep), jnp.ndim(x))))
    return jnp.where(keep, x, jnp.zeros_like(x))


class State(NamedTuple):
    """The softmax over the keys taken into account so far, for ``t`` queries."""

    maximum: Float[Array, " t"]  # m
    total: Float[Array, " t"]  # l
    weighted: Float[Array, "t D"]  # a


def start(t: int, D: int, dtype: Any) -> State:
    """No keys yet."""
    return State(jnp.full((t,), -jnp.inf, dtype), jnp.zeros((t,), dtype), jnp.zeros((t, D), dtype))


def finite(m: jax.Array) -> jax.Array:
    """``m``, or 0 where ``m`` is ``-inf``: safe to subtract from ``-inf``, which gives no NaN."""
    return jnp.where(m == -jnp.inf, jnp.zeros_like(m), m)


def rows(s: Float[Array, "t s"]) -> Float[Array, "t s"]:
    """The softmax of each row; 0 for a row of ``-inf``.

    >>> rows(jnp.array([[0.0, 0.0, -jnp.inf], [-jnp.inf] * 3])).tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    """
    e = jnp.exp(s - jax.lax.stop_gradient(finite(s.max(axis=-1, initial=-jnp.inf)))[:, None])
    total = e.sum(axis=-1)
    return e / (total + (total == 0).astype(s.dtype))[:, None]


def update(
    state: State,
    logits: Float[Array, "t s"],
    value: Float[Array, "s D"],
    kept: Float[Array, "t s"] | None = None,
) -> State:
    """The state after one more block of keys.

    Args:
      state: of the keys so far.
      logits: ``[t s]``; ``-inf`` masks a key.
      value: ``[s D]``.
      kept: the factor by which dropout multiplies each probability; the normaliser leaves it out.

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
        state.weighted * shrink[:, None] + (p if kept is None else p * kept) @ value,
    )


def merge(a: State, b: State) -> State:
    """The state of both sets of keys together.

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
      sink: an extra logit in the denominator, a scalar.
    """
    m, total, weighted = state
    if sink is not None:
        m = jnp.maximum(m, sink)
        shrink = jnp.exp(state.maximum - finite(m))
        total, weighted = total * shrink + jnp.exp(sink - finite(m)), weighted * shrink[:, None]
    empty = total == 0
    safe = jnp.where(empty, jnp.ones_like(total), total)
    return weighted / safe[:, None], finite(m), jnp.where(empty, -jnp.inf, jnp.log(safe))
