"""How a run is split: the mesh of its devices, the sharding rules, and its processes.

``--mesh data=2,model=2`` gives the mesh; ``--fsdp`` also shards parameters and optimizer state.
With ``--coordinator``, several processes train one model, each with its own devices: every process
assembles the rows of each batch that its devices need.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attention_jax.models import sharding
from attention_jax.models.stack import Stack
from experiments.options import nearest
from experiments.training.task import ALL, Rows

T = TypeVar("T")

AXES = {
    "data": "the batch",
    "model": "heads, hidden units and vocabulary",
    "context": "the length of sequences",
}
HEARTBEAT = 20  # seconds after which a silent process counts as dead
REACHABLE = 60  # seconds within which the coordinator and all processes must have started


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices of a run, and how its arrays are split among them."""

    mesh: Mesh
    rules: sharding.Rules

    @property
    def parts(self) -> int:
        """The number of parts a batch is split into."""
        return int(self.mesh.shape.get("data", 1))

    @property
    def rows(self) -> Rows:
        """The rows of every batch that the devices of this process need."""
        if self.parts == 1:
            return ALL
        axis = self.mesh.axis_names.index("data")
        return rows_of(self.mesh.devices, axis, jax.process_index())

    @property
    def per_device_gradients(self) -> bool:
        """Whether each device computes a gradient of its own, to be summed as one vector.

        That is for processes on CPUs that split nothing but the batch. Their collectives take
        milliseconds for each array, however small: the program of one device, partitioned, would
        spend most of a step on them. Each device then has dropout of its own.
        """
        plain = set(self.mesh.shape) == {"data"} and dict(self.rules)["embed"] is None
        on_cpus = self.mesh.devices.flat[0].platform == "cpu"
        return plain and on_cpus and jax.process_count() > 1

    def shardings(self, tree: Any) -> Any:
        """The sharding of every array of a state."""
        return sharding.shardings(tree, self.mesh, self.rules)

    def create(self, make: Callable[[], Any], *, traced: bool = True) -> Any:
        """A fresh model; over several devices, each only allocates its shards.

        Args:
          make: creates the model.
          traced: whether ``make`` can be traced; else the model is created whole, on one device.
        """
        if self.mesh.size == 1 or not traced:
            return make()
        return sharding.create(make, self.mesh, self.rules)

    def put(self, tree: T) -> T:
        """A state on the devices, each with its shards."""
        return jax.tree.map(_put, tree, self.shardings(tree))

    def put_batch(self, batch: T) -> T:
        """A batch on the devices, from the rows of this process."""
        placed = NamedSharding(self.mesh, PartitionSpec("data" if self.parts > 1 else None))
        if placed.is_fully_addressable:
            return jax.device_put(batch, placed)
        rows = self.rows

        def put(x: Any) -> jax.Array:
            x = np.asarray(x)
            whole = (rows.size_of_batch(len(x)), *x.shape[1:])
            return jax.make_array_from_process_local_data(placed, x, whole)

        return jax.tree.map(put, batch)

    def prepared(self, model: Any) -> Any:
        """The model, with its sequences split if the mesh has an axis ``context``.

        Raises:
          ValueError: an axis of the mesh that splits nothing of the model.
        """
        name = type(model).__name__
        if (size := self.mesh.shape.get("model", 1)) > 1:
            specs = jax.tree.leaves(self.shardings(nnx.state(model, nnx.Param)))
            if not any("model" in x.spec for x in specs):
                raise ValueError(
                    f"mesh has model={size}, which divides no heads, hidden units or vocabulary "
                    f"of {name}: use another size, or the axis data"
                )
        if self.mesh.shape.get("context", 1) > 1 and not split_sequences(model):
            raise ValueError(
                f"mesh has the axis context, but {name} has no transformer layers, whose "
                f"sequences it splits: use data or model"
            )
        return model


