"""Splash attention for TPUs: the contract in the interpreter, what it refuses, its lazy masks."""

import functools
import time
from unittest import mock

import chex
import helpers
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from contract import IMPLEMENTATIONS, PAIRS, PROMISES, assert_right, covering, parameters, values
from helpers import value_and_gradients

from attention_jax import attention, explain, masks, scores, testing
from attention_jax.backends import splash

NAME = "splash interpreted"
interpreted = IMPLEMENTATIONS[NAME]

# --- The contract: the promises that the kernel supports, and pairs with what these lack of every
# option's values.


def possible(case):
    return (
        case.dtype in ("float32", "bfloat16")
        and case.score in ("none", "softcap")
        and not (case.score == "softcap" and case.lse)
        and not case.dropout_rate
        and not case.positions
        and case.mask
        not in (
            "dense",
            "nothing",
            "mask_fn",
            "mask_fn evaluated",
            "causal offsets",
            "prefix | causal",
            "global | window",
            "block_sparse traced",
        )
    )


NO_KEYS = testing.cases(name="no keys, narrow")  # the others have a bias
POSSIBLE = [case for case in PROMISES + NO_KEYS if possible(case)]
CASES = [*POSSIBLE, *covering([case for case in PAIRS if possible(case)], values, POSSIBLE)]


def test_enough_cases_are_supported():
    assert len(CASES) >= 15
    assert any("kernel" in case.tags for case in CASES)


@pytest.mark.parametrize(("name", "case"), parameters(NAME, CASES, "kernel"))
def test_equals_the_oracle(name, case):
    assert_right(name, case)


# --- Against the materialized path: options that the catalogue has only with arrays, and combined.


inputs = functools.partial(helpers.inputs, B=(2,), T=70, S=150, N=4, K=2, H=16, D=8)


