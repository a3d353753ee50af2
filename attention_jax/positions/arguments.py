"""Positions as arguments, and the angles that belong to them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.axes import is_array, same_rank


def check_positions(positions: Any, name: str = "positions") -> Any:
    """The argument as an array; raises where it cannot be positions."""
    if not is_array(positions):
        positions = np.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {positions.dtype}")
    return positions


def rows(table: Any, index: Any, name: str) -> jax.Array:
    """``table[index]``: an error for an index out of range where it is known, else NaN."""
    index = check_positions(index, name)
    if not isinstance(index, jax.core.Tracer) and index.size:
        known = np.asarray(index)  # under jit, what JAX makes of a constant is not known
        least, most = int(known.min()), int(known.max())
        if least < 0 or most >= table.shape[0]:
            raise ValueError(
                f"{name} must be from 0 to {table.shape[0] - 1}, the rows of the table, got "
                f"{least} to {most}"
            )
    # To take(), -1 is the last row: here it is out of range.
    index = jnp.where(jnp.asarray(index) < 0, table.shape[0], index)
    return jnp.take(jnp.asarray(table), index, axis=0, mode="fill", fill_value=jnp.nan)


def angles(positions: Any, f: jax.Array) -> jax.Array:
    """``position * f_i`` in the dtype of ``f``: ``[*B T, i]``."""
    at, f = same_rank(jnp.asarray(positions)[..., None].astype(f.dtype), f)
    return at * f
