"""``PagedCache``: keys and values of all rows in one pool of pages, which rows can share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention_jax.cache.pages import NONE, Copies, Pages, init_pages
from attention_jax.cache.tokens import (
    as_count,
    check_new_tokens,
    empty,
    floats,
    kept_length,
    like,
    stored,
)
from attention_jax.core.axes import AnyArray, brief_fields, int_at_least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of the tokens so far, in pages that are allocated as rows grow.

    Attributes:
      key: ``[S K H]``, the pool: page ``p`` is the ``page_size`` slots from ``p * page_size`` on.
      value: ``[S K D]``.
      pages: which pages hold the tokens of each row.
    """

    key: Any
    value: Any
    pages: Pages

    def __repr__(self) -> str:
        return brief_fields(self, ("key", "value", "length", "page_size", "free_pages"))

    @property
    def rolling(self) -> bool:
        """False: a paged cache holds all tokens."""
        return False

    @property
    def length(self) -> Any:
        """int32 ``[R]``, how many tokens were appended to each row."""
        return self.pages.length

    @property
    def capacity(self) -> int:
        """The largest number of tokens in a row."""
        return self.pages.capacity

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.pages.page_size

    @property
    def table(self) -> Any:
        """int32 ``[R M]``, the pages of each row in order; -1 where it has none."""
        return self.pages.table

    @property
    def references(self) -> Any:
        """int32 ``[P]``, how many rows use each page."""
        return self.pages.references

    @property
    def free_pages(self) -> Any:
        """int32 ``[]``, how many pages no row uses."""
        return self.pages.free_pages

    @property
    def overflowed(self) -> Any:
        """bool ``[R]``: tokens were dropped, since pages ran out or the row was full."""
        return self.pages.overflowed

    def positions(self) -> Int[Array, "R S"]:
        """The position of the token in each of the ``M page`` places of a row, ``-1`` if empty."""
        places = jnp.arange(self.table.shape[-1] * self.page_size, dtype=jnp.int32)
        real = jnp.repeat(self.table != NONE, self.page_size, axis=-1)
        real = real & (places < jnp.minimum(self.length, self.capacity)[:, None])
        return jnp.where(real, places[None], -1)

    def append(
        self,
        key: Float[AnyArray, "R T K H"],
        value: Float[AnyArray, "R T K D"],
        count: Any = None,
    ) -> PagedCache:
        """The cache with ``T`` more tokens in each row, or the first ``count`` of them.

        Rows get free pages as they need them, the first rows first. A row that continues a page
        which others use too gets a copy of it, so that no row changes the tokens of another.

        Args:
          key, value: ``[R T K H]`` and ``[R T K D]`` in the cache's dtype.
          count: how many of them are real, an int or int array ``[R]``; default T. The rest is
            padding.

        Raises:
          ValueError: shapes do not fit; a row is longer than ``capacity``; or there are too few
            free pages. Where lengths are traced, tokens without a place are dropped instead,
            overwrite nothing, and ``overflowed`` is True.
          TypeError: another dtype.

        >>> import numpy as np
        >>> from attention_jax.cache import init_paged
        >>> cache = init_paged(2, capacity=8, page_size=2, pages=5, num_kv_heads=1, head_dim=1)
        >>> x = np.ones((2, 3, 1, 1), np.float32)
        >>> cache = cache.append(x, x, count=np.array([3, 1]))
        >>> cache.table.tolist(), cache.free_pages.item()
        ([[0, 1, -1, -1], [2, -1, -1, -1]], 2)
        """
        batch = self.length.shape
        T = check_new_tokens(key, value, self.key, self.value, batch)
        count = as_count(count, T, batch)
        pages, copies = self.pages.longer(count)
        _check_room(self.pages, pages)
        new = jnp.arange(T, dtype=jnp.int32)[None]
        slots = pages.slots(self.length[:, None] + new)
        slots = jnp.where(new < count[:, None], slots, pages.num_slots).reshape(-1)

        def put(pool: Any, x: Any) -> Any:
            x = like(pool, x)
            return stored(pool, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), x), slots)

        key_pool, value_pool = self._copied(copies)
        return PagedCache(put(key_pool, key), put(value_pool, value), pages)

    def _longer(self, count: Any) -> PagedCache:
        """The cache with its length after ``count`` more tokens, before they are stored."""
        return dataclasses.replace(self, pages=self.pages.longer(count)[0])

    def _copied(self, copies: Copies) -> tuple[Any, Any]:
        """The pools with some pages copied."""
        within = jnp.arange(self.page_size, dtype=jnp.int32)[None]
        source = (copies.source[:, None] * self.page_size + within).reshape(-1)
        target = jnp.where(copies.target == NONE, self.pages.num_pages, copies.target)
        target = (target[:, None] * self.page_size + within).reshape(-1)

        def copy(pools: Any) -> Any:
            return jax.tree.map(lambda x: x.at[target].set(x[source], mode="drop"), pools)

        # Most calls copy nothing, and this way they do not read the pages either.
        return jax.lax.cond(
            (copies.target != NONE).any(), copy, lambda x: x, (self.key, self.value)
        )

    def rollback(self, length: Any) -> PagedCache:
        """The cache without the tokens from position ``length`` on, whose pages become free.

        Args:
          length: how many tokens to keep, an int or int array ``[R]``.

        Raises:
          ValueError: more tokens than the cache has; not checked when lengths are traced.
          TypeError: not integers.

        >>> import numpy as np
        >>> from attention_jax.cache import init_paged
        >>> cache = init_paged(1, capacity=8, page_size=2, num_kv_heads=1, head_dim=1)
        >>> x = np.ones((1, 5, 1, 1), np.float32)
        >>> cache.append(x, x).rollback(2).table.tolist()
        [[0, -1, -1, -1]]
        """
        pages = self.pages.rollback(kept_length(length, self.length))
        return dataclasses.replace(self, pages=pages)

    def free(self, row: Any) -> PagedCache:
        """The cache with an empty row, whose pages become free unless other rows use them.

        Args:
          row: an int, or a traced one.
        """
        row = self._row("row", row)
        rows = jnp.arange(len(self.length), dtype=jnp.int32)
        pages = self.pages.rollback(jnp.where(rows == row, 0, self.length))
        return dataclasses.replace(self, pages=pages)

    def share(self, source: Any, target: Any, length: Any) -> PagedCache:
        """The cache in which row ``target`` consists of the first ``length`` tokens of ``source``.

        No key or value is copied: both rows use the same pages, until one continues a page that is
        not full. The previous tokens of ``target`` are dropped. The tokens of a row that is shared
        with itself are those of ``rollback``.

        Args:
          source, target: rows, ints or traced ones.
          length: how many tokens to share, an int or a traced one, at most those of the source.

        Raises:
          ValueError: rows or tokens that are not there; not checked for traced values, of which
            the length is limited to that of the source.

        >>> import numpy as np
        >>> from attention_jax.cache import init_paged
        >>> cache = init_paged(2, capacity=6, page_size=2, num_kv_heads=1, head_dim=1)
        >>> x = np.ones((2, 3, 1, 1), np.float32)
        >>> cache = cache.append(x, x, count=np.array([3, 0])).share(0, 1, 3)
        >>> cache.table.tolist(), cache.references.tolist()
        ([[0, 1, -1], [0, 1, -1]], [2, 2, 0, 0, 0, 0])
        >>> cache.append(x[:, :1], x[:, :1], count=np.array([0, 1])).table.tolist()
        [[0, 1, -1], [0, 2, -1]]
        """
        source, target = self._row("source", source), self._row("target", target)
        if not any(isinstance(x, jax.core.Tracer) for x in (source, length, self.length)):
            length = int_at_least("length", length, 0)
            if length > (most := int(self.length[source])):
                raise ValueError(f"length must be at most {most}, that of the source, got {length}")
        return dataclasses.replace(self, pages=self.pages.share(source, target, length))

    def _row(self, name: str, row: Any) -> Any:
        if isinstance(row, jax.core.Tracer):
            return row
        rows = len(self.length)
        if not 0 <= int_at_least(name, row, 0) < rows:
            raise ValueError(f"{name} must be from 0 to {rows - 1}, got {row}")
        return row

    def gathered(self) -> tuple[jax.Array, jax.Array]:
        """Keys ``[R M*page K H]`` and values of each row in order; those of empty places differ."""
        positions = jnp.arange(self.table.shape[-1] * self.page_size, dtype=jnp.int32)
        slots = self.pages.slots(jnp.broadcast_to(positions, (len(self.length), len(positions))))

        def of_rows(pool: Any) -> jax.Array:
            return floats(jax.tree.map(lambda x: x.at[slots].get(mode="clip"), pool))

        return of_rows(self.key), of_rows(self.value)


