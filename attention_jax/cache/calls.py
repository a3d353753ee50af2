"""Attention with a cache: keys, values, mask and scores for new queries."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Float

from attention_jax.api import attention
from attention_jax.backends.arguments import ScoreLike, as_scores
from attention_jax.cache.in_pool import attention_in_pool
from attention_jax.cache.kv_cache import KVCache
from attention_jax.cache.paged_cache import PagedCache
from attention_jax.cache.tokens import floats, like
from attention_jax.core.axes import AnyArray, check_float_array, kind
from attention_jax.core.int8 import Quantized
from attention_jax.core.positions import Contiguous
from attention_jax.masks import Mask, lengths, window
from attention_jax.masks.at_positions import mask_at_positions
from attention_jax.masks.in_cache import check_ahead, check_back, check_lengths, of_positions
from attention_jax.scores import Score
from attention_jax.scores.at_positions import score_at_positions

Cache: TypeAlias = KVCache | PagedCache


def extend(
    cache: Cache,
    key: Float[AnyArray, "*B T K H"],
    value: Float[AnyArray, "*B T K D"],
    *,
    mask: Mask | None = None,
    count: Any = None,
) -> tuple[Any, Any, Mask, Cache]:
    """Keys, values and mask for ``T`` new queries, and the cache with the new tokens.

    Args:
      cache: the earlier tokens.
      key, value: of the new tokens.
      mask: of positions in the whole sequence; default ``causal()``, in a rolling cache a window of
        ``capacity``. The module docstring says which masks a cache supports.
      count: how many of the new tokens are real, an int or int array ``[*B]``; default T.

    Returns:
      Keys ``[*B S K H]`` and values ``[*B S K D]``; the mask of the new queries, at positions
      ``length + t``, and these keys; the new cache. For scores, see ``placed_scores``.

    Raises:
      ValueError: the mask lets a query attend to later tokens, or to tokens that a rolling cache no
        longer holds; or its arrays are shorter than the sequence.

    >>> import numpy as np
    >>> from attention_jax.cache import extend, init
    >>> x = np.ones((2, 1, 2), np.float32)
    >>> keys, values, mask, _ = extend(init((), capacity=3, num_kv_heads=1, head_dim=2), x, x)
    >>> print(mask)
    █··
    ██·
    """
    keys, values, mask, positions, after = _extended(cache, key, value, mask, count)
    return keys, values, mask_at_positions(mask, *positions), after


class Positions(NamedTuple):
    """``query_positions`` and ``key_positions`` of a call."""

    queries: Any
    keys: Any


def _extended(
    cache: Cache, key: Any, value: Any, mask: Mask | None, count: Any
) -> tuple[Any, Any, Mask, Positions, Cache]:
    """Keys, values, the mask to be evaluated at positions, these positions, and the new cache."""
    _check_mask(mask)
    after = cache.append(key, value, count)
    T = key.shape[-3]
    positions = _positions(cache, T, after)
    mask = of_positions(_checked(mask, cache, after), *positions, in_order=not cache.rolling)
    if isinstance(after, PagedCache):
        keys, values = after.gathered()
    else:
        keys, values = floats(after.key), floats(after.value)
    if cache.rolling and T > 1:
        # The last new tokens may overwrite keys that the first queries attend to.
        keys, values = (
            jnp.concatenate([floats(old), floats(like(old, new))], axis=-3)
            for old, new in ((cache.key, key), (cache.value, value))
        )
    return keys, values, mask, positions, after


def _check_mask(mask: Any) -> None:
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a Mask when there is a cache, got {kind(mask)}: use masks.mask_fn, or "
            f"masks.dense for an array of the whole sequence"
        )


def _checked(mask: Mask | None, cache: Cache, after: Cache) -> Mask:
    """The mask, or the default one; raises if the cache does not support it."""
    if mask is None:
        mask = window(cache.capacity - 1 if cache.rolling else None, 0)
    check_ahead(mask, cache.length, after.length)
    if isinstance(cache, KVCache) and cache.rolling:
        check_back(mask, cache.capacity, cache.intact)
    check_lengths("mask", mask, after.length, cache.capacity, rolling=cache.rolling)
    return mask


def placed_scores(
    cache: Cache, score: ScoreLike, T: int, *, count: Any = None
) -> tuple[Score, ...]:
    """Scores evaluated at the positions of ``T`` new queries and the keys that ``extend`` returns.

    Args:
      cache: the earlier tokens.
      score: of the whole sequence, arrays included; except the query of a ``relative_embedding``,
        which holds the new tokens only.
      T: the number of new tokens.
      count: as for ``extend``.

    Raises:
      ValueError: arrays shorter than the sequence; or an array as ``offset``, since the cache
        determines the positions of the queries.

    >>> import numpy as np
    >>> from attention_jax import scores
    >>> from attention_jax.cache import placed_scores, init
    >>> cache = init((), capacity=4, num_kv_heads=1, head_dim=1, rolling=True)
    >>> x = np.ones((5, 1, 1), np.float32)
    >>> (score,) = placed_scores(cache.append(x, x), scores.alibi(np.array([1.0])), 1)
    >>> score.score(np.zeros(4, np.float32), 0, 0, 0, np.arange(4)).tolist()  # 5 to 4, 5, 2, 3
    [-1.0, 0.0, -3.0, -2.0]
    """
    after = cache._longer(T if count is None else count)
    positions = _positions(cache, T, after)
    scores = _scores(cache, score, positions, after, in_order=not cache.rolling)
    positions = _for_attention(cache, positions)
    return tuple(score_at_positions(each, *positions) for each in scores)


def _scores(
    cache: Cache, score: ScoreLike, positions: Positions, after: Cache, *, in_order: bool
) -> tuple[Score, ...]:
    """The scores, to be evaluated at positions, with the array entries of these positions.

    Args:
      in_order: see ``of_positions``.
    """
    found = []
    for each in as_scores(score):
        if each.offset_per_example():
            raise ValueError(
                f"score: offset of {each.public_name} must be an int with a cache, which sets "
                f"the positions of the queries: leave out offset=cache.length"
            )
        check_lengths("score", each, after.length, cache.capacity, rolling=cache.rolling)
        found.append(of_positions(each, *positions, in_order=in_order))
    return tuple(found)


def _for_attention(cache: Cache, positions: Positions) -> Positions:
    """The positions to pass to ``attention``: those of a plain cache are contiguous."""
    return positions if cache.rolling else Positions(Contiguous(cache.length), Contiguous(0))


def attend(
    cache: Cache,
    query: Float[AnyArray, "*B T N H"],
    key: Float[AnyArray, "*B T K H"],
    value: Float[AnyArray, "*B T K D"],
    *,
    mask: Mask | None = None,
    score: ScoreLike = (),
    count: Any = None,
    **options: Any,
) -> tuple[Any, Cache]:
    """Appends ``T`` new tokens and computes their attention to all tokens in the cache.

    Query ``t`` of a row is at position ``length + t``. The result equals attention with this mask
    and these scores over the whole sequence at once, whether tokens come in one call, in chunks or
    one by one; masks and scores for which this is impossible raise an error. See the module
    docstring.

    Args:
      cache: the earlier tokens.
      query, key, value: of the new tokens.
      mask: of positions in the whole sequence, such as ``masks.window(255, 0)``; default
        ``masks.causal()``, in a rolling cache a window of ``capacity``.
      score: of positions in the whole sequence; see ``placed_scores``.
      count: how many of the new tokens are real, an int or int array ``[*B]``; default T.
      **options: of ``attention``, except positions, which the cache determines.

    Returns:
      What ``attention`` returns, and the cache with the new tokens.

    Raises:
      ValueError: see ``extend`` and ``placed_scores``.

    >>> import jax
    >>> import numpy as np
    >>> from attention_jax import attention
    >>> from attention_jax.cache import attend, init
    >>> from attention_jax.masks import window
    >>> x = np.random.default_rng(0).normal(size=(5, 1, 2)).astype(np.float32)  # T N H
    >>> empty = init((), capacity=5, num_kv_heads=1, head_dim=2)
    >>> step = jax.jit(attend)
    >>> first, cache = step(empty, x[:3], x[:3], x[:3])
    >>> second, cache = step(cache, x[3:], x[3:], x[3:])
    >>> whole = attention(x, x, x, mask=window(None, 0))
    >>> np.allclose(np.concatenate([first, second]), whole, atol=1e-6)
    True
    """
    for name in ("query_positions", "key_positions"):
        if name in options:
            raise TypeError(f"{name} is not an option of attend: the cache determines it")
    for name, x in (("query", query), ("key", key)):
        check_float_array(name, x)
        if x.ndim < 3:
            layout = "[*B T N H]" if name == "query" else "[*B T K H]"
            raise ValueError(f"{name} must have at least 3 axes {layout}, got shape {x.shape}")
    T = query.shape[-3]
    if key.shape[-3] != T:
        raise ValueError(
            f"query has {T} tokens (T) but key has {key.shape[-3]}: both hold the new tokens"
        )
    if isinstance(cache, PagedCache) and not isinstance(cache.key, Quantized):
        return _attend_in_pool(cache, query, key, value, mask, score, count, options)
    keys, values, mask, positions, after = _extended(cache, key, value, mask, count)
    in_order = isinstance(cache, KVCache) and not cache.rolling  # pages may be missing in between
    scores = _scores(cache, score, positions, after, in_order=in_order)
    if in_order:
        # Contiguous positions do not mark empty slots, which are those from the length on.
        mask = mask & lengths(key=after.length)
        positions = _for_attention(cache, positions)
    options |= {"query_positions": positions.queries, "key_positions": positions.keys}
    return attention(query, keys, values, mask=mask, score=scores, **options), after


def _attend_in_pool(
    cache: PagedCache,
    query: Any,
    key: Any,
    value: Any,
    mask: Mask | None,
    score: ScoreLike,
    count: Any,
    options: dict[str, Any],
) -> tuple[Any, PagedCache]:
    """``attend`` to the pool of pages, of which each row's own are visible to it.

    No key is copied: on a CPU it takes as long as attention to a plain cache, and a seventh of the
    time of gathering the pages of each row first.
    """
    _check_mask(mask)
    after = cache.append(key, value, count)
    new = jnp.arange(query.shape[-3], dtype=jnp.int32)
    positions = Positions(cache.length[:, None] + new[None], after.pages.positions())
    mask = of_positions(_checked(mask, cache, after), *positions, in_order=False)
    scores = _scores(cache, score, positions, after, in_order=False)
    result = attention_in_pool(
        query, after.key, after.value, mask=mask, score=scores, positions=positions, **options
    )
    return result, after


def _positions(cache: Cache, T: int, after: Cache) -> Positions:
    """Positions of the new queries ``[*B T]`` and of the keys ``[*B S]``, -1 for empty slots.

    Args:
      cache, after: before and after the new tokens are appended.
      T: the number of new tokens, padding included.
    """
    new = jnp.arange(T, dtype=jnp.int32).reshape((1,) * cache.length.ndim + (T,))
    queries = cache.length[..., None] + new
    if not cache.rolling or T == 1:
        return Positions(queries, after.positions())
    new = jnp.where(queries < after.length[..., None], queries, -1)
    return Positions(queries, jnp.concatenate([cache.positions(), new], axis=-1))
