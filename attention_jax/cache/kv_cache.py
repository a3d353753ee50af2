"""``KVCache``: keys and values of the tokens so far, with methods to append and drop tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention_jax.cache.tokens import (
    as_count,
    check_new_tokens,
    empty,
    kept_length,
    like,
    stored,
)
from attention_jax.core.axes import (
    AnyArray,
    brief_fields,
    int_at_least,
    kind,
    same_rank,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far.

    Attributes:
      key: ``[*B C K H]``, ``C`` slots; an array, or ``Quantized``.
      value: ``[*B C K D]``.
      length: int32 ``[*B]``, how many tokens were appended to each row. In a plain cache, tokens
        beyond ``C`` were dropped; see ``overflowed``.
      rolling: whether new tokens overwrite the oldest.
      first: int32 ``[*B]``, the first position that a rolling cache may still hold; None in a plain
        cache.
    """

    # Not annotated with shapes, because transformations also put specs and axes into the fields.
    key: Any
    value: Any
    length: Any
    rolling: bool = dataclasses.field(default=False, metadata={"static": True})
    first: Any = None

    def __repr__(self) -> str:
        return brief_fields(self, ("key", "value", "length", "rolling"))

    @property
    def capacity(self) -> int:
        """The number of slots (C)."""
        return int(self.key.shape[-3])

    @property
    def overflowed(self) -> Any:
        """bool ``[*B]``: more tokens were appended than a plain cache can hold."""
        return (self.length > self.capacity) & (not self.rolling)

    def positions(self) -> Int[Array, "*B C"]:
        """The position of the token in each slot, ``-1`` if the slot is empty.

        >>> import numpy as np
        >>> from attention_jax.cache import init
        >>> cache = init((), capacity=3, num_kv_heads=1, head_dim=1, rolling=True)
        >>> x = np.zeros((4, 1, 1), np.float32)
        >>> cache.append(x, x).positions().tolist()
        [3, 1, 2]
        """
        slots, length = same_rank(
            jnp.arange(self.capacity, dtype=jnp.int32), self.length[..., None]
        )
        if self.rolling:  # the largest position below length that is stored in this slot
            position = length - 1 - (length - 1 - slots) % self.capacity
        else:
            position = jnp.broadcast_to(slots, (*self.length.shape, self.capacity))
        least = self._first()[..., None] if self.rolling else 0
        return jnp.where((position >= least) & (position < length), position, -1)

    def intact(self, window: int) -> Any:
        """bool ``[*B]``: whether the cache holds the last ``window - 1`` tokens (or all, if fewer).

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
          count: how many of them are real, an int or int array ``[*B]``; default T. The rest is
            padding.

        Raises:
          ValueError: shapes do not fit; or there are more tokens than slots. Where lengths are
            traced, tokens beyond the last slot are dropped instead, overwrite nothing, and
            ``overflowed`` is True.
          TypeError: another dtype.

        >>> import numpy as np
        >>> from attention_jax.cache import init
        >>> cache = init((2,), capacity=4, num_kv_heads=1, head_dim=1)
        >>> x = np.ones((2, 3, 1, 1), np.float32)
        >>> cache.append(x, x, count=np.array([3, 1])).length.tolist()
        [3, 1]
        """
        batch = self.length.shape
        T = check_new_tokens(key, value, self.key, self.value, batch)
        count = as_count(count, T, batch)
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
            # If two new tokens map to one slot, the later one is stored.
            keep = keep & (slot >= after[..., None] - self.capacity)
            slot = slot % self.capacity
        slot = jnp.where(keep, slot, self.capacity)  # mode="drop" drops indices out of range

        put = stored
        for _ in batch:
            put = jax.vmap(put)
        return dataclasses.replace(
            self._longer(count),
            key=put(self.key, like(self.key, key), slot),
            value=put(self.value, like(self.value, value), slot),
        )

    def _longer(self, count: Any) -> KVCache:
        """The cache with its length after ``count`` more tokens, before they are stored."""
        length = self.length + jnp.asarray(count, jnp.int32)
        first = self.first
        if first is not None:
            first = jnp.maximum(first, length - self.capacity)
        return dataclasses.replace(self, length=length, first=first)

    def rollback(self, length: Any) -> KVCache:
        """The cache without the tokens from position ``length`` on.

        For rejected tokens in speculative decoding. A plain cache can be rolled back to any length.
        In a rolling cache the dropped tokens have overwritten those ``capacity`` positions before
        them: with a window of ``W`` tokens it can be rolled back by ``capacity - W + 1``, so make
        it larger than the window. ``extend`` raises an error for a mask that reaches overwritten
        tokens.

        Do not roll back into a prefix with bidirectional attention: the tokens that are kept have
        already attended to those that are dropped.

        Args:
          length: how many tokens to keep, an int or int array ``[*B]``.

        Raises:
          ValueError: more tokens than the cache has, or (rolling) all tokens to keep are
            overwritten. Not checked when lengths are traced: check ``intact(window)`` afterward.
          TypeError: not integers.

        >>> import numpy as np
        >>> from attention_jax.cache import init
        >>> cache = init((2,), capacity=4, num_kv_heads=1, head_dim=1)
        >>> x = np.ones((2, 3, 1, 1), np.float32)
        >>> cache.append(x, x).rollback(np.array([1, 2])).positions().tolist()
        [[0, -1, -1, -1], [0, 1, -1, -1]]
        """
        length = kept_length(length, self.length)
        first = self._first() if self.rolling else None
        known = not any(isinstance(x, jax.core.Tracer) for x in (length, first))
        if first is not None and known and bool((length < first).any()):
            raise ValueError(
                f"length must be at least {first}: earlier tokens are overwritten in a rolling "
                f"cache of capacity {self.capacity}, got {length}"
            )
        return dataclasses.replace(self, length=length, first=first)


def init(
    batch: tuple[int, ...],
    *,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
    rolling: bool = False,
    quantize: str | None = None,
) -> KVCache:
    """An empty cache.

    Args:
      batch: the batch axes ``*B``.
      capacity: slots per row (C); in a rolling cache at least the number of keys in a query's
        window, including its own.
      num_kv_heads: key-value heads (K), not query heads.
      head_dim: width of a key (H).
      value_dim: width of a value (D); default ``head_dim``.
      dtype: of keys and values.
      rolling: whether new tokens overwrite the oldest.
      quantize: ``"int8"`` to store keys and values as 8-bit integers, with a scale in ``dtype`` for
        each token and head; see the module docstring.

    >>> from attention_jax.cache import init
    >>> init((2,), capacity=8, num_kv_heads=2, head_dim=4).key.shape
    (2, 8, 2, 4)
    """
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"batch must be a tuple, the batch axes *B, got {kind(batch)}: for one axis, write "
            f"({batch},)"
        )
    capacity = int_at_least("capacity", capacity, 1)
    key, value = empty(
        (*batch, capacity),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        quantize=quantize,
    )
    first = jnp.zeros(batch, jnp.int32) if rolling else None
    return KVCache(key, value, jnp.zeros(batch, jnp.int32), rolling, first)
