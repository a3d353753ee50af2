"""What ``parallel.attention`` refuses, and its error messages."""

import functools

import jax
import numpy as np
import pytest
from helpers import jax_normal
from parallel_calls import DEVICES, SPLIT, B, H, T, auto_mesh, inputs, sharded

from attention_jax import masks, parallel, scores


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
