"""Arrays as 8-bit integers with scales: a quarter of the memory of float32."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.core.axes import AnyArray, brief_fields

MOST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array as integers and scales; indexing it gives floating-point numbers.

    Attributes:
      integers: int8, from -127 to 127.
      scale: of each channel, in the dtype of the array; it broadcasts to ``integers``.
    """

    integers: Any  # within JAX's transformations not always an array
    scale: Any

    def __repr__(self) -> str:
        return brief_fields(self, ("integers", "scale"))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return self.integers.shape

    @property
    def ndim(self) -> int:
        """Its number of axes."""
        return self.integers.ndim

    @property
    def size(self) -> int:
        """Its number of entries."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the array that indexing gives."""
        return self.scale.dtype

    def __getitem__(self, index: Any) -> jax.Array:
        return (self.integers.astype(self.dtype) * self.scale)[index]


def quantize(x: Float[AnyArray, "..."], axis: int) -> Quantized:
    """Rounds an array to integers, with one scale along ``axis``::

        s = max |x| / 127        q = round(x / s)        |q s - x| <= s / 2

    Args:
      x: any floating dtype; the bound holds up to its rounding.
      axis: whose entries share a scale.

    Raises:
      ValueError: infinite or NaN entries, if the values are known.

    >>> import numpy as np
    >>> from attention_jax.core.int8 import quantize
    >>> q = quantize(np.array([[1.0, -100.0], [0.3, 254.0]], np.float32), axis=0)
    >>> q.integers.tolist(), q.scale.round(4).tolist()
    ([[127, -50], [38, 127]], [[0.007899999618530273, 2.0]])
    """
    x = jnp.asarray(x)
    if not isinstance(x, jax.core.Tracer) and not jnp.isfinite(x.astype(jnp.float32)).all():
        raise ValueError("x must be finite to be quantized, got infinite or NaN entries")
    return rounded(x, axis)


def rounded(x: Float[Array, "..."], axis: int) -> Quantized:
    """``quantize`` without the check: what shares a scale with an infinite entry is NaN."""
    largest = jnp.abs(x).astype(jnp.float32).max(axis, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / MOST).astype(x.dtype)
    integers = jnp.round(x.astype(jnp.float32) / scale.astype(jnp.float32))
    return Quantized(jnp.clip(integers, -MOST, MOST).astype(jnp.int8), scale)
