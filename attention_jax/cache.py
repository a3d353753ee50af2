"""A key-value cache for decoding: a pytree of fixed size.

    cache = cache.append(key, value)                       one token or many, per row
    cache = cache.rollback(length)                         drop the tokens from ``length`` on
    keys, values, mask, cache = extend(cache, key, value)  append, and what to attend to
    result, cache = attend(cache, query, key, value)       append and attend

A prompt in one call, in chunks or token by token gives the same results. Under ``jit``, donate the
cache, so that it is updated in place rather than copied:

>>> x = jax.random.normal(jax.random.key(0), (2, 10, 4, 8))  # *B T N H
>>> cache = init((2,), capacity=16, num_kv_heads=4, head_dim=8)
>>> step = jax.jit(attend, donate_argnums=0)
>>> prompt, cache = step(cache, x[:, :9], x[:, :9], x[:, :9])
>>> token, cache = step(cache, x[:, 9:], x[:, 9:], x[:, 9:])
>>> token.shape, cache.length.tolist()
((2, 1, 4, 8), [10, 10])

A plain cache stores token ``p`` in slot ``p`` and holds ``capacity`` tokens. A rolling cache stores
it in slot ``p % capacity``, over the oldest, for models with a sliding window.

Masks and scores are rules of positions in the whole sequence, so they mean the same with a cache as
without one: query ``t`` of a call is at position ``length + t``, whatever the slots. Their arrays
(ids, flags, a bias) are those of the whole sequence. A cache refuses what it cannot do:

- A query may not attend to later keys, except below a fixed position: the prefix of
  ``masks.prefix(n) | masks.causal()`` attends to itself in both directions, and must come in one
  call to an empty cache. Other masks must be known to be causal, ``mask & masks.causal()``. The
  default is ``masks.causal()``.
- In a rolling cache a query must look back less than ``capacity``. The default is that window.

What depends on lengths (a prefix in one call, arrays long enough) is checked unless lengths are
traced. Dropout masks depend on the indices of queries and keys within a call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attention_jax import scores
from attention_jax.api import attention
from attention_jax.backends.call import ScoreLike, as_scores
from attention_jax.core.axes import (
    AnyArray,
    check_float_array,
    check_positions,
    int_at_least,
    same_rank,
)
from attention_jax.masks import Mask, at_positions, window
from attention_jax.masks.in_cache import check_ahead, check_back, check_lengths, of_positions
from attention_jax.scores import Score

__all__ = ["KVCache", "attend", "extend", "init", "placed_scores"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far.

    Attributes:
      key: ``[*B C K H]``, ``C`` slots.
      value: ``[*B C K D]``.
      length: int32 ``[*B]``, how many tokens were appended to each row. In a plain cache, tokens
        beyond ``C`` were dropped; see ``overflowed``.
      rolling: whether new tokens overwrite the oldest.
      first: int32 ``[*B]``, the first position that a rolling cache may still hold; None in a plain
        cache.
    """

    # No shape annotations: transformations also build caches of specs, axes and tracers.
    key: Any
    value: Any
    length: Any
    rolling: bool = dataclasses.field(default=False, metadata={"static": True})
    first: Any = None

    @property
    def capacity(self) -> int:
        """The number of slots (C)."""
        return int(self.key.shape[-3])

    @property
    def overflowed(self) -> Any:
        """bool ``[*B]``: more tokens were appended than a plain cache can hold."""
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
        if self.rolling:  # the largest position below length that belongs in the slot
            position = length - 1 - (length - 1 - slots) % self.capacity
        else:
            position = jnp.broadcast_to(slots, (*self.length.shape, self.capacity))
        least = self._first()[..., None] if self.rolling else 0
        return jnp.where((position >= least) & (position < length), position, -1)

    def intact(self, window: int) -> Any:
        """bool ``[*B]``: the last ``window - 1`` tokens, or all if fewer, are in the cache.

        False only in a rolling cache that was rolled back; see ``rollback``.
        """
        int_at_least("window", window, 1)
        if not self.rolling:
            return jnp.ones(self.length.shape, bool)
        return self._first() <= jnp.maximum(self.length - (window - 1), 0)

    def _first(self) -> Any:
        if self.first is not None:
            return self.first
        return jnp.maximum(self.length - self.capacity, 0)

    def append(
        self,
        key: Float[AnyArray, "*B T K H"],
        value: Float[AnyArray, "*B T K D"],
        count: Any = None,
    ) -> KVCache:
        """The cache with ``T`` more tokens in each row, or the first ``count`` of them.

        Args:
          key, value: ``[*B T K H]`` and ``[*B T K D]`` in the cache's dtype.
          count: how many are real, an int or int array ``[*B]``; default T. The rest is padding.

        Raises:
          ValueError: shapes do not fit; or there are more tokens than slots. Where lengths are
            traced, tokens beyond the last slot are dropped instead, overwrite nothing, and
            ``overflowed`` is True.
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
            checked = np.asarray(check_positions(count, "count"))
            if checked.size and not (checked.min() >= 0 and checked.max() <= T):
                raise ValueError(f"count must be from 0 to T = {T}, got {count}")
        count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), batch)
        after = self.length + count
        known = not isinstance(after, jax.core.Tracer)
        if known and not self.rolling and (most := int(after.max(initial=0))) > self.capacity:
            raise ValueError(
                f"the cache has capacity {self.capacity}, but a row would hold {most} tokens: make "
                f"a larger cache, or a rolling one"
            )
        new, length = same_rank(jnp.arange(T, dtype=jnp.int32), self.length[..., None])
        slot = length + new  # [*B T]
        keep = new < count[..., None]
        if self.rolling:
            # Of two tokens for one slot, the later one.
            keep = keep & (slot >= after[..., None] - self.capacity)
            slot = slot % self.capacity
        slot = jnp.where(keep, slot, self.capacity)  # out of range: dropped

        def store(old: jax.Array, x: Any, at: jax.Array) -> jax.Array:
            return old.at[at].set(x, mode="drop")

        for _ in batch:
            store = jax.vmap(store)
        return dataclasses.replace(
            self._longer(count),
            key=store(self.key, jnp.asarray(key), slot),
            value=store(self.value, jnp.asarray(value), slot),
        )

    def _longer(self, count: Any) -> KVCache:
        """The cache with its length after ``count`` more tokens, before they are stored."""
        length = self.length + jnp.asarray(count, jnp.int32)
        first = self.first
        if first is not None:
            first = jnp.maximum(first, length - self.capacity)
        return dataclasses.replace(self, length=length, first=first)

    def rollback(self, length: Any) -> KVCache:
        """The cache without the tokens from position ``length`` on, as if they were never there.

        For tokens that are rejected, as in speculative decoding. A plain cache can go back to any
        length. In a rolling one the dropped tokens have overwritten those ``capacity`` before them:
        with a window of ``W`` tokens it can go back by ``capacity - W + 1``, so make it larger than
        the window. ``extend`` refuses a mask that reaches overwritten tokens.

        Do not roll back into a prefix with bidirectional attention: the tokens that are kept have
        already attended to those that are dropped.

        Args:
          length: how many tokens to keep, an int or int array ``[*B]``.

        Raises:
          ValueError: more tokens than the cache has, or (rolling) all tokens to keep are
            overwritten. Not checked where lengths are traced: ask ``intact(window)`` afterwards.
          TypeError: not integers.

        >>> cache = init((2,), capacity=4, num_kv_heads=1, head_dim=1)
        >>> x = np.ones((2, 3, 1, 1), np.float32)
        >>> cache.append(x, x).rollback(np.array([1, 2])).positions().tolist()
        [[0, -1, -1, -1], [0, 1, -1, -1]]
        """
        length = jnp.asarray(check_positions(length, "length"), jnp.int32)
        length = jnp.broadcast_to(length, self.length.shape)
        first = self._first() if self.rolling else None
        least = jnp.zeros((), jnp.int32) if first is None else first
        if not any(isinstance(x, jax.core.Tracer) for x in (length, self.length, least)):
            if bool((length < 0).any() | (length > self.length).any()):
                raise ValueError(
                    f"length must be from 0 to the cache's length {self.length}, got {length}"
                )
            if bool((length < least).any()):
                raise ValueError(
                    f"length must be at least {least}: earlier tokens are overwritten in a rolling "
                    f"cache of capacity {self.capacity}, got {length}"
                )
        return dataclasses.replace(self, length=length, first=first)

    def _check(self, key: Any, value: Any) -> int:
        for name, x, stored in (("key", key, self.key), ("value", value, self.value)):
            check_float_array(name, x)
            if x.dtype != stored.dtype:
                raise TypeError(
                    f"{name} must have the cache's dtype {stored.dtype}, got {x.dtype}: cast it"
                )
            batch, (K, H) = stored.shape[:-3], stored.shape[-2:]
            if len(x.shape) != stored.ndim or (x.shape[:-3], x.shape[-2:]) != (batch, (K, H)):
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
      capacity: slots per row (C); in a rolling cache, at least as many as the keys of a query's
        window, its own included.
      num_kv_heads: key-value heads (K), not query heads.
      head_dim: width of a key (H).
      value_dim: width of a value (D); default ``head_dim``.
      dtype: of keys and values.
      rolling: whether new tokens overwrite the oldest.

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
        jnp.zeros(batch, jnp.int32) if rolling else None,
    )


def extend(
    cache: KVCache,
    key: Float[AnyArray, "*B T K H"],
    value: Float[AnyArray, "*B T K D"],
    *,
    mask: Mask | None = None,
    count: Any = None,
) -> tuple[Any, Any, Mask, KVCache]:
    """Keys, values and mask for ``T`` new queries, and the cache with the new tokens.

    Args:
      cache: the earlier tokens.
      key, value: of the new tokens.
      mask: of positions; default ``causal()``, in a rolling cache a window of ``capacity``. The
        module docstring says which masks a cache takes.
      count: how many of them are real, an int or int array ``[*B]``; default T.

    Returns:
      Keys ``[*B S K H]`` and values ``[*B S K D]``; the mask of the new queries, at positions
      ``length + t``, and these keys; the cache. For scores, see ``placed_scores``.

    Raises:
      ValueError: the mask lets a query attend to later tokens, or to tokens that a rolling cache no
        longer holds; or its arrays are shorter than the sequence.

    >>> x = np.ones((2, 1, 2), np.float32)
    >>> keys, values, mask, _ = extend(init((), capacity=3, num_kv_heads=1, head_dim=2), x, x)
    >>> print(mask)
    █··
    ██·
    """
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a Mask of positions with a cache, got {type(mask).__name__}: "
            f"see masks.mask_fn, or masks.dense for an array of the whole sequence"
        )
    after = cache.append(key, value, count)
    T = key.shape[-3]
    if mask is None:
        mask = window(cache.capacity - 1 if cache.rolling else None, 0)
    queries, at = _positions(cache, T, after)
    check_ahead(mask, cache.length, after.length)
    if cache.rolling:
        check_back(mask, cache.capacity, cache.intact)
    check_lengths("mask", mask, after.length, cache.capacity, rolling=cache.rolling)
    mask = of_positions(mask, queries, at, in_order=not cache.rolling)
    keys, values = after.key, after.value
    if cache.rolling and T > 1:
        # The last tokens overwrite keys of the first queries: take old and new ones.
        keys = jnp.concatenate([cache.key, jnp.asarray(key)], axis=-3)
        values = jnp.concatenate([cache.value, jnp.asarray(value)], axis=-3)
    return keys, values, at_positions(mask, queries, at), after


def placed_scores(
    cache: KVCache, score: ScoreLike, T: int, *, count: Any = None
) -> tuple[Score, ...]:
    """Scores of positions, for ``T`` new queries and the keys that ``extend`` returns.

    Args:
      cache: the earlier tokens.
      score: of the whole sequence, as are its arrays; except the query of a ``relative_embedding``,
        which is that of the new tokens.
      T: how many new tokens.
      count: as for ``extend``.

    Raises:
      ValueError: arrays shorter than the sequence; or an array as ``offset``, since the cache
        itself knows where the queries begin.

    >>> cache = init((), capacity=4, num_kv_heads=1, head_dim=1, rolling=True)
    >>> x = np.ones((5, 1, 1), np.float32)
    >>> (score,) = placed_scores(cache.append(x, x), scores.alibi(np.array([1.0])), 1)
    >>> score.score(np.zeros(4, np.float32), 0, 0, 0, np.arange(4)).tolist()  # 5 to 4, 5, 2, 3
    [-1.0, 0.0, -3.0, -2.0]
    """
    given, placed = as_scores(score), []
    if not given:
        return ()
    after = cache._longer(T if count is None else count)
    queries, keys = _positions(cache, T, after)
    for each in given:
        if each.offset_per_example():
            raise ValueError(
                f"score: offset of {type(each).__name__.lower()} must be an int with a cache, "
                f"which knows where the queries begin: leave out offset=cache.length"
            )
        check_lengths("score", each, after.length, cache.capacity, rolling=cache.rolling)
        each = of_positions(each, queries, keys, in_order=not cache.rolling)
        if cache.rolling:
            placed.append(scores.at_positions(each, queries, keys))
        else:
            placed.append(scores.later(each, cache.length))
    return tuple(placed)


def attend(
    cache: KVCache,
    query: Float[AnyArray, "*B T N H"],
    key: Float[AnyArray, "*B T K H"],
    value: Float[AnyArray, "*B T K D"],
    *,
    mask: Mask | None = None,
    score: ScoreLike = (),
    count: Any = None,
    **options: Any,
) -> tuple[Any, KVCache]:
    """Attention of ``T`` new tokens to those in the cache and to themselves; appends them.

    Query ``t`` of a row is at position ``length + t``. The result equals attention with this mask
    and these scores over the whole sequence at once, whether tokens come in one call, in chunks or
    one by one; masks and scores for which it could not are refused. See the module docstring.

    Args:
      cache: the earlier tokens.
      query, key, value: of the new tokens.
      mask: of positions, such as ``masks.window(255, 0)``; default ``masks.causal()``, in a rolling
        cache a window of ``capacity``.
      score: of positions; see ``placed_scores``.
      count: how many of them are real, an int or int array ``[*B]``; default T.
      **options: of ``attention``.

    Returns:
      What ``attention`` returns, and the cache with the new tokens.

    Raises:
      ValueError: see ``extend`` and ``placed_scores``.

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
    keys, values, mask, after = extend(cache, key, value, mask=mask, count=count)
    placed = placed_scores(cache, score, T, count=count)
    return attention(query, keys, values, mask=mask, score=placed, **options), after


def _positions(cache: KVCache, T: int, after: KVCache) -> tuple[jax.Array, jax.Array]:
    """Positions of the new queries ``[*B T]`` and of the keys ``[*B S]``, -1 for empty slots.

    Args:
      cache, after: without and with the new tokens.
      T: the number of new tokens, padding included.
    """
    new = jnp.arange(T, dtype=jnp.int32).reshape((1,) * cache.length.ndim + (T,))
    queries = cache.length[..., None] + new
    if not cache.rolling or T == 1:
        return queries, after.positions()
    new = jnp.where(queries < after.length[..., None], queries, -1)
    return queries, jnp.concatenate([cache.positions(), new], axis=-1)
