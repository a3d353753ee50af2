"""Differential attention: the difference of two softmaxes, so that common noise cancels::

out = (softmax(scale * Q_1 K_1^T) - lambda softmax(scale * Q_2 K_2^T)) V
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.api import attention
from attention_jax.backends.arguments import check_types
from attention_jax.core.axes import AnyArray, Output, accumulation_dtype, same_rank


def differential_attention(
    query: Float[AnyArray, "*B T N2 H"],
    key: Float[AnyArray, "*B S K2 H"],
    value: Float[AnyArray, "*B S K D"],
    weight: Any,
    **options: Any,
) -> Output:
    """The attention of one head minus ``lambda`` times that of its neighbor, to the same values.

    For each output head ``n``, with ``lambda`` the weight::

        out = (softmax(scale * Q_2n K_2k^T) - lambda softmax(scale * Q_2n+1 K_2k+1^T)) V_k

    as two calls of ``attention``. The paper then normalizes each head of the output (RMSNorm with
    its own scale) and multiplies it by ``1 - initial`` of ``differential_weight``.

    Args:
      query: ``[*B T 2N H]``, heads in pairs.
      key: ``[*B S 2K H]``, heads in pairs.
      value: ``[*B S K D]``; in the paper ``D = 2H``.
      weight: ``lambda``, a number or ``[N]``; see ``differential_weight``.
      **options: of ``attention`` (mask, score, scale, implementation and so on); the heads of
        masks and scores are the ``N`` output heads.

    Returns:
      ``[*B T N D]`` in the query's dtype; 0 for a query with no visible key.

    Raises:
      TypeError, ValueError, NotImplementedError: as ``attention``, or an odd number of heads.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import differential_attention
    >>> q, v = np.zeros((1, 2, 1), np.float32), np.float32([2, 4]).reshape(2, 1, 1)
    >>> differential_attention(q, np.zeros((2, 2, 1), np.float32), v, 0.5).item()
    1.5

    Source: Ye et al. 2024, "Differential Transformer".
    """
    _check(query, key, value, weight, options)
    dtype = accumulation_dtype(query.dtype)
    first, second = (
        attention(query[..., i::2, :], key[..., i::2, :], value, **options).astype(dtype)
        for i in (0, 1)
    )
    per_head = jnp.broadcast_to(jnp.asarray(weight, dtype), (query.shape[-2] // 2,))[:, None]
    first, second, per_head = same_rank(first, second, per_head)
    return (first - per_head * second).astype(query.dtype)


def differential_weight(
    *,
    query_1: Float[AnyArray, "... H"],
    key_1: Float[AnyArray, "... H"],
    query_2: Float[AnyArray, "... H"],
    key_2: Float[AnyArray, "... H"],
    layer: int,
) -> Float[Array, "..."]:
    """``lambda = exp(q1 . k1) - exp(q2 . k2) + initial`` from four learned vectors.

    ``initial = 0.8 - 0.6 exp(-0.3 layer)``, layers counted from 0.

    Args:
      query_1, key_1, query_2, key_2: ``[H]``, or ``[N H]`` for a weight per head.
      layer: index of the layer in the model.

    Returns:
      ``lambda``, a scalar or ``[N]``.

    >>> import numpy as np
    >>> from attention_jax.mechanisms import differential_weight
    >>> zero = np.zeros(4, np.float32)
    >>> weight = differential_weight(query_1=zero, key_1=zero, query_2=zero, key_2=zero, layer=0)
    >>> round(float(weight), 3)
    0.2

    Source: Ye et al. 2024, section 2.1.
    """

    def exp_dot(q: Any, k: Any) -> jax.Array:
        return jnp.exp(jnp.sum(jnp.asarray(q) * jnp.asarray(k), axis=-1))

    initial = 0.8 - 0.6 * jnp.exp(-0.3 * layer)
    return exp_dot(query_1, key_1) - exp_dot(query_2, key_2) + initial


def _check(query: Any, key: Any, value: Any, weight: Any, options: dict[str, Any]) -> None:
    check_types({"query": query, "key": key, "value": value})
    layouts = {"query": "[*B T 2N H]", "key": "[*B S 2K H]", "value": "[*B S K D]"}
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    for name, shape in shapes.items():
        if len(shape) < 3:
            raise ValueError(f"{name} must have at least 3 axes {layouts[name]}, got shape {shape}")
    for name in ("query", "key"):
        if shapes[name][-2] % 2:
            raise ValueError(
                f"{name} must have an even number of heads, {layouts[name]}, two for each head of "
                f"the output, got shape {shapes[name]}"
            )
    if key.shape[-2] != 2 * value.shape[-2]:
        raise ValueError(
            f"key must have twice the heads of value, [*B S 2K H] and [*B S K D], got shapes "
            f"{key.shape} and {value.shape}"
        )
    if options.get("return_lse"):
        raise NotImplementedError("return_lse: a difference of two softmaxes has no normalizer")
    N = query.shape[-2] // 2
    if jnp.shape(weight) not in ((), (N,)):
        raise ValueError(f"weight must be a number or [N] = ({N},), got shape {jnp.shape(weight)}")
