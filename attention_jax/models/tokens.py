"""Padding, positions and masks of tokens, for all models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from attention_jax import masks
from attention_jax.cache import Cache
from attention_jax.core.axes import AnyArray, same_rank
from attention_jax.masks import Mask


def padding(real: Bool[AnyArray, "*B S"] | None, queries: int | None = None) -> Mask | None:
    """``masks.padding``; None if all tokens are real."""
    return None if real is None else masks.padding(real, queries=queries)


def both(a: Mask | None, b: Mask | None) -> Mask | None:
    """``a & b``, where None is no mask."""
    return b if a is None else a if b is None else a & b


def positions_after(caches: tuple[Cache, ...], T: int, count: Any) -> jax.Array:
    """Positions ``[*B T]`` of new tokens; padding, after ``count``, repeats the last one."""
    new, length = same_rank(jnp.arange(T, dtype=jnp.int32), caches[0].length[..., None])
    if count is not None:
        most = jnp.maximum(jnp.asarray(count, jnp.int32) - 1, 0)
        new = jnp.minimum(*same_rank(new, most[..., None]))
    return length + new


def last(x: jax.Array, count: Any) -> jax.Array:
    """The vector of the last real token, ``x[*B, count - 1]``: ``[*B T E]`` to ``[*B E]``."""
    at = jnp.broadcast_to(jnp.asarray(count, jnp.int32) - 1, x.shape[:-2])
    return jnp.take_along_axis(x, at[..., None, None], axis=-2)[..., 0, :]
