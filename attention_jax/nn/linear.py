"""Flax's ``Linear``, with a faster product that understands explicit mesh axes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
from flax import nnx
from jax import lax

from attention_jax.core.shards import (
    explicit_mesh,
    gathered,
    named_sharding,
    resharded,
    spec_of,
    without,
)
from attention_jax.nn.logical import logical

PROJECTIONS = ("query", "key", "value", "gate", "out")

KERNEL_INIT, BIAS_INIT = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class Product:
    """``lax.dot_general`` of ``x [*B T E]`` and ``kernel [E F]`` as one product of two matrices.

    The gradient of the kernel sums over all of ``*B T``. XLA on a CPU does that 1.5 times faster
    over a single axis (2,048 tokens, 384 x 1,536: 175 instead of 105 GFLOP/s). Axes sharded over an
    explicit mesh are not merged, since that would gather them.

    Attributes:
      embed: which axis of the kernel is the width of the model. A kernel that is stored in shards
        along it (FSDP) is gathered for the product, so that the tokens stay where they are.
    """

    embed: int | None = None

    def __call__(
        self,
        x: jax.Array,
        kernel: jax.Array,
        dimensions: Any,
        *,
        out_sharding: Any = None,
        **options: Any,
    ) -> jax.Array:
        if self.embed is not None:
            kernel = gathered(kernel, self.embed)
        if out_sharding is None and (mesh := explicit_mesh(x, kernel)) is not None:
            return _sharded(x, kernel, dimensions, mesh, **options)
        if out_sharding is not None or x.ndim <= 2:
            return lax.dot_general(x, kernel, dimensions, out_sharding=out_sharding, **options)
        *lead, E = x.shape
        flat = x.reshape(math.prod(lead), E)
        y = lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **options)
        return y.reshape(*lead, kernel.shape[-1])


def _sharded(
    x: jax.Array, kernel: jax.Array, dimensions: Any, mesh: Any, **options: Any
) -> jax.Array:
    """The product under an explicit mesh.

    Where the width of ``x`` is sharded, the kernel's rows are too, and the devices' sums are added
    up (tensor parallelism).
    """
    *lead, width = spec_of(x)
    columns = without(spec_of(kernel)[1], (*lead, width))
    kernel = resharded(kernel, mesh, (width, columns))
    out = named_sharding(mesh, (*lead, columns))
    return lax.dot_general(x, kernel, dimensions, out_sharding=out, **options)


Linear = functools.partial(nnx.Linear, dot_general=Product())


def linear(
    in_features: int,
    out_features: int,
    *,
    axes: tuple[str | None, str | None],
    units: int | None = None,
    **options: Any,
) -> nnx.Linear:
    """``nnx.Linear`` with named axes.

    Args:
      in_features, out_features: the shape of the kernel.
      axes: names of the kernel's axes. A bias along ``"embed"`` is never sharded: it is small.
      units: how many units the axis other than ``"embed"`` has; see ``logical``.
      **options: of ``nnx.Linear``.
    """
    bias = None if axes[1] == "embed" else axes[1]
    each = tuple(None if name == "embed" else units for name in axes)
    return nnx.Linear(
        in_features,
        out_features,
        dot_general=Product(axes.index("embed") if "embed" in axes else None),
        kernel_metadata=logical(*axes, units=each),
        bias_metadata=logical(bias, units=None if bias is None else (units,)),
        **options,
    )


def names_with_bias(bias: bool | Collection[str]) -> Callable[[str], bool]:
    """Whether a projection of ``MultiHeadAttention`` has a bias, by its name."""
    names = set(PROJECTIONS if bias is True else bias or ())
    if unknown := names - set(PROJECTIONS):
        raise ValueError(f"bias must name some of {PROJECTIONS}, got {sorted(unknown)}")
    return names.__contains__
