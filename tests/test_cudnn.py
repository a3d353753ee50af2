"""The adapter to cuDNN: the arguments it passes, refusals, and rows that cuDNN leaves undefined."""

import functools
import math
import re
import subprocess
import sys

import cudnn_calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cudnn_calls import (
    BF16,
    CUDNN,
    F32,
    SUPPORTED,
    B,
    G,
    H,
    K,
    N,
    T,
    by_xla,
    inputs,
    lengths,
    normal,
    output,
    own_bias,
    prepared,
    shared_bias,
)

from attention_jax import masks, reference, scores
from attention_jax.core.pytree import full_rank

calls = pytest.fixture(cudnn_calls.calls)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_equals_the_oracle(name, calls):
    options = SUPPORTED[name]
    x, cotangent = inputs(), normal(3, *B, T, N, H)
    bias = [options["score"].array] if "score" in options else []

    def both(fn):
        def program(x, bias):
            score = {"score": scores.bias(*bias)} if bias else {}
            out, pull = jax.vjp(lambda x, bias: fn(*x, **{**options, **score}), x, bias)
            return out, pull(cotangent)

        return jax.tree.leaves(jax.jit(program)(x, [jnp.asarray(b) for b in bias]))

    ours, plain = both(output), both(by_xla)
    visible = np.ones((math.prod(B), N, T, T), bool)
    if "mask" in options:
        visible = options["mask"].resolve(T, T, N)
        visible = full_rank(visible, prepared(*x)[1].sizes, "mask").to_dense(T, T, B=6, N=N)
    wide = [np.asarray(a, np.float64) for a in (*x, *bias)]
    rule = {
        "mask": np.asarray(visible).reshape(*B, N, T, T),
        "scale": 0.3,
        "score": [reference.Bias(b) for b in wide[3:]],
    }
    right = reference.attention_gradients(*wide[:3], np.asarray(cotangent, np.float64), **rule)
    right = [reference.attention(*wide[:3], **rule).out, *right[:3], *(right.score)]
    assert len(ours) == len(plain) == len(right)
    for times, a, b, r in zip((2, 3, 3, 3, 3), ours, plain, right, strict=False):
        a, b = (np.asarray(y, np.float64) for y in (a, b))
        allowed = times * np.abs(b - r).max() + float(jnp.finfo(BF16).eps) * np.abs(r).max()
        assert np.abs(a - r).max() <= allowed


def recorded(calls, **options):
    T = options.pop("T", 10)
    jax.eval_shape(functools.partial(output, **options), *inputs(T))
    return calls.pop()


def test_arguments(calls):
    call = recorded(calls, T=128)
    assert call["query"].shape == (6, 128, N, H)
    assert call["key"].shape == call["value"].shape == (6, 128, K, H)
    assert call["bias"] is None
    assert call["scale"] == 0.3
    assert call["is_causal"] is False
    assert call["local_window_size"] is None
    assert call["query_seq_lengths"] is call["key_value_seq_lengths"] is None
    assert recorded(calls, mask=masks.causal())["is_causal"] is True
    call = recorded(calls, mask=masks.window(3, 0))
    assert call["is_causal"] is True
    assert call["local_window_size"] == (3, 0)
    assert recorded(calls, mask=masks.window(T, 0))["local_window_size"] is None
    assert recorded(calls, score=scores.bias(own_bias[:1]))["bias"].shape == (6, 1, T, T)
    assert recorded(calls, score=scores.bias(own_bias[:1, :1]))["bias"].shape == (1, 1, T, T)
    assert recorded(calls, score=scores.bias(shared_bias))["bias"].shape == (1, N, T, T)


def test_lengths_are_passed(calls):
    def lengths_passed(T, mask):
        def program(*x):
            output(*x, mask=mask)
            call = calls.pop()
            return call["query_seq_lengths"], call["key_value_seq_lengths"]

        return [x.tolist() for x in jax.jit(program)(*inputs(T))]

    many = np.int16(99) * lengths.astype(np.int16)
    assert lengths_passed(10, masks.lengths(query=lengths - 1, key=many)) == [[10] * 6, [10] * 6]
    none = np.array([[0, -3, 4], [1, 9, 11]])
    assert lengths_passed(10, masks.lengths(key=none)) == [[10] * 6, [1, 1, 4, 1, 9, 10]]
    # Without a mask on lengths they are passed in full, unless they are multiples of a tile.
    assert lengths_passed(9, masks.causal()) == [[9] * 6, [9] * 6]


# --- What is refused.


def bias(*shape, dtype=BF16):
    return scores.bias(jnp.zeros(shape, dtype))


