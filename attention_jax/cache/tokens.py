"""New tokens of a cache: their checks, and how their keys and values are stored."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.core.axes import (
    Shape,
    check_float_array,
    check_positions,
    int_at_least,
    with_sizes,
)
from attention_jax.core.int8 import Quantized, rounded


def check_new_tokens(key: Any, value: Any, keys: Any, values: Any, batch: Shape) -> int:
    """The number of new tokens (T); raises unless they fit the arrays of a cache.

    Args:
      key, value: of the new tokens, ``[*B T K H]`` and ``[*B T K D]``.
      keys, values: of the cache, ``[... K H]`` and ``[... K D]``.
      batch: the batch axes ``*B``.
    """
    both = (("key", "H", key, keys), ("value", "D", value, values))
    for name, letter, x, old in both:
        check_float_array(name, x)
        if x.dtype != old.dtype:
            raise TypeError(
                f"{name} must have the cache's dtype {old.dtype}, got {x.dtype}: cast it"
            )
        K, width = old.shape[-2:]
        if x.ndim != len(batch) + 3 or x.shape[:-3] != batch or x.shape[-2:] != (K, width):
            layout = f"[*B T K {letter}]"
            expected = with_sizes(layout, {"*B": batch, "K": K, letter: width})
            raise ValueError(f"{name} must have shape {expected} to fit the cache, got {x.shape}")
    if key.shape[-3] != value.shape[-3]:
        raise ValueError(
            f"key has {key.shape[-3]} tokens (T) but value has {value.shape[-3]}: they must "
            f"have equally many"
        )
    return int(key.shape[-3])


def as_count(count: Any, T: int, batch: Shape) -> jax.Array:
    """The argument ``count`` as int32 ``[*B]``: how many of ``T`` tokens are real."""
    count = T if count is None else count
    if not isinstance(count, jax.core.Tracer):
        checked = np.asarray(check_positions(count, "count"))
        if checked.size and not (checked.min() >= 0 and checked.max() <= T):
            raise ValueError(f"count must be from 0 to T = {T}, got {count}")
    return jnp.broadcast_to(jnp.asarray(count, jnp.int32), batch)


def kept_length(length: Any, before: Any) -> jax.Array:
    """The argument ``length`` of ``rollback`` as int32 ``[*B]``, checked if lengths are known."""
    length = jnp.asarray(check_positions(length, "length"), jnp.int32)
    length = jnp.broadcast_to(length, before.shape)
    known = not any(isinstance(x, jax.core.Tracer) for x in (length, before))
    if known and bool((length < 0).any() | (length > before).any()):
        raise ValueError(f"length must be from 0 to the cache's length {before}, got {length}")
    return length


# --- Stored arrays: floating-point numbers, or 8-bit integers with a scale per token and head.


def empty(
    slots: Shape,
    *,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None,
    dtype: Any,
    quantize: str | None,
) -> tuple[Any, Any]:
    """Keys ``[*slots K H]`` and values ``[*slots K D]`` of zeros."""
    if quantize not in (None, "int8"):
        raise ValueError(f'quantize must be "int8" or None, got {quantize!r}')
    sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
    sizes["value_dim"] = head_dim if value_dim is None else value_dim
    for name, x in sizes.items():
        int_at_least(name, x, 1)

    def zeros(width: int) -> Any:
        shape = (*slots, num_kv_heads, width)
        if quantize is None:
            return jnp.zeros(shape, dtype)
        return Quantized(jnp.zeros(shape, jnp.int8), jnp.ones((*shape[:-1], 1), dtype))

    return zeros(head_dim), zeros(sizes["value_dim"])


def like(old: Any, x: Any) -> Any:
    """New keys or values, as the cache stores them."""
    return rounded(jnp.asarray(x), -1) if isinstance(old, Quantized) else jnp.asarray(x)


def stored(old: Any, x: Any, slots: jax.Array) -> Any:
    """``old [C K H]`` with ``x [T K H]`` in these slots; slots out of range are dropped."""
    return jax.tree.map(lambda old, x: old.at[slots].set(x, mode="drop"), old, x)


def floats(x: Any) -> jax.Array:
    """Stored keys or values as floating-point numbers."""
    return x[...] if isinstance(x, Quantized) else x
