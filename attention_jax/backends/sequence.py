"""Queries that are sharded along the sequence over explicit mesh axes.

Each device gathers the keys and values and computes the results of its own queries, so results are
sharded like the queries; gradients of keys and values are reduce-scattered. ``parallel`` has other
strategies, for use inside ``shard_map``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attention_jax.backends.call import Call, Spec, call_at_positions
from attention_jax.backends.heads import axes_of_mapped, spec_of_array
from attention_jax.core.axes import Sizes
from attention_jax.core.positions import AtPositions
from attention_jax.core.pytree import leaves
from attention_jax.core.shards import explicit_mesh

V = TypeVar("V")
Axes = tuple[str, ...]


def axes_of_queries(call: Call) -> Axes:
    """The explicit mesh axes over which the query's axis ``T`` is sharded."""
    if call.query.ndim < 3 or explicit_mesh([call.query]) is None:  # the rank is checked later
        return ()
    return spec_of_array(call.query)[-3]


def spec_of_one_device(spec: Spec, call: Call) -> Spec:
    """The spec of one device: its shard of the queries, at their positions.

    Args:
      spec: of all devices.
      call: from ``complete``.
    """
    names, mesh = axes_of_queries(call), explicit_mesh([call.query])
    if not names or mesh is None:
        return spec
    call = _with_numbers(call, spec.sizes)
    T = spec.sizes.T // math.prod(mesh.shape[name] for name in names)
    sizes = dataclasses.replace(spec.sizes, T=T)
    return spec._replace(sizes=sizes, mask=call.mask, score=call.score)


def split(call: Call, sizes: Sizes) -> str | None:
    """How a complete call is split over explicit mesh axes, in words; None if it is not.

    >>> import jax
    >>> from attention_jax import explain
    >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((jax.device_count(),), ("seq",), axis_types=(AxisType.Explicit,))
    >>> sharding = NamedSharding(mesh, P(None, "seq"))
    >>> x = jax.ShapeDtypeStruct((2, 64, 4, 8), "float32", sharding=sharding)
    >>> explain(x, x, x).split
    'T over seq; gathers S of key and value'
    """
    flat = [np.asarray(x) if isinstance(x, float) else x for x in jax.tree.leaves(call)]
    mesh = explicit_mesh(flat)
    if mesh is None:
        return None
    letters = _letters(call, len(sizes.B))
    names = axes_of_queries(call)
    mesh_axes = axes_of_mapped(flat, letters, sizes, mesh, taken=names)
    mesh_axes |= {"T": names} if names else {}
    sharded: dict[str, list[str]] = {}  # axis letters by mesh axes
    for letter, over in mesh_axes.items():
        sharded.setdefault(", ".join(over), []).append(letter)
    moves: dict[str, list[str]] = {}  # arguments by how an axis is resharded or gathered
    for name, x, axes in zip(_names(call), flat, letters, strict=True):
        for letter, over in zip(axes, spec_of_array(x), strict=False):
            if over and over != mesh_axes.get(letter):
                verb = "reshards" if letter in mesh_axes else "gathers"
                moves.setdefault(f"{verb} {letter}", []).append(name)
    phrases = [f"{_listed(axes)} over {over}" for over, axes in sharded.items()]
    phrases += [f"{what} of {_listed(of)}" for what, of in moves.items()]
    text = "; ".join(phrases)
    return text.replace("B0", "B") if len(sizes.B) == 1 else text


def _names(call: Call) -> list[str]:
    """The name of each array of a call, for messages."""
    names = ["query", "key", "value", *(leaf.name for leaf in leaves((call.mask, call.score)))]
    names += [] if call.sinks is None else ["sinks"]
    return [*names, "scale", *(leaf.name for leaf in leaves(call.dropout))]


