"""Checks of what masks are made from."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from attention_jax.axes import AnyArray, is_array

# An int, or one int per example.
PerExample = int | Int[AnyArray, "*B"]


def int_at_least(name: str, x: Any, least: int) -> int:
    """``x`` as an int; raises unless it is one, and at least ``least``."""
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(x).__name__} {x!r}")
    if x < least:
        raise ValueError(f"{name} must be at least {least}, got {x}")
    return int(x)


def int_array(name: str, x: Any, rank: int) -> None:
    """Raises unless ``x`` is a signed integer array of at least ``rank`` axes."""
    if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.signedinteger):
        raise TypeError(f"{name} must be a signed integer array, got {_describe(x)}")
    if x.ndim < rank:
        raise ValueError(f"{name} must have at least {rank} axes, got shape {x.shape}")


def bool_array(name: str, x: Any, rank: int) -> None:
    """Raises unless ``x`` is a bool array of at least ``rank`` axes."""
    if not is_array(x) or x.dtype != np.bool_:
        raise TypeError(f"{name} must be a bool array (True = visible), got {_describe(x)}")
    if x.ndim < rank:
        raise ValueError(f"{name} must have at least {rank} axes, got shape {x.shape}")


def _describe(x: Any) -> str:
    return f"dtype {x.dtype}" if is_array(x) else type(x).__name__


def per_example(name: str, x: Any) -> Any:
    """An int stays an int; an int array is data."""
    if isinstance(x, (int, np.integer)) and not isinstance(x, bool):
        return int(x)
    int_array(name, x, 0)
    return x


def checked_align(align: str) -> str:
    """``align``; raises unless it is ``"start"`` or ``"end"``."""
    if align not in ("start", "end"):
        raise ValueError(f'align must be "start" or "end", got {align!r}')
    return align
