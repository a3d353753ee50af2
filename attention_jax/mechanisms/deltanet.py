"""The delta rule (DeltaNet): linear attention that corrects what its state recalls for a key::

S_t   = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
out_t = scale * q_t S_t
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.backends.arguments import MaskLike, Scale
from attention_jax.core.axes import AnyArray, Key, Query, Value
from attention_jax.core.softmax import product
from attention_jax.mechanisms.causal_padding import keep_rows
from attention_jax.mechanisms.chunkwise import (
    CAUSAL,
    State,
    check_causal,
    check_gate,
    run_causal,
    scaled,
)
from attention_jax.mechanisms.packing import PackedState, documents_of

CHUNK = 64  # tokens


def delta_chunk(
    state: Float[Array, "H D"],
    q: Float[Array, "C H"],
    k: Float[Array, "C H"],
    v: Float[Array, "C D"],
    beta: Float[Array, "C 1"],
) -> tuple[Float[Array, "C D"], Float[Array, "H D"]]:
    """A chunk of one head, with ``u_t = beta_t (v_t - S_{t-1}^T k_t)`` for all tokens at once::

    (I + tril(diag(beta) K K^T, -1)) U = diag(beta) (V - K S)
    out = Q S + tril(Q K^T) U,   S' = S + K^T U
    """
    system = jnp.eye(k.shape[0], dtype=k.dtype) + jnp.tril(beta * product(k, k, 1, 1), -1)
    recalled = product(k, state, 1, 0)
    u = jax.scipy.linalg.solve_triangular(
        system, beta * (v - recalled), lower=True, unit_diagonal=True
    )
    out = product(q, state, 1, 0) + product(jnp.tril(product(q, k, 1, 1)), u, 1, 0)
    return out, state + product(k, u, 0, 0)


def packed_delta_chunk(
    state: Float[Array, "H D"],
    q: Float[Array, "C H"],
    starts: Float[Array, "C 1"],
    k: Float[Array, "C H"],
    v: Float[Array, "C D"],
    beta: Float[Array, "C 1"],
) -> tuple[Float[Array, "C D"], Float[Array, "H D"]]:
    """``delta_chunk`` with the state reset where a document starts."""
    documents = documents_of(starts)
    near = jnp.where(documents.same, beta * product(k, k, 1, 1), 0)
    system = jnp.eye(k.shape[0], dtype=k.dtype) + jnp.tril(near, -1)
    recalled = product(keep_rows(documents.first, k), state, 1, 0)
    u = jax.scipy.linalg.solve_triangular(
        system, beta * (v - recalled), lower=True, unit_diagonal=True
    )
    pairs = jnp.tril(jnp.where(documents.same, product(q, k, 1, 1), 0))
    out = product(keep_rows(documents.first, q), state, 1, 0) + product(pairs, u, 1, 0)
    return out, documents.carry(state) + product(keep_rows(documents.last, k), u, 0, 0)


def delta_rule(
    query: Query,
    key: Key,
    value: Value,
    beta: Float[AnyArray, "*B S K"],
    *,
    mask: MaskLike = CAUSAL,
    segments: Any = None,
    scale: Scale = None,
    state: State | PackedState | None = None,
    return_state: bool = False,
) -> Any:
    """Causal linear attention that replaces what its state recalls for a key, by the delta rule.

    For each token ``t`` of each head of each example::

        S_t   = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
        out_t = scale * q_t S_t

    Within a chunk, with ``u_t = beta_t (v_t - S_{t-1}^T k_t)``, this is the triangular system
    ``(I + tril(diag(beta) K K^T, -1)) U = diag(beta) (V - K S)``.

    Args:
      query, key, value, mask, segments, scale, state, return_state: as for
        ``gated_linear_attention``. Keys should have norm 1: ``beta = 1`` then replaces the recalled
        value by the new one.
      beta: ``[*B S K]``, the strength of the correction, in [0, 1] (stable up to 2).

    Returns:
      As ``gated_linear_attention``.

    Raises:
      As ``gated_linear_attention``.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import delta_rule
    >>> key = np.ones((2, 1, 1), np.float32)
    >>> value = np.float32([5, 7]).reshape(2, 1, 1)
    >>> delta_rule(key, key, value, key[..., 0]).ravel().tolist()  # 7 replaces 5
    [5.0, 7.0]

    Source: Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight Programmers"; Yang
    et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length".
    """
    sizes, padding = check_causal(query, key, value, mask, scale, "delta_rule")
    check_gate("beta", beta, sizes, "[*B S K]")
    column = jnp.asarray(beta)[..., None]
    return run_causal(
        delta_chunk,
        packed_delta_chunk,
        scaled(query, scale),
        (key, value, column),
        chunk=CHUNK,
        state_shape=(sizes.H, sizes.D),
        sizes=sizes,
        padding=padding,
        segments=segments,
        state=state,
        return_state=return_state,
        dtype=query.dtype,
    )