def _check_room(before: Pages, after: Pages) -> None:
    """Raises if rows are known to overflow; traced ones are flagged by ``overflowed``."""
    if isinstance(after.length, jax.core.Tracer) or isinstance(after.table, jax.core.Tracer):
        return
    if (most := int(after.length.max(initial=0))) > after.capacity:
        raise ValueError(
            f"the cache has capacity {after.capacity}, but a row would hold {most} tokens: make a "
            f"larger cache"
        )
    if bool((after.overflowed & ~before.overflowed).any()):
        raise ValueError(
            f"the cache has {after.num_pages} pages of {after.page_size} tokens, of which "
            f"{int(before.free_pages)} are free, too few for these tokens: free rows, or make a "
            f"cache with more pages"
        )


def init_paged(
    rows: int,
    *,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
    page_size: int = 16,
    pages: int | None = None,
    quantize: str | None = None,
) -> PagedCache:
    """An empty paged cache.

    Args:
      rows: the number of rows (R), its only batch axis.
      capacity: the largest number of tokens in a row.
      num_kv_heads: key-value heads (K), not query heads.
      head_dim: width of a key (H).
      value_dim: width of a value (D); default ``head_dim``.
      dtype: of keys and values.
      page_size: tokens per page; on a CPU, attention to the pages is fastest if it is a multiple
        of 32.
      pages: how many pages there are for all rows; default as many as all of them could need.
      quantize: as for ``init``.

    >>> from attention_jax.cache import init_paged
    >>> cache = init_paged(4, capacity=64, pages=8, num_kv_heads=2, head_dim=4)
    >>> cache.key.shape, cache.table.shape
    ((128, 2, 4), (4, 4))
    """
    table = init_pages(rows, capacity=capacity, page_size=page_size, pages=pages)
    key, value = empty(
        (table.num_slots,),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        quantize=quantize,
    )
    return PagedCache(key, value, table)
