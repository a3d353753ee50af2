"""Names for the axes of parameters, in Flax's metadata, that sharding rules refer to."""

from __future__ import annotations

from typing import Any


def logical(*names: str | None, units: tuple[int | None, ...] | None = None) -> dict[str, Any]:
    """Metadata of an ``nnx.Param`` that names its axes; see ``models.sharding`` for the names.

    A model that is created while a mesh is in use is not sharded by it, since these names are not
    those of mesh axes: ``models.sharding`` shards it, given rules. Flax's ``nnx.eval_shape`` does
    look them up in a mesh that is in use: call it outside, or with Flax's logical axis rules.

    Args:
      *names: of each axis; None for one that is never sharded.
      units: per axis, the number of units that stay whole when it is sharded: of heads, which have
        several entries each; None where every entry is one.
    """
    metadata: dict[str, Any] = {"out_sharding": names, "eager_sharding": False}
    return metadata if units is None else metadata | {"units": units}
