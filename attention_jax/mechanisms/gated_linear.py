"""Linear attention that forgets: by a constant, by gates, or by what it is told anew."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attention_jax.core.axes import AnyArray, Key, Query, Value, accumulation_dtype
from attention_jax.core.softmax import product
from attention_jax.masks import causal
from attention_jax.mechanisms.chunkwise import check_gate, checked, left_to_right
from attention_jax.mechanisms.packing import PackedState, of, packed, runs

PIECE = 64  # tokens computed at once
PIECE_OF_VECTORS = 16  # where each number of a key has its own gate: a piece takes C x C x H
CAUSAL = causal()

State = Float[Array, "*B K H D"]


def gated_linear_attention(
    query: Query,
    key: Key,
    value: Value,
    log_gate: Float[AnyArray, "*B S K _"],
    *,
    mask: Any = CAUSAL,
    segments: Any = None,
    scale: Any = None,
    state: State | PackedState | None = None,
    return_state: bool = False,
) -> Any:
    """Linear attention with a memory that fades as its gates say.

    For each token ``t`` of each head of each example::

        S_t   = diag(exp log_gate_t) S_{t-1} + k_t v_t^T
        out_t = scale * q_t S_t

    which is ``out_i = scale * sum_{j<=i} sum_h q_ih k_jh exp(sum_{j<l<=i} log_gate_lh) v_j``,
    computed so within pieces of tokens. Time ``O(T H D)``, and memory; nothing divides by a sum of
    weights: a norm usually follows.

    Args:
      query, key, value: as for ``attention``, of one length.
      log_gate: logarithms of gates in [0, 1], ``-inf`` forgets: ``[*B S K H]``, or ``[*B S K 1]``
        for all numbers of a key, which costs less.
      mask: ``masks.causal()``, with ``masks.lengths`` or ``masks.padding`` by ``&``: padding is
        passed over, gates included.
      scale: of the output; default ``1 / sqrt(H)``.
      segments: integers that broadcast to ``[*B T]``, for several documents in one row: the state
        is 0 again where a token has another id than the one before it. Negative is padding, which
        is passed over. Each run of one id is a document.
      state: ``S [*B K H D]`` after the tokens before; default 0. With ``segments`` a
        ``PackedState``, which also holds the id of the last token: the first token here goes on
        after it if it has the same id.
      return_state: whether to return that after these too.

    Returns:
      ``[*B T N D]`` in the query's dtype; with ``return_state`` also the state, in float32 or
      wider. A call with the state of the tokens before, also of one token, goes on after them.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: a mask that says something else.

    >>> one = np.ones((3, 1, 1), np.float32)
    >>> half = np.log(one / 2)
    >>> gated_linear_attention(one, one, one, half).ravel().tolist()
    [1.0, 1.5, 1.75]
    >>> gated_linear_attention(one, one, one, half, segments=np.array([4, 4, 7])).ravel().tolist()
    [1.0, 1.5, 1.0]

    Source: Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient
    Training".
    """
    sizes, found = checked(query, key, value, mask, scale, "gated_linear_attention")
    check_gate("log_gate", log_gate, sizes, (sizes.H, 1))
    several = packed(segments, state, found, sizes)
    if several.starts is not None:  # a gate of 0 forgets what was before
        log_gate = jnp.where(several.starts, -jnp.inf, jnp.asarray(log_gate))
    result = left_to_right(
        gated_piece,
        PIECE if log_gate.shape[-1] == 1 else PIECE_OF_VECTORS,
        sizes,
        several.found,
        _scaled(query, scale),
        (key, value, log_gate),
        (sizes.H, sizes.D),
        several.state,
        return_state,
        query.dtype,
    )
    return several.result(result, return_state)


def gated_piece(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One piece of one head: ``[C H]``, ``[C H]``, ``[C D]``, gates ``[C H]`` or ``[C 1]``."""
    C = q.shape[0]
    later = jnp.arange(C)[:, None] - jnp.arange(C)[None, :]
    # fade_ij = sum_{j<l<=i} g_l, each summed by itself: a difference of sums from the start would
    # lose digits, and be NaN after a gate of -inf.
    fade = jnp.cumsum(jnp.where(later[..., None] > 0, g[:, None], 0.0), axis=0)
    fade = jnp.where(later[..., None] >= 0, fade, -jnp.inf)
    decay = jnp.exp(fade)
    if g.shape[1] == 1:
        pairs = product(q, k, 1, 1) * decay[..., 0]
    else:
        pairs = jnp.einsum("ih,jh,ijh->ij", q, k, decay, precision=jax.lax.Precision.HIGHEST)
    before = jnp.exp(jnp.cumsum(g, axis=0))
    out = product(pairs, v, 1, 0) + product(q * before, state, 1, 0)
    return out, before[-1][:, None] * state + product(k * decay[-1], v, 0, 0)