def _listed(words: list[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def over_queries(
    run: Callable[[Call], tuple[jax.Array, jax.Array]], call: Call, sizes: Sizes, names: Axes
) -> tuple[jax.Array, jax.Array]:
    """Output and lse, sharded along ``T`` like the query.

    Args:
      run: from a call with some of the queries and all keys to output and lse.
      call: from ``complete``.
      sizes: of all devices.
      names: from ``axes_of_queries``.
    """
    mesh = explicit_mesh([call.query])
    if mesh is None:
        raise RuntimeError("over_queries needs a query that is sharded over explicit axes")
    call = _with_numbers(call, sizes)
    flat, structure = jax.tree.flatten(call)
    flat = [jnp.asarray(x) for x in flat]
    letters = _letters(call, len(sizes.B))
    mesh_axes = axes_of_mapped(flat, letters, sizes, mesh, taken=names) | {"T": names}
    full = {f"B{i}": size for i, size in enumerate(sizes.B)} | sizes.of_letters()
    keys_split = all(spec_of_array(x)[-3] == names for x in (call.key, call.value))

    def spec(axes: tuple[str, ...], shape: tuple[int, ...], is_key: bool) -> PartitionSpec:
        """Axes of size 1 and those of a function's arrays are replicated."""
        named = mesh_axes | ({"S": names} if is_key and keys_split else {})
        split = (
            named.get(a) if n == full.get(a) else None for a, n in zip(axes, shape, strict=False)
        )
        return PartitionSpec(*split)

    specs = tuple(
        spec(axes, x.shape, i in (1, 2))
        for i, (x, axes) in enumerate(zip(flat, letters, strict=True))
    )
    arrays = [
        jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in zip(flat, specs, strict=True)
    ]
    T = sizes.T // math.prod(mesh.shape[name] for name in names)

    def on_each_device(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        shard: Call = jax.tree.unflatten(structure, arrays)
        if keys_split:
            key, value = (
                jax.lax.all_gather(x, names, axis=x.ndim - 3, tiled=True) for x in shard[1:3]
            )
            shard = shard._replace(key=key, value=value)
        start = jax.lax.axis_index(names) * T
        return run(
            shard._replace(
                mask=None if shard.mask is None else _from_start(shard.mask, start),
                score=tuple(_from_start(x, start) for x in shard.score),
                dropout=None if shard.dropout is None else _from_start(shard.dropout, start),
            )
        )

    batch = [f"B{i}" for i in range(len(sizes.B))]
    lse = PartitionSpec(*(mesh_axes.get(a) for a in (*batch, "T", "N")))
    return jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=specs,
        out_specs=(lse, lse),
        axis_names={name for group in mesh_axes.values() for name in group},
    )(*arrays)


def _with_numbers(call: Call, sizes: Sizes) -> Call:
    """The call with the numbers of its examples and heads as arrays, to be sharded with them."""
    numbers = {
        "examples": np.arange(math.prod(sizes.B), dtype=np.int32).reshape(sizes.B),
        "head_numbers": np.arange(sizes.N, dtype=np.int32),
    }
    return call_at_positions(call, None, None, resolved=True, **numbers)


def _letters(call: Call, batch: int) -> list[tuple[str, ...]]:
    """The axis letters of each array of a complete call."""
    axes: list[Any] = [("B", "T", "N", "H"), ("B", "S", "K", "H"), ("B", "S", "K", "D")]
    axes += [leaf.axes for leaf in leaves((call.mask, call.score))]
    axes += [] if call.sinks is None else [("N",)]
    axes += [(), *(leaf.axes for leaf in leaves(call.dropout))]
    names = tuple(f"B{i}" for i in range(batch))
    return [tuple(x for a in each for x in (names if a == "B" else (a,))) for each in axes]


def _from_start(value: V, start: jax.Array) -> V:
    """``value`` for the queries from ``start`` on; explicit positions are already sharded."""
    if not isinstance(value, AtPositions) or value.query_positions is not None:
        return value
    return dataclasses.replace(value, query_start=value.query_start + start)