def layout(mesh: str | None, *, fsdp: bool, devices: int = 1) -> Layout:
    """The layout that the options describe.

    Args:
      mesh: such as ``"data=2,model=2"``; None for ``devices`` along ``data``.
      fsdp: shard parameters and optimizer state over ``data`` and ``context`` too.
      devices: used without ``mesh``; with several processes the default is all devices.

    Raises:
      ValueError: a mesh that cannot be read, has unknown axes, or needs too many devices.

    >>> dict(layout("data=1,model=1", fsdp=False).mesh.shape)
    {'data': 1, 'model': 1}
    """
    if mesh is not None and devices > 1:
        raise ValueError("devices must be 1 with mesh, which says how many there are")
    if mesh is None and jax.process_count() > 1:
        devices = jax.device_count()
    sizes = {"data": devices} if mesh is None else parse(mesh)
    needed, given = int(np.prod(list(sizes.values()))), jax.device_count()
    option = "devices" if mesh is None else f"the devices of mesh {mesh}"
    if needed > given:
        raise ValueError(
            f"{option} must be at most {given}, all that JAX has, got {needed}; on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed} makes more"
        )
    if jax.process_count() > 1 and needed != given:
        raise ValueError(
            f"{option} must be {given}, got {needed}: the {jax.process_count()} processes "
            f"must use all of theirs"
        )
    rules = rules_of(sizes, fsdp=fsdp)
    grid = np.array(jax.devices()[:needed]).reshape(tuple(sizes.values()))
    made = Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return Layout(made, rules)


def rules_of(axes: Iterable[str], *, fsdp: bool) -> sharding.Rules:
    """The sharding rules of a mesh with these axes.

    Raises:
      ValueError: ``fsdp`` without ``data`` and ``context``.
    """
    axes = set(axes)
    if fsdp and not axes & {"data", "context"}:  # ``sharding.rules`` knows of no option mesh
        raise ValueError("fsdp needs an axis data or context in mesh, got none")
    return sharding.rules(**{name: name for name in axes}, fsdp=fsdp)


def rows_of(devices: np.ndarray, axis: int, process: int) -> Rows:
    """The rows of every batch that a process needs.

    Args:
      devices: of the mesh.
      axis: that of ``data``.
      process: which process.
    """
    mine = [at[axis] for at, x in np.ndenumerate(devices) if x.process_index == process]
    return Rows(min(mine), max(mine) + 1, devices.shape[axis])


def split_sequences(model: nnx.Module) -> int:
    """Splits sequences along the mesh axis ``context``, in place; returns in how many stacks."""
    stacks = [x for _, x in nnx.iter_modules(model) if isinstance(x, Stack)]
    for stack in stacks:
        stack.sequence_axis = "context"
    return len(stacks)


def parse(mesh: str) -> dict[str, int]:
    """The axes of a mesh and their sizes.

    Raises:
      ValueError: not ``name=size,...``, an unknown axis, one given twice, or a bad size.

    >>> parse("data=2,model=4")
    {'data': 2, 'model': 4}
    """
    sizes: dict[str, int] = {}
    for word in mesh.split(","):
        name, _, size = word.strip().partition("=")
        if name not in AXES:
            raise ValueError(
                f"mesh has an unknown axis {name!r}{nearest(name, AXES) or '.'} "
                f"Axes: {', '.join(AXES)}, as in data=2,model=2"
            )
        if name in sizes:
            raise ValueError(f"mesh has the axis {name} twice: {mesh}")
        if not size.isdigit() or int(size) < 1:
            raise ValueError(f"mesh needs a size of at least 1 for {name}, got {size!r}")
        sizes[name] = int(size)
    return sizes


def _put(x: Any, placed: Any) -> Any:
    """An array, the same on every process, in shards."""
    if isinstance(x, jax.Array) and x.sharding == placed:
        return x
    if placed.is_fully_addressable:
        return jax.device_put(x, placed)
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), NamedSharding(placed.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, placed, lambda index: whole[index])


