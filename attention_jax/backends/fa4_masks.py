"""Our masks as the functions that FlashAttention 4 compiles into its kernel.

``fa4`` imports this only for a call that needs it, because it needs the package ``fa4_jax``. A
function is called with the indices of one query and one key, which in the kernel are of a type of
its own, so it uses only operators and indexing. Arrays are operands of the kernel: new values do
not compile again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from fa4_jax import MaskMod, and_masks, static  # type: ignore[import-not-found]
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from attention_jax.core.axes import Sizes
from attention_jax.masks import Band, Chunked, Dilated, Lengths, Mask, Segments


@dataclasses.dataclass(frozen=True)
class BandFunction(MaskMod):  # type: ignore[misc]
    """``i - left <= j - offset <= i + right``; None is no bound on that side."""

    offset: Any  # int32 [B]
    left: int | None = static()
    right: int | None = static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        distance = k - q - self.offset[b]
        if self.left is None:
            return distance <= self.right
        if self.right is None:
            return distance >= -self.left
        return (distance >= -self.left) & (distance <= self.right)


@dataclasses.dataclass(frozen=True)
class LengthsFunction(MaskMod):  # type: ignore[misc]
    """The first queries and the first keys."""

    query: Any  # int32 [B]
    key: Any  # int32 [B]

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q < self.query[b]) & (k < self.key[b])


@dataclasses.dataclass(frozen=True)
class SegmentsFunction(MaskMod):  # type: ignore[misc]
    """Equal ids that are not negative."""

    query: Any  # int32 [B T]
    key: Any  # int32 [B S]

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (self.query[b, q] == self.key[b, k]) & (self.query[b, q] >= 0)


@dataclasses.dataclass(frozen=True)
class ChunkedFunction(MaskMod):  # type: ignore[misc]
    """Both in the same chunk."""

    size: int = static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return q // self.size == k // self.size


@dataclasses.dataclass(frozen=True)
class DilatedFunction(MaskMod):  # type: ignore[misc]
    """Distances that are multiples of the stride."""

    stride: int = static()

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return q % self.stride == k % self.stride


def function(parts: Sequence[Mask], sizes: Sizes) -> Any:
    """One function for masks that must all hold; None if there are none."""
    functions = [_function(part, sizes) for part in parts]
    return and_masks(*functions) if len(functions) > 1 else next(iter(functions), None)


def _function(mask: Mask, sizes: Sizes) -> Any:
    T, S = sizes.T, sizes.S
    if isinstance(mask, Band):
        return BandFunction(_flat(mask.offset, sizes), mask.left, mask.right)
    if isinstance(mask, Lengths):
        query, key = (
            n if x is None else jnp.clip(jnp.asarray(x), 0, n)  # before the cast to int32
            for x, n in ((mask.query, T), (mask.key, S))
        )
        return LengthsFunction(_flat(query, sizes), _flat(key, sizes))
    if isinstance(mask, Segments):
        return SegmentsFunction(_flat(mask.query_ids, sizes, T), _flat(mask.key_ids, sizes, S))
    if isinstance(mask, Chunked):
        return ChunkedFunction(mask.size)
    if isinstance(mask, Dilated):
        return DilatedFunction(mask.stride)
    raise NotImplementedError(
        f"implementation 'fa4' cannot: mask {type(mask).__name__} has no function here"
    )


def _flat(x: ArrayLike, sizes: Sizes, *rest: int) -> Int[Array, "B ..."]:
    """Integers over ``*B`` and further axes as int32 ``[B ...]``."""
    x = jnp.broadcast_to(jnp.asarray(x), (*sizes.B, *rest))
    return x.astype(jnp.int32).reshape(-1, *rest)
