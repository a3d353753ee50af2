"""Padded sequences: which tokens are real, and their positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.core.axes import Shape, is_array


def as_real(real: Any, shape: Shape, *, name: str = "real", of: str = "the tokens'") -> Any:
    """The argument as a bool array of the tokens' shape; None, no padding, stays None.

    It does not broadcast: one row for a batch is more often a mistake than the padding of all rows.

    Raises:
      ValueError: another dtype or shape.
    """
    if real is None:
        return None
    if not is_array(real):
        real = np.asarray(real)
    if real.dtype != bool or real.shape != shape:
        raise ValueError(
            f"{name} must be bool of {of} shape {shape}, False for padding, got "
            f"{real.dtype}{real.shape}"
        )
    return real


def filled(x: Any, real: Any) -> Any:
    """``x`` with padding replaced by 0, whatever it holds, NaN included."""
    if real is None:
        return x
    # NumPy integers keep their width, so that range checks see the original values.
    host = not isinstance(x, jax.Array) and not isinstance(real, jax.core.Tracer)
    return np.where(real, x, 0) if host else jnp.where(real, x, 0)


def positions_of(real: Any) -> jax.Array:
    """``max(cumsum(real) - 1, 0)``: the first real token is at position 0.

    >>> import numpy as np
    >>> from attention_jax.nn.padding import positions_of
    >>> positions_of(np.array([False, False, True, True, False])).tolist()
    [0, 0, 0, 1, 1]
    """
    return jnp.maximum(jnp.cumsum(jnp.asarray(real), axis=-1, dtype=jnp.int32) - 1, 0)


def places(positions: Any, real: Any) -> Any:
    """Positions with padding set to 0; default: ``positions_of(real)``."""
    if positions is None:
        return None if real is None else positions_of(real)
    return filled(positions, real)
