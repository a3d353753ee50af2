"""Everything we use of JAX beyond its documented interface.

JAX may move undocumented names in any release. ``tests/test_compat.py`` tests what we expect of
each of them, with all supported releases, from 0.10 on.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

try:
    from jax.experimental.pallas import triton
except ImportError:  # deprecated since JAX 0.12
    triton = None  # type: ignore[assignment]

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "Literal",
    "Primitive",
    "ad",
    "batching",
    "for_export",
    "jaxpr_as_fun",
    "like",
    "mesh_platform",
    "mlir",
    "no_axes",
    "no_mesh",
    "num_devices",
    "run_again",
    "sharded_over",
    "trace_settings",
    "triton",
    "varies",
    "with_devices",
]


def varies(aval: Any) -> frozenset[Any]:
    """The mesh axes along which an array of this type varies, within ``shard_map``."""
    return frozenset(aval.manual_axis_type.varying)


def run_again(primitive: Any, inputs: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Applies an operation of a jaxpr, with its parameters there, to other inputs."""
    results = primitive.bind(*inputs, **primitive.get_bind_params(params))
    return list(results) if primitive.multiple_results else [results]


def like(aval: Any, shape: Sequence[Any], dtype: Any, spec: Sequence[Any] = ()) -> Any:
    """The type of a result that varies along the same mesh axes as ``aval``.

    Args:
      spec: the explicit mesh axes that each axis of the result is sharded over; default none.
    """
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*(spec or (None,) * len(shape))))
    return aval.update(shape=tuple(shape), dtype=dtype, weak_type=False, sharding=sharding)


def sharded_over(aval: Any, axis: Any) -> Any:
    """The explicit mesh axes that an axis of an array is sharded over; None if it is not."""
    spec = tuple(aval.sharding.spec)
    return spec[axis] if axis < len(spec) else None


def for_export(ctx: Any) -> bool:
    """Whether a lowering rule runs for ``jax.export``, whose programs may run elsewhere."""
    return bool(ctx.module_context.lowering_parameters.for_export)


def mesh_platform() -> str | None:
    """The platform of the mesh in use, even if its devices are absent; None without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def no_axes() -> Any:
    """A context in which the mesh in use has no axes but keeps its device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def no_mesh() -> Any:
    """A context without a mesh, to compute something on this machine while tracing."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def num_devices(context: Any) -> int:
    """The number of devices among which XLA partitions a program.

    It is 1 inside ``shard_map``, where the program of each device is given.
    """
    return int(getattr(context.module_context.axis_context, "num_devices", 1))


def with_devices(context: Any) -> Any:
    """The lowering context with devices, which ``custom_partitioning`` needs; None if impossible.

    Only the number of devices affects the program, so the first ones of the platform are used. If
    the program is for another machine, there may be too few here.
    """
    module = context.module_context
    axes = module.axis_context
    try:
        devices = tuple(jax.devices(module.platforms[0])[: axes.num_devices])
    except RuntimeError:  # no device of this platform
        return None
    if len(devices) < axes.num_devices:
        return None
    axes = dataclasses.replace(axes, device_assignment=devices, abstract_mesh=None)
    return context.replace(module_context=module.replace(axis_context=axes))


def trace_settings() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context factory that restores the current x64 and precision settings.

    XLA calls back to partition a program when these are no longer in effect.
    """
    x64 = jax.enable_x64.value
    precision = jax.default_matmul_precision.value

    @contextlib.contextmanager
    def settings() -> Iterator[None]:
        with jax.enable_x64(x64), jax.default_matmul_precision(precision):
            yield

    return settings
