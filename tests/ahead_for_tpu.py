"""Compiles for a TPU without having one, and prints what the compiler reports, as JSON.

A separate program: the TPU compiler needs environment variables that other tests must not have.
"""

import json
import os

os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",  # those of the tests are for CPUs
}

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import attention_jax as aj
from attention_jax import masks, scores
from attention_jax.core.compat import no_mesh
from attention_jax.models import Decoder, DecoderConfig, Layers

TOPOLOGY = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
MESH = jax.sharding.Mesh(np.array(TOPOLOGY.devices), ("batch",))
T, N, K, H = 1024, 8, 2, 128


def shapes(B, dtype="bfloat16"):
    """Query, key and value of a batch, an example to each chip."""
    sharding = NamedSharding(MESH, PartitionSpec("batch"))
    return [jax.ShapeDtypeStruct((B, T, n, H), dtype, sharding=sharding) for n in (N, K, K)]


def compiled(fn, *args):
    """Facts about ``fn`` compiled for four chips."""
    program = jax.jit(fn).lower(*args).compile()
    text, memory, cost = program.as_text(), program.memory_analysis(), program.cost_analysis()
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "pairs": text.count(f"{T},{T}]"),
        "temporary bytes": memory.temp_size_in_bytes,
        "argument bytes": memory.argument_size_in_bytes,
        "flops": cost["flops"],
        "bytes accessed": cost["bytes accessed"],
    }


def over_the_batch(fn):
    """``fn`` on each chip's examples: a kernel cannot be split by the compiler."""
    spec = PartitionSpec("batch")
    return jax.shard_map(fn, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False)


def attend(query, key, value, **options):
    return aj.attention(query, key, value, **options)


def grads(query, key, value, **options):
    def loss(*xs):
        out = attend(*xs, **options)
        out, lse = out if isinstance(out, tuple) else (out, 0.0)
        return out.astype(jnp.float32).sum() + jnp.sum(lse)

    return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)


CALLS = {
    "causal": {"mask": masks.causal()},
    "window, softcap": {"mask": masks.window(255, 0), "score": scores.softcap(30.0)},
    "prefix, sinks, lse": {
        "mask": masks.prefix(100) | masks.causal(),
        "sinks": np.zeros(N, jnp.bfloat16),
        "return_lse": True,
    },
    "segments": {"mask": masks.causal() & masks.segments(np.arange(T)[None] // 300)},
}


def sharded(fn):
    """``fn`` of arrays sharded over batch and heads of an Explicit mesh, without ``shard_map``."""
    explicit = (AxisType.Explicit,) * 2
    mesh = jax.sharding.Mesh(MESH.devices.reshape(2, 2), ("data", "model"), axis_types=explicit)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    xs = [jax.ShapeDtypeStruct((4, T, n, H), "bfloat16", sharding=sharding) for n in (N, K, K)]
    with jax.set_mesh(mesh):
        text = jax.jit(lambda *xs: fn(*xs, mask=masks.causal())).lower(*xs).compile().as_text()
    names = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": sum(text.count(f" {name}") for name in names),
    }


def decoder():
    """A training step of a small decoder, every chip with a batch of its own."""
    layers = Layers(features=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=H)
    config = DecoderConfig(256, layers, positions="learned", max_length=T, tied=True)
    with no_mesh():  # in which Flax would look up the axes that parameters name
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    optimizer = optax.adamw(1e-3)

    def step(state, moments, tokens):
        def loss(state):
            logits = nnx.merge(graph, state)(tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return jax.lax.pmean(losses.mean(), "batch")

        value, gradients = jax.value_and_grad(loss)(state)
        updates, moments = optimizer.update(gradients, moments, state)
        return optax.apply_updates(state, updates), moments, value

    def placed(tree, spec):
        sharding = NamedSharding(MESH, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    state = placed(state, PartitionSpec())
    moments = placed(jax.eval_shape(optimizer.init, state), PartitionSpec())
    tokens = placed(jax.ShapeDtypeStruct((4, T + 1), jnp.int32), PartitionSpec("batch"))
    specs = PartitionSpec(), PartitionSpec(), PartitionSpec("batch")
    step = jax.shard_map(
        step, mesh=MESH, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    return compiled(step, state, moments, tokens)


def main():
    found = {"default backend": jax.default_backend(), "device": str(TOPOLOGY.devices[0])}
    for name, options in CALLS.items():
        found["chosen, " + name] = aj.explain(*shapes(4), **options, platform="tpu").chosen
    with jax.set_mesh(MESH):
        found["platform"] = aj.backends.platform()
        for name, options in CALLS.items():
            for fn in (attend, grads):
                run = over_the_batch(lambda *xs, fn=fn, options=options: fn(*xs, **options))
                found[f"{fn.__name__}, {name}"] = compiled(run, *shapes(4))
        found["grads, float32"] = compiled(
            over_the_batch(lambda *xs: grads(*xs, mask=masks.causal())), *shapes(4, "float32")
        )
        found["training step"] = decoder()
    for fn in (attend, grads):
        found[f"sharded {fn.__name__}"] = sharded(fn)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
