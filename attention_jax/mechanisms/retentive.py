"""Retention (RetNet): linear attention that decays at a constant rate per head::

out_i = scale * sum_{j<=i} decay^(i-j) (q_i . k_j) v_j
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attention_jax.backends.arguments import MaskLike, Scale
from attention_jax.core.axes import (
    AnyArray,
    Key,
    Query,
    Value,
    accumulation_dtype,
    check_float_array,
)
from attention_jax.mechanisms.chunkwise import CAUSAL, State, check_causal
from attention_jax.mechanisms.gated_linear import gated_linear_attention
from attention_jax.mechanisms.packing import PackedState


def retention(
    query: Query,
    key: Key,
    value: Value,
    *,
    decay: Float[AnyArray, " K"] | None = None,
    mask: MaskLike = CAUSAL,
    segments: Any = None,
    scale: Scale = None,
    state: State | PackedState | None = None,
    return_state: bool = False,
) -> Any:
    """Causal linear attention that decays with distance, at a constant rate per head.

    ::

        out_i = scale * sum_{j<=i} decay^(i-j) (q_i . k_j) v_j

    This is ``gated_linear_attention`` with the same gate for all tokens. The paper rotates queries
    and keys by their positions (``positions.rotary``) and normalizes each head of the output.

    Args:
      query, key, value, segments, scale, state, return_state: as for ``gated_linear_attention``.
      decay: one for each key-value head, in (0, 1]; default ``1 - 2^-5 .. 1 - 2^-12``, evenly in
        the exponent.
      mask: as for ``gated_linear_attention``; padding does not count toward the distance.

    Returns:
      As ``gated_linear_attention``.

    Raises:
      As ``gated_linear_attention``.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import retention
    >>> one = np.ones((3, 1, 1), np.float32)
    >>> retention(one, one, one, decay=np.float32([0.5])).ravel().tolist()
    [1.0, 1.5, 1.75]

    Source: Sun et al. 2023, "Retentive Network: A Successor to Transformer for Large Language
    Models".
    """
    sizes, _ = check_causal(query, key, value, mask, scale, "retention")
    log_decay = _log_decay(decay, sizes.K, accumulation_dtype(query.dtype))
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


def _log_decay(decay: Any, K: int, dtype: Any) -> Float[Array, " K"]:
    if decay is None:
        # Computed in float64 and then rounded: the float32 logarithm of a decay near 1 would have
        # only 4 digits.
        return jnp.asarray(np.log1p(-(2.0 ** -np.linspace(5, 12, K))), dtype)
    check_float_array("decay", decay)
    log_decay: jax.Array = jnp.log(jnp.asarray(decay, dtype))
    if log_decay.shape != (K,):
        raise ValueError(
            f"decay has shape {log_decay.shape}, expected [K] = ({K},), one per key-value head"
        )
    return log_decay
