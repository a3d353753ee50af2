"""Flax's ``Linear`` with a faster product: leading axes are flattened into one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
from flax import nnx
from jax import lax

PROJECTIONS = ("query", "key", "value", "gate", "out")

KERNEL_INIT, BIAS_INIT = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()


def flat_dot_general(
    x: jax.Array, kernel: jax.Array, dimensions: Any, *, out_sharding: Any = None, **options: Any
) -> jax.Array:
    """``lax.dot_general`` of ``x [*B T E]`` and ``kernel [E F]`` as one product of two matrices.

    The gradient of the kernel sums over all of ``*B T``. XLA on a CPU does that 1.5 times faster
    over a single axis (2,048 tokens, 384 x 1,536: 175 instead of 105 GFLOP/s).
    """
    if out_sharding is not None or x.ndim <= 2:
        return lax.dot_general(x, kernel, dimensions, out_sharding=out_sharding, **options)
    *lead, E = x.shape
    y = lax.dot_general(x.reshape(math.prod(lead), E), kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*lead, kernel.shape[-1])


Linear = functools.partial(nnx.Linear, dot_general=flat_dot_general)


def names_with_bias(bias: bool | Collection[str]) -> Callable[[str], bool]:
    """Whether a projection of ``MultiHeadAttention`` has a bias, by its name."""
    names = set(PROJECTIONS if bias is True else bias or ())
    if unknown := names - set(PROJECTIONS):
        raise ValueError(f"bias must name some of {PROJECTIONS}, got {sorted(unknown)}")
    return names.__contains__
