"""Multi-head latent attention (MLA): keys and values of all heads from one small vector per token::

k_jn  = [c_j U_n, key_rotary_j]        v_jn = c_j W_n        c_j: the latent of token j
out_i = softmax_j(scale * [query_i, query_rotary_i] . k_j) v_j
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from attention_jax.api import attention
from attention_jax.backends.arguments import Scale, check_types
from attention_jax.core.axes import AnyArray, Output, accumulation_dtype, with_sizes


def latent_attention(
    query: Float[AnyArray, "*B T N H"],
    query_rotary: Float[AnyArray, "*B T N P"],
    latent: Float[AnyArray, "*B S R"],
    key_rotary: Float[AnyArray, "*B S P"],
    key_up: Float[AnyArray, "R N H"],
    value_up: Float[AnyArray, "R N D"],
    *,
    scale: Scale = None,
    **options: Any,
) -> Output:
    """Attention to keys and values that are projected up from latent vectors: for training.

    For each head ``n``, with ``c_j`` the latent of token ``j``::

        k_j   = [c_j U_n, key_rotary_j]          v_j = c_j W_n
        out_i = softmax_j(scale * [query_i, query_rotary_i] . k_j) v_j

    A cache holds ``latent`` and ``key_rotary``: ``R + P`` numbers per token instead of
    ``N (H + P + D)``. To decode from it, see ``absorbed_latent_attention``.

    Args:
      query: the part of the queries without rotary positions.
      query_rotary, key_rotary: the parts with rotary positions, already rotated; that of the keys
        is shared by all heads.
      latent: ``c``.
      key_up, value_up: ``U`` and ``W``, the projections from the latent to the heads.
      scale: of the logits; default ``1 / sqrt(H + P)``.
      **options: of ``attention``: mask, score, implementation and so on.

    Returns:
      ``[*B T N D]`` in the query's dtype; with ``return_lse`` also the lse, as ``attention``.

    Raises:
      TypeError, ValueError, NotImplementedError: as ``attention``, or shapes that do not fit.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import absorbed_latent_attention, latent_attention
    >>> shapes = (5, 2, 4), (5, 2, 3), (5, 6), (5, 3), (6, 2, 4), (6, 2, 7)
    >>> arrays = [np.random.default_rng(0).normal(size=s).astype(np.float32) for s in shapes]
    >>> direct, absorbed = latent_attention(*arrays), absorbed_latent_attention(*arrays)
    >>> direct.shape, bool(abs(direct - absorbed).max() < 1e-5)
    ((5, 2, 7), True)

    Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.
    """
    _check(query, query_rotary, latent, key_rotary, key_up, value_up)
    N, P = query_rotary.shape[-2:]
    key = _product("...sr,rnh->...snh", latent, key_up)
    value = _product("...sr,rnd->...snd", latent, value_up)
    shared = jnp.broadcast_to(jnp.asarray(key_rotary)[..., None, :], (*key_rotary.shape[:-1], N, P))
    return attention(
        jnp.concatenate([query, query_rotary], axis=-1),
        jnp.concatenate([key, shared], axis=-1),
        value,
        scale=_scale(scale, query, query_rotary),
        **options,
    )


def absorbed_latent_attention(
    query: Float[AnyArray, "*B T N H"],
    query_rotary: Float[AnyArray, "*B T N P"],
    latent: Float[AnyArray, "*B S R"],
    key_rotary: Float[AnyArray, "*B S P"],
    key_up: Float[AnyArray, "R N H"],
    value_up: Float[AnyArray, "R N D"],
    *,
    scale: Scale = None,
    **options: Any,
) -> Output:
    """``latent_attention`` with the up-projections absorbed into queries and output: for decoding.

    ``query_i . (c_j U_n) = (query_i U_n^T) . c_j``, so the latent vectors themselves serve as the
    keys and values of a single key-value head for all query heads; ``W_n`` is applied last::

        out_i = (softmax_j(scale * [query_i U_n^T, query_rotary_i] . [c_j, key_rotary_j]) c_j) W_n

    Keys and values of the heads are never formed. That is cheaper for few queries and many keys;
    for as many queries as keys it costs more, since the logit of a pair takes ``R + P`` instead of
    ``H + P`` multiplications.

    Args:
      As for ``latent_attention``, except ``return_lse``, which must be False.

    Returns:
      ``[*B T N D]`` in the query's dtype.

    Raises:
      As ``latent_attention``.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import absorbed_latent_attention
    >>> one = np.ones((1, 1, 1), np.float32)
    >>> absorbed_latent_attention(one, one, one[0], one[0], one, 3 * one).item()
    3.0

    Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.
    """
    _check(query, query_rotary, latent, key_rotary, key_up, value_up)
    if options.get("return_lse"):
        raise NotImplementedError("return_lse is not supported here: use latent_attention")
    absorbed = _product("...tnh,rnh->...tnr", query, key_up)
    mean_latent = attention(
        jnp.concatenate([absorbed, query_rotary], axis=-1),
        jnp.concatenate([latent, key_rotary], axis=-1)[..., None, :],
        jnp.asarray(latent)[..., None, :],
        scale=_scale(scale, query, query_rotary),
        **options,
    )
    return _product("...tnr,rnd->...tnd", mean_latent, value_up)


def _scale(scale: Any, query: Any, query_rotary: Any) -> Any:
    width = query.shape[-1] + query_rotary.shape[-1]
    return 1.0 / math.sqrt(width) if scale is None else scale


def _product(axes: str, a: Any, b: Any) -> jax.Array:
    """An einsum accumulated in float32 or wider, in the dtype of ``a``."""
    dtype = jnp.asarray(a).dtype
    wide = accumulation_dtype(dtype)
    out = jnp.einsum(
        axes, jnp.asarray(a), jnp.asarray(b), precision="highest", preferred_element_type=wide
    )
    return out.astype(dtype)


def _check(
    query: Any, query_rotary: Any, latent: Any, key_rotary: Any, key_up: Any, value_up: Any
) -> None:
    arrays = {
        "query": query,
        "query_rotary": query_rotary,
        "latent": latent,
        "key_rotary": key_rotary,
        "key_up": key_up,
        "value_up": value_up,
    }
    check_types(arrays)
    if query.ndim < 3 or latent.ndim != query.ndim - 1 or query_rotary.ndim != query.ndim:
        raise ValueError(
            f"query must be [*B T N H], query_rotary [*B T N P] and latent [*B S R], got "
            f"{query.shape}, {query_rotary.shape} and {latent.shape}"
        )
    *start, N, H = query.shape
    *rows, R = latent.shape
    P = query_rotary.shape[-1]
    sizes = {"*B": tuple(start[:-1]), "T": start[-1], "S": rows[-1], "N": N, "H": H, "P": P, "R": R}
    expected = {
        "query_rotary": ("[*B T N P]", (*start, N, P)),
        "latent": ("[*B S R]", (*start[:-1], rows[-1], R)),
        "key_rotary": ("[*B S P]", (*rows, P)),
        "key_up": ("[R N H]", (R, N, H)),
        "value_up": ("[R N D]", (R, N, value_up.shape[-1] if value_up.ndim else 0)),
    }
    for name, (layout, shape) in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"{name} must have shape {with_sizes(layout, sizes)}, got {arrays[name].shape}"
            )