def retention(
    query: Query,
    key: Key,
    value: Value,
    *,
    decay: Float[AnyArray, " K"] | None = None,
    mask: Any = CAUSAL,
    segments: Any = None,
    scale: Any = None,
    state: State | PackedState | None = None,
    return_state: bool = False,
) -> Any:
    """Linear attention whose memory fades at a constant rate of each head.

    ::

        out_i = scale * sum_{j<=i} decay^(i-j) (q_i . k_j) v_j

    It is ``gated_linear_attention`` with the same gate for all tokens. The paper turns queries and
    keys by their positions (``positions.rotary``) and normalises each head of the output.

    Args:
      query, key, value, segments, scale, state, return_state: as for ``gated_linear_attention``.
      decay: one for each key-value head, in (0, 1]; default ``1 - 2^-5 .. 1 - 2^-12``, evenly in
        the exponent.
      mask: as for ``gated_linear_attention``; tokens of padding do not count as distance.

    Returns:
      As ``gated_linear_attention``.

    Raises:
      As ``gated_linear_attention``.

    >>> one = np.ones((3, 1, 1), np.float32)
    >>> retention(one, one, one, decay=np.float32([0.5])).ravel().tolist()
    [1.0, 1.5, 1.75]

    Source: Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language
    Models".
    """
    sizes, _ = checked(query, key, value, mask, scale, "retention")
    dtype = accumulation_dtype(query.dtype)
    if decay is None:
        # In float64, and rounded last: in float32 the logarithm would keep 4 digits of a decay
        # near 1.
        log_decay = jnp.asarray(np.log1p(-(2.0 ** -np.linspace(5, 12, sizes.K))), dtype)
    else:
        log_decay = jnp.log(jnp.asarray(decay, dtype))
    if log_decay.shape != (sizes.K,):
        raise ValueError(
            f"decay has shape {log_decay.shape}, expected [K] = ({sizes.K},), one per key-value "
            f"head"
        )
    log_gate = jnp.broadcast_to(log_decay[:, None], (*sizes.B, sizes.S, sizes.K, 1))
    return gated_linear_attention(
        query,
        key,
        value,
        log_gate,
        mask=mask,
        segments=segments,
        scale=scale,
        state=state,
        return_state=return_state,
    )


def delta_rule(
    query: Query,
    key: Key,
    value: Value,
    beta: Float[AnyArray, "*B S K"],
    *,
    mask: Any = CAUSAL,
    segments: Any = None,
    scale: Any = None,
    state: State | PackedState | None = None,
    return_state: bool = False,
) -> Any:
    """Linear attention that corrects what its memory says of a key, rather than add to it.

    For each token ``t`` of each head of each example::

        S_t   = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
        out_t = scale * q_t S_t

    Within a piece, with ``u_t = beta_t (v_t - S_{t-1}^T k_t)``, this is the triangular system
    ``(I + tril(diag(beta) K K^T, -1)) U = diag(beta) (V - K S)``.

    Args:
      query, key, value, mask, segments, scale, state, return_state: as for
        ``gated_linear_attention``. Keys should have norm 1: then ``beta = 1`` replaces what was
        known of a key by the value.
      beta: ``[*B S K]``, how much to correct, in [0, 1] (up to 2 it stays stable).

    Returns:
      As ``gated_linear_attention``.

    Raises:
      As ``gated_linear_attention``.

    >>> key = np.ones((2, 1, 1), np.float32)
    >>> value = np.float32([5, 7]).reshape(2, 1, 1)
    >>> delta_rule(key, key, value, key[..., 0]).ravel().tolist()  # what it knew is replaced
    [5.0, 7.0]

    Source: Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight Programmers"; Yang
    et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length".
    """
    sizes, found = checked(query, key, value, mask, scale, "delta_rule")
    check_gate("beta", jnp.asarray(beta)[..., None], sizes, (1,))
    several = packed(segments, state, found, sizes)
    arrays = (key, value, jnp.asarray(beta)[..., None])
    result = left_to_right(
        delta_piece if several.starts is None else packed_delta_piece,
        PIECE,
        sizes,
        several.found,
        _scaled(query, scale),
        arrays if several.starts is None else (*arrays, several.starts),
        (sizes.H, sizes.D),
        several.state,
        return_state,
        query.dtype,
    )
    return several.result(result, return_state)


def packed_delta_piece(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As ``delta_piece``, with a state that begins anew at ``starts [C 1]``."""
    run = runs(starts)
    near = jnp.where(run.same, beta * product(k, k, 1, 1), 0)
    system = jnp.eye(k.shape[0], dtype=k.dtype) + jnp.tril(near, -1)
    known = product(of(run.first, k), state, 1, 0)
    u = jax.scipy.linalg.solve_triangular(
        system, beta * (v - known), lower=True, unit_diagonal=True
    )
    pairs = jnp.tril(jnp.where(run.same, product(q, k, 1, 1), 0))
    out = product(of(run.first, q), state, 1, 0) + product(pairs, u, 1, 0)
    return out, run.kept(state) + product(of(run.last, k), u, 0, 0)


def delta_piece(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One piece of one head: ``[C H]``, ``[C H]``, ``[C D]``, ``[C 1]``."""
    system = jnp.eye(k.shape[0], dtype=k.dtype) + jnp.tril(beta * product(k, k, 1, 1), -1)
    known = product(k, state, 1, 0)
    u = jax.scipy.linalg.solve_triangular(
        system, beta * (v - known), lower=True, unit_diagonal=True
    )
    out = product(q, state, 1, 0) + product(jnp.tril(product(q, k, 1, 1)), u, 1, 0)
    return out, state + product(k, u, 0, 0)


def _scaled(query: Any, scale: Any) -> jax.Array:
    """``scale * query``, by ``1 / sqrt(H)`` where there is none, in float32 or wider."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return jnp.asarray(query, accumulation_dtype(query.dtype)) * scale
