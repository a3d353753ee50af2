"""Speculative decoding with draws: rejection sampling from the distribution of the model.

At one position of one row the draft drew a token from ``q``, and the model's distribution is ``p``.
The token stays with probability ``min(1, p(token) / q(token))``; otherwise another one is drawn
from ``norm(max(p - q, 0))``. Either way the result is a draw from ``p``:

>>> import numpy as np
>>> from attention_jax.models.rejection import redrawn
>>> p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.7, 0.1])
>>> stays = np.minimum(1, p / q)
>>> np.allclose(q * stays + np.sum(q * (1 - stays)) * redrawn(p, q), p)
True

Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention_jax.core.axes import AnyArray


def stays(p: Float[Array, " V"], q: Float[Array, " V"], token: Any, uniform: Any) -> Any:
    """Whether a token drawn from ``q`` stays: with probability ``min(1, p(token) / q(token))``.

    Args:
      p, q: ``[V]``, the distributions of the model and the draft.
      token: drawn from ``q``; -1 if the draft has none, which never stays.
      uniform: drawn from [0, 1).
    """
    return (uniform * q[token] < p[token]) & (token >= 0)


def redrawn(p: Float[AnyArray, " V"], q: Float[AnyArray, " V"]) -> Float[Array, " V"]:
    """The distribution of the token that replaces one that does not stay: norm(max(p - q, 0))."""
    left = jnp.maximum(p - q, 0)
    total = left.sum()
    return jnp.where(total > 0, left / total, p)  # nothing is left only if p and q are equal


def verified_draws(
    p: Float[Array, "path V"],
    q: Float[Array, "ahead V"],
    tokens: Int[Array, " ahead"],
    key: jax.Array,
) -> tuple[Int[Array, " path"], Int[Array, ""]]:
    """One row: the tokens that stay, the one that follows them, and how many stay.

    Args:
      p: the model's distributions, one more than tokens; all 0 where there is no token to choose.
      q: the draft's.
      tokens: its draws.
      key: of the row.
    """
    of_draws, of_last = jax.random.split(key)
    uniform = jax.random.uniform(of_draws, tokens.shape, p.dtype)
    count = jnp.cumprod(jax.vmap(stays)(p[:-1], q, tokens, uniform)).sum(dtype=jnp.int32)
    q = jnp.concatenate([q, jnp.zeros_like(q[:1])])  # nothing is proposed after the last token
    last = jax.random.categorical(of_last, jnp.log(redrawn(p[count], q[count])))
    last = jnp.where(jnp.any(p[count] > 0), last, -1)
    return jnp.append(tokens, -1).at[count].set(last), count
