"""The kernels for GPUs: the contract in the interpreter, tiles, and what they refuse."""

import functools
from unittest import mock

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import (
    CORE,
    IMPLEMENTATIONS,
    PAIRS,
    PROMISES,
    assert_right,
    covering,
    parameters,
    values,
)
from jax.experimental import pallas as pl

from attention_jax import attention, explain, masks, scores
from attention_jax.backends.pallas_gpu import launch, refs
from attention_jax.backends.pallas_gpu import run as pallas_gpu
from attention_jax.core import compat
from attention_jax.core.pytree import Lookup

NAME = "pallas_gpu interpreted"
interpreted = IMPLEMENTATIONS[NAME]

# --- The contract: the core promises, and pairs with what these lack of every option's values.


def possible(case):
    return case.dtype != "float64" and not case.score.startswith("relative_embedding")


# A table whose gradient is that of the loops, positions with a bias, a bias of one batch axis.
MORE = ("planted, T5", "positions, planted", "bias of one batch axis")
CHOSEN = [case for case in PROMISES if case in CORE or case.name in MORE]
POSSIBLE = [case for case in CHOSEN if possible(case)]
CASES = [*POSSIBLE, *covering([case for case in PAIRS if possible(case)], values, POSSIBLE)]


@pytest.mark.parametrize(("name", "case"), parameters(NAME, CASES, "kernel"))
def test_equals_the_oracle(name, case):
    assert_right(name, case)


# --- Transformations.


inputs = functools.partial(helpers.inputs, B=(2,), T=21, S=37, N=4, K=2, H=5, D=3)


def loss(fn, *args, **options):
    return jnp.sin(fn(*args, **options)).sum()


@pytest.mark.slow
@pytest.mark.parametrize("in_axes", [(0, 0, 0), (1, None, 0), (None, 0, None)])
def test_vmap_equals_one_by_one(in_axes):
    q, k, v = inputs(B=(2,))
    args = [
        x[0] if axis is None else jnp.moveaxis(x, 0, axis)
        for x, axis in zip((q, k, v), in_axes, strict=True)
    ]

    def run(q, k, v, fn):
        return jax.vmap(functools.partial(fn, mask=masks.causal()), in_axes)(q, k, v)

    def value_and_grads(fn):
        return jax.value_and_grad(lambda *xs: jnp.sin(run(*xs, fn)).sum(), (0, 1, 2))(*args)

    xla = functools.partial(attention, implementation="xla")
    chex.assert_trees_all_close(value_and_grads(interpreted), value_and_grads(xla), atol=2e-5)


@pytest.mark.slow
def test_forward_mode_and_second_derivatives():
    q, k, v = inputs(T=9, S=17)
    options = {"mask": masks.window(5, 1), "score": scores.softcap(2.0)}
    xla = functools.partial(attention, implementation="xla")
    for derive in (
        lambda f: jax.jvp(f, (q,), (jnp.cos(q),)),
        lambda f: jax.jvp(jax.grad(f), (q,), (jnp.cos(q),)),
    ):
        results = [
            derive(lambda q, fn=fn: loss(fn, q, k, v, **options)) for fn in (interpreted, xla)
        ]
        chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(2, 4), (1, 4), (2, 1)])
def test_gradients_of_a_bias_and_of_slopes_come_from_a_kernel(heads):
    q, k, v = inputs()
    bias = jax.random.normal(jax.random.key(1), (*heads, 21, 37))
    slopes = jnp.array([0.1, 0.2, 0.3, 0.4])

    def run(bias, slopes, fn):
        score = [scores.bias(bias), scores.softcap(3.0), scores.alibi(slopes)]
        return loss(fn, q, k, v, score=score, mask=masks.window(9, 5))

    grad = jax.value_and_grad(run, (0, 1))
    loop_operands = mock.Mock(side_effect=launch.loop_operands)
    with mock.patch.object(launch, "loop_operands", loop_operands):
        ours = grad(bias, slopes, interpreted)
    loop_operands.assert_not_called()  # the loops were not used
    xla = functools.partial(attention, implementation="xla")
    chex.assert_trees_all_close(ours, grad(bias, slopes, xla), atol=2e-5)


@pytest.mark.slow
def test_a_number_that_functions_close_over_has_a_gradient():
    q, k, v = inputs()

    def run(w, fn):
        mask = masks.mask_fn(lambda b, n, q, k: (q - k).astype(jnp.float32) * w < 9)
        score = scores.score_fn(lambda s, b, n, q, k: jnp.tanh(s * w))
        return loss(fn, q, k, v, mask=mask, score=score)

    xla = functools.partial(attention, implementation="xla")
    ours, right = (
        jax.jit(jax.value_and_grad(lambda w, fn=fn: run(w, fn)))(0.7) for fn in (interpreted, xla)
    )
    chex.assert_trees_all_close(ours, right, rtol=1e-4)


@pytest.mark.slow
def test_a_table_of_the_size_of_all_pairs_is_looked_up():
    q, k, v = inputs(T=21, S=37)
    table = jax.random.normal(jax.random.key(1), (21, 37))
    # Indexed in reverse, so that the entry of pair (q, k) is not at (q, k).
    score = lambda t: scores.score_fn(lambda s, b, n, q, k, t: s + t[20 - q, 36 - k], t)  # noqa: E731
    xla = functools.partial(attention, implementation="xla")
    ours, right = (
        jax.grad(lambda t, fn=fn: loss(fn, q, k, v, score=score(t)))(table)
        for fn in (interpreted, xla)
    )
    chex.assert_trees_all_close(ours, right, atol=2e-5)


@pytest.mark.slow
def test_results_are_the_same_bits_each_time():
    q, k, v = inputs()
    grad = jax.jit(jax.grad(lambda *xs: loss(interpreted, *xs, mask=masks.causal()), (0, 1, 2)))
    chex.assert_trees_all_equal(grad(q, k, v), grad(q, k, v))


