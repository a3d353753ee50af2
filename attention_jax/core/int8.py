"""Arrays as 8-bit integers with scales: a quarter of the memory of float32."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.core.axes import AnyArray, accumulation_dtype, brief_fields

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
    if not isinstance(x, jax.core.Tracer) and not jnp.isfinite(x).all():
        raise ValueError("x must be finite to be quantized, got infinite or NaN entries")
    return rounded(x, axis)


def rounded(x: Float[Array, "..."], axis: int) -> Quantized:
    """``quantize`` unchecked: entries that share a scale with an infinite one become NaN."""
    info, wide = jnp.finfo(x.dtype), accumulation_dtype(x.dtype)
    largest = jnp.abs(x.astype(wide)).max(axis, keepdims=True)
    # Rounded up, 127 steps could overflow.
    scale = jnp.where(
        jnp.isfinite(largest),
        jnp.minimum(largest / MOST, float(info.max) / MOST * (1 - float(info.eps))),
        largest,
    )
    least, unit = float(jnp.finfo(wide).tiny), float(info.smallest_subnormal)
    if unit >= least:  # float16: a small scale is rounded up, so that 127 steps still suffice
        scale = jnp.where(scale < float(info.tiny), jnp.ceil(scale / unit) * unit, scale)
    scale = jnp.where(scale < least, 1, scale).astype(x.dtype)  # zeros, or as good as zeros
    integers = jnp.round(x.astype(wide) / scale.astype(wide))
    return Quantized(jnp.clip(integers, -MOST, MOST).astype(jnp.int8), scale)