REFUSED = [
    ({"platform": "cpu"}, "NVIDIA GPUs, the platform is cpu"),
    ({"platform": "tpu"}, "NVIDIA GPUs, the platform is tpu"),
    ({"dtype": np.float32}, "bfloat16 and float16 only, query is float32"),
    ({"D": 16}, r"widths 16 \(D\) and 8 \(H\)"),
    ({"H": 12}, r"multiple of 8, got 12 \(H\)"),
    ({"H": 136}, r"wider than 128 .* got 136 \(H\)"),
    (
        {"sinks": np.zeros(N, np.float32)},
        "sinks are not supported by jax.nn's call to cuDNN",
    ),
    ({"dropout": True}, "dropout here is a hash .* cuDNN draws other bits"),
    ({"return_lse": True}, "gradient of the lse"),
    ({"scale": jnp.float32(0.3)}, "scale is an array"),
    ({"scale": -0.3}, "scale is -0.3, which must be positive"),
    ({"scale": 0.0}, "scale is 0.0, which must be positive"),
    ({"mask": np.ones((T, T), bool)}, "bool array, which jax.nn would turn into a bias"),
    ({"mask": masks.causal() & masks.dense(np.ones((T, T), bool))}, "bool array"),
    ({"mask": masks.causal() | masks.prefix(3)}, "mask Or is not supported"),
    ({"mask": ~masks.prefix(3)}, "mask Not is not supported"),
    ({"mask": masks.segments(np.zeros((*B, T), np.int32))}, "mask Segments is not supported"),
    ({"mask": masks.chunked(2) & masks.causal()}, "mask Chunked is not supported"),
    ({"mask": masks.dilated(2)}, "mask Dilated is not supported"),
    ({"mask": masks.mask_fn(lambda b, n, q, k: q == k)}, "mask MaskFn is not supported"),
    ({"mask": masks.causal(2)}, "offset 2, .* top-left"),
    ({"mask": masks.causal(lengths)}, "offset per example, .* top-left"),
    ({"mask": masks.causal(), "S": 12}, "causal and T is 10 but S is 12"),
    ({"mask": masks.causal(), "S": 8}, "causal and T is 10 but S is 8"),
    ({"mask": masks.causal(align="end"), "S": 12}, "offset 2, .* top-left"),
    ({"mask": masks.window(2, 0), "S": 8}, "causal and T is 10 but S is 8"),
    ({"mask": masks.window(2, None)}, "left window without causal"),
    ({"mask": masks.window(2, None), "S": 8}, "left window without causal"),
    ({"mask": masks.window(3, 1)}, "allows 1 keys after the query"),
    ({"mask": masks.window(2, 0) & masks.lengths(key=lengths)}, "window and key lengths"),
    ({"score": scores.softcap(2.0)}, "score Softcap is not supported"),
    ({"score": scores.alibi()}, "score Alibi is not supported"),
    ({"score": [bias(T, T), scores.softcap(2.0)]}, "score Softcap is not supported"),
    ({"score": [bias(T, T), bias(T, T)]}, "score has 2 biases"),
    (
        {"score": bias(T, T, dtype=F32)},
        "bias of float32, .* the dtype of query, bfloat16",
    ),
    ({"score": bias(T, T, dtype=np.float16), "dtype": np.float16}, "cannot represent the number"),
    ({"score": bias(1, T)}, r"last axes must be T and S = \(10, 10\) in full"),
    ({"score": bias(T, 1)}, r"last axes must be T and S = \(10, 10\) in full"),
    ({"score": bias(9, 10), "T": 9, "S": 10}, "must be even, got 9 and 10"),
    ({"score": bias(10, 9), "T": 10, "S": 9}, "must be even, got 10 and 9"),
    ({"score": bias(T, T), "mask": masks.window(2, 0)}, "bias and mask a window"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=[r for _, r in REFUSED])
def test_refuses_with_a_reason(options, reason):
    options = dict(options)
    shape = {name: options.pop(name) for name in ("T", "S", "D", "H", "dtype") if name in options}
    call, spec = prepared(*inputs(**shape), **options)
    found = CUDNN.why_unsupported(spec)
    assert found is not None
    assert re.search(reason, found), found
    assert CUDNN.extra_bytes(spec) >= 0
    if found.startswith("mask"):
        with pytest.raises(NotImplementedError, match=reason):
            CUDNN.run(call, spec)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_refuses_a_scale_that_is_not_finite(scale):
    _, spec = prepared(*inputs())
    reason = CUDNN.why_unsupported(spec._replace(scale=scale))
    assert reason.startswith(f"scale is {scale}, which must be positive and finite")


# --- Fully masked queries and keys.


hiding = np.asarray(normal(6, 1, T, T)).copy()
hiding[:, 3] = hiding[:, :, 6] = -np.inf

EMPTY = {
    "key lengths": masks.lengths(key=np.array([[0, 7, -1], [1, 0, 10]])),
    "no key": masks.lengths(key=0),
    "query lengths": masks.lengths(query=np.array([[0, 7, -1], [1, 0, 10]])),
    "both": masks.lengths(
        query=np.array([[0, 5, 9], [3, 2, 10]]), key=np.array([[4, 0, 3], [8, 1, 10]])
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "causal", "with_bias"),
    [
        ("key lengths", False, False),
        ("no key", True, False),
        ("query lengths", False, True),
        ("both", True, False),
        ("both", True, True),
    ],
)
def test_padding_reaches_nothing(name, causal, with_bias, calls):
    mask = EMPTY[name] & masks.causal() if causal else EMPTY[name]
    query, key, value = inputs()
    options = {"score": scores.bias(hiding)} if with_bias else {}
    sizes = prepared(query, key, value)[1].sizes
    dense = np.asarray(full_rank(mask, sizes, "mask").to_dense(T, T, B=6, N=N))
    dense = dense.reshape(*B, N, T, T)
    if with_bias:
        dense = dense & (hiding != -np.inf)
    attends = np.moveaxis(dense.any(-1), -2, -1)[..., None]  # [*B T N 1]
    attended = dense.any(-2).reshape(*B, K, G, T).any(-2)
    attended = np.moveaxis(attended, -2, -1)[..., None]  # [*B S K 1]
    planted = [
        jnp.where(keep, x, jnp.asarray(bad, BF16))
        for keep, x, bad in zip(
            (attends, attended, attended),
            (query, key, value),
            (np.nan, np.inf, np.nan),
            strict=True,
        )
    ]

    def loss(x):
        out = output(*x, mask=mask, **options)
        return (out * normal(7, *out.shape)).astype(F32).sum(), out

    run = jax.jit(jax.grad(loss, has_aux=True))
    clean, out = run([query, key, value])
    found, out_planted = run(planted)
    for a, b in zip((out, *clean), (out_planted, *found), strict=True):
        assert jnp.isfinite(a).all()
        np.testing.assert_array_equal(a, b)
    assert (out[~np.broadcast_to(attends, out.shape)] == 0).all()
    for x, keep in zip(clean, (attends, attended, attended), strict=True):
        assert (x[~np.broadcast_to(keep, x.shape)] == 0).all()


def test_a_masking_bias(calls):
    """Masking entries get no gradient, and no number near the limits of float32 is summed."""

    def program(x, array):
        def loss(array):
            return output(*x, score=scores.bias(array)).astype(F32).sum()

        d = jax.grad(loss)(array)
        calls.clear()
        loss(array)
        return d, calls.pop()["bias"]

    lowest = jnp.finfo(BF16).min
    far = jnp.asarray(hiding).at[0, 1].set(lowest).at[0, 2, :4].set(lowest)
    d, passed = jax.jit(program)(inputs(), far)
    assert jnp.isfinite(d).all()
    assert (d[far == -np.inf] == 0).all()
    assert jnp.isfinite(passed).all()
    assert (passed >= -(2.0**41)).all()
    assert (passed[0, 0, 3] == 0).all()  # a query without a visible key
    assert passed[0, 0, 1].max() == 0  # one whose keys are all masked by large finite numbers
    rest, as_passed = hiding[0, 4:], np.asarray(passed[0, 0, 4:])
    np.testing.assert_array_equal(as_passed[rest != -np.inf], rest[rest != -np.inf])


# --- What it costs.


def test_extra_bytes():
    x = inputs()
    rows = 2 * math.prod(B) * T * H * 2
    assert CUDNN.extra_bytes(prepared(*x)[1]) == 0
    assert CUDNN.extra_bytes(prepared(*x, mask=masks.causal())[1]) == 0
    assert CUDNN.extra_bytes(prepared(*x, mask=masks.prefix(3))[1]) == rows * (N + K)
    spec = prepared(*x, score=scores.bias(shared_bias))[1]
    assert CUDNN.extra_bytes(spec) == rows * (N + K) + 2 * N * T * T
    spec = prepared(*x, score=scores.bias(own_bias))[1]
    assert CUDNN.extra_bytes(spec) == rows * (N + K) + 2 * 6 * T * T


def test_nothing_is_probed():
    """Importing and querying the adapter starts no backend, and so needs no GPU."""
    program = (
        "import jax, ml_dtypes\n"
        "from attention_jax.core.axes import Sizes\n"
        "from attention_jax.backends import CuDNN, Spec\n"
        "sizes = Sizes(B=(2,), T=128, S=128, K=2, G=1, H=64, D=64)\n"
        "spec = Spec(sizes, ml_dtypes.bfloat16, None, (), 0.1, False, 0.0, False, 'gpu')\n"
        "assert CuDNN().why_unsupported(spec) is None\n"
        "assert CuDNN().extra_bytes(spec) == 0\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"  # which a backend that has started ignores
        "assert jax.device_count('cpu') == 3\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