LAYOUT = np.random.default_rng(0).random((5, 10)) < 0.4
LAYOUT[2] = False  # queries without visible keys
TOGETHER = {
    "layout and its complement": {"mask": masks.block_sparse(LAYOUT, 16) & ~masks.chunked(32)},
    "prefix or causal, sinks": {
        "mask": masks.prefix(9) | masks.causal(),
        "sinks": np.array([0.5, -1.0, 2.0, 0.0], np.float32),
        "return_lse": True,
    },
    "dilated window, softcap": {
        "mask": masks.dilated(2) & masks.window(30, 4, align="end"),
        "score": scores.softcap(2.0),
    },
    "segments with padding, causal, lengths": {
        "mask": masks.segments(
            np.repeat([[0, 1, 2, -1, 3, 3, 7]], 10)[None], np.repeat([[0, 2, 1, 3, -1]], 30)[None]
        )
        & masks.causal(offset=60)
        & masks.lengths(key=np.array([0, 140])),
        "return_lse": True,
    },
    "nothing": {"mask": masks.causal(offset=-100), "return_lse": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_equals_the_materialized_path(name):
    results = [
        value_and_gradients(fn, *inputs(), **TOGETHER[name])
        for fn in (interpreted, functools.partial(attention, implementation="xla"))
    ]
    chex.assert_trees_all_close(*results, rtol=2e-5, atol=2e-5)


def test_a_mask_of_many_pairs_is_evaluated_block_by_block():
    static = splash.StaticMask(masks.causal() & masks.window(1000, 0), 2**17, 2**17)
    start = time.perf_counter()
    queries, keys = static.visible()
    assert queries.all()
    assert keys.all()
    assert time.perf_counter() - start < 20  # 1.7e10 pairs one by one take minutes and 16 GiB
    mask = splash._lazy(static, 2**17, 2**17)
    assert mask[slice(0, 512), slice(512, 1024)].shape == (512, 512)


@pytest.mark.parametrize(
    "mask",
    [
        ~masks.chunked(100) & masks.causal(),
        masks.block_sparse(np.random.default_rng(1).random((8, 8)) < 0.5, 150),
        masks.prefix(40) | ~masks.window(300, 20),
    ],
)
def test_blocks_are_those_of_the_mask_and_need_no_device(mask):
    T, S = 1150, 900  # the last block of keys is padded
    dense = np.asarray(mask.to_dense(T, S))
    lazy = splash._lazy(splash.StaticMask(mask, T, S), 1152, 1024)
    with jax.transfer_guard("disallow"):  # what JAX computes would move the indices to a device
        blocks = [
            [lazy[slice(i, i + 128), slice(j, j + 512)] for j in (0, 512)]
            for i in range(0, 1152, 128)
        ]
    found = np.block(blocks)
    np.testing.assert_array_equal(found[:T, :S], dense)
    assert not found[:, S:].any()


def test_equal_masks_are_equal_to_splash():
    one, other, third = (
        splash._lazy(splash.StaticMask(masks.window(n, 0), 512, 512), 512, 512) for n in (9, 9, 8)
    )
    assert (one == other, hash(one) == hash(other), one == third) == (True, True, False)


@pytest.mark.slow
def test_a_long_window_is_lowered_without_an_array_of_pairs():
    x = [jax.ShapeDtypeStruct((1, 2**16, n, 64), jnp.bfloat16) for n in (2, 1, 1)]
    pairs = splash.StaticMask.pairs
    with mock.patch.object(splash.StaticMask, "pairs", autospec=True, side_effect=pairs) as static:
        program = jax.jit(functools.partial(interpreted, mask=masks.window(1000, 0))).lower(*x)
    assert 128 <= static.call_count < 5000  # there are 16,384 blocks, and splash asks several times
    assert "65536x65536" not in program.as_text()


def products(jaxpr, inside=""):
    """Kernel and precision of every product within a kernel."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and inside:
            yield inside, eqn.params["precision"]
        name = str(eqn.params.get("name")) if eqn.primitive.name == "pallas_call" else inside
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from products(sub, name)


@pytest.mark.slow
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_reaches_the_kernels_of_every_pass(dtype, lse):
    def loss(*xs):
        return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(fn(*xs)))

    fn = functools.partial(interpreted, mask=masks.causal(), return_lse=lse)
    x = [jax.ShapeDtypeStruct((1, 128, 2, 64), dtype)] * 3
    # In bfloat16 the TPU's compiler fails if static for more.
    with jax.default_matmul_precision("highest" if dtype == "bfloat16" else None):
        found = list(products(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*x).jaxpr))
    assert {name.split("_")[2] for name, _ in found} == {"fwd", "dq", "dkv"}
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert {p for _, p in found} == {highest if dtype == "float32" else None}


# --- What is refused.


def reason(*, dtype="bfloat16", platform="tpu", **options):
    q, k = (jax.ShapeDtypeStruct((2, 64, n, 16), dtype) for n in (4, 2))
    return explain(q, k, k, platform=platform, implementation="splash", **options).reasons["splash"]


OFFSETS = np.array([1, 2], np.int32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"platform": "cpu"}, "for TPUs, the platform is cpu"),
        ({"platform": "gpu"}, "for TPUs, the platform is gpu"),
        ({"dtype": "float16"}, "float16"),
        ({"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}, "dropout"),
        ({"score": scores.alibi()}, "score Alibi"),
        ({"score": [scores.softcap(2.0)] * 2}, "more than one softcap"),
        ({"score": scores.softcap(2.0), "return_lse": True}, "lse with softcap"),
        ({"mask": masks.causal(offset=OFFSETS)}, "mask Band holds arrays"),
        ({"mask": masks.dense(np.ones((64, 64), bool))}, "mask Dense holds arrays"),
        ({"mask": masks.mask_fn(lambda b, n, q, k: q > k)}, "mask_fn may depend on the example"),
        ({"mask": masks.segments(np.zeros((2, 64), int)) | masks.causal()}, "mask Or holds"),
    ],
)
def test_refuses_with_a_reason(options, words):
    assert words in reason(**options)


def test_by_name_on_another_platform_says_which_can():
    with pytest.raises(NotImplementedError, match=r"for TPUs, the platform is cpu.*blockwise, xla"):
        attention(*inputs(), implementation="splash")
