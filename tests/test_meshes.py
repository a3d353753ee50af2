"""Arrays that are sharded over explicit mesh axes: what comes out, and how it is sharded."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import needs_native
from flax import nnx
from helpers import jax_normal, slow
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attention_jax as aj
from attention_jax import masks, mechanisms, nn, scores

B, T, N, K, H = 4, 12, 4, 2, 8
IMPLEMENTATIONS = ("xla", "blockwise")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def inputs():
    return {
        "query": jax_normal(0, B, T, N, H),
        "key": jax_normal(1, B, T, K, H),
        "value": jax_normal(2, B, T, K, H),
        "bias": jax_normal(3, N, T, T),
        "sinks": jax_normal(4, N),
        "lengths": jnp.array([12, 8, 4, 0]),
        "weight": jnp.float32(1.1),
    }


SPECS = {
    "batch and heads": dict.fromkeys(("query", "key", "value"), ("data", None, "model"))
    | {"bias": ("model",), "sinks": ("model",), "lengths": ("data",)},
    "batch": dict.fromkeys(("query", "key", "value"), ("data",)),
    "heads": dict.fromkeys(("query", "key", "value"), (None, None, "model")),
    "length": dict.fromkeys(("query", "key", "value"), (None, "data")),
    "more shards than heads": {"query": (None, None, "data")},
    "keys alone": {"key": ("data",), "value": ("data",)},
    "in conflict": {"query": ("data",), "key": (None, None, "model"), "value": ("model",)},
}
OUT = {
    "batch and heads": ("data", None, "model", None),
    "batch": ("data", None, None, None),
    "heads": (None, None, "model", None),
    "length": (None, "data", None, None),
    "more shards than heads": (None, None, None, None),
    "keys alone": ("data", None, None, None),
    "in conflict": ("data", None, "model", None),
}


def everything(query, key, value, bias, sinks, lengths, weight, *, implementation):
    by_example = scores.score_fn(lambda s, b, n, q, k: s * jnp.where(b > 0, weight, 1.0))
    return aj.attention(
        query,
        key,
        value,
        mask=masks.causal() & masks.lengths(key=lengths),
        score=[scores.bias(bias), scores.alibi(), by_example],
        sinks=sinks,
        dropout_rate=0.2,
        dropout_key=jax.random.key(9),
        implementation=implementation,
        return_lse=True,
    )


def put(mesh, spec, x):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


@functools.partial(jax.jit, static_argnames="implementation")
def output_and_gradient(arrays, lengths, implementation):
    def loss(arrays):
        out, lse = everything(**arrays, lengths=lengths, implementation=implementation)
        return (out**2).sum() + lse.sum(), out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(arrays)
    return out, gradient


@functools.cache
def on_one_device(implementation):
    arrays = inputs()
    lengths = arrays.pop("lengths")
    return jax.device_get(output_and_gradient(arrays, lengths, implementation))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("batch and heads", "blockwise"),
        slow("length", "blockwise"),
        slow("more shards than heads", "blockwise"),
        slow("in conflict", "blockwise"),
        slow("batch and heads", "xla"),
        slow("batch", "xla"),
        slow("heads", "xla"),
        slow("keys alone", "xla"),
    ],
)
def test_attention_and_its_gradient(mesh, name, implementation):
    specs, arrays = SPECS[name], inputs()
    lengths = put(mesh, specs.get("lengths", ()), arrays.pop("lengths"))
    sharded = {k: put(mesh, specs[k], x) if k in specs else x for k, x in arrays.items()}
    out, got = output_and_gradient(sharded, lengths, implementation)
    expected, gradient = on_one_device(implementation)
    assert jax.typeof(out).sharding.spec == P(*OUT[name])
    chex.assert_trees_all_close(np.asarray(out), expected, atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(got), gradient, atol=1e-4)


@pytest.mark.parametrize("in_use", [slow(True), False])
def test_outside_of_jit(mesh, in_use):
    arrays = inputs()
    run = functools.partial(everything, implementation="blockwise")
    expected, _ = run(**arrays)
    specs = SPECS["batch and heads"]
    sharded = {k: put(mesh, specs[k], x) if k in specs else x for k, x in arrays.items()}
    if in_use:
        with jax.set_mesh(mesh):
            out, _ = run(**sharded)
    else:
        out, _ = run(**sharded)
    assert jax.typeof(out).sharding.spec == P(*OUT["batch and heads"])
    chex.assert_trees_all_close(np.asarray(out), np.asarray(expected), atol=1e-5)


def test_a_single_key_value_head_is_there_for_all(mesh):
    q, k = jax_normal(0, B, T, N, H), jax_normal(1, B, T, 1, H)
    expected = aj.attention(q, k, k)
    out = aj.attention(put(mesh, ("data", None, "model"), q), k, k)
    assert jax.typeof(out).sharding.spec == P("data", None, "model", None)
    chex.assert_trees_all_close(np.asarray(out), np.asarray(expected), atol=1e-5)


def test_batch_and_heads_need_no_collective(mesh):
    specs = SPECS["batch and heads"]
    arrays = [put(mesh, specs[name], inputs()[name]) for name in ("query", "key", "value")]
    for implementation in IMPLEMENTATIONS:
        run = functools.partial(aj.attention, mask=masks.causal(), implementation=implementation)
        text = jax.jit(run).lower(*arrays).compile().as_text()
        assert not any(x in text for x in ("all-gather", "all-reduce", "all-to-all", "permute"))


SPLIT = {
    "batch and heads": "B over data; N and K over model",
    "length": "T over data; gathers S of key and value",
    "more shards than heads": "gathers N of query",
    "in conflict": "B over data; N and K over model; reshards B of value",
}


@pytest.mark.parametrize("name", SPLIT)
def test_explain_says_how_a_call_is_split(mesh, name):
    given = {x: put(mesh, SPECS[name].get(x, ()), inputs()[x]) for x in ("query", "key", "value")}
    explanation = aj.explain(**given)
    assert explanation.split == SPLIT[name]
    assert str(explanation).splitlines()[-1] == f"split: {SPLIT[name]}"
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in given.items()
    }
    assert aj.explain(**abstract).split == SPLIT[name]
    # The compiled program communicates where it says so.
    said = []

    def attend(arrays):
        said.append(aj.explain(**arrays).split)
        return aj.attention(**arrays)

    text = jax.jit(attend).lower(given).compile().as_text()
    assert said == [SPLIT[name]]
    collectives = re.findall(r" (all-\w+|collective-permute)(?:-start)?\(", text)
    assert (" of " in SPLIT[name]) == bool(collectives)


@pytest.mark.parametrize(
    ("platform", "dtype", "score", "chosen"),
    [
        ("tpu", "bfloat16", (), "blockwise"),  # splash counts queries from 0
        pytest.param("cpu", "float32", scores.softcap(2.0), "native", marks=needs_native),
        pytest.param("cpu", "float32", scores.bias(np.zeros(1024)), "native", marks=needs_native),
    ],
)
def test_explain_chooses_what_each_device_runs(mesh, platform, dtype, score, chosen):
    x = jnp.zeros((B, 1024, N, H), dtype)
    split, options = put(mesh, (None, "data"), x), {"mask": masks.causal(), "score": score}
    assert aj.explain(split, x, x, platform=platform, **options).chosen == chosen
    if platform == "cpu":
        aj.attention(split, x, x, implementation=chosen, **options)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_dropout_alone_over_a_sequence(mesh, implementation):
    """Each device drops the pairs of its own queries."""
    x = jax_normal(0, B, 64, N, H)
    options = {"dropout_rate": 0.3, "dropout_key": jax.random.key(0)}
    out = aj.attention(put(mesh, (None, "data"), x), x, x, implementation=implementation, **options)
    expected = aj.attention(x, x, x, implementation="xla", **options)
    chex.assert_trees_all_close(np.asarray(out), np.asarray(expected), atol=1e-5)


def test_explain_says_nothing_of_arrays_that_are_not_split(mesh):
    x = jax.ShapeDtypeStruct((B, T, N, H), "float32")
    assert aj.explain(x, x, x).split is None
    assert "split" not in str(aj.explain(x, x, x))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["blockwise", slow("xla")])
def test_vmap_over_a_sharded_axis(mesh, implementation):
    arrays = [inputs()[name] for name in ("query", "key", "value")]

    def loss(*arrays):
        one = functools.partial(aj.attention, mask=masks.causal(), implementation=implementation)
        out = jax.vmap(one)(*arrays)
        return (out**2).sum(), out

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, expected), gradient = both(*arrays)
    with jax.set_mesh(mesh):
        sharded = [put(mesh, ("data", None, "model"), x) for x in arrays]
        (_, out), got = both(*sharded)
    assert jax.typeof(out).sharding.spec == P("data", None, "model", None)
    chex.assert_trees_all_close(np.asarray(out), np.asarray(expected), atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(gradient), atol=1e-4)


def test_a_table_sharded_along_its_index(mesh):
    arrays, table = [inputs()[name] for name in ("query", "key", "value")], jax_normal(6, N, T)
    rule = lambda s, b, n, q, k, table: s + table[n, k]  # noqa: E731
    expected = aj.attention(*arrays, score=scores.score_fn(rule, table))
    sharded = [put(mesh, ("data", None, "model"), x) for x in arrays]
    with jax.set_mesh(mesh):
        score = scores.score_fn(rule, put(mesh, ("model",), table))
        got = aj.attention(*sharded, score=score)
    chex.assert_trees_all_close(np.asarray(got), np.asarray(expected), atol=1e-5)


@pytest.mark.slow
def test_weights_and_mechanisms(mesh):
    q, k, v = (inputs()[name] for name in ("query", "key", "value"))
    fns = (
        lambda q, k, v: aj.attention_weights(q, k, mask=masks.causal()),
        lambda q, k, v: mechanisms.linear_attention(q, k, v),
        lambda q, k, v: mechanisms.topk_attention(q, k, v, k=3),
        lambda q, k, v: mechanisms.retention(q, k, v),
    )
    for fn in map(jax.jit, fns):
        expected = fn(q, k, v)
        out = fn(*(put(mesh, ("data", None, "model"), x) for x in (q, k, v)))
        chex.assert_trees_all_close(np.asarray(out), np.asarray(expected), atol=1e-5)


def test_modules_and_drop_ins(mesh):
    x = jax_normal(5, B, T, 16)
    ours = nn.MultiHeadAttention(16, num_heads=4, mask=masks.causal(), rngs=nnx.Rngs(0))
    flax = nnx.MultiHeadAttention(
        num_heads=4, in_features=16, attention_fn=nn.attention_fn, decode=False, rngs=nnx.Rngs(0)
    )
    q = jax_normal(0, B, T, N, H)
    with jax.set_mesh(mesh):
        sharded = put(mesh, ("data",), x)
        for module in (ours, flax):
            run = jax.jit(lambda x, module=module: module(x))
            expected, got = np.asarray(run(x)), run(sharded)
            chex.assert_trees_all_close(np.asarray(got), expected, atol=1e-5)
        got = nn.dot_product_attention(
            *(put(mesh, ("data", None, "model"), q),) * 3, is_causal=True
        )
    expected = nn.dot_product_attention(q, q, q, is_causal=True)
    chex.assert_trees_all_close(np.asarray(got), np.asarray(expected), atol=1e-5)


@pytest.mark.slow
def test_a_function_that_closes_over_a_number_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x = jax_normal(0, B, T, 2, H)

    def loss(x, w):
        score = scores.score_fn(lambda s, b, n, q, k: jax.nn.softplus(s * w))
        return (aj.attention(x, x, x, score=score, implementation="blockwise") ** 2).sum()

    def summed(x, w):
        return jax.lax.psum(loss(x, w), "data")

    mapped = jax.shard_map(summed, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    got = jax.jit(jax.grad(mapped, argnums=(0, 1)))(x, 1.1)
    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, 1.1)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
