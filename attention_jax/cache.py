"""The keys and values of the tokens so far, kept for decoding: a pytree of fixed size.

    cache = cache.append(key, value)                      one token or many, per row
    keys, values, mask, cache = extend(cache, key, value)  and what their queries attend to
    result, cache = attend(cache, query, key, value)       and attention to it

A plain cache stores token ``p`` at slot ``p`` and holds ``capacity`` tokens. A rolling one stores
it at ``p % capacity``, over the oldest, for models that look back no further than a window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attention_jax.attention import attention
from attention_jax.axes import AnyArray, check_float_array, same_rank
from attention_jax.masks import Mask, at_positions, window
from attention_jax.masks.arguments import int_at_least

__all__ = ["KVCache", "attend", "extend", "init"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far.

    Attributes:
      key: ``[*B C K H]``, ``C`` slots.
      value: ``[*B C K D]``.
      length: int32 ``[*B]``, how many tokens each row has been given. More than ``C`` in a plain
        cache means that the ones beyond were dropped; see ``overflowed``.
      rolling: whether new tokens take the place of the oldest.
    """

    # Not annotated with shapes: transformations also build caches of specs, axes and tracers.
    key: Any
    value: Any
    length: Any
    rolling: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """How many tokens there is room for (C)."""
        return int(self.key.shape[-3])

    @property
    def overflowed(self) -> Any:
        """bool ``[*B]``: the row was given more tokens than a plain cache can hold."""
        return (self.length > self.capacity) & (not self.rolling)

    def positions(self) -> Int[Array, "*B C"]:
        """The position of the token in each slot, ``-1`` where there is none.

        >>> cache = init((), capacity=3, num_kv_heads=1, head_dim=1, rolling=True)
        >>> x = np.zeros((4, 1, 1), np.float32)
        >>> cache.append(x, x).positions().tolist()
        [3, 1, 2]
        """
        slots, length = same_rank(
            jnp.arange(self.capacity, dtype=jnp.int32), self.length[..., None]
        )
        if self.rolling:  # the largest position before length that falls into the slot
            position = length - 1 - (length - 1 - slots) % self.capacity
        else:
            position = jnp.broadcast_to(slots, (*self.length.shape, self.capacity))
        return jnp.where((position >= 0) & (position < length), position, -1)

    def append(
        self,
        key: Float[AnyArray, "*B T K H"],
        value: Float[AnyArray, "*B T K D"],
        count: Any = None,
    ) -> KVCache:
        """The cache with ``T`` more tokens in each row, or with the first ``count`` of them.

        Args:
          key, value: ``[*B T K H]`` and ``[*B T K D]`` in the cache's dtype.
          count: how many are real, an int or int array ``[*B]``; default T. The rest is padding.

        Raises:
          ValueError: shapes that do not fit; or more tokens than there is room for, where lengths
            are known. Where they are not, tokens beyond the last slot are dropped, never written
            over others, and ``overflowed`` says so.
          TypeError: another dtype.

        >>> cache = init((2,), capacity=4, num_kv_heads=1, head_dim=1)
        >>> x = np.ones((2, 3, 1, 1), np.float32)
        >>> cache.append(x, x, count=np.array([3, 1])).length.tolist()
        [3, 1]
        """
        T = self._check(key, value)
        batch = self.length.shape
        count = T if count is None else count
        if not isinstance(count, jax.core.Tracer):
            checked = np.asarray(count)
            if not np.issubdtype(checked.dtype, np.integer):
                raise TypeError(f"count must be integers, got {checked.dtype}")
            if checked.size and not (checked.min() >= 0 and checked.max() <= T):
                raise ValueError(f"count must be from 0 to T = {T}, got {count}")
        count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), batch)
        after = self.length + count
        known = not isinstance(after, jax.core.Tracer)
        if known and not self.rolling and (most := int(after.max(initial=0))) > self.capacity:
            raise ValueError(
                f"the cache has capacity {self.capacity}, but a row would hold {most} tokens: make "
                f"a larger one, or a rolling one"
            )
        new, length = same_rank(jnp.arange(T, dtype=jnp.int32), self.length[..., None])
        slot = length + new  # [*B T]
        keep = new < count[..., None]
        if self.rolling:
            keep = keep & (slot >= after[..., None] - self.capacity)  # else the next round's
            slot = slot % self.capacity
        slot = jnp.where(keep, slot, self.capacity)  # out of range: dropped

        def store(old: jax.Array, x: Any, at: jax.Array) -> jax.Array:
            return old.at[at].set(x, mode="drop")

        for _ in batch:
            store = jax.vmap(store)
        return dataclasses.replace(
            self,
            key=store(self.key, jnp.asarray(key), slot),
            value=store(self.value, jnp.asarray(value), slot),
            length=after,
        )

    def _check(self, key: Any, value: Any) -> int:
        for name, x, mine in (("key", key, self.key), ("value", value, self.value)):
            check_float_array(name, x)
            if x.dtype != mine.dtype:
                raise TypeError(
                    f"{name} must have the cache's dtype {mine.dtype}, got {x.dtype}: cast it"
                )
            batch, (K, H) = mine.shape[:-3], mine.shape[-2:]
            if len(x.shape) != mine.ndim or (x.shape[:-3], x.shape[-2:]) != (batch, (K, H)):
                raise ValueError(
                    f"{name} must have shape {(*batch, 'T', K, H)} to fit the cache, got {x.shape}"
                )
        if key.shape[-3] != value.shape[-3]:
            raise ValueError(
                f"key has {key.shape[-3]} tokens (T) but value has {value.shape[-3]}: they must be "
                f"equal"
            )
        return int(key.shape[-3])


