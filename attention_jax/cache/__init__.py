"""Key-value caches for decoding: pytrees of fixed size.

    cache = cache.append(key, value)                       one token or many, per row
    cache = cache.rollback(length)                         drop the tokens from ``length`` on
    keys, values, mask, cache = extend(cache, key, value)  append, and return what to attend to
    result, cache = attend(cache, query, key, value)       append and attend

The results are the same whether a prompt comes in one call, in chunks or token by token. Under
``jit``, donate the cache, so that it is updated in place rather than copied:

>>> import jax
>>> from attention_jax import cache as caches
>>> x = jax.random.normal(jax.random.key(0), (2, 10, 4, 8))  # *B T N H
>>> cache = caches.init((2,), capacity=16, num_kv_heads=4, head_dim=8)
>>> step = jax.jit(caches.attend, donate_argnums=0)
>>> prompt, cache = step(cache, x[:, :9], x[:, :9], x[:, :9])
>>> token, cache = step(cache, x[:, 9:], x[:, 9:], x[:, 9:])
>>> token.shape, cache.length.tolist()
((2, 1, 4, 8), [10, 10])

A plain cache stores token ``p`` in slot ``p`` and holds ``capacity`` tokens. A rolling cache stores
it in slot ``p % capacity``, overwriting the oldest token, for models with a sliding window. A paged
cache stores the tokens of all rows in one pool of pages, which are given to rows as they grow: its
memory is that of the tokens it holds, not of the longest row. Rows can share a prefix, of which
they copy a page only to continue it:

    cache = cache.free(row)                                its pages become free
    cache = cache.share(source, target, length)            the same pages in two rows

>>> paged = caches.init_paged(2, capacity=16, page_size=4, pages=5, num_kv_heads=4, head_dim=8)
>>> one = paged.append(x[:, :9], x[:, :9], count=jax.numpy.array([9, 0])).share(0, 1, 9)
>>> two = one.append(x[:, :1], x[:, :1], count=jax.numpy.array([0, 1]))
>>> two.table.tolist(), two.free_pages.item()
([[0, 1, 2, -1], [0, 1, 3, -1]], 1)

``attend`` reads the pages in place, at about the speed of a plain cache on a CPU; ``extend`` copies
those of each row together. With ``quantize="int8"`` any of these caches stores keys and values as
8-bit integers with a scale for each token and head::

    s = max |k| / 127        |stored k - k| <= s / 2

They take a quarter of the memory of float32 (H + 4 bytes for 4 H), or half of bfloat16. Attention
first widens them to floating-point numbers, one layer at a time, which takes longer than reading
them as they are.

Masks and scores are evaluated at positions in the whole sequence, so they mean the same with a
cache as without one: query ``t`` of a call is at position ``length + t``, whatever slot it is
stored in. Their arrays (ids, flags, a bias) cover the whole sequence. Two restrictions apply, and
a violation raises an error:

- A query may not attend to later keys, except within a prefix: ``masks.prefix(n) |
  masks.causal()`` is allowed if the prefix comes in one call to an empty cache. Join masks that are
  not known to be causal with ``& masks.causal()``, which is also the default.
- In a rolling cache a query may not attend to keys ``capacity`` or more positions back. The default
  is a causal window of ``capacity`` keys.

Checks that depend on lengths (the prefix in one call, arrays long enough, free pages) are skipped
when lengths are traced; ``overflowed`` then says which rows lost tokens. In ``attend``, dropout
masks depend on positions too.
"""

from attention_jax.cache.calls import Cache as Cache
from attention_jax.cache.calls import attend as attend
from attention_jax.cache.calls import extend as extend
from attention_jax.cache.calls import placed_scores as placed_scores
from attention_jax.cache.kv_cache import KVCache as KVCache
from attention_jax.cache.kv_cache import init as init
from attention_jax.cache.paged_cache import PagedCache as PagedCache
from attention_jax.cache.paged_cache import init_paged as init_paged

__all__ = [
    "KVCache",
    "PagedCache",
    "attend",
    "extend",
    "init",
    "init_paged",
    "placed_scores",
]
