"""Arrays that are sharded over Auto mesh axes: who computes what, and what is sent."""

import contextlib
import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import needs_native
from helpers import jax_normal, slow
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attention_jax as aj
from attention_jax import masks, scores
from experiments.programs import counts

B, T, N, K, H = 8, 40, 8, 4, 8


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def put(mesh, spec, x):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def collectives(fn, *arguments):
    found = counts(jax.jit(fn).lower(*arguments).compile().as_text())
    return sorted(found.elements())


def inputs():
    return {
        "query": jax_normal(0, B, T, N, H),
        "key": jax_normal(1, B, T, K, H),
        "value": jax_normal(2, B, T, K, H),
        "bias": jax_normal(3, N, T, T),
        "sinks": jax_normal(4, N),
    }


def everything(query, key, value, bias, sinks, implementation="blockwise"):
    return aj.attention(
        query,
        key,
        value,
        mask=masks.causal() & masks.lengths(key=jnp.arange(B) * T // B),
        score=[scores.bias(bias), scores.alibi()],
        sinks=sinks,
        dropout_rate=0.2,
        dropout_key=jax.random.key(9),
        implementation=implementation,
        return_lse=True,
    )


@functools.partial(jax.jit, static_argnames="implementation")
def results_and_gradient(arrays, implementation="blockwise"):
    def loss(arrays):
        out, lse = everything(**arrays, implementation=implementation)
        return (out**2).sum() + lse.sum(), (out, lse)

    (_, results), gradient = jax.value_and_grad(loss, has_aux=True)(arrays)
    return results, gradient


SPECS = {
    "batch and heads": dict.fromkeys(("query", "key", "value"), ("data", None, "model"))
    | {"bias": ("model",), "sinks": ("model",)},
    "batch": dict.fromkeys(("query", "key", "value"), (("data", "model"),)),
    "heads": dict.fromkeys(("query", "key", "value"), (None, None, "model")),
    "more shards than key-value heads": {"query": (None, None, ("data", "model"))},
    "keys alone": {"key": ("data",), "value": ("data",)},
    "in conflict": {"query": ("data",), "key": (None, None, "model"), "value": ("model",)},
    "length and width": {"query": (None, "data", None, "model"), "key": (None, "data")},
}


@pytest.fixture(scope="module")
def on_one_device():
    return jax.device_get(results_and_gradient(inputs()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_output_and_gradient_equal_those_of_one_device(mesh, name, on_one_device):
    specs = SPECS[name]
    sharded = {k: put(mesh, specs[k], x) if k in specs else x for k, x in inputs().items()}
    (results, gradient), (expected, d_expected) = results_and_gradient(sharded), on_one_device
    chex.assert_trees_all_close(jax.device_get(results), expected, atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(gradient), d_expected, atol=1e-4)


@needs_native
def test_the_native_kernel_runs_on_each_devices_share(mesh):
    arrays, specs = inputs(), SPECS["batch and heads"]
    sharded = {k: put(mesh, specs[k], x) for k, x in arrays.items()}
    expected, got = (results_and_gradient(x, "native") for x in (arrays, sharded))
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), atol=1e-4)
    own = ("query", "key", "value")
    run = lambda q, k, v: aj.attention(q, k, v, implementation="native")  # noqa: E731
    assert not collectives(run, *(sharded[x] for x in own))


def attend(query, key, value):
    return aj.attention(query, key, value, mask=masks.causal(), implementation="blockwise")


def squares(*arrays):
    return (attend(*arrays) ** 2).sum()


# The gradient's cotangents have the shards of their arrays: nothing to send either.
TRANSFORMED = {
    "forward": attend,
    "gradient": jax.grad(squares, argnums=(0, 1, 2)),
    "jvp": lambda *arrays: jax.jvp(attend, arrays, arrays),
    "vmap": jax.vmap(attend),
    "gradient of gradient": jax.grad(lambda *a: jax.grad(squares)(*a).sum()),
    "checkpoint in scan": jax.grad(
        lambda q, k, v: jax.lax.scan(
            jax.checkpoint(lambda c, _: (attend(c, k, v), None)), q, None, length=2
        )[0].sum()
    ),
}


@pytest.mark.parametrize(
    ("name", "in_use"),
    [
        slow("forward", False),
        slow("forward", True),
        ("gradient", True),
        slow("gradient", False),
        slow("jvp", True),
        ("vmap", True),
        slow("gradient of gradient", False),
        slow("checkpoint in scan", True),
    ],
)
def test_batch_and_heads_need_no_collective(mesh, name, in_use):
    fn, arrays = TRANSFORMED[name], [inputs()[x] for x in ("query", "key", "value")]
    sharded = [put(mesh, ("data", None, "model"), x) for x in arrays]
    expected = jax.jit(fn)(*arrays)
    with jax.set_mesh(mesh) if in_use else contextlib.nullcontext():
        compiled = jax.jit(fn).lower(*sharded).compile()
    got = compiled(*sharded)
    assert not counts(compiled.as_text())
    for x in jax.tree.leaves(got):
        assert x.sharding.spec == P("data", None, "model")
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), atol=1e-4)


