"""Calls of ``parallel.attention`` on a mesh whose axis ``seq`` splits the sequence."""

import jax
from helpers import jax_normal
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attention_jax import parallel
from attention_jax.core.pytree import leaves

B, T, N, K, H = 2, 24, 8, 4, 8
DEVICES = 4
SPLIT = P(None, "seq")


def auto_mesh(devices=DEVICES):
    auto = (AxisType.Auto,)
    return jax.make_mesh((devices,), ("seq",), axis_types=auto, devices=jax.devices()[:devices])


def specs(value):
    """How the arrays of masks and scores are split: by query, or by key alone."""

    def spec(x, leaf):
        letter = "T" if "T" in leaf.axes else "S"
        axes = leaf.axes[-x.ndim :] if x.ndim else ()  # an array may leave out its first axes
        split = [a == letter and n > 1 for a, n in zip(axes, x.shape, strict=False)]
        return P(*("seq" if each else None for each in split))

    arrays = zip(jax.tree.leaves(value), leaves(value), strict=True)
    return jax.tree.unflatten(jax.tree.structure(value), [spec(*each) for each in arrays])


def sharded(strategy, devices=DEVICES, **fixed):
    """``parallel.attention`` of whole arrays, as a function like ``attention``."""

    def fn(query, key, value, *, mask=None, score=(), sinks=None, scale=None, **options):
        def local(query, key, value, mask, score, sinks, scale):
            return parallel.attention(
                query,
                key,
                value,
                axis_name="seq",
                strategy=strategy,
                mask=mask,
                score=score,
                sinks=sinks,
                scale=scale,
                **options,
                **fixed,
            )

        score = tuple(score) if isinstance(score, (tuple, list)) else (score,)
        arrays = P(*(None,) * (query.ndim - 3), "seq")
        mapped = jax.shard_map(
            local,
            mesh=auto_mesh(devices),
            in_specs=(arrays, arrays, arrays, specs(mask), specs(score), P(), P()),
            out_specs=arrays,
        )
        return mapped(query, key, value, mask, score, sinks, scale)

    return fn


def inputs():
    return [jax_normal(0, B, T, N, H), jax_normal(1, B, T, K, H), jax_normal(2, B, T, K, H)]
