"""``Pages``: which pages of a common pool hold the tokens of each row."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from attention_jax.core.axes import brief_fields, int_at_least

NONE = -1  # in the table: no page


class Copies(NamedTuple):
    """Pages to copy, for each row at most one: int32 ``[R]``, ``NONE`` where there is none."""

    source: Any
    target: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """The pages of each row: token ``p`` is in page ``table[row, p // page_size]``.

    Attributes:
      table: int32 ``[R M]``, the pages of each row in order; -1 where it has none.
      length: int32 ``[R]``, how many tokens were appended to each row.
      references: int32 ``[P]``, how many rows use each page; a page with none is free.
      page_size: tokens per page.
      capacity: the largest number of tokens in a row.
    """

    # Not annotated with shapes, because transformations also put specs and axes into the fields.
    table: Any
    length: Any
    references: Any
    page_size: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return brief_fields(self, ("table", "length", "references", "page_size"))

    @property
    def num_pages(self) -> int:
        """The number of pages (P), free or not."""
        return int(self.references.shape[-1])

    @property
    def num_slots(self) -> int:
        """The number of tokens that all pages hold (S)."""
        return self.num_pages * self.page_size

    @property
    def free_pages(self) -> Any:
        """int32 ``[]``: how many pages no row uses."""
        return jnp.sum(self.references == 0, dtype=jnp.int32)

    @property
    def overflowed(self) -> Any:
        """bool ``[R]``: a row has tokens for which there was no page, or no place in its table."""
        missing = (self._first_tokens() < self.length[:, None]) & (self.table == NONE)
        return missing.any(-1) | (self.length > self.capacity)

    def slots(self, positions: Int[Array, "R T"]) -> Int[Array, "R T"]:
        """Where the pool holds the tokens at these positions: the slot ``page_size * page + ...``.

        A position without a page has the slot after the last one, where ``mode="drop"`` ignores it.
        """
        within = jnp.clip(positions // self.page_size, 0, self.table.shape[-1] - 1)
        page = jnp.take_along_axis(self.table, within, axis=-1)
        there = (page != NONE) & (positions >= 0) & (positions < self.capacity)
        slot = page * self.page_size + positions % self.page_size
        return jnp.where(there, slot, self.num_slots)

    def positions(self) -> Int[Array, "R S"]:
        """For each row the position of the token in each slot of the pool, ``-1`` if not its own.

        >>> from attention_jax.cache.pages import init_pages
        >>> pages, _ = init_pages(2, capacity=4, page_size=2, pages=3).longer([3, 1])
        >>> pages.positions().tolist()
        [[0, 1, 2, -1, -1, -1], [-1, -1, -1, -1, 0, -1]]
        """
        R, M = self.table.shape
        at = jnp.where(self.table == NONE, self.num_pages, self.table)
        place = jnp.full((R, self.num_pages), M, jnp.int32)  # of each page in the row's table

        def put(place: Any, at: Any) -> Any:
            return place.at[at].set(jnp.arange(M, dtype=jnp.int32), mode="drop")

        first = jax.vmap(put)(place, at) * self.page_size
        position = first[:, :, None] + jnp.arange(self.page_size, dtype=jnp.int32)[None, None]
        position = position.reshape(R, -1)
        return jnp.where(position < jnp.minimum(self.length, self.capacity)[:, None], position, -1)

    def longer(self, count: Any) -> tuple[Pages, Copies]:
        """The pages with ``count`` more tokens in each row, and which pages to copy for that.

        A row gets a free page for each page that its new tokens begin. If they continue a page that
        other rows use too, the row gets a copy of it; if all of these continue it, the first one
        keeps it. Pages that run out leave -1 in the table, also in place of a copy.

        Args:
          count: int ``[R]`` or an int, 0 or more.
        """
        count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), self.length.shape)
        begun, shared = self._places(count)
        needed = begun | shared
        free = jnp.nonzero(self.references == 0, size=self.num_pages, fill_value=NONE)[0]
        number = jnp.cumsum(needed.reshape(-1)).reshape(needed.shape) - 1  # among those needed
        found = jnp.where(number < self.num_pages, free[jnp.minimum(number, len(free) - 1)], NONE)
        new = jnp.where(needed, found.astype(jnp.int32), NONE)
        old = jnp.where(shared, self.table, NONE)
        copies = Copies(
            jnp.where(new == NONE, NONE, old).max(-1), jnp.where(shared, new, NONE).max(-1)
        )
        pages = dataclasses.replace(
            self,
            table=jnp.where(needed, new, self.table),
            length=self.length + count,
            references=_counted(_counted(self.references, new, 1), old, -1),
        )
        return pages, copies

    def needed(self, count: Any) -> Any:
        """int32 ``[]``: how many free pages rows take for ``count`` more tokens, int ``[R]``."""
        begun, shared = self._places(count)
        return jnp.sum(begun | shared, dtype=jnp.int32)

    def _places(self, count: Any) -> tuple[Any, Any]:
        """Bool ``[R M]``: the pages that new tokens begin, and shared ones that they continue."""
        first, length = self._first_tokens(), self.length[:, None]
        after = length + count[:, None]
        begun = (first >= length) & (first < after)
        continued = (first < length) & (length < first + self.page_size) & (length < after)
        continued &= self.table != NONE
        page = jnp.where(continued, self.table, NONE).max(-1)  # at most one of each row
        users = jnp.where(page == NONE, 0, self.references[page])
        same = (page[:, None] == page) & (page != NONE)
        first_of_all = (same.sum(-1) == users) & (same.argmax(-1) == jnp.arange(len(page)))
        return begun, continued & ((users > 1) & ~first_of_all)[:, None]

    def rollback(self, length: Any) -> Pages:
        """The pages without the tokens from position ``length`` on, int ``[R]``."""
        dropped = self._first_tokens() >= length[:, None]
        return dataclasses.replace(
            self,
            table=jnp.where(dropped, NONE, self.table),
            length=length,
            references=_counted(self.references, jnp.where(dropped, self.table, NONE), -1),
        )

    def share(self, source: Any, target: Any, length: Any) -> Pages:
        """The pages with the first ``length`` tokens of ``source`` as those of ``target``."""
        length = jnp.minimum(jnp.asarray(length, jnp.int32), self.length[source])
        kept = jnp.arange(self.table.shape[-1], dtype=jnp.int32) * self.page_size < length
        row = jnp.where(kept, self.table[source], NONE)
        references = _counted(self.references, self.table[target], -1)
        return dataclasses.replace(
            self,
            table=self.table.at[target].set(row),
            length=self.length.at[target].set(length),
            references=_counted(references, row, 1),
        )

    def rows(self, rows: Any) -> Pages:
        """The pages of some rows, int ``[A]``, as if there were no others.

        ``with_rows`` puts them back. A number that is no row stands for an empty one.
        """
        return dataclasses.replace(
            self,
            table=self.table.at[rows].get(mode="fill", fill_value=NONE),
            length=self.length.at[rows].get(mode="fill", fill_value=0),
        )

    def with_rows(self, rows: Any, pages: Pages) -> Pages:
        """The pages of all rows, with those of some from ``rows``."""
        return dataclasses.replace(
            self,
            table=self.table.at[rows].set(pages.table, mode="drop"),
            length=self.length.at[rows].set(pages.length, mode="drop"),
            references=pages.references,
        )

    def _first_tokens(self) -> Any:
        """int32 ``[1 M]``: the position of the first token of each page of a row."""
        return jnp.arange(self.table.shape[-1], dtype=jnp.int32)[None] * self.page_size


def _counted(references: jax.Array, pages: jax.Array, by: int) -> jax.Array:
    """The references with ``by`` more for each of these pages, as often as it occurs."""
    at = jnp.where(pages == NONE, len(references), pages)
    return references.at[at].add(by, mode="drop")


def init_pages(rows: int, *, capacity: int, page_size: int = 16, pages: int | None = None) -> Pages:
    """Empty rows, and a pool of free pages; arguments as for ``init_paged``."""
    rows = int_at_least("rows", rows, 1)
    capacity = int_at_least("capacity", capacity, 1)
    page_size = int_at_least("page_size", page_size, 1)
    per_row = -(-capacity // page_size)
    pages = rows * per_row if pages is None else int_at_least("pages", pages, 1)
    return Pages(
        jnp.full((rows, per_row), NONE, jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(pages, jnp.int32),
        page_size,
        capacity,
    )