def for_evaluation(tree: T) -> T:
    """The arrays of a state for programs that this process runs by itself.

    They stay in shards if all of these are here, and are gathered from several processes. Without
    any shards they are those of one device, so that only one computes.
    """
    arrays = jax.tree.leaves(tree)
    if all(x.is_fully_replicated for x in arrays):
        return jax.tree.map(lambda x: x.addressable_data(0), tree)
    if all(x.is_fully_addressable for x in arrays):
        return tree

    def gathered(x: Any) -> Any:
        if x.is_fully_replicated:
            return x.addressable_data(0)
        return jax.numpy.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(gathered, tree)


# --- Processes.


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins this process to the others; must come before anything else that uses JAX.

    Args:
      coordinator: ``HOST:PORT``, an address of process 0 that all others reach; ``"auto"`` to find
        it, and the processes, in the environment of a cluster that JAX knows.
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      ValueError: options that are missing, or a coordinator that does not answer.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            raise ValueError("processes and process need coordinator, HOST:PORT of process 0")
        return
    options: dict[str, Any] = {
        "initialization_timeout": 2 * REACHABLE,  # a clearer error comes first
        "heartbeat_timeout_seconds": HEARTBEAT,
    }
    if coordinator == "auto":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(**options)
        except (RuntimeError, ValueError) as problem:
            raise ValueError(
                f"coordinator auto found no processes to join: {str(problem).splitlines()[0]}; "
                f"give HOST:PORT, processes and process"
            ) from None
        return
    if processes is None or process is None:
        raise ValueError("coordinator needs processes, how many there are, and process, from 0")
    if not 0 <= process < processes:
        raise ValueError(f"process must be from 0 to {processes - 1}, got {process}")
    host, colon, port = coordinator.rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(f"coordinator must be HOST:PORT or auto, got {coordinator!r}")
    if process > 0:
        _wait_for(host, int(port))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    missing = (
        f"the {processes} processes could not meet at coordinator {coordinator} within "
        f"{REACHABLE} s: start all of them, with this address"
    )
    late = threading.Timer(REACHABLE, _give_up, [missing])
    late.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process, coordinator_bind_address=coordinator, **options
        )
    except RuntimeError as problem:
        raise ValueError(f"{missing} ({str(problem).splitlines()[0]})") from None
    finally:
        late.cancel()


def _give_up(message: str) -> None:
    """Ends this process with an error; JAX's own timeout aborts with a stack trace."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def _wait_for(host: str, port: int) -> None:
    """Waits until something answers there; JAX's own client would abort the process."""
    until = time.monotonic() + REACHABLE
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError as problem:
            if time.monotonic() > until:
                raise ValueError(
                    f"coordinator {host}:{port} did not answer within {REACHABLE} s ({problem}): "
                    f"start process 0 there, or check the address"
                ) from None
        time.sleep(0.2)


def agreed(value: T) -> T:
    """The number, or dict of numbers, of process 0, in every process."""
    if jax.process_count() == 1:
        return value
    leaves, structure = jax.tree.flatten(value)
    words = np.array(leaves, np.float64).view(np.uint32)  # exact without 64-bit arrays
    firsts = [next(d for d in jax.devices() if d.process_index == i) for i in _processes()]
    mesh = Mesh(np.array(firsts), ("process",))
    sent = words[None] if jax.process_index() == 0 else np.zeros_like(words[None])
    split = NamedSharding(mesh, PartitionSpec("process"))
    rows = jax.make_array_from_process_local_data(split, sent)
    found = np.asarray(_sum(rows, NamedSharding(mesh, PartitionSpec()))).view(np.float64)
    same = [type(old)(new) for old, new in zip(leaves, found, strict=True)]
    return jax.tree.unflatten(structure, same)


@functools.partial(jax.jit, static_argnums=1)
def _sum(rows: jax.Array, everywhere: NamedSharding) -> jax.Array:
    total = rows.sum(axis=0, dtype=rows.dtype)
    return jax.lax.with_sharding_constraint(total, everywhere)


def _processes() -> range:
    return range(jax.process_count())
