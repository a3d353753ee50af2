"""Attention over a mesh axis that splits the sequence: results of one device, and what is sent."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import needs_native, prepared
from helpers import jax_normal, slow
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from parallel_calls import DEVICES, SPLIT, B, H, N, T, auto_mesh, inputs, sharded

import attention_jax as aj
from attention_jax import masks, parallel, scores, testing
from attention_jax.core.axes import Sizes
from attention_jax.masks import block_map
from attention_jax.masks.at_positions import mask_at_positions
from experiments.programs import counts


def everything(fn, query, key, value, bias, sinks, table, weight):
    """Every option at once."""
    ids = jnp.sort(jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) % 3)
    by_position = scores.score_fn(
        lambda s, b, n, q, k, w: s * w + 0.1 * (b + n + q - k).astype(s.dtype), weight
    )
    return fn(
        query,
        key,
        value,
        mask=masks.causal(2) & masks.segments(ids),
        score=[scores.bias(bias), scores.relative_bias(table), scores.alibi(), by_position],
        sinks=sinks,
        scale=jnp.float32(0.4),
        dropout_rate=0.2,
        dropout_key=jax.random.key(9),
        return_lse=True,
    )


def value_and_gradient(fn):
    d_out, d_lse = jax_normal(7, B, T, N, H), jax_normal(8, B, T, N)

    def loss(*arrays):
        out, lse = everything(fn, *arrays)
        return (out * d_out).sum() + (lse * d_lse).sum(), (out, lse)

    arrays = [*inputs(), jax_normal(3, N, T, T), jax_normal(4, N), jax_normal(5, 8, N)]
    arrays.append(jnp.float32(1.1))
    (_, results), gradient = jax.jit(jax.value_and_grad(loss, range(7), has_aux=True))(*arrays)
    return results, gradient


@pytest.fixture(scope="module")
def on_one_device():
    return value_and_gradient(functools.partial(aj.attention, implementation="xla"))


@pytest.mark.parametrize("strategy", [slow("ring"), slow("gather"), "heads"])
def test_every_option_and_its_gradient(strategy, on_one_device):
    results, gradient = on_one_device
    got, d_got = value_and_gradient(sharded(strategy, implementation="xla"))
    chex.assert_trees_all_close(got, results, atol=1e-5)
    chex.assert_trees_all_close(d_got, gradient, atol=1e-4, rtol=1e-4)


def even(case):
    """The case with lengths and heads that four devices divide."""
    sizes = dataclasses.replace(case.sizes, T=24, S=40, K=4, G=2)
    return dataclasses.replace(case, sizes=sizes)


# A ring merges what chunks of keys give, and is tried on each kind of mask, score and row. The
# others exchange arrays before the attention: those along queries, keys, heads, and several axes.
PROMISES = {
    "length 0, sinks": ["ring"],
    "planted, segments, long": ["ring", "gather", "heads"],
    "empty rows by both": ["ring", "gather", "heads"],
    "bias of one batch axis": ["ring", "gather", "heads"],  # and of one query
    "large logits, bfloat16": ["ring"],
    "lse, long, bfloat16": ["ring"],
    "nothing visible": ["ring"],
    "softcap shows -inf bias again": ["ring"],
    "score_fn hides": ["ring"],
    "planted, Shaw": ["ring", "gather", "heads"],
    "planted, T5": ["ring", "heads"],
    "causal end, T < S": ["ring", "gather"],
    "everything": ["ring", "gather", "heads"],
}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        (name, strategy) if name == "length 0, sinks" else slow(name, strategy)
        for name, strategies in PROMISES.items()
        for strategy in strategies
    ],
)
def test_what_attention_promises(name, strategy):
    (case,) = testing.cases(name=name)
    if len(case.sizes.B) > 1:
        case = dataclasses.replace(case, sizes=dataclasses.replace(case.sizes, B=(2,)))
    implementation = "blockwise" if strategy == "ring" else "xla"
    fn = sharded(strategy, implementation=implementation)
    report = testing.check(fn, cases=[prepared(even(case))])
    assert report.ok, str(report)
    assert "refused" not in str(report.rows[0].verdict)


SHARDS = Sizes(B=(2,), T=80, S=144, K=2, G=3, H=11, D=7)
OF_NATIVE = [
    testing.Case("T5", SHARDS, mask="causal", score="relative_bias"),
    testing.Case("softcap, sinks", SHARDS, mask="segments", score="bias, softcap", sinks=True),
    testing.Case("alibi", SHARDS, mask="window offset", score="softcap, alibi", dtype="bfloat16"),
    testing.Case("planted", SHARDS, mask="lengths", score="bias", planted=True),
    testing.Case("bits", SHARDS, mask="dilated & causal", magnitude=30.0, scale=0.4),
]


@needs_native
@pytest.mark.parametrize(
    "case", [each if each.name == "planted" else slow(each) for each in OF_NATIVE], ids=str
)
def test_a_ring_of_the_native_kernel(case):
    report = testing.check(sharded("ring", implementation="native"), cases=[case])
    assert report.ok, str(report)
    assert "refused" not in str(report.rows[0].verdict)


@pytest.mark.parametrize(
    ("strategy", "order"),
    [
        slow("ring", parallel.striped),
        ("gather", parallel.zigzag),
        slow("heads", parallel.zigzag),
    ],
)
def test_positions_in_another_order(strategy, order):
    order = order(T, DEVICES)
    options = {"score": scores.alibi(), "dropout_rate": 0.3, "dropout_key": jax.random.key(3)}

    def local(positions, *arrays):
        return parallel.attention(
            *arrays,
            axis_name="seq",
            strategy=strategy,
            mask=masks.window(9, 0),
            query_positions=positions,
            key_positions=positions,
            **options,
        )

    in_specs = (P("seq"), SPLIT, SPLIT, SPLIT)
    mapped = jax.shard_map(local, mesh=auto_mesh(), in_specs=in_specs, out_specs=SPLIT)

    def in_order(*arrays):
        mixed = [x[:, order.permutation] for x in arrays]
        return mapped(jnp.asarray(order.permutation), *mixed)[:, order.inverse]

    def plain(*arrays):
        return aj.attention(*arrays, mask=masks.window(9, 0), **options)

    def cotangents(fn, d_out, *arrays):
        out, pull = jax.vjp(fn, *arrays)
        return out, pull(d_out)

    arrays = jax_normal(6, B, T, N, H), *inputs()
    got, expected = (jax.jit(functools.partial(cotangents, f))(*arrays) for f in (in_order, plain))
    chex.assert_trees_all_close(got, expected, atol=1e-5)


@pytest.mark.slow
def test_outside_of_jit():
    query, *rest = (x[:, :4] for x in inputs())
    results = [
        jax.value_and_grad(lambda q, fn=fn: (fn(q, *rest) ** 2).sum())(query)
        for fn in (sharded("ring", 2), aj.attention)
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


# --- What is sent, and what is kept.

# Of the program of each device, forward and with the gradient; those of a ring are in its loops.
SENT = {
    "ring": ({"collective-permute": 2}, {"collective-permute": 2 + 4}),
    "gather": ({"all-gather": 2}, {"all-gather": 2, "reduce-scatter": 2}),
    "heads": ({"all-to-all": 4}, {"all-to-all": 8}),
}


@pytest.mark.parametrize("strategy", SENT)
def test_collectives(strategy):
    mesh = auto_mesh()
    arrays = [jax.device_put(x, NamedSharding(mesh, SPLIT)) for x in inputs()]
    fn = sharded(strategy)

    def attend(*arrays):
        return fn(*arrays, mask=masks.causal())

    def cotangents(*arrays):
        out, pull = jax.vjp(attend, *arrays)
        return pull(out)

    for run, expected in zip((attend, cotangents), SENT[strategy], strict=True):
        text = jax.jit(run).lower(*arrays).compile().as_text()
        assert counts(text) == expected


def temporary_bytes(fn, *arrays):
    return jax.jit(fn).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("backward", "most"), [(False, 5.5), slow(True, 9.5)])
@pytest.mark.parametrize(
    "implementation", ["blockwise", pytest.param("native", marks=needs_native)]
)
def test_memory_of_a_ring_is_linear_in_the_local_length(backward, most, implementation):
    """In local arrays: keys and values held and received, 4, and the chunk's output.

    In the backward pass, output and cotangent instead of the latter, and the chunk's gradients, 3.
    """
    ring = sharded("ring", 8, implementation=implementation)
    split = NamedSharding(auto_mesh(8), SPLIT)

    def attend(*arrays):
        return ring(*arrays, mask=masks.causal())

    def gradient(*arrays):
        return jax.grad(lambda *xs: (attend(*xs) ** 2).sum(), argnums=(0, 1, 2))(*arrays)

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 64), "float32", sharding=split)
        return temporary_bytes(gradient if backward else attend, x, x, x)

    local = 8192 // 8 * 2 * 64 * 4
    assert temporary(16384) - temporary(8192) <= most * local


def test_zigzag_balances_causal_work():
    length, n, size = 4096, 8, 256
    local = length // n

    @jax.jit
    def visited(own, positions):
        mask = mask_at_positions(masks.causal(), own, positions)
        kinds = block_map.block_map(mask, local, length, block_q=size, block_k=size).kinds
        return (kinds != block_map.EMPTY).sum()

    def tiles(positions):
        return [int(visited(own, positions)) for own in positions.reshape(n, local)]

    assert tiles(np.arange(length, dtype=np.int32)) == [3, 7, 11, 15, 19, 23, 27, 31]
    assert tiles(parallel.zigzag(length, n).permutation) == [17] * n


@pytest.mark.parametrize("order", [parallel.zigzag, parallel.striped])
def test_orders_are_permutations(order):
    permutation, inverse = order(48, 4)
    np.testing.assert_array_equal(permutation[inverse], np.arange(48))
    np.testing.assert_array_equal(np.sort(permutation), np.arange(48))


# --- Under an Explicit mesh, by itself.


def test_plain_attention_of_a_sharded_sequence():
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Explicit,) * 2)

    def attend(query, key, value, bias, sinks):
        return aj.attention(
            query,
            key,
            value,
            mask=masks.window(9, 0, align="end"),
            score=[scores.bias(bias), scores.alibi(), scores.softcap(5.0)],
            sinks=sinks,
            dropout_rate=0.2,
            dropout_key=jax.random.key(9),
            query_positions=np.arange(5, 5 + T, dtype=np.int32),
            implementation="xla",
        )

    def cotangents(d_out, *arrays):
        out, pull = jax.vjp(attend, *arrays)
        return out, pull(d_out)

    split = NamedSharding(mesh, P("data", "seq"))
    whole = jax_normal(6, B, T, N, H), *inputs(), jax_normal(3, N, T, T), jax_normal(4, N)
    expected = jax.jit(cotangents)(*whole)
    shards = [jax.device_put(x, split) for x in whole[:4]]
    shards += [jax.device_put(x, NamedSharding(mesh, P())) for x in whole[4:]]

    def of_shards(bias, sinks, d_out, *arrays):
        """Without the gradients of bias and sinks, which are sums over all devices."""
        _, pull = jax.vjp(lambda *xs: attend(*xs, bias, sinks), *arrays)
        return pull(d_out)

    compiled = jax.jit(of_shards).lower(*shards[4:], *shards[:4]).compile()
    assert set(counts(compiled.as_text())) == {"all-gather", "reduce-scatter"}
    got = jax.jit(cotangents)(*shards)
    assert jax.typeof(got[0]).sharding.spec == P("data", "seq", None, None)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), atol=1e-4)
