"""Sharding the parameters of a model over a mesh of devices, by rules.

Every parameter of this library names its axes (Flax's logical axes); rules map these names to axes
of a mesh. One set of rules says how a model is split, and products of them are rules too:

======================  ===========================  ===============================================
``rules(...)``          what is split                take it when
======================  ===========================  ===============================================
``data="data"``         the batch                    the model fits on a device: the fastest
``fsdp=True``           parameters too, by embed     model or optimizer state do not fit
``model="model"``       heads, hidden, vocabulary    a layer's activations do not fit; fast links
``context="context"``   the length of sequences      a single sequence does not fit
======================  ===========================  ===============================================

The names: ``vocab``, ``embed`` (the width of the model), ``heads``, ``kv_heads``, ``qkv`` (fused
projections, which are never split by heads), ``mlp`` (the hidden width), ``norm``. Those of data
are ``batch`` and ``sequence``.

>>> import jax
>>> import numpy as np
>>> from flax import nnx
>>> from attention_jax.models import Decoder, DecoderConfig, Layers, sharding
>>> config = DecoderConfig(10, Layers(features=8, num_layers=1, num_heads=2))
>>> mesh = jax.make_mesh((1, 1), ("data", "model"))  # of as many devices as there are
>>> rules = sharding.rules(data="data", model="model", fsdp=True)
>>> model = sharding.create(lambda: Decoder(config, rngs=nnx.Rngs(0)), mesh, rules)
>>> model.stack.blocks[0].feed_forward.sublayer.up.kernel[...].sharding.spec[:]
('data', 'model')
>>> tokens = jax.device_put(np.ones((4, 6), np.int32), sharding.of_batch(mesh, rules))
>>> with jax.set_mesh(mesh):
...     nnx.jit(lambda model, tokens: model(tokens))(model, tokens).shape
(4, 6, 10)

The metadata are Flax's, so its own functions work as well:

>>> from flax.core import spmd
>>> with spmd.logical_axis_rules(rules):
...     specs = nnx.get_partition_spec(nnx.state(model, nnx.Param))
>>> specs.stack.blocks[0].feed_forward.sublayer.down.kernel.get_value()[:]
('model', 'data')
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from attention_jax.core.shards import mesh_axes_of

M = TypeVar("M", bound=nnx.Module)
MeshAxes = str | tuple[str, ...] | None
Rules = tuple[tuple[str, MeshAxes], ...]


def rules(
    *,
    data: MeshAxes = None,
    model: MeshAxes = None,
    context: MeshAxes = None,
    fsdp: bool = False,
) -> Rules:
    """Which mesh axes each logical axis is sharded over, as ``(name, mesh axes)`` pairs.

    Args:
      data: of the batch: data parallelism.
      model: of heads, hidden units and vocabulary: tensor parallelism.
      context: of the length of sequences: context parallelism.
      fsdp: also shard parameters and optimizer state over ``data`` and ``context``, along the
        width of the model: fully sharded data parallelism, ZeRO-3.

    Raises:
      ValueError: a mesh axis with two uses; ``fsdp`` without ``data`` and ``context``.

    >>> from attention_jax.models import sharding
    >>> dict(sharding.rules(data="data", fsdp=True))["embed"]
    'data'

    Source: Rajbhandari et al. 2020, "ZeRO"; Shoeybi et al. 2019, "Megatron-LM".
    """
    used = [name for axes in (data, model, context) for name in mesh_axes_of(axes)]
    if len(set(used)) < len(used):
        raise ValueError(f"data, model and context must be different mesh axes, got {used}")
    stored = mesh_axes_of(data) + mesh_axes_of(context) if fsdp else ()
    if fsdp and not stored:
        raise ValueError("fsdp shards parameters over data and context: give one of them")
    return (
        ("batch", data),
        ("sequence", context),
        ("embed", stored if len(stored) > 1 else stored[0] if stored else None),
        ("vocab", model),
        ("heads", model),
        ("kv_heads", model),
        ("mlp", model),
        ("qkv", None),
        ("norm", None),
    )


def of_batch(mesh: Mesh, rules: Rules) -> NamedSharding:
    """The sharding of tokens ``[B T ...]``: batch and length over the axes that the rules name."""
    axes = dict(rules)
    _check(mesh, rules)
    sequence = axes.get("sequence")
    spec = (axes.get("batch"),) if sequence is None else (axes.get("batch"), sequence)
    return NamedSharding(mesh, PartitionSpec(*spec))


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> Any:
    """The sharding of every array of a tree, such as a model's state or an optimizer's.

    An axis that a mesh axis does not divide stays whole, and so do heads of which there are fewer
    than shards: grouped key-value heads, often.

    Args:
      tree: a pytree with ``nnx.Variable`` of arrays or ``jax.ShapeDtypeStruct``. Other arrays, and
        variables that do not name their axes, stay whole.
      mesh: the devices, or an ``AbstractMesh`` of devices that are not there.
      rules: see ``rules``.

    Returns:
      A pytree of the same structure, with a ``NamedSharding`` for each array.

    Raises:
      ValueError: rules that name an axis the mesh does not have; a parameter with an axis that is
        neither in the rules nor in the mesh.

    >>> import jax
    >>> from flax import nnx
    >>> from attention_jax.models import sharding
    >>> from attention_jax.nn import FeedForward
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> state = nnx.state(FeedForward(8, 32, rngs=nnx.Rngs(0)), nnx.Param)
    >>> placed = sharding.shardings(state, mesh, sharding.rules(model="model"))
    >>> placed.up.kernel.get_value().spec[:]
    (None, 'model')
    """
    _check(mesh, rules)

    def of(x: Any) -> Any:
        if isinstance(x, nnx.Variable):
            return x.replace(NamedSharding(mesh, _spec(x, mesh, rules)))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def shard(model: M, mesh: Mesh, rules: Rules) -> M:
    """A copy of a model with every array sharded by the rules.

    Args:
      model: not changed.
      mesh, rules: as for ``shardings``.

    >>> import jax
    >>> from flax import nnx
    >>> from attention_jax.models import sharding
    >>> from attention_jax.nn import FeedForward
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> model = sharding.shard(
    ...     FeedForward(8, 32, rngs=nnx.Rngs(0)), mesh, sharding.rules(model="model"))
    >>> model.up.kernel[...].sharding.spec[:]
    (None, 'model')
    """
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_put(state, shardings(state, mesh, rules)))


def create(make: Callable[[], M], mesh: Mesh, rules: Rules) -> M:
    """A fresh model whose parameters are created in shards: each device only allocates its shards.

    Args:
      make: creates the model, ``lambda: Decoder(config, rngs=nnx.Rngs(0))``. It is traced.
      mesh, rules: as for ``shardings``.

    Returns:
      The model, with the same values as ``make()`` up to rounding.
    """
    graph, state = nnx.split(nnx.eval_shape(make))
    placed = shardings(state, mesh, rules)
    return nnx.merge(graph, jax.jit(lambda: nnx.state(make()), out_shardings=placed)())


def _spec(x: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> PartitionSpec:
    """The spec of a variable; see ``shardings`` for what stays whole."""
    metadata, shape = x.get_metadata(), x.get_value().shape
    names = tuple(metadata.get("out_sharding") or ())
    if len(names) != len(shape):  # a statistic of an optimizer with axes of its own, for example
        return PartitionSpec()
    units = metadata.get("units") or (None,) * len(shape)
    known, spec = dict(rules), []
    for name, size, number in zip(names, shape, units, strict=True):
        if name is not None and name not in known and name not in mesh.shape:
            raise ValueError(
                f"rules must have an entry for {name!r}, an axis of a parameter of shape {shape}, "
                f"got entries for {sorted(known)}"
            )
        axes = mesh_axes_of(known.get(name, name))
        parts = math.prod(mesh.shape[axis] for axis in axes)
        whole = any(n % parts for n in (size, size if number is None else number))
        spec.append(None if whole or not axes else axes if len(axes) > 1 else axes[0])
    return PartitionSpec(*spec)


def _check(mesh: Mesh | AbstractMesh, rules: Rules) -> None:
    for name, axes in rules:
        if missing := [axis for axis in mesh_axes_of(axes) if axis not in mesh.shape]:
            raise ValueError(
                f"rules shard {name!r} over {missing[0]!r}, expected axes of the mesh: "
                f"{', '.join(map(str, mesh.axis_names))}"
            )
