"""Rotary embedding: pairs of numbers turned by an angle that grows with the position."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attention_jax.core.axes import AnyArray, accumulation_dtype, check_positions, same_rank
from attention_jax.positions.scalings import DynamicNTK, Scaling, angles, frequencies


def rotary(
    x: Float[AnyArray, "*B T N H"],
    positions: Any,
    *,
    theta: float = 10_000.0,
    width: int | None = None,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    length: Any = None,
) -> Float[Array, "*B T N H"]:
    """Each pair ``(a, b)`` of the first ``width`` numbers turned by ``position * f``::

        (a, b) -> (a cos - b sin, a sin + b cos)

    Args:
      x: queries or keys ``[*B T N H]``, differentiable.
      positions: integers that broadcast to ``[*B T]``.
      theta: ``f_i = theta ** (-2 i / width)``.
      width: how many numbers are turned, even; the rest stays. Default: all (H).
      interleaved: pairs are neighbours ``(0, 1), (2, 3), ...``; else number ``i`` and
        ``i + width / 2``, as in most published checkpoints.
      scaling, length: see ``frequencies``.

    Returns:
      ``[*B T N H]`` in the dtype of ``x``; angles too are computed in float32 or wider. In
      float32 an angle is off by up to ``6e-8 * position``.

    Raises:
      ValueError: ``width`` is odd or more than H; ``positions`` do not broadcast to ``[*B T]``.
      TypeError: ``positions`` are not integers.

    >>> x = np.array([[[1.0, 0.0]], [[1.0, 0.0]]], np.float32)  # T = 2, N = 1, H = 2
    >>> print(np.asarray(rotary(x, np.arange(2))).round(2)[:, 0])
    [[1.   0.  ]
     [0.54 0.84]]

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    x = jnp.asarray(x)
    H = x.shape[-1]
    width = H if width is None else width
    if width > H:
        raise ValueError(f"width must be at most {H}, the width of x (H), got {width}")
    positions = check_positions(positions)
    try:
        fits = np.broadcast_shapes(positions.shape, x.shape[:-2]) == x.shape[:-2]
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"positions must broadcast to {x.shape[:-2]}, the [*B T] of x, got {positions.shape}"
        )
    dtype = accumulation_dtype(x.dtype)
    f, scale = frequencies(width, theta=theta, scaling=scaling, length=length, dtype=dtype)
    turned = x[..., :width].astype(dtype)
    turns, turned = same_rank(angles(positions, f)[..., None, :], turned)  # [*B T 1 h]
    cos, sin = scale * jnp.cos(turns), scale * jnp.sin(turns)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = jnp.split(turned, 2, axis=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., width:]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """``rotary`` with its options, as a value that a module can hold.

    The length that a scaling may depend on is each row's largest position and one.

    Attributes:
      theta, width, interleaved, scaling: as for ``rotary``.

    >>> x = np.array([[[1.0, 0.0]], [[1.0, 0.0]]], np.float32)  # T = 2, N = 1, H = 2
    >>> print(np.asarray(Rotary()(x, np.arange(2))).round(2)[:, 0])
    [[1.   0.  ]
     [0.54 0.84]]
    """

    theta: float = 10_000.0
    width: int | None = None
    interleaved: bool = False
    scaling: Scaling | None = None

    def __call__(self, x: Float[AnyArray, "*B T N H"], positions: Any) -> Float[Array, "*B T N H"]:
        """``x`` turned by the angles of its positions, integers that broadcast to ``[*B T]``."""
        length = None
        if isinstance(self.scaling, DynamicNTK):
            length = jnp.max(positions, axis=-1, keepdims=True) + 1
        return rotary(
            x,
            positions,
            theta=self.theta,
            width=self.width,
            interleaved=self.interleaved,
            scaling=self.scaling,
            length=length,
        )
