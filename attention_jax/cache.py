"""The keys and values of the tokens so far, kept for decoding: a pytree of fixed size.

    cache = cache.append(key, value)                      one token or many, per row
    cache = cache.rollback(length)                        without those from ``length`` on
    keys, values, mask, cache = extend(cache, key, value)  and what their queries attend to
    result, cache = attend(cache, query, key, value)       and attention to it

A prompt in one call, in chunks or token by token gives the same results. Under ``jit``, donate the
cache, so that it is updated in place rather than copied:

>>> x = jax.random.normal(jax.random.key(0), (2, 10, 4, 8))  # *B T N H
>>> cache = init((2,), capacity=16, num_kv_heads=4, head_dim=8)
>>> step = jax.jit(attend, donate_argnums=0)
>>> prompt, cache = step(cache, x[:, :9], x[:, :9], x[:, :9])
>>> token, cache = step(cache, x[:, 9:], x[:, 9:], x[:, 9:])
>>> token.shape, cache.length.tolist()
((2, 1, 4, 8), [10, 10])

A plain cache stores token ``p`` at slot ``p`` and holds ``capacity`` tokens. A rolling one stores
it at ``p % capacity``, over the oldest, for models that look back no further than a window.

Masks and scores are rules of positions in the whole sequence, and so mean the same with a cache as
without one: query ``t`` of a call is at position ``length + t``, wherever the slots are. Arrays
they hold (ids, flags, a bias) are those of the whole sequence. What a cache cannot do is refused:

- A query sees no later key, but those below a fixed position: ``masks.prefix(n) | masks.causal()``
  is a prefix that sees itself in both directions, and comes in one call to an empty cache. Other
  masks must say that they are causal, ``mask & masks.causal()``; no mask is ``masks.causal()``.
- In a rolling cache a query looks back less than ``capacity``; no mask is a window of that.

What depends on lengths (a prefix in one call, arrays long enough) is checked where they are known,
and cannot be where they are traced. Dropout counts the queries and keys of a call.
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
from attention_jax.core.axes import AnyArray, check_float_array, int_at_least, is_array, same_rank
from attention_jax.masks import Mask, at_positions, window
from attention_jax.masks.reach import check_ahead, check_back
from attention_jax.masks.slicing import check_lengths, of_positions
from attention_jax.scores import RelativeEmbedding, Score

__all__ = ["KVCache", "attend", "extend", "init", "placed_scores"]


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
      first: int32 ``[*B]``, the position before which tokens of a rolling cache are written over;
        None in a plain one.
    """

    # Not annotated with shapes: transformations also build caches of specs, axes and tracers.
    key: Any
    value: Any
    length: Any
    rolling: bool = dataclasses.field(default=False, metadata={"static": True})
    first: Any = None

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
        least = self._first()[..., None] if self.rolling else 0
        return jnp.where((position >= least) & (position < length), position, -1)

    def intact(self, window: int) -> Any:
        """bool ``[*B]``: the next token finds the ``window - 1`` before it, or all there were.

        False only in a rolling cache that was rolled back, see ``rollback``.
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
            self._longer(count),
            key=store(self.key, jnp.asarray(key), slot),
            value=store(self.value, jnp.asarray(value), slot),
        )

    def _longer(self, count: Any) -> KVCache:
        """With the length after ``count`` more tokens, which are yet to be stored."""
        length = self.length + jnp.asarray(count, jnp.int32)
        first = self.first
        if first is not None:
            first = jnp.maximum(first, length - self.capacity)
        return dataclasses.replace(self, length=length, first=first)

    def rollback(self, length: Any) -> KVCache:
        """The cache without the tokens from position ``length`` on, as if they never came.

        For tokens that were only tried, as in speculative decoding. A plain cache can go back to
        any length. In a rolling one the forgotten tokens have written over the ones ``capacity``
        before them: with a window of ``W`` tokens it can go back by ``capacity - W + 1``, so make
        it larger than the window. ``extend`` refuses a mask that sees what is written over.

        Not into a prefix whose tokens see each other: those that are kept have already seen the
        ones that go.

        Args:
          length: how many tokens to keep, an int or int array ``[*B]``.

        Raises:
          ValueError: more tokens than there are, or (rolling) none of those to keep is left. Where
            lengths are traced this is not checked; ``intact(window)`` says so afterwards.
          TypeError: not integers.

        >>> cache = init((2,), capacity=4, num_kv_heads=1, head_dim=1)
        >>> x = np.ones((2, 3, 1, 1), np.float32)
        >>> cache.append(x, x).rollback(np.array([1, 2])).positions().tolist()
        [[0, -1, -1, -1], [0, 1, -1, -1]]
        """
        if not jnp.issubdtype(jnp.result_type(length), jnp.integer):
            raise TypeError(f"length must be integers, got {jnp.result_type(length)}")
        length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), self.length.shape)
        first = self._first() if self.rolling else None
        least = jnp.zeros((), jnp.int32) if first is None else first
        if not any(isinstance(x, jax.core.Tracer) for x in (length, self.length, least)):
            if bool((length < 0).any() | (length > self.length).any()):
                raise ValueError(
                    f"length must be from 0 to the tokens there are, {self.length}, got {length}"
                )
            if bool((length < least).any()):
                raise ValueError(
                    f"length must be at least {least}: the tokens before are written over in a "
                    f"rolling cache of capacity {self.capacity}, got {length}"
                )
        return dataclasses.replace(self, length=length, first=first)

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
    """What ``T`` new queries attend to: keys, values and mask; and the cache with the new tokens.

    Args:
      cache: what came before.
      key, value: of the new tokens.
      mask: in terms of positions; default ``causal()``, in a rolling cache a window of
        ``capacity``. See the top of this module for what it may show.
      count: how many of them are real, an int or int array ``[*B]``; default T.

    Returns:
      Keys ``[*B S K H]`` and values ``[*B S K D]``; a mask of the new queries, which are at
      positions ``length + t``, and these keys; the cache. Scores: see ``placed_scores``.

    Raises:
      ValueError: the mask shows a query what is not there: later tokens, or those a rolling cache
        holds no more; or its arrays are shorter than the sequence.

    >>> x = np.ones((2, 1, 2), np.float32)
    >>> keys, values, mask, _ = extend(init((), capacity=3, num_kv_heads=1, head_dim=2), x, x)
    >>> print(mask)
    █··
    ██·
    """
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a Mask in terms of positions with a cache, got {type(mask).__name__}: "
            f"see masks.mask_fn, or masks.dense for an array of the whole sequence"
        )
    after = cache.append(key, value, count)
    T = key.shape[-3]
    if mask is None:
        mask = window(cache.capacity - 1 if cache.rolling else None, 0)
    queries, at = _places(cache, T, after)
    check_ahead(mask, cache.length, after.length)
    if cache.rolling:
        check_back(mask, cache.capacity, cache.intact)
    check_lengths("mask", mask, after.length, cache.capacity, rolling=cache.rolling)
    mask = of_positions(mask, queries, at, in_order=not cache.rolling)
    keys, values = after.key, after.value
    if cache.rolling and T > 1:
        # Some keys that the first queries see are written over by the last: take both.
        keys = jnp.concatenate([cache.key, jnp.asarray(key)], axis=-3)
        values = jnp.concatenate([cache.value, jnp.asarray(value)], axis=-3)
    return keys, values, at_positions(mask, queries, at), after


def placed_scores(
    cache: KVCache, score: ScoreLike, T: int, *, count: Any = None
) -> tuple[Score, ...]:
    """Scores in terms of positions, for ``T`` new queries and the keys that ``extend`` returns.

    Args:
      cache: what came before.
      score: of the whole sequence; its arrays too, but for the query of a ``relative_embedding``,
        which is that of the new tokens.
      T: how many new tokens.
      count: as for ``extend``.

    Raises:
      ValueError: arrays shorter than the sequence; or an ``offset`` for each example, which would
        count twice where it says where the queries begin.

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
    queries, keys = _places(cache, T, after)
    for each in given:
        if is_array(getattr(each, "offset", 0)):
            raise ValueError(
                f"score: offset of {type(each).__name__.lower()} must be an int with a cache, "
                f"which itself says where queries begin: leave out offset=cache.length"
            )
        if not isinstance(each, RelativeEmbedding):
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
    """Attention of ``T`` new tokens to those in the cache and to themselves, which it then holds.

    Query ``t`` of a row is at position ``length + t``. The same as attention with this mask and
    these scores over the whole sequence at once, whether tokens come in one call, in chunks or one
    by one; a mask or score with which that cannot be is refused. See the top of this module.

    Args:
      cache: what came before.
      query, key, value: of the new tokens.
      mask: in terms of positions, ``masks.window(255, 0)`` say; default ``masks.causal()``, in a
        rolling cache a window of ``capacity``.
      score: in terms of positions; see ``placed_scores``.
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
    keys, values, seen, after = extend(cache, key, value, mask=mask, count=count)
    placed = placed_scores(cache, score, T, count=count)
    return attention(query, keys, values, mask=seen, score=placed, **options), after


def _places(cache: KVCache, T: int, after: KVCache) -> tuple[jax.Array, jax.Array]:
    """Positions of the new queries ``[*B T]``, and of the keys ``[*B S]``, -1 where there is none.

    Args:
      cache, after: without and with the new tokens.
      T: how many, with padding.
    """
    new = jnp.arange(T, dtype=jnp.int32).reshape((1,) * cache.length.ndim + (T,))
    queries = cache.length[..., None] + new
    if not cache.rolling or T == 1:
        return queries, after.positions()
    new = jnp.where(queries < after.length[..., None], queries, -1)
    return queries, jnp.concatenate([cache.positions(), new], axis=-1)