def test_each_device_computes_its_share_only(mesh):
    arrays = [inputs()[x] for x in ("query", "key", "value")]
    sharded = [put(mesh, ("data", None, "model"), x) for x in arrays]
    whole, share = (
        jax.jit(attend).lower(*xs).compile().cost_analysis()["flops"] for xs in (arrays, sharded)
    )
    assert share < whole / 4  # of 8 devices


@pytest.mark.slow
def test_sums_over_sharded_examples_are_summed_over_devices(mesh):
    """The bias is shared by all examples: its gradient is summed once over the data axis."""
    specs = SPECS["batch and heads"]
    bias, *arrays = (put(mesh, specs[k], inputs()[k]) for k in ("bias", "query", "key", "value"))

    def loss(bias, *arrays):
        score = scores.bias(bias)
        return (aj.attention(*arrays, score=score, implementation="blockwise") ** 2).sum()

    assert collectives(jax.grad(loss), bias, *arrays) == ["all-reduce"]


@pytest.mark.slow
def test_second_derivatives_under_vmap(mesh):
    arrays = [jax_normal(i, 8, 3, 2, 4) for i in range(3)]
    hessian = jax.vmap(jax.hessian(squares))
    got = jax.jit(hessian)(*(put(mesh, ("data", None, "model"), x) for x in arrays))
    chex.assert_trees_all_close(
        jax.device_get(got), jax.device_get(jax.jit(hessian)(*arrays)), atol=1e-4
    )


def test_outside_of_jit(mesh):
    arrays = [inputs()[x] for x in ("query", "key", "value")]
    out = attend(*(put(mesh, ("data", None, "model"), x) for x in arrays))
    assert out.sharding.spec == P("data", None, "model")
    chex.assert_trees_all_close(np.asarray(out), np.asarray(attend(*arrays)), atol=1e-6)


@pytest.mark.slow
def test_settings_of_the_caller_hold_while_xla_compiles(mesh):
    """XLA asks for each device's program while it compiles, outside of the caller's context."""
    with jax.enable_x64(True):
        arrays = [jax_normal(i, B, T, N, H) for i in range(3)]
        placed = [put(mesh, ("data",), x) for x in arrays]
        out = jax.jit(attend)(*placed)
        assert out.dtype == jnp.float64
        chex.assert_trees_all_close(out, attend(*arrays), rtol=1e-12)


@pytest.mark.parametrize("manual", [{"data"}, {"data", "model"}])
def test_inside_shard_map(mesh, manual):
    spec = P("data", None, "model" if "model" in manual else None)
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=manual)
    arrays = [inputs()[x] for x in ("query", "key", "value")]
    sharded = [put(mesh, ("data", None, "model"), x) for x in arrays]
    got = jax.jit(mapped)(*sharded)
    chex.assert_trees_all_close(np.asarray(got), np.asarray(attend(*arrays)), atol=1e-6)


CACHED = """
import sys
import jax, jax.numpy as jnp
import attention_jax as aj
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
x = jnp.ones((1, 600, 2, 8))
aj.attention(x, x, x, implementation="blockwise").block_until_ready()
print(sum("cache_hits" in event for event in hits), sum("cache_misses" in e for e in hits))
"""


@pytest.mark.slow
def test_the_persistent_cache_works_on_one_device(tmp_path):
    run = functools.partial(
        subprocess.run,
        [sys.executable, "-c", CACHED, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    run(check=True)
    hits, misses = run(check=True).stdout.split()
    assert int(hits) > 0
    assert misses == "0"
