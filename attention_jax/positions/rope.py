"""Rotary embedding: rotates pairs of features by an angle that grows with the position."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.core.axes import (
    AnyArray,
    accumulation_dtype,
    broadcasts_to,
    check_positions,
    same_rank,
)
from attention_jax.positions.scalings import Scaling, angles, frequencies


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
    """Rotates each pair ``(a, b)`` of the first ``width`` features by ``position * f``::

        (a, b) -> (a cos - b sin, a sin + b cos)

    Args:
      x: queries or keys ``[*B T N H]``, differentiable.
      positions: integers that broadcast to ``[*B T]``.
      theta: ``f_i = theta ** (-2 i / width)``.
      width: how many features to rotate, even; the others stay. Default: all (H).
      interleaved: pairs are neighbors ``(0, 1), (2, 3), ...``; else features ``i`` and
        ``i + width / 2``, as in most published checkpoints.
      scaling, length: see ``frequencies``.

    Returns:
      ``[*B T N H]`` in the dtype of ``x``. Angles are computed in float32 or wider; in float32
      they are off by up to ``6e-8 * position``.

    Raises:
      ValueError: ``width`` is odd or more than H; ``positions`` do not broadcast to ``[*B T]``.
      TypeError: ``positions`` are not integers.

    >>> import numpy as np
    >>> from attention_jax.positions import rotary
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
    if not broadcasts_to(positions.shape, x.shape[:-2]):
        raise ValueError(
            f"positions must broadcast to {x.shape[:-2]}, the [*B T] of x, got {positions.shape}"
        )
    dtype = accumulation_dtype(x.dtype)
    f, scale = frequencies(width, theta=theta, scaling=scaling, length=length, dtype=dtype)
    rotated = x[..., :width].astype(dtype)
    angle, rotated = same_rank(angles(positions, f)[..., None, :], rotated)  # [*B T 1 h]
    cos, sin = scale * jnp.cos(angle), scale * jnp.sin(angle)
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
    else:
        a, b = jnp.split(rotated, 2, axis=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        rotated = jnp.stack(pair, axis=-1).reshape(rotated.shape)
    else:
        rotated = jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., width:]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """``rotary`` with its options, as a value that a module can hold.

    A scaling that depends on the length takes each row's largest position plus one.

    Attributes:
      theta, width, interleaved, scaling: as for ``rotary``.

    >>> import numpy as np
    >>> from attention_jax.positions import Rotary
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
        """``x`` rotated by the angles of ``positions``, integers that broadcast to ``[*B T]``."""
        length = None
        if self.scaling is not None and self.scaling.depends_on_length:
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
