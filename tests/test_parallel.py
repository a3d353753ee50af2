"""Attention over a mesh axis that splits the sequence: results of one device, and what is sent."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import needs_native
from helpers import jax_normal, mostly_slow, slow
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attention_jax as aj
from attention_jax import masks, parallel, scores, testing
from attention_jax.core.axes import Sizes
from attention_jax.core.pytree import leaves
from attention_jax.masks import block_map
from attention_jax.masks.at_positions import mask_at_positions
from experiments.programs import counts

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


@pytest.mark.parametrize(
    ("strategy", "implementation"),
    [
        ("ring", "blockwise"),
        slow("ring", "xla"),
        slow("gather", "xla"),
        slow("gather", "blockwise"),
        ("heads", "xla"),
        slow("heads", "blockwise"),
    ],
)
def test_every_option_and_its_gradient(strategy, implementation, on_one_device):
    results, gradient = on_one_device
    got, d_got = value_and_gradient(sharded(strategy, implementation=implementation))
    chex.assert_trees_all_close(got, results, atol=1e-5)
    chex.assert_trees_all_close(d_got, gradient, atol=1e-4, rtol=1e-4)


def even(case):
    """The case with lengths and heads that four devices divide."""
    sizes = dataclasses.replace(case.sizes, T=24, S=40, K=4, G=2)
    return dataclasses.replace(case, sizes=sizes)


PROMISES = [
    "planted, bias",
    "planted, segments, long",
    "length 0, sinks",
    "empty rows by both",
    "large logits, bfloat16",
    "lse, long, bfloat16",
    "nothing visible",
    "softcap shows -inf bias again",
    "score_fn hides",
    "planted, Shaw",
    "planted, T5",
    "causal end, T < S",
    "everything",
    "complement",
]


@pytest.mark.parametrize("strategy", ["ring", slow("gather"), slow("heads")])
@pytest.mark.parametrize("name", mostly_slow(PROMISES, {"length 0, sinks"}))
def test_what_attention_promises(strategy, name):
    (case,) = testing.cases(name=name)
    if len(case.sizes.B) > 1:
        case = dataclasses.replace(case, sizes=dataclasses.replace(case.sizes, B=(2,)))
    implementation = "blockwise" if strategy == "ring" else "xla"
    report = testing.check(sharded(strategy, implementation=implementation), cases=[even(case)])
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


@pytest.mark.parametrize("order", [parallel.zigzag, slow(parallel.striped)])
@pytest.mark.parametrize("strategy", ["ring", "gather", slow("heads")])
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


@pytest.mark.parametrize("transformed", [lambda fn: fn, slow(jax.value_and_grad)])
def test_outside_of_jit(transformed):
    query, *rest = (x[:, :4] for x in inputs())
    results = [
        transformed(lambda q, fn=fn: (fn(q, *rest) ** 2).sum())(query)
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


# --- What is refused.


def local_call(**options):
    mapped = jax.shard_map(
        functools.partial(parallel.attention, **({"axis_name": "seq"} | options)),
        mesh=auto_mesh(),
        in_specs=SPLIT,
        out_specs=SPLIT,
    )
    return jax.eval_shape(mapped, *inputs())


LOCAL = T // DEVICES
WRONG = [
    ({"axis_name": "model"}, ValueError, "axis_name is 'model'.*its axes are 'seq'"),
    (
        {"query_positions": np.zeros(T, np.int32)},
        ValueError,
        r"query_positions has shape \(24,\), expected \[T\] or \[\*B T\] with .* T = 6",
    ),
    (
        {"score": scores.bias(np.zeros((LOCAL, LOCAL), np.float32))},
        ValueError,
        r"array of scores.bias has shape \(6, 6\), expected an axis of S = 24",
    ),
    (
        {"mask": masks.segments(np.zeros(LOCAL, np.int32), np.zeros(7, np.int32))},
        ValueError,
        "key_ids of masks.segments .* S = 6, the keys of this device, or S = 24",
    ),
    ({"strategy": "ring", "implementation": "cudnn"}, NotImplementedError, "cudnn cannot"),
]


IDS = masks.segments(np.zeros(T, np.int32))  # the ids of all devices for the local queries


@pytest.mark.parametrize(
    ("options", "words", "letters"),
    [
        ({"query_positions": np.zeros(T, np.int32)}, "expected .* T = 6", "T is"),
        ({"mask": IDS}, r"shape \(24,\)", "T is"),
        ({"mask": IDS, "strategy": "ring"}, r"shape \(24,\)", "T is"),
        ({"mask": np.ones((5, T), bool)}, r"shape \(5, 24\)", "T is"),
        ({"mask": np.ones((5, T), bool), "strategy": "ring"}, r"shape \(5, 6\)", "T and S are"),
    ],
)
def test_errors_about_lengths_say_that_they_are_local(options, words, letters):
    local = rf"\({letters} (a )?local lengths?; axis_name 'seq' has 4 devices\)"
    with pytest.raises(ValueError, match=f"{words}.*{local}"):
        local_call(**options)


def test_other_errors_do_not_mention_lengths():
    with pytest.raises(ValueError, match=r"dropout_rate") as raised:
        local_call(dropout_rate=1.5)
    assert "local" not in str(raised.value)


@pytest.mark.parametrize(("options", "error", "words"), WRONG)
def test_wrong_arguments(options, error, words):
    with pytest.raises(error, match=words):
        local_call(**options)


def test_heads_must_be_divided_evenly():
    q, k = jax_normal(0, B, T, 6, H), jax_normal(1, B, T, 6, H)
    with pytest.raises(ValueError, match=r'"heads" divides heads among the 4 .* has 6 \(N\)'):
        sharded("heads")(q, k, k)
    q, k = jax_normal(0, B, T, 4, H), jax_normal(1, B, T, 2, H)
    with pytest.raises(ValueError, match=r'key has 2 \(K\): use strategy "ring" or "gather"'):
        sharded("heads")(q, k, k)


@pytest.mark.parametrize(
    ("order", "T", "n", "error", "words"),
    [
        (parallel.zigzag, 20, 4, ValueError, "T must be a multiple of 2 n = 8, got 20"),
        (parallel.striped, 10, 4, ValueError, "T must be a multiple of n = 4, got 10"),
        (parallel.striped, 10, 0, ValueError, "n must be at least 1, got 0"),
    ],
)
def test_lengths_that_devices_do_not_divide(order, T, n, error, words):
    with pytest.raises(error, match=words):
        order(T, n)


def test_a_ring_is_differentiated_once_in_reverse_mode():
    fn = sharded("ring")
    arrays = inputs()
    with pytest.raises(NotImplementedError, match=r"strategy 'ring' cannot.*forward-mode"):
        jax.jit(lambda *xs: jax.jvp(fn, xs, xs)).lower(*arrays)
    with pytest.raises(NotImplementedError, match=r"strategy 'ring' cannot.*only once"):
        jax.jit(jax.hessian(lambda q: (fn(q, *arrays[1:]) ** 2).sum())).lower(arrays[0])


# --- Under an Explicit mesh, by itself.


@pytest.mark.parametrize("implementation", ["xla", slow("blockwise")])
@pytest.mark.parametrize("positions", [None, np.arange(5, 5 + T, dtype=np.int32)])
def test_plain_attention_of_a_sharded_sequence(positions, implementation):
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
            query_positions=positions,
            implementation=implementation,
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
