"""Position embeddings that are added to the inputs: sinusoidal and learned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attention_jax.core.axes import AnyArray, accumulation_dtype, check_positions
from attention_jax.core.shards import explicit_mesh, named_sharding, resharded, spec_of, without
from attention_jax.positions.scalings import angles, frequencies


def sinusoidal(
    positions: Any,
    width: int,
    *,
    theta: float = 10_000.0,
    interleaved: bool = True,
    dtype: Any = jnp.float32,
) -> Float[Array, "*B T E"]:
    """``sin(position * f_i)`` and ``cos(position * f_i)``, ``f_i = theta ** (-2 i / width)``.

    Args:
      positions: integers ``[*B T]``.
      width: features per position (E), even.
      theta: the longest wavelength is ``2 pi theta``.
      interleaved: sines and cosines alternate, as in the paper; else all sines come first.
      dtype: of the result. Angles are computed in float32 or wider; in float32 they are off by up
        to ``6e-8 * position``.

    Returns:
      ``[*B T E]`` in ``dtype``.

    Raises:
      ValueError: ``width`` is odd or not positive, ``theta`` not positive.
      TypeError: ``positions`` are not integers.

    >>> import numpy as np
    >>> from attention_jax.positions import sinusoidal
    >>> print(np.asarray(sinusoidal(np.arange(2), 4)).round(2))
    [[0.   1.   0.   1.  ]
     [0.84 0.54 0.01 1.  ]]

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5.
    """
    f, _ = frequencies(width, theta=theta, dtype=accumulation_dtype(dtype))
    angle = angles(check_positions(positions), f)
    pair = jnp.sin(angle).astype(dtype), jnp.cos(angle).astype(dtype)
    if interleaved:
        return jnp.stack(pair, axis=-1).reshape(*angle.shape[:-1], width)
    return jnp.concatenate(pair, axis=-1)


def learned(table: Float[AnyArray, "P E"], positions: Any) -> Float[Array, "*B T E"]:
    """``table[position]``.

    Args:
      table: ``[P E]``, one vector per position, differentiable.
      positions: integers ``[*B T]`` from 0 to ``P - 1``.

    Returns:
      ``[*B T E]``; NaN for positions out of range where they are traced.

    Raises:
      ValueError: a position is out of range, where they are not traced.
      TypeError: ``positions`` are not integers.

    >>> import numpy as np
    >>> from attention_jax.positions import learned
    >>> learned(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), np.array([1, 0])).tolist()
    [[3.0, 4.0], [1.0, 2.0]]
    """
    return rows(table, positions, "positions")


def rows(table: Any, index: Any, name: str) -> jax.Array:
    """``table[index]``; an index out of range raises an error, or gives NaN where it is traced."""
    index = check_positions(index, name)
    if not isinstance(index, jax.core.Tracer) and index.size:
        known = np.asarray(index)  # in NumPy: under jit, JAX traces operations on constants too
        least, most = int(known.min()), int(known.max())
        if least < 0 or most >= table.shape[0]:
            raise ValueError(
                f"{name} must be from 0 to {table.shape[0] - 1}, the rows of the table, got "
                f"{least} to {most}"
            )
    # take() reads -1 as the last row; here it is out of range.
    index = jnp.where(jnp.asarray(index) < 0, table.shape[0], index)
    table = jnp.asarray(table)
    if (mesh := explicit_mesh(table, index)) is None:
        return jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan)
    used = spec_of(index)
    kept = tuple(without(axes, used) for axes in spec_of(table))
    table, out = resharded(table, mesh, kept), named_sharding(mesh, (*used, *kept[1:]))
    return table.at[index].get(mode="fill", fill_value=jnp.nan, out_sharding=out)
