"""Masks of parts of a sequence: prefix, lengths, segments, chunks, global tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Bool, Int

from attention_jax.core.axes import (
    AnyArray,
    PerExample,
    bool_array,
    check_one_dtype,
    int_array,
    int_at_least,
    per_example,
)
from attention_jax.masks.base import Mask
from attention_jax.masks.grid import Grid
from attention_jax.masks.reach import Reach


class Lengths(Mask):
    """The first ``query`` queries attend to the first ``key`` keys; None means no bound."""

    NAME = "masks.lengths"
    DEFAULTS = {"query": None, "key": None}
    AXES = {"query": "*B", "key": "*B"}
    BY_INTERVALS = True
    query: PerExample | None
    key: PerExample | None

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self._below(q, k)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        return self._below(grid.q0, grid.k0), self._below(grid.q1, grid.k1)

    def reach(self) -> Reach:
        return Reach(self.key, None)

    def _below(self, q: Any, k: Any) -> Any:
        inside = (q == q) & (k == k)  # all True, of the right shape
        if self.query is not None:
            inside = inside & (q < self.query)
        if self.key is not None:
            inside = inside & (k < self.key)
        return inside


class Prefix(Lengths):
    """The first keys. A separate class so that messages name ``masks.prefix``."""

    NAME = "masks.prefix"
    ARGUMENTS = {"key": "length"}


def prefix(length: PerExample) -> Mask:
    """Query ``i`` attends to key ``j`` where ``j < length``; with ``| causal()``, prefix-LM.

    Args:
      length: an int >= 0, or an int array ``[*B]``, in which negative lengths count as 0.

    >>> from attention_jax.masks import causal, prefix
    >>> print(prefix(3) | causal())
    ███·····
    ███·····
    ███·····
    ████····
    █████···
    ██████··
    ███████·
    ████████

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (T5), section 3.2.1.
    """
    return Prefix(None, per_example("length", length, least=0))


def lengths(*, query: PerExample | None = None, key: PerExample | None = None) -> Mask:
    """Query ``i`` attends to key ``j`` where ``i < query`` and ``j < key``; None means no bound.

    Args:
      query, key: how many queries and keys are real, ints >= 0 or int arrays ``[*B]``, in which
        negative lengths count as 0; the rest is padding and never affects a result. Both are
        keyword arguments: ``lengths(key=n)`` masks padded keys.

    >>> from attention_jax.masks import lengths
    >>> print(lengths(query=6, key=5))
    █████···
    █████···
    █████···
    █████···
    █████···
    █████···
    ········
    ········
    """
    return Lengths(
        None if query is None else per_example("query", query, least=0),
        None if key is None else per_example("key", key, least=0),
    )


class Segments(Mask):
    """Query and key with the same id, which is not negative."""

    NAME = "masks.segments"
    AXES = {"query_ids": "*B T", "key_ids": "*B S"}
    BY_INTERVALS = True
    query_ids: Any
    key_ids: Any

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return (self.query_ids == self.key_ids) & (self.query_ids >= 0)

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        # The range of the ids that are not padding; empty (low > high) if all are padding.
        def intervals(over: Callable[..., Any], ids: Any) -> tuple[Any, Any, Any]:
            unpadded = jnp.where(ids < 0, jnp.iinfo(ids.dtype).max, ids)
            return over(jnp.min, unpadded), over(jnp.max, ids), over(jnp.all, ids >= 0)

        q_low, q_high, q_real = intervals(grid.over_queries, jnp.asarray(self.query_ids))
        k_low, k_high, k_real = intervals(grid.over_keys, jnp.asarray(self.key_ids))
        some = (q_low <= k_high) & (k_low <= q_high) & (q_high >= 0) & (k_high >= 0)
        same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        return some, same & q_real & k_real


def segments(
    query_ids: Int[AnyArray, "*B T"], key_ids: Int[AnyArray, "*B S"] | None = None
) -> Mask:
    """Query ``i`` attends to key ``j`` where their ids are equal and not negative.

    For several documents packed into one sequence.

    Args:
      query_ids: int array ``[*B T]``; a negative id is padding, masked as query and as key.
      key_ids: int array ``[*B S]``; None takes ``query_ids``.

    >>> import numpy as np
    >>> from attention_jax.masks import segments
    >>> print(segments(np.array([0, 0, 0, 1, 1, 2, -1, -1])))
    ███·····
    ███·····
    ███·····
    ···██···
    ···██···
    ·····█··
    ········
    ········

    Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination".
    """
    key_ids = query_ids if key_ids is None else key_ids
    for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
        int_array(name, ids, 1)
    check_one_dtype("query_ids", query_ids, "key_ids", key_ids)
    return Segments(query_ids, key_ids)


class Padding(Segments):
    """One segment and padding. A separate class for mechanisms that take padding masks only."""

    NAME = "masks.padding"
    ARGUMENTS = {"query_ids": "real", "key_ids": "real"}


def padding(real: Bool[AnyArray, "*B S"], *, queries: int | None = None) -> Mask:
    """A padding mask: masks padding as keys and, in self-attention, as queries too.

    Args:
      real: bool array ``[*B S]``, False for padding.
      queries: for cross-attention, the number of queries (T); None is for self-attention.

    >>> import numpy as np
    >>> from attention_jax.masks import padding
    >>> print(padding(np.array([True, True, False, True])))
    ██·█
    ██·█
    ····
    ██·█
    >>> print(padding(np.array([True, True, False, True]), queries=2))
    ██·█
    ██·█
    """
    bool_array("real", real, 1)
    ids = jnp.where(jnp.asarray(real), 0, -1).astype(jnp.int32)
    if queries is None:
        return Padding(ids, ids)
    shape = (*ids.shape[:-1], int_at_least("queries", queries, 0))
    return Padding(jnp.zeros(shape, jnp.int32), ids)


class Chunked(Mask):
    """Query and key in the same chunk of ``size`` positions."""

    NAME = "masks.chunked"
    BY_INTERVALS = True
    size: int

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return q // self.size == k // self.size

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        q0, q1 = grid.q0 // self.size, grid.q1 // self.size
        k0, k1 = grid.k0 // self.size, grid.k1 // self.size
        return (q0 <= k1) & (k0 <= q1), (q0 == q1) & (k0 == k1) & (q0 == k0)

    def reach(self) -> Reach:
        return Reach(None, self.size - 1)


def chunked(size: int) -> Mask:
    """Query ``i`` attends to key ``j`` where ``i // size == j // size``.

    >>> from attention_jax.masks import chunked
    >>> print(chunked(3))
    ███·····
    ███·····
    ███·····
    ···███··
    ···███··
    ···███··
    ······██
    ······██

    Source: Qiu et al. 2020, "Blockwise Self-Attention for Long Document Understanding".
    """
    return Chunked(int_at_least("size", size, 1))


class GlobalTokens(Mask):
    """Flagged queries attend to all keys, and all queries to flagged keys."""

    NAME = "masks.global_tokens"
    ARGUMENTS = {"query_flags": "flags", "key_flags": "flags"}
    AXES = {"query_flags": "*B T", "key_flags": "*B S"}
    BY_INTERVALS = True
    query_flags: Any
    key_flags: Any

    def rule(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.query_flags | self.key_flags

    def block(self, grid: Grid, b: Any, n: Any) -> tuple[Any, Any]:
        q, k = jnp.asarray(self.query_flags), jnp.asarray(self.key_flags)
        return (
            grid.over_queries(jnp.any, q) | grid.over_keys(jnp.any, k),
            grid.over_queries(jnp.all, q) | grid.over_keys(jnp.all, k),
        )


def global_tokens(flags: Bool[AnyArray, "*B T"]) -> Mask:
    """Query ``i`` attends to key ``j`` where ``flags[i] or flags[j]``; for ``T == S`` only.

    Args:
      flags: bool array ``[*B T]``.

    >>> import numpy as np
    >>> from attention_jax.masks import global_tokens, window
    >>> print(global_tokens(np.arange(8) == 0) | window(1, 1))
    ████████
    ███·····
    ████····
    █·███···
    █··███··
    █···███·
    █····███
    █·····██

    Source: Beltagy et al. 2020, "Longformer", section 3.1.
    """
    bool_array("flags", flags, 1)
    return GlobalTokens(flags, flags)
