"""Performer: random features for linear attention that approximate softmax attention::

f_r(x) = exp(w_r . x' - |x'|^2 / 2) / sqrt(count)        x' = x / H^(1/4)
E f(q) . f(k) = exp(q . k / sqrt(H))
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.core.axes import AnyArray, int_at_least
from attention_jax.mechanisms.linear import Features

LARGEST_EXPONENT = 80.0  # of keys: float32 can sum exp(80) over many keys


def exponents(x: Float[AnyArray, "t _"], W: Float[Array, "M H"]) -> Float[Array, "t M"]:
    """``w_r . x' - |x'|^2 / 2`` with ``x' = x / H^(1/4)``."""
    H = W.shape[-1]
    if x.shape[-1] != H:
        raise ValueError(f"features are of width H = {H}, got arrays of width {x.shape[-1]}")
    x = jnp.asarray(x) / H**0.25
    w = W.astype(x.dtype)
    products = jnp.einsum("...h,rh->...r", x, w, precision=jax.lax.Precision.HIGHEST)
    return products - jnp.sum(x**2, axis=-1, keepdims=True) / 2


def performer_features(key: jax.Array, H: int, count: int) -> Features:
    """Positive random features whose products estimate the weights of softmax attention.

    With ``x' = x / H^(1/4)`` and rows ``w_r ~ N(0, I)``, orthogonal within each group of ``H``::

        f_r(x) = exp(w_r . x' - |x'|^2 / 2) / sqrt(count)
        E f(q) . f(k) = exp(q . k / sqrt(H))

    Each query is rescaled so that its largest feature is 1, which does not change attention
    weights. Keys cannot be rescaled, because a causal sum does not know later keys: their
    exponents, which can reach ``|w_r|^2 / 2``, are clipped at 80, which float32 can sum over many
    keys.

    Args:
      key: a key of ``jax.random``.
      H: width of queries and keys.
      count: number of features (M); the error falls as ``1 / sqrt(count)``.

    Returns:
      ``Features`` for ``linear_attention``.

    Raises:
      TypeError, ValueError: ``H`` or ``count`` is not an int of at least 1.

    >>> import jax
    >>> import numpy as np
    >>> from attention_jax.mechanisms import performer_features
    >>> features = performer_features(jax.random.key(0), 4, 4096)
    >>> q, k = np.float32([[1, 0, 0, 1]]), np.float32([[1, 0, 0, 0], [0, 1, 0, 0]])
    >>> weights = features.query(q) @ features.key(k).T
    >>> bool(abs(weights[0, 0] / weights[0, 1] - np.exp(0.5)) < 0.05)
    True

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers".
    """
    int_at_least("H", H, 1)
    int_at_least("count", count, 1)
    W = _orthogonal_normal(key, H, count)

    def of_query(x: AnyArray) -> jax.Array:
        e = exponents(x, W)
        return jnp.exp(e - jax.lax.stop_gradient(e.max(axis=-1, keepdims=True)))

    def of_key(x: AnyArray) -> jax.Array:
        return jnp.exp(jnp.minimum(exponents(x, W), LARGEST_EXPONENT)) / math.sqrt(count)

    return Features(of_query, of_key)


def _orthogonal_normal(key: jax.Array, H: int, count: int) -> Float[Array, "M H"]:
    """Rows ``w_r ~ N(0, I)``, orthogonal within each group of ``H``."""
    groups = -(-count // H)
    for_directions, for_norms = jax.random.split(key)
    directions = jax.random.orthogonal(for_directions, H, (groups,)).reshape(groups * H, H)[:count]
    norms = jnp.linalg.norm(jax.random.normal(for_norms, (count, H)), axis=-1, keepdims=True)
    return norms * directions