def init(
    batch: tuple[int, ...],
    *,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
    rolling: bool = False,
) -> KVCache:
    """An empty cache.

    Args:
      batch: the batch axes ``*B``.
      capacity: how many tokens there is room for in each row (C); for a rolling cache, at least as
        many as a query sees, itself included.
      num_kv_heads: key-value heads (K), not query heads.
      head_dim: width of a key (H).
      value_dim: width of a value (D); default ``head_dim``.
      dtype: of keys and values.
      rolling: whether new tokens take the place of the oldest.

    >>> init((2,), capacity=8, num_kv_heads=2, head_dim=4).key.shape
    (2, 8, 2, 4)
    """
    value_dim = head_dim if value_dim is None else value_dim
    sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "value_dim": value_dim}
    int_at_least("capacity", capacity, 1)
    for name, x in sizes.items():
        int_at_least(name, x, 1)
    return KVCache(
        jnp.zeros((*batch, capacity, num_kv_heads, head_dim), dtype),
        jnp.zeros((*batch, capacity, num_kv_heads, value_dim), dtype),
        jnp.zeros(batch, jnp.int32),
        rolling,
    )


def extend(
    cache: KVCache,
    key: Float[AnyArray, "*B T K H"],
    value: Float[AnyArray, "*B T K D"],
    *,
    mask: Mask | None = None,
    count: Any = None,
) -> tuple[Any, Any, Mask, KVCache]:
    """What ``T`` new queries attend to: keys, values and mask; and the cache with the new tokens.

    Args:
      cache: what came before.
      key, value: of the new tokens.
      mask: in terms of positions; and-ed with ``causal()``, and in a rolling cache with a window of
        ``capacity``.
      count: how many of them are real, an int or int array ``[*B]``; default T.

    Returns:
      Keys ``[*B S K H]`` and values ``[*B S K D]``; a mask of the new queries, which are at
      positions ``length + t``, and these keys; the cache.

    >>> x = np.ones((2, 1, 2), np.float32)
    >>> keys, values, mask, _ = extend(init((), capacity=3, num_kv_heads=1, head_dim=2), x, x)
    >>> print(mask)
    █··
    ██·
    """
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a Mask in terms of positions with a cache, got {type(mask).__name__}: "
            f"see masks.mask_fn"
        )
    after = cache.append(key, value, count)
    T = key.shape[-3]
    new, length = same_rank(jnp.arange(T, dtype=jnp.int32), cache.length[..., None])
    queries = length + new
    back = cache.capacity - 1 if cache.rolling else None
    seen = window(back, 0) if mask is None else mask & window(back, 0)
    if cache.rolling and T > 1:
        # Some keys that the first queries see are written over by the last: take both.
        real = new < (after.length - cache.length)[..., None]
        at = jnp.concatenate([cache.positions(), jnp.where(real, queries, -1)], axis=-1)
        keys = jnp.concatenate([cache.key, jnp.asarray(key)], axis=-3)
        values = jnp.concatenate([cache.value, jnp.asarray(value)], axis=-3)
    else:
        at, keys, values = after.positions(), after.key, after.value
    return keys, values, at_positions(seen, queries, at), after


def attend(
    cache: KVCache,
    query: Float[AnyArray, "*B T N H"],
    key: Float[AnyArray, "*B T K H"],
    value: Float[AnyArray, "*B T K D"],
    *,
    mask: Mask | None = None,
    count: Any = None,
    **options: Any,
) -> tuple[Any, KVCache]:
    """Attention of ``T`` new tokens to those in the cache and to themselves, which it then holds.

    Query ``t`` of a row is at position ``length + t``. The same as attention over the whole
    sequence at once, whether tokens come in one call, in chunks or one by one.

    Args:
      cache: what came before.
      query, key, value: of the new tokens.
      mask: in terms of positions, ``masks.window(255, 0)`` say; and-ed with ``causal()``, and in a
        rolling cache with a window of ``capacity``.
      count: how many of them are real, an int or int array ``[*B]``; default T.
      **options: of ``attention``. A score sees indices: in a plain cache those of keys are their
        positions, and an ``offset`` of ``cache.length`` says where the queries begin.

    Returns:
      What ``attention`` returns, and the cache with the new tokens.

    >>> x = np.random.default_rng(0).normal(size=(5, 1, 2)).astype(np.float32)  # T N H
    >>> empty = init((), capacity=5, num_kv_heads=1, head_dim=2)
    >>> first, cache = attend(empty, x[:3], x[:3], x[:3])
    >>> second, cache = attend(cache, x[3:], x[3:], x[3:])
    >>> whole = attention(x, x, x, mask=window(None, 0))
    >>> bool(jnp.allclose(jnp.concatenate([first, second]), whole, atol=1e-6))
    True
    """
    T = query.shape[-3]
    if key.shape[-3] != T:
        raise ValueError(
            f"query has {T} tokens (T) but key has {key.shape[-3]}: both are of the new tokens"
        )
    keys, values, seen, after = extend(cache, key, value, mask=mask, count=count)
    return attention(query, keys, values, mask=seen, **options), after
