"""The argument ``rngs`` of modules."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from attention_jax.core.axes import is_array, kind


def check_rngs(rngs: Any) -> None:
    """Raises unless a module can draw its parameters from ``rngs``."""
    if not isinstance(rngs, nnx.Rngs):
        seed = rngs if isinstance(rngs, int) else 0
        raise TypeError(f"rngs must be nnx.Rngs, got {kind(rngs)}: use nnx.Rngs({seed})")


def dropout_key(rngs: Any) -> jax.Array:
    """The next key of ``nnx.Rngs`` or of one of its streams; a key itself is returned."""
    if isinstance(rngs, nnx.Rngs):
        rngs = rngs.dropout
    key = rngs() if isinstance(rngs, nnx.RngStream) else rngs
    if not is_array(key):
        raise TypeError(
            f"rngs must be nnx.Rngs, one of its streams or a random key, got {kind(rngs)}: use "
            f"nnx.Rngs(dropout=0)"
        )
    return key
