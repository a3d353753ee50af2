"""``gather`` and ``heads``: two ways to see all keys, each in one exchange before the attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.backends.call import Call, call_at_positions
from attention_jax.core.positions import Contiguous
from attention_jax.core.pytree import Leaf, map_leaves
from attention_jax.parallel.shards import Shard, along_keys, axis_of


def gathered(shard: Shard) -> Call:
    """The call of this device's queries with the keys and values of all devices.

    The transpose of the gather is a reduce-scatter of the gradients.
    """

    def keys_of_all(x: Any, leaf: Leaf) -> Any:
        axis, whole = along_keys(shard, x, leaf)
        return x if axis is None or whole else _gather(shard, x, axis)

    call = shard.call
    call = call._replace(
        key=_gather(shard, call.key, -3),
        value=_gather(shard, call.value, -3),
        mask=map_leaves(keys_of_all, call.mask),
        score=map_leaves(keys_of_all, call.score),
    )
    return call_at_positions(
        call, shard.queries, _positions_of_all(shard, shard.keys), resolved=True
    )


def _gather(shard: Shard, x: Any, axis: int) -> jax.Array:
    found: jax.Array = jax.lax.all_gather(x, shard.axis_name, axis=axis % x.ndim, tiled=True)
    return found


def _positions_of_all(shard: Shard, positions: Any) -> Any:
    """Those of all devices, in their order."""
    if isinstance(positions, Contiguous):
        return Contiguous(0)
    return _gather(shard, positions, -1)


def with_own_heads(shard: Shard) -> Call:
    """The call of all queries and keys with this device's share of the heads.

    Raises:
      ValueError: there are not equally many heads for each device.
    """
    z, devices = shard.sizes, shard.devices
    for letter, size in (("N", z.N), ("K", z.K)):
        if size % devices:
            name = "query" if letter == "N" else "key"
            raise ValueError(
                f'strategy "heads" divides heads among the {devices} devices along axis_name '
                f"{shard.axis_name!r}, but {name} has {size} ({letter}): use strategy "
                f'"ring" or "gather"'
            )
    share = z.N // devices

    def own(x: Any, leaf: Leaf) -> Any:
        heads, queries = axis_of(x, leaf, "N"), axis_of(x, leaf, "T")
        if heads is not None and x.shape[heads] == 1:
            heads = None
        keys, whole = along_keys(shard, x, leaf)
        if keys is not None and not whole:
            x = _gather(shard, x, keys)
        if heads is None:
            return x if queries is None else _gather(shard, x, queries)
        if queries is None:
            start = shard.index * share
            return jax.lax.dynamic_slice_in_dim(x, start, share, axis=heads % x.ndim)
        return _exchange(shard, x, split=heads, join=queries)

    call = shard.call
    query, key, value = (_exchange(shard, x, split=-2, join=-3) for x in call[:3])
    call = call._replace(
        query=query,
        key=key,
        value=value,
        mask=map_leaves(own, call.mask),
        score=map_leaves(own, call.score),
        sinks=None
        if call.sinks is None
        else jax.lax.dynamic_slice_in_dim(call.sinks, shard.index * share, share),
    )
    queries, keys = (_positions_of_all(shard, x) for x in (shard.queries, shard.keys))
    numbers = shard.index * share + jnp.arange(share, dtype=jnp.int32)
    return call_at_positions(call, queries, keys, head_numbers=numbers, resolved=True)


def own_queries(shard: Shard, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The reverse for results: this device's queries, with all heads."""
    return _exchange(shard, out, split=-3, join=-2), _exchange(shard, lse, split=-2, join=-1)


def _exchange(shard: Shard, x: Any, *, split: int, join: int) -> jax.Array:
    """All-to-all: divides one axis among the devices and joins another."""
    found: jax.Array = jax.lax.all_to_all(
        x,
        shard.axis_name,
        split_axis=split % x.ndim,
        concat_axis=join % x.ndim,
        tiled=True,
    )
    return found
