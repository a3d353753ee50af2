"""Shardings while tracing: read from types for explicit mesh axes, constraints for Auto axes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def explicit_mesh(*arrays: Any) -> Any:
    """The mesh over whose explicit axes an array is sharded; None if no array is.

    Args:
      arrays: arrays, or sequences of them.
    """
    for x in jax.tree.leaves(arrays):
        sharding = jax.typeof(x).sharding
        if sharding.mesh.explicit_axes and any(axis is not None for axis in sharding.spec):
            in_use = jax.sharding.get_abstract_mesh()  # an enclosing vmap removes axes from it
            return sharding.mesh if in_use.empty else in_use
    return None


def spec_of(x: Any) -> tuple[Any, ...]:
    """The explicit mesh axes that each axis is sharded over: None, a name or several."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return (*spec, *[None] * (x.ndim - len(spec)))


def without(axes: Any, used: Iterable[Any]) -> Any:
    """The mesh axes of one array axis, without those that other array axes use.

    >>> from attention_jax.core.shards import without
    >>> without(("data", "model"), ["data", None])
    'model'
    """
    taken = {name for entry in used for name in mesh_axes_of(entry)}
    left = tuple(name for name in mesh_axes_of(axes) if name not in taken)
    return left if len(left) > 1 else left[0] if left else None


def named_sharding(mesh: Any, spec: Iterable[Any]) -> NamedSharding:
    """The sharding of an array with these mesh axes."""
    return NamedSharding(mesh, PartitionSpec(*spec))


def resharded(x: jax.Array, mesh: Any, spec: tuple[Any, ...]) -> jax.Array:
    """The array resharded, or unchanged if it already has this sharding."""
    return x if spec_of(x) == spec else jax.sharding.reshard(x, named_sharding(mesh, spec))


def gathered(x: jax.Array, axis: int) -> jax.Array:
    """The array gathered along one axis; the sharding of the other axes is kept.

    For parameters that are stored in shards along that axis. The gradient is sharded again.
    """
    if (mesh := explicit_mesh(x)) is not None:
        spec = spec_of(x)
        return resharded(x, mesh, (*spec[:axis], None, *spec[axis + 1 :]))
    if isinstance(x, jax.core.Tracer) and jax.sharding.get_abstract_mesh().auto_axes:
        free: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
        free[axis] = None
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*free))
    return x


def split_along(x: Any, axis: int, name: str | None, what: str) -> Any:
    """The array with one axis sharded over an Auto axis of the mesh in use.

    Args:
      x: the array.
      axis: which of its axes.
      name: of the mesh axis. If it is None or no such mesh is in use, the array is unchanged.
      what: the axis in words, for the error.

    Raises:
      ValueError: a mesh axis that does not divide the axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if name is None or name not in mesh.auto_axes:
        return x
    if x.shape[axis] % (devices := mesh.shape[name]):
        raise ValueError(
            f"{what} must be a multiple of the {devices} devices along mesh axis "
            f"{name!r}, got {x.shape[axis]}: pad it to {-(-x.shape[axis] // devices) * devices}"
        )
    free: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    free[axis] = name
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*free))


def mesh_axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec: none, one or several."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
