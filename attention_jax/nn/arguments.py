"""Checks of what modules are called with."""

from __future__ import annotations

from typing import Any

import numpy as np

from attention_jax.axes import Shape, broadcasts_to, check_float_array, is_array


def check_tokens(name: str, x: Any, layout: str, width: int) -> None:
    """Raises unless ``x`` is a floating array with the axes of ``layout`` and a width.

    Args:
      name: of the argument.
      x: the argument.
      layout: such as ``"[*B T E]"``: at least as many axes as it has letters beside ``*B``.
      width: of the last axis.
    """
    check_float_array(name, x)
    *axes, last = layout.strip("[]").split()
    rank = len([a for a in axes if a not in ("*B", "...")]) + 1
    if x.ndim < rank or x.shape[-1] != width:
        raise ValueError(f"{name} must have shape {layout} with {last} = {width}, got {x.shape}")


def check_real(real: Any, shape: Shape) -> None:
    """Raises unless ``real`` says of each token ``[*B T]`` whether it is one."""
    if not is_array(real) or real.dtype != np.bool_:
        got = f"dtype {real.dtype}" if is_array(real) else type(real).__name__
        raise TypeError(f"real must be a bool array (False for padding), got {got}")
    check_broadcasts("real", real, shape)


def check_broadcasts(name: str, x: Any, shape: Shape) -> None:
    """Raises unless the array ``x`` broadcasts to ``shape``, which is that of the tokens."""
    if not broadcasts_to(x.shape, shape):
        raise ValueError(f"{name} must broadcast to [*B T] = {shape}, got {x.shape}")
