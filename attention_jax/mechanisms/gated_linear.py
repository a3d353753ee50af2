"""Gated linear attention: a matrix state that decays by a gate at every token::

S_t   = diag(exp log_gate_t) S_{t-1} + k_t v_t^T
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
from attention_jax.mechanisms.chunkwise import (
    CAUSAL,
    State,
    check_causal,
    check_gate,
    run_causal,
    scaled,
)
from attention_jax.mechanisms.packing import PackedState

CHUNK = 64  # tokens
CHUNK_WITH_VECTOR_GATES = 16  # with a gate for each feature of a key, a chunk takes C x C x H


def gated_linear_chunk(
    state: Float[Array, "H D"],
    q: Float[Array, "C H"],
    k: Float[Array, "C H"],
    v: Float[Array, "C D"],
    g: Float[Array, " C #H"],
) -> tuple[Float[Array, "C D"], Float[Array, "H D"]]:
    """A chunk of one head, with the recurrence unrolled over its tokens::

    out_i = sum_{j<=i} (q_i . decay_ij k_j) v_j + (q_i decay_i) S
    S'    = decay_C S + sum_j (decay_Cj k_j) v_j^T
    decay_ij = exp(sum_{j<l<=i} g_l),   decay_i = exp(sum_{l<=i} g_l)
    """
    C = q.shape[0]
    distance = jnp.arange(C)[:, None] - jnp.arange(C)[None, :]
    # Each sum over j < l <= i is computed directly: a difference of two cumulative sums would lose
    # digits, and would be NaN after a gate of -inf.
    log_decay = jnp.cumsum(jnp.where(distance[..., None] > 0, g[:, None], 0.0), axis=0)
    log_decay = jnp.where(distance[..., None] >= 0, log_decay, -jnp.inf)
    decay = jnp.exp(log_decay)
    if g.shape[1] == 1:
        pairs = product(q, k, 1, 1) * decay[..., 0]
    else:
        pairs = jnp.einsum("ih,jh,ijh->ij", q, k, decay, precision=jax.lax.Precision.HIGHEST)
    from_start = jnp.exp(jnp.cumsum(g, axis=0))
    out = product(pairs, v, 1, 0) + product(q * from_start, state, 1, 0)
    return out, from_start[-1][:, None] * state + product(k * decay[-1], v, 0, 0)


def packed_gated_linear_chunk(
    state: Float[Array, "H D"],
    q: Float[Array, "C H"],
    starts: Float[Array, "C 1"],
    k: Float[Array, "C H"],
    v: Float[Array, "C D"],
    g: Float[Array, " C #H"],
) -> tuple[Float[Array, "C D"], Float[Array, "H D"]]:
    """``gated_linear_chunk`` with the state reset where a document starts: a gate of 0."""
    return gated_linear_chunk(state, q, k, v, jnp.where(starts > 0, -jnp.inf, g))


def gated_linear_attention(
    query: Query,
    key: Key,
    value: Value,
    log_gate: Float[AnyArray, "*B S K _"],
    *,
    mask: MaskLike = CAUSAL,
    segments: Any = None,
    scale: Scale = None,
    state: State | PackedState | None = None,
    return_state: bool = False,
) -> Any:
    """Causal linear attention with a state that decays by data-dependent gates.

    For each token ``t`` of each head of each example::

        S_t   = diag(exp log_gate_t) S_{t-1} + k_t v_t^T
        out_t = scale * q_t S_t

    that is ``out_i = scale * sum_{j<=i} sum_h q_ih k_jh exp(sum_{j<l<=i} log_gate_lh) v_j``, the
    form used within a chunk of tokens. Time ``O(T H D)``, memory linear in ``T``. The output is not
    divided by a sum of weights; models usually normalize it.

    Args:
      query, key, value: as for ``attention``, of one length.
      log_gate: logarithms of gates in [0, 1], of which ``-inf`` resets the state: ``[*B S K H]``,
        or ``[*B S K 1]`` for one gate per token, which is cheaper.
      mask: ``masks.causal()``, optionally with ``masks.lengths`` or ``masks.padding`` by ``&``:
        padding is skipped, gates included.
      scale: of the output; default ``1 / sqrt(H)``.
      segments: integers that broadcast to ``[*B T]``, for several documents packed into one row:
        the state is reset where the id changes, so that each run of equal ids is a document.
        Negative ids are padding, which is skipped.
      state: ``S [*B K H D]`` after the previous tokens; default 0. With ``segments`` a
        ``PackedState``, which also holds the id of the last token: the first token here continues
        its document if the ids are equal.
      return_state: whether to return the state after these tokens too.

    Returns:
      ``[*B T N D]`` in the query's dtype; with ``return_state`` also the state, in float32 or
      wider. Passing that state to the next call, of one token or many, resumes the sequence.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: any other mask.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import gated_linear_attention
    >>> one = np.ones((3, 1, 1), np.float32)
    >>> half = np.log(one / 2)
    >>> gated_linear_attention(one, one, one, half).ravel().tolist()
    [1.0, 1.5, 1.75]
    >>> gated_linear_attention(one, one, one, half, segments=np.array([4, 4, 7])).ravel().tolist()
    [1.0, 1.5, 1.0]

    Source: Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient
    Training".
    """
    sizes, padding = check_causal(query, key, value, mask, scale, "gated_linear_attention")
    check_gate("log_gate", log_gate, sizes, "[*B S K H]")
    return run_causal(
        gated_linear_chunk,
        packed_gated_linear_chunk,
        scaled(query, scale),
        (key, value, log_gate),
        chunk=CHUNK if log_gate.shape[-1] == 1 else CHUNK_WITH_VECTOR_GATES,
        state_shape=(sizes.H, sizes.D),
        sizes=sizes,
        padding=padding,
        segments=segments,
        state=state,
        return_state=return_state,
        dtype=query.dtype,
    )
