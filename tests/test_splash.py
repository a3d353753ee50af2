"""Splash attention for TPUs: the contract in the interpreter, what it refuses, its lazy masks."""

import functools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import IMPLEMENTATIONS, PAIRS, PROMISES, assert_right

from attention_jax import attention, explain, masks, scores
from attention_jax.backends import splash

NAME = "splash interpreted"
interpreted = IMPLEMENTATIONS[NAME]

# --- The contract: all of the catalogue that the kernel can do.


def possible(case):
    return (
        case.dtype in ("float32", "bfloat16")
        and case.score in ("none", "softcap")
        and not (case.score == "softcap" and case.lse)
        and not case.dropout_rate
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


CASES = [case for case in (*PROMISES, *PAIRS) if possible(case)]
QUICK_CASES = {"length 0, sinks", "planted", "lse, long, bfloat16", "causal end, T < S"}


def test_there_is_enough_to_check():
    assert len(CASES) >= 20
    assert {c.name for c in CASES} >= QUICK_CASES


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=[] if c.name in QUICK_CASES else [pytest.mark.slow])
        for c in CASES
    ],
)
def test_equals_the_oracle(case):
    assert_right(NAME, case)


# --- Against the materialised path: what the catalogue has only with arrays, and together.


def inputs(B=(2,), T=70, S=150, N=4, K=2, H=16, D=8):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (*B, T, N, H), (*B, S, K, H), (*B, S, K, D)
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def value_and_grads(fn, *args, **options):
    def loss(*args):
        out = fn(*args, **options)
        out, lse = out if isinstance(out, tuple) else (out, jnp.zeros(()))
        return jnp.sin(out).sum() + jnp.cos(jnp.where(jnp.isfinite(lse), lse, 0.0)).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*args)


LAYOUT = np.random.default_rng(0).random((5, 10)) < 0.4
LAYOUT[2] = False  # queries that see nothing
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
def test_equals_the_materialised_path(name):
    results = [
        value_and_grads(fn, *inputs(), **TOGETHER[name])
        for fn in (interpreted, functools.partial(attention, implementation="xla"))
    ]
    chex.assert_trees_all_close(*results, rtol=2e-5, atol=2e-5)


def test_a_mask_of_many_pairs_is_asked_block_by_block():
    asked = splash.Asked(masks.causal() & masks.window(1000, 0), 2**17, 2**17)
    start = time.perf_counter()
    queries, keys = asked.seen()
    assert queries.all()
    assert keys.all()
    assert time.perf_counter() - start < 20  # 1.7e10 pairs one by one take minutes and 16 GiB
    mask = splash._lazy(asked, 2**17, 2**17)
    assert mask[slice(0, 512), slice(512, 1024)].shape == (512, 512)


# --- What is refused.


def reason(*, dtype="bfloat16", platform="tpu", **options):
    q, k = (jax.ShapeDtypeStruct((2, 64, n, 16), dtype) for n in (4, 2))
    return explain(q, k, k, platform=platform, implementation="splash", **options).reasons["splash"]


OFFSETS = np.array([1, 2], np.int32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"platform": "cpu"}, "for TPUs, this is a cpu"),
        ({"platform": "gpu"}, "for TPUs, this is a gpu"),
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


def test_by_name_on_another_platform_says_who_can():
    with pytest.raises(NotImplementedError, match=r"for TPUs, this is a cpu.*blockwise, xla"):
        attention(*inputs(), implementation="splash")
