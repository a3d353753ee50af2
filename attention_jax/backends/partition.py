"""Partitions a primitive over a mesh with Auto axes: each device runs a shard of the mapped axes.

XLA cannot partition the loops of a kernel: by default it gathers the operands and runs the whole
program on every device. But batch and heads are mapped axes of the primitive, and the same program
works for any shard of them. ``custom_partitioning`` tells XLA that the mapped axes may be sharded
and the others may not, and each device runs the program on its shard. Results that sum over a
sharded axis, such as the gradient of a shared array, are also summed over the devices.

This is for Auto axes. For Explicit axes the shardings are known while tracing, and ``heads`` uses
``shard_map``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attention_jax.backends.mapped_axes import Dims, Static
from attention_jax.core.compat import trace_settings


def over_devices(
    run: Callable[..., Sequence[jax.Array]], static: Static, arrays: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    """``run(static, *arrays)``, split over the devices of the program if there are several.

    Args:
      run: the forward, tangent or backward of a kernel.
      static: the sizes of the mapped axes, and where each array has them.
      arrays: the operands; XLA replicates them along all other axes.
    """
    if not static.levels:
        return run(static, *arrays)
    settings = trace_settings()

    @custom_partitioning
    def whole(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        # jit, because custom_partitioning does not allow constants in its own program.
        return jax.jit(lambda *xs: tuple(run(static, *xs)))(*arrays)

    def partition(_: Any, operands: Sequence[Any], results: Sequence[Any]) -> Any:
        split = split_of(static, operands)
        local = dataclasses.replace(static, levels=split.local(static.levels))

        def on_each_device(*shards: jax.Array) -> tuple[jax.Array, ...]:
            with settings():
                return tuple(
                    split.sum_over_devices(x, dims)
                    for x, dims in zip(run(local, *shards), static.out_dims, strict=True)
                )

        def shardings(arrays: Sequence[Any], all_dims: Sequence[Dims]) -> tuple[NamedSharding, ...]:
            pairs = zip(arrays, all_dims, strict=True)
            return tuple(split.sharding(len(x.shape), dims) for x, dims in pairs)

        out_shardings = shardings(results, static.out_dims)
        in_shardings = shardings(operands, static.in_dims)
        return split.mesh, on_each_device, out_shardings, in_shardings

    def rule(_: Any, operands: Sequence[Any], results: Sequence[Any]) -> SdyShardingRule:
        return sharding_rule(static, *([len(x.shape) for x in xs] for xs in (operands, results)))

    whole.def_partition(partition, sharding_rule=rule, decode_shardings=False)
    return whole(*arrays)


def sharding_rule(
    static: Static, operand_ranks: Sequence[int], result_ranks: Sequence[int]
) -> SdyShardingRule:
    """Allows the mapped axes to be sharded, consistently across all arrays.

    >>> import jax
    >>> from attention_jax.backends.mapped_axes import Static
    >>> from attention_jax.backends.partition import sharding_rule
    >>> dims = {"in_dims": ((0,), (None,)), "out_dims": ((1,),)}
    >>> static = Static(jax.tree.structure(0), None, levels=(8,), **dims)
    >>> rule = sharding_rule(static, [2, 1], [2])
    >>> rule.operand_mappings, rule.result_mappings
    ((('level0', 'operand0_1'), ('operand1_0',)), (('result0_0', 'level0'),))
    """

    def mapping(name: str, rank: int, dims: Dims) -> ArrayMapping:
        levels = {d: f"level{level}" for level, d in enumerate(dims) if d is not None}
        return ArrayMapping(*(levels.get(axis, f"{name}_{axis}") for axis in range(rank)))

    def mappings(name: str, ranks: Sequence[int], all_dims: Sequence[Dims]) -> tuple[Any, ...]:
        pairs = zip(ranks, all_dims, strict=True)
        return tuple(mapping(f"{name}{i}", rank, dims) for i, (rank, dims) in enumerate(pairs))

    operands = mappings("operand", operand_ranks, static.in_dims)
    results = mappings("result", result_ranks, static.out_dims)
    names = itertools.chain(*operands, *results)
    whole = tuple(name for name in names if not name.startswith("level"))
    return SdyShardingRule(operands, results, need_replication_factors=whole)


class Split(NamedTuple):
    """How the mapped axes are divided among the devices."""

    mesh: Mesh  # in the program's order of devices; its axis sizes are prime
    axes: tuple[tuple[str, ...], ...]  # of the mesh, per level

    def num_shards(self, level: int) -> int:
        """The number of shards that a level is divided into."""
        return math.prod(self.mesh.shape[name] for name in self.axes[level])

    def local(self, levels: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the levels on one device."""
        return tuple(size // self.num_shards(level) for level, size in enumerate(levels))

    def sharding(self, rank: int, dims: Dims) -> NamedSharding:
        """The sharding of an array with these mapped axes; its other axes are not sharded."""
        named = {d: names for d, names in zip(dims, self.axes, strict=True) if d is not None}
        spec = PartitionSpec(*(named.get(axis) or None for axis in range(rank)))
        return NamedSharding(self.mesh, spec)

    def sum_over_devices(self, x: jax.Array, dims: Dims) -> jax.Array:
        """Sums a result over the devices that split a level the result lacks."""
        summed = [names for names, d in zip(self.axes, dims, strict=True) if d is None]
        over = tuple(itertools.chain(*summed))
        return jax.lax.psum(x, over) if over else x


def split_of(static: Static, operands: Sequence[jax.ShapeDtypeStruct]) -> Split:
    """The split given by the shardings of the operands.

    The first operand that is sharded along a level decides how that level is split. A level that
    does not divide evenly is not split, nor is one whose mesh axes already split another level.
    """
    devices: list[Any] = []
    wanted: list[np.ndarray | None] = [None] * len(static.levels)  # the shard of each device
    for x, dims in zip(operands, static.in_dims, strict=True):
        if x.sharding is None:
            continue
        slices = x.sharding.devices_indices_map(x.shape)
        devices = devices or list(slices)
        for level, axis in enumerate(dims):
            if axis is not None and wanted[level] is None:
                shard = _shard_indices([slices[d][axis] for d in devices], static.levels[level])
                wanted[level] = shard if shard.any() else None
    factors, axes = _as_axes(len(devices), wanted)
    names = [f"axis{i}" for i in range(len(factors))]
    mesh = Mesh(np.asarray(devices).reshape(factors), names)
    return Split(mesh, tuple(tuple(names[i] for i in level) for level in axes))


def _shard_indices(slices: Sequence[slice], size: int) -> np.ndarray:
    """The index of the shard that each device holds; all 0 if the shards differ in size."""
    starts = np.asarray([each.start or 0 for each in slices])
    stops = np.asarray([size if each.stop is None else each.stop for each in slices])
    length = int(stops[0] - starts[0])
    if length == 0 or size % length or not (stops - starts == length).all():
        return np.zeros_like(starts)
    return starts // length


def _as_axes(
    count: int, wanted: Sequence[np.ndarray | None]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The devices as a grid, and for each level the axes of the grid that split it.

    The sizes of the grid are the prime factors of the number of devices, because two levels may
    share a mesh axis of size 4. Among all orders of the factors, the one that splits levels by the
    most axes is taken.

    >>> import numpy as np
    >>> from attention_jax.backends.partition import _as_axes
    >>> _as_axes(4, [np.array([0, 0, 1, 1]), None])
    ((2, 2), ((0,), ()))
    >>> _as_axes(6, [np.array([0, 1, 0, 1, 0, 1]), np.array([0, 0, 1, 1, 2, 2])])
    ((3, 2), ((1,), (0,)))
    """
    best: tuple[int, Any] = (-1, None)
    for factors in _orders(_prime_factors(count)):
        taken: set[int] = set()
        levels: list[tuple[int, ...]] = []
        for shard in wanted:
            axes = () if shard is None else _digits(shard, factors)
            levels.append(() if taken & set(axes) else axes)
            taken |= set(axes)
        if len(taken) > best[0]:
            best = len(taken), (factors, tuple(levels))
    return best[1]


def _digits(shard: np.ndarray, factors: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a grid whose coordinates are the digits of ``shard``, most significant first.

    Empty if there are no such axes.
    """
    grid = shard.reshape(factors)
    weights = [int(grid[tuple(np.eye(len(factors), dtype=int)[i])]) for i in range(len(factors))]
    spelled = sum(w * x for w, x in zip(weights, np.indices(factors), strict=True))
    if not np.array_equal(spelled, grid):
        return ()
    axes = sorted((i for i, w in enumerate(weights) if w), key=lambda i: -weights[i])
    return tuple(axes)


def _prime_factors(n: int) -> list[int]:
    factors = []
    for p in range(2, n + 1):
        while n % p == 0:
            factors.append(p)
            n //= p
    return factors


def _orders(factors: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All distinct permutations.

    >>> from attention_jax.backends.partition import _orders
    >>> list(_orders([2, 2, 3]))
    [(2, 2, 3), (2, 3, 2), (3, 2, 2)]
    """
    if not factors:
        yield ()
    for first in sorted(set(factors)):
        rest = list(factors)
        rest.remove(first)
        for others in _orders(rest):
            yield first, *others
