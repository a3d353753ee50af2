"""Compiling a training step ahead of time, for TPUs that this machine does not have."""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from attention_jax.models import sharding
from experiments.plan.estimate import GB, LENGTHS, Options, model_of
from experiments.programs import sent
from experiments.training.layout import parse, rules_of, split_sequences

TOPOLOGIES = {4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}


def compiled(options: Options) -> list[str]:
    """What the compiler for TPU v5e reports for the step, as text.

    Bytes and FLOPs inside a loop over layers are those of one iteration, as XLA counts them.

    Raises:
      ValueError: another device, or a number of them that is no topology of it.
    """
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    axes = parse(options.mesh)
    number = math.prod(axes.values())
    if options.device != "v5e" or number not in TOPOLOGIES:
        raise ValueError(
            f"compile needs device v5e and a mesh of one of {list(TOPOLOGIES)} devices, got "
            f"{options.device} and {number}"
        )
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[number])
    except (RuntimeError, ValueError) as problem:
        raise ValueError(f"compile needs libtpu: {str(problem).splitlines()[0]}") from None
    grid: Any = np.array(topology.devices).reshape(tuple(axes.values()))
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    program = _program(options, jax.sharding.Mesh(grid, tuple(axes), axis_types=kinds))
    memory, cost = program.memory_analysis(), program.cost_analysis()
    found = sent(program.as_text())
    rows = [
        f"compiled for {TOPOLOGIES[number]}, bytes per device:",
        f"  arguments    {memory.argument_size_in_bytes / GB:10.2f} GB",
        f"  temporary    {memory.temp_size_in_bytes / GB:10.2f} GB",
        f"  FLOPs        {cost['flops']:10.3g}",
    ]
    rows += [f"  {len(x):3} {kind}, {sum(x) / GB:.3f} GB" for kind, x in sorted(found.items())]
    return rows


def _program(options: Options, mesh: Any) -> Any:
    """The compiled training step."""
    axes = parse(options.mesh)
    rules = rules_of(axes, fsdp=options.fsdp)
    model = model_of(options.size)
    if axes.get("context", 1) > 1:
        split_sequences(model)
    graph, state = nnx.split(model)
    optimizer = optax.adamw(1e-4)

    def step(state: Any, moments: Any, tokens: Any) -> Any:
        def loss(state: Any) -> Any:
            logits = nnx.merge(graph, state)(tokens)
            targets = jnp.roll(tokens, -1, axis=1)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, gradient = jax.value_and_grad(loss)(state)
        updates, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments, value

    def described(tree: Any) -> tuple[Any, Any]:
        placed = sharding.shardings(tree, mesh, rules)
        return placed, jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed
        )

    placed, state = described(state)
    placed_moments, moments = described(jax.eval_shape(optimizer.init, state))
    everywhere = NamedSharding(mesh, PartitionSpec())
    batch = axes.get("data", 1) if options.batch is None else options.batch
    split = NamedSharding(mesh, PartitionSpec("data" if "data" in axes else None))
    tokens = jax.ShapeDtypeStruct((batch, LENGTHS[options.length]), jnp.int32, sharding=split)
    with jax.set_mesh(mesh):
        out = placed, placed_moments, everywhere
        run = jax.jit(step, donate_argnums=(0, 1), out_shardings=out)
        return run.lower(state, moments, tokens).compile()
