"""Linear attention: the score of a query and a key is a product of features, so that sums of keys
and values can be made once for all queries."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.backends.call import check_types
from attention_jax.backends.heads import lift
from attention_jax.core.axes import (
    Key,
    Query,
    Value,
    accumulation_dtype,
    check_query_key_value,
    int_at_least,
)
from attention_jax.core.softmax import product
from attention_jax.mechanisms.causal_padding import only_seen, seen
from attention_jax.mechanisms.chunkwise import left_to_right, over_pieces
from attention_jax.mechanisms.packing import PackedState, of, packed, runs

PIECE = 64  # tokens computed at once where it is causal
LARGE = 1024  # where it is not
MOST = 80.0  # of the exponents of keys


class Features(NamedTuple):
    """What queries and keys become, ``[t H]`` to ``[t M]``, at least 0."""

    query: Callable[[jax.Array], jax.Array]
    key: Callable[[jax.Array], jax.Array]


def _elu_plus_1(x: jax.Array) -> jax.Array:
    return jax.nn.elu(x) + 1


ELU_PLUS_1 = Features(_elu_plus_1, _elu_plus_1)


def linear_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: Any = None,
    features: Features = ELU_PLUS_1,
    segments: Any = None,
    state: Float[Array, "*B K M D1"] | PackedState | None = None,
    return_state: bool = False,
) -> Any:
    """Attention whose weights are products of features.

    For each query ``i`` of each head of each example, with ``f`` the features::

        out_i = sum_j f(q_i) . f(k_j) v_j / sum_j f(q_i) . f(k_j)
              = f(q_i) S / f(q_i) z        S = sum_j f(k_j) v_j^T,   z = sum_j f(k_j)

    Time and memory are ``O((T + S) M D)``. Causal, ``S`` and ``z`` are those of the keys so far:
    they are the state, and a call with the state of the tokens before goes on after them, also
    by a single token.

    Args:
      query, key, value: as for ``attention``.
      mask: None, ``masks.causal()``, ``masks.lengths``, ``masks.padding``, joined by ``&``.
      features: of queries and keys; default ``elu(x) + 1``.
      segments: of documents in one row, see ``gated_linear_attention``; causal only.
      state: ``[*B K M D+1]``, ``S`` and beside it ``z``, of the tokens before; causal only. With
        ``segments`` a ``PackedState``.
      return_state: whether to return that after these tokens too.

    Returns:
      ``[*B T N D]`` in the query's dtype, 0 where the sum of the weights is; with
      ``return_state`` also the state, in float32 or wider.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: a mask that says something else.

    >>> import numpy as np
    >>> from attention_jax import masks
    >>> q, v = np.zeros((3, 1, 2), np.float32), np.float32([1, 3, 8]).reshape(3, 1, 1)
    >>> linear_attention(q, q, v, mask=masks.causal()).ravel().tolist()  # means of those so far
    [1.0, 2.0, 4.0]
    >>> _, state = linear_attention(q[:2], q[:2], v[:2], mask=masks.causal(), return_state=True)
    >>> one = slice(2, 3)
    >>> linear_attention(q[one], q[one], v[one], mask=masks.causal(), state=state).item()
    4.0

    Source: Katharopoulos et al. 2020, "Transformers are RNNs".
    """
    check_types({"query": query, "key": key, "value": value})
    sizes = check_query_key_value(query, key, value)
    found = seen(mask, sizes, "linear_attention")
    dtype = accumulation_dtype(query.dtype)
    # One value more makes the sum of the weights; a token that is not seen has neither.
    one = jnp.ones((*key.shape[:-1], 1), dtype)
    M = jax.eval_shape(features.key, jax.ShapeDtypeStruct((1, sizes.H), dtype)).shape[-1]
    if found.causal:
        several = packed(segments, state, found, sizes)
        found = several.found
        arrays: tuple[Any, ...] = (key, value, one)
        step = functools.partial(causal_piece, features)
        if several.starts is not None:
            arrays = (several.starts, *arrays)
            step = functools.partial(packed_piece, features)
        width = (M, sizes.D + 1)
        out, state = several.result(
            left_to_right(
                step, PIECE, sizes, found, query, arrays, width, several.state, True, query.dtype
            ),
            True,
        )
    elif state is not None or return_state or segments is not None:
        raise ValueError(
            "state, return_state and segments are of causal attention: give mask=masks.causal()"
        )
    else:
        (out,) = lift(
            lambda *arrays: (among_all(features, M, *arrays),),
            [
                only_seen(jnp.asarray(query, dtype), found.queries),
                *(only_seen(jnp.asarray(x, dtype), found.keys) for x in (key, value, one)),
            ],
            sizes,
            ("*B T N H", "*B S K H", "*B S K D", "*B S K D"),
            ("*B T N D",),
        )
    out = only_seen(out, found.queries).astype(query.dtype)
    return (out, state) if return_state else out


def among_all(
    features: Features, M: int, q: jax.Array, k: jax.Array, v: jax.Array, one: jax.Array
) -> jax.Array:
    """``f(Q) (f(K)^T V)`` of one head, as means; by pieces, which stay in the processor's cache."""

    def add(S: jax.Array, k: jax.Array, *values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return k[:, :0], S + product(features.key(k), jnp.concatenate(values, axis=1), 0, 0)

    def read(S: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        return means(product(features.query(q), S, 1, 0)), S

    _, S = over_pieces(add, jnp.zeros((M, v.shape[1] + 1), v.dtype), (k, v, one), LARGE)
    return over_pieces(read, S, (q,), LARGE)[0]


def causal_piece(
    features: Features, state: jax.Array, q: jax.Array, k: jax.Array, *values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As ``linear_piece``, of features, and of values and ones as means."""
    v = jnp.concatenate(values, axis=1)
    out, state = linear_piece(state, features.query(q), features.key(k), v)
    return means(out), state


def packed_piece(
    features: Features,
    state: jax.Array,
    q: jax.Array,
    starts: jax.Array,
    k: jax.Array,
    *values: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As ``causal_piece``, with a state that begins anew at ``starts [C 1]``."""
    run = runs(starts)
    q, k, v = features.query(q), features.key(k), jnp.concatenate(values, axis=1)
    pairs = jnp.tril(jnp.where(run.same, product(q, k, 1, 1), 0))
    out = product(pairs, v, 1, 0) + product(of(run.first, q), state, 1, 0)
    return means(out), run.kept(state) + product(of(run.last, k), v, 0, 0)


def linear_piece(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``out = tril(Q K^T) V + Q S``, ``S' = S + K^T V``, for one piece of one head."""
    pairs = jnp.tril(product(q, k, 1, 1))
    out = product(pairs, v, 1, 0) + product(q, state, 1, 0)
    return out, state + product(k, v, 0, 0)


def means(sums: jax.Array) -> jax.Array:
    """``[t D+1]`` to ``[t D]``: sums by that of the weights, which is last; 0 where that is 0."""
    total = sums[:, -1:]
    return jnp.where(total == 0, 0, sums[:, :-1] / jnp.where(total == 0, 1, total))


def performer_features(key: jax.Array, H: int, count: int) -> Features:
    """Random features whose products are the weights of softmax attention, on average.

    With ``x' = x / H^(1/4)`` and rows ``w_r ~ N(0, I)``, orthogonal within each ``H`` of them::

        f_r(x) = exp(w_r . x' - |x'|^2 / 2) / sqrt(count)
        E f(q) . f(k) = exp(q . k / sqrt(H))

    A query is multiplied by a factor of its own that makes its largest feature 1, which changes no
    weight. Keys cannot be, as they come one by one: their exponents, which may be ``|w_r|^2 / 2``,
    end at 80, which float32 can sum over many keys.

    Args:
      key: a JAX random key.
      H: width of queries and keys.
      count: features (M); the error falls as ``1 / sqrt(count)``.

    >>> import numpy as np
    >>> features = performer_features(jax.random.key(0), 4, 4096)
    >>> q, k = np.float32([[1, 0, 0, 1]]), np.float32([[1, 0, 0, 0], [0, 1, 0, 0]])
    >>> weights = features.query(q) @ features.key(k).T
    >>> bool(abs(weights[0, 0] / weights[0, 1] - np.exp(0.5)) < 0.05)
    True

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers".
    """
    int_at_least("H", H, 1)
    int_at_least("count", count, 1)
    blocks = -(-count // H)
    turns, lengths = jax.random.split(key)
    directions = jax.random.orthogonal(turns, H, (blocks,)).reshape(blocks * H, H)[:count]
    norms = jnp.linalg.norm(jax.random.normal(lengths, (count, H)), axis=-1, keepdims=True)
    W = norms * directions

    def exponents(x: Any) -> jax.Array:
        if x.shape[-1] != H:
            raise ValueError(f"features are of width H = {H}, got arrays of width {x.shape[-1]}")
        x = jnp.asarray(x) / H**0.25
        w = W.astype(x.dtype)
        products = jnp.einsum("...h,rh->...r", x, w, precision=jax.lax.Precision.HIGHEST)
        return products - jnp.sum(x**2, axis=-1, keepdims=True) / 2

    def of_query(x: Any) -> jax.Array:
        e = exponents(x)
        return jnp.exp(e - jax.lax.stop_gradient(e.max(axis=-1, keepdims=True)))

    def of_key(x: Any) -> jax.Array:
        return jnp.exp(jnp.minimum(exponents(x), MOST)) / math.sqrt(count)

    return Features(of_query, of_key)
