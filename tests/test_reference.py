"""The oracle against independent code: its formula against scalar loops.

Its gradients are in ``test_reference_gradients.py``; empty rows, masked keys and errors in
``test_reference_edges.py``.
"""

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference_problems import (
    B,
    G,
    H,
    N,
    S,
    T,
    close,
    each_option,
    equal,
    every_option,
    inputs,
    literal,
)

from attention_jax import attention, masks, reference
from attention_jax.reference import Bias


@each_option
def test_forward_equals_scalar_loops(options):
    query, key, value, *_ = inputs()
    result = reference.attention(query, key, value, **options)
    for actual, expected in zip(result, literal(query, key, value, options), strict=True):
        assert actual.shape == expected.shape
        close(actual, expected)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)], ids=str)
def test_any_number_of_batch_axes(batch):
    query, key, value, *_ = inputs(batch=batch)
    options = every_option(batch=batch)
    result = reference.attention(query, key, value, **options)
    for actual, expected in zip(result, literal(query, key, value, options), strict=True):
        assert actual.shape == expected.shape
        close(actual, expected)


def test_query_head_n_reads_key_head_n_over_g():
    query, key, value, *_ = inputs()
    shared = reference.attention(query, key, value)
    copied = reference.attention(query, np.repeat(key, G, axis=-2), np.repeat(value, G, axis=-2))
    equal(shared, copied)


@pytest.mark.parametrize("batch", [(), (B,)])
def test_a_rule_of_positions_is_a_mask(batch):
    """As an array of it, with keys at negative positions masked; forward and backward."""
    query, key, value, d_out, d_lse = inputs()
    rng = np.random.default_rng(3)
    i, j = rng.integers(0, 9, (*batch, T)), rng.integers(-2, 9, (*batch, S))
    at = {"query_positions": i, "key_positions": j}
    i, j = i[..., None, :, None], j[..., None, None, :]
    mask = np.broadcast_to((j <= i + 2) & (j >= 0), (*batch, 1, T, S))
    assert 0 < mask.mean() < 1

    def rule(i, j):
        return j <= i + 2

    found = reference.attention(query, key, value, mask=rule, **at)
    for x, y in zip(found, reference.attention(query, key, value, mask=mask), strict=True):
        equal(x, y)
    found = reference.attention_gradients(query, key, value, d_out, d_lse, mask=rule, **at)
    gradients = reference.attention_gradients(query, key, value, d_out, d_lse, mask=mask)
    for x, y in zip(found[:3], gradients[:3], strict=True):
        equal(x, y)


def test_positions_are_those_of_attention():
    query, key, value, *_ = inputs()
    i, j = np.array([8, 0, 3, 5, 6], np.int32), np.array([4, -1, 0, 9, 2, 7, 5], np.int32)
    at = {"query_positions": i, "key_positions": j}
    right = reference.attention(query, key, value, mask=lambda i, j: (i - 4 <= j) & (j <= i), **at)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    out = attention(*arrays, mask=masks.window(4, 0), **at)
    np.testing.assert_allclose(out, right.out, atol=1e-5)


def test_default_scale_is_one_over_root_of_width():
    query, key, value, *_ = inputs()
    default = reference.attention(query, key, value)
    equal(default, reference.attention(query, key, value, scale=1 / math.sqrt(H)))


@each_option
def test_weights_sum_to_one_less_the_share_of_the_sink(options):
    query, key, value, *_ = inputs()
    result = reference.attention(query, key, value, **options)
    share = 0.0
    if "sinks" in options:
        share = np.exp(options["sinks"] - result.lse)  # [B T N]
    close(np.moveaxis(result.weights.sum(axis=-1), -2, -1), 1.0 - share + np.zeros((B, T, N)))


def test_a_sink_is_a_key_whose_value_is_zero():
    query, key, value, *_ = inputs()
    sinks = np.linspace(-1.0, 2.0, N)
    with_sinks = reference.attention(query, key, value, sinks=sinks)
    bias = np.zeros((N, 1, S + 1))
    bias[:, 0, -1] = sinks
    extra = [(0, 0), (0, 1), (0, 0), (0, 0)]
    with_a_key = reference.attention(
        query, np.pad(key, extra), np.pad(value, extra), score=[Bias(bias)], scale=H**-0.5
    )
    close(with_sinks.out, with_a_key.out)
    close(with_sinks.lse, with_a_key.lse)
    close(with_sinks.weights, with_a_key.weights[..., :-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32])
def test_any_dtype_is_computed_in_float64(dtype):
    arrays = [(3 * x).astype(dtype) for x in inputs()]
    bias = np.random.default_rng(2).normal(size=(T, S)).astype(dtype)
    wide = [x.astype(np.float64) for x in arrays]
    options, wide_options = ({"score": [Bias(b)]} for b in (bias, bias.astype(np.float64)))
    result = reference.attention(*arrays[:3], **options)
    gradients = reference.attention_gradients(*arrays, **options)
    assert all(x.dtype == np.float64 for x in (*result, *gradients[:3], gradients.score[0]))
    equal(result, reference.attention(*wide[:3], **wide_options))
    equal(gradients, reference.attention_gradients(*wide, **wide_options))


def test_jax_arrays_are_computed_in_float64():
    q, k, v = (x[0, :, 0].astype(np.float32) for x in inputs()[:3])
    bias = np.random.default_rng(2).normal(size=(T, S)).astype(np.float32)
    on_device = reference.head(*map(jnp.asarray, (q, k, v)), score=[Bias(jnp.asarray(bias))])
    assert all(type(x) is np.ndarray and x.dtype == np.float64 for x in on_device)
    equal(on_device, reference.head(q, k, v, score=[Bias(bias)]))


def test_large_logits_are_exact():
    # Logits 0, 1e4 and 1e4 - log 3: their exponentials overflow, their softmax is 0, 3/4, 1/4.
    key = np.array([[0.0], [1e4], [1e4 - math.log(3)]])
    result = reference.head([[1.0]], key, np.eye(3), scale=1.0)
    close(result.out, [[0.0, 0.75, 0.25]])
    close(result.lse, [1e4 + math.log(4 / 3)], 1e-15)
    # -1e4 alone would underflow to an empty row.
    close(reference.head([[-1.0]], [[1e4], [1e4]], [[2.0], [4.0]], scale=1.0).out, [[3.0]])
    # The sink may be the largest, too.
    result = reference.head([[1.0]], [[0.0]], [[1.0]], sink=1e4)
    equal((result.out, result.lse), ([[0.0]], [1e4]))


@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_a_shift_of_all_logits_moves_only_lse(shift):
    query, key, value, d_out, _ = inputs()
    shifted = {"score": [Bias(np.array(shift))]}
    result = reference.attention(query, key, value, **shifted)
    plain = reference.attention(query, key, value)
    close(result.out, plain.out, 1e-11)
    close(result.lse, plain.lse + shift, 1e-11)
    of_shift = reference.attention_gradients(query, key, value, d_out, **shifted).score[0]
    close(of_shift, 0.0, 1e-12)