@pytest.mark.slow
def test_empty_blocks_are_not_visited():
    q, k, v = inputs(T=64, S=64)
    mask = masks.mask_fn(lambda b, n, q, k: k < 16, evaluate=True)
    pairs = masks.causal() & masks.lengths(key=16)
    # All blocks claim to be empty, though pairs are visible: visiting one would change the output.
    blank = Blank(pairs)
    out = interpreted(q, k, v, mask=blank)
    assert not np.any(out)
    assert np.any(interpreted(q, k, v, mask=mask))


class Blank(masks.Mask):
    """Every block is empty, though pairs are not."""

    mask_: masks.Mask

    def rule(self, b, n, q, k):
        return self.mask_.rule(b, n, q, k)

    def block(self, grid, b, n):
        return np.False_, np.False_


# --- Tiles.


@pytest.mark.parametrize("mapped", [0, 1, 2])
def test_a_tile_larger_than_its_array_is_padded_with_zeros(mapped):
    x = jnp.arange(30.0).reshape(2, 5, 3) + 1  # two arrays 5 x 3
    dims = (mapped,)

    def kernel(x, _, y, tile):
        tile[...] = refs.MappedRef(x, dims, (1,)).load((2, 16), (0, 16))
        refs.MappedRef(y, dims, (0,)).store(tile[...], (2, 16), (0, 16))

    y, tile = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(jnp.moveaxis(x, 0, mapped).shape, x.dtype),
            jax.ShapeDtypeStruct((16, 16), x.dtype),
        ],
        input_output_aliases={1: 0},
        interpret=True,
    )(*(jnp.moveaxis(a, 0, mapped) for a in (x, -x)))
    expected = np.zeros((16, 16), np.float32)
    expected[:3, :3] = x[1, 2:]
    np.testing.assert_array_equal(tile, expected)
    expected = np.array(-x)
    expected[0, 2:] = x[1, 2:]
    np.testing.assert_array_equal(jnp.moveaxis(y, mapped, 0), expected)


# --- What is refused.


def reason(*, dtype="bfloat16", H=64, platform="gpu", **options):
    q, k = (jax.ShapeDtypeStruct((2, 1000, n, H), dtype) for n in (8, 2))
    return explain(q, k, k, platform=platform, implementation="pallas_gpu", **options).reasons[
        "pallas_gpu"
    ]


IDS = jnp.arange(1000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"platform": "cpu"}, "for GPUs, the platform is cpu"),
        ({"platform": "tpu"}, "for GPUs, the platform is tpu"),
        ({"dtype": "float64"}, "float64"),
        ({"H": 4096}, "shared memory"),
        (
            {
                "score": scores.relative_embedding(
                    np.zeros((2, 1000, 8, 64), jnp.bfloat16), np.zeros((9, 64), jnp.bfloat16)
                )
            },
            "score RelativeEmbedding cannot run in a kernel",
        ),
        ({"mask": masks.mask_fn(lambda b, n, q, k: IDS[q] == IDS[k])}, "pass it as an argument"),
        (
            {"mask": masks.mask_fn(lambda b, n, q, k, x: jnp.take(x, q) == k, IDS)},
            "look up entries",
        ),
        (
            {"mask": masks.mask_fn(lambda b, n, q, k, x: x[:3].sum() + q > k, IDS)},
            "can only be indexed by 1 integers",
        ),
        (
            {"score": scores.score_fn(lambda s, b, n, q, k: s - s.max())},
            "reduce_max",
        ),
    ],
)
def test_refuses_with_a_reason(options, words):
    if options.get("dtype") == "float64":
        with jax.enable_x64(True):
            assert words in reason(**options)
    else:
        assert words in reason(**options)


def test_is_refused_where_jax_has_no_triton(monkeypatch):
    monkeypatch.setattr(compat, "triton", None)
    assert "no Triton" in reason()


def test_a_function_with_its_array_as_argument_is_taken():
    fn = masks.mask_fn(lambda b, n, q, k, ids: ids[q] == ids[k], IDS)
    assert reason(mask=fn) == "asked for"


def test_by_name_on_another_platform_says_which_can():
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match=r"for GPUs, the platform is cpu.*blockwise, xla"):
        attention(q, k, v, implementation="pallas_gpu")


def test_tiles_fit_shared_memory_or_there_are_none():
    for itemsize in (2, 4):
        for H in (16, 64, 128, 200, 256, 512):
            for candidates in (pallas_gpu.FORWARD, pallas_gpu.BACKWARD):
                tiles = pallas_gpu.choose_tiles(candidates, 4096, 4096, H, H, itemsize)
                if tiles is not None:
                    backward = candidates is pallas_gpu.BACKWARD
                    used = pallas_gpu.shared_bytes(tiles, H, H, itemsize, backward=backward)
                    assert used <= pallas_gpu.SHARED_MEMORY
    assert pallas_gpu.choose_tiles(pallas_gpu.FORWARD, 64, 64, 4096, 64, 4) is None


# --- Looking entries up.


def test_lookup_clips_and_wraps_as_jax_does():
    x = jnp.arange(10.0)
    lookup = Lookup(lambda i: x[i], x.shape, x.dtype)
    i = jnp.array([-11, -10, -1, 0, 9, 10, 99])
    chex.assert_trees_all_equal(lookup[i], x[i])


@pytest.mark.parametrize("index", [..., slice(2), 1.0, (0, 0), np.array([True])])
def test_lookup_refuses_other_indices(index):
    lookup = Lookup(lambda i: i, (10,), jnp.float32)
    with pytest.raises(NotImplementedError, match="1 integers"):
        lookup[index]
