"""One device's share of a call: what it has, and what of masks and scores goes with the keys."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Hashable, Iterator
from typing import Any

import jax

from attention_jax.backends.call import Call
from attention_jax.core.axes import Sizes, check_query_key_value
from attention_jax.core.positions import Contiguous, checked_positions
from attention_jax.core.pytree import Leaf

AxisName = Hashable  # or a tuple of them


@dataclasses.dataclass(frozen=True)
class Shard:
    """One device's queries and keys, and where they are in the sequence.

    Attributes:
      call: mask and scores resolved for the whole sequence, not at positions yet.
      sizes: of this device.
      queries, keys: positions, int32 arrays or ``Contiguous``.
      axis_name: of the mesh axis, or axes, that split the sequence.
      devices: along it.
    """

    call: Call
    sizes: Sizes
    queries: Any
    keys: Any
    axis_name: AxisName
    devices: int

    @property
    def index(self) -> jax.Array:
        """The number of this device along the axis."""
        return jax.lax.axis_index(self.axis_name)


def axis_size(axis_name: AxisName) -> int:
    """How many devices there are along a mesh axis.

    Raises:
      ValueError: there is no such axis here.
    """
    try:
        return int(jax.lax.axis_size(axis_name))
    except NameError:
        mesh = jax.sharding.get_abstract_mesh()
        raise ValueError(
            f"axis_name is {axis_name!r}, which is not an axis of the shard_map around this call: "
            f"its axes are {', '.join(map(repr, mesh.manual_axes)) or 'none'}"
        ) from None


@contextlib.contextmanager
def local(letters: str, axis_name: AxisName) -> Iterator[None]:
    """Adds to errors about these axis letters that they are lengths on one device."""
    try:
        yield
    except (TypeError, ValueError) as problem:
        text = str(problem)
        named = [x for x in letters if re.search(rf"\b{x}\b", text)]
        # Errors of JAX derive from these types; ours do not.
        if named and type(problem) in (TypeError, ValueError) and "device" not in text:
            names = " and ".join(named)
            lengths = "are local lengths" if len(named) > 1 else "is a local length"
            devices = f"axis_name {axis_name!r} has {axis_size(axis_name)} devices"
            problem.args = (f"{text} ({names} {lengths}; {devices})",)
        raise


def shard_of(call: Call, query_positions: Any, key_positions: Any, *, axis_name: AxisName) -> Shard:
    """A call inside ``shard_map``; without positions, shards follow each other.

    Args:
      call: from ``bind``, without positions.
      query_positions, key_positions: of this device's queries and keys, or None.
      axis_name: of the mesh axis that splits the sequence.

    Raises:
      TypeError, ValueError: arguments that do not fit together.
    """
    devices = axis_size(axis_name)
    sizes = check_query_key_value(call.query, call.key, call.value)
    T, S, N = sizes.T, sizes.S, sizes.N
    for name, x in (("query_positions", query_positions), ("key_positions", key_positions)):
        if isinstance(x, Contiguous):
            raise TypeError(f"{name} must be an int32 array here, got {x}: use jnp.arange")
    queries = checked_positions("query_positions", query_positions, (*sizes.B, T))
    keys = checked_positions("key_positions", key_positions, (*sizes.B, S))
    if queries is None and keys is None:

        def resolve(x: Any) -> Any:
            return x.resolve(devices * T, devices * S, N)
    else:

        def resolve(x: Any) -> Any:
            return x.resolve_in_sequence(N)

    index = jax.lax.axis_index(axis_name)
    return Shard(
        call=call._replace(
            mask=None if call.mask is None else resolve(call.mask),
            score=tuple(map(resolve, call.score)),
        ),
        sizes=sizes,
        queries=Contiguous(index * T) if queries is None else queries,
        keys=Contiguous(index * S) if keys is None else keys,
        axis_name=axis_name,
        devices=devices,
    )


def axis_of(x: Any, leaf: Leaf, letter: str) -> int | None:
    """Where an array of a mask or score has an axis, counted from the last; None without it.

    An array may leave out its first axes, and those of size 1 broadcast.
    """
    if letter not in leaf.axes:
        return None
    axis = leaf.axes.index(letter) - len(leaf.axes)
    if "B" in leaf.axes[leaf.axes.index(letter) :]:
        return None
    if -axis > x.ndim or (leaf.broadcast and x.shape[axis] == 1):
        return None
    return axis


def along_keys(shard: Shard, x: Any, leaf: Leaf) -> tuple[int | None, bool]:
    """The axis of an array that runs along keys, and whether it has those of all devices.

    Raises:
      ValueError: it has entries for neither the keys of this device nor for those of all.
    """
    axis = axis_of(x, leaf, "S")
    if axis is None:
        return None, False
    S, devices = shard.sizes.S, shard.devices
    size = x.shape[axis]
    by_pair = axis_of(x, leaf, "T") is not None
    if size == S and not (by_pair and devices > 1):
        return axis, False
    if size == devices * S:
        return axis, True
    expected = f"S = {devices * S}, the keys of all {devices} devices"
    if not by_pair:
        expected = f"S = {S}, the keys of this device, or {expected}"
    raise ValueError(
        f"{leaf.name} has shape {tuple(x.shape)}, expected an axis of {expected} in their order"
    )
