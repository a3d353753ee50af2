"""``nn.dot_product_attention`` beside ``jax.nn``'s: every argument, and pairs of them.

For a query without visible keys, ``jax.nn`` returns the mean of all values and we return 0;
elsewhere the two must agree, forward and backward.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
from helpers import close_to_largest, jax_normal

from attention_jax import attention
from attention_jax.nn import dot_product_attention
from attention_jax.testing.rules import band

B, T, S, N, H = 2, 6, 9, 4, 8
# jax.nn's own attention promotes dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def random_mask(*shape):
    return jnp.asarray(np.random.default_rng(3).random(shape) < 0.6)


# The values of each argument; of an array that broadcasts, the shapes.
ARGUMENTS = {
    "batch": (True, False),
    "kv_heads": (N, 2, 1),
    "dtype": ("float32", "bfloat16", "float16"),
    "bias": (None, (B, N, T, S), (1, N, T, S), (B, 1, T, S), (1, 1, 1, S), (N, T, S), (T, S), (S,)),
    "mask": (None, (B, N, T, S), (B, 1, 1, S), (1, N, T, 1), (1, 1, T, S), (T, S)),
    "scale": (None, 0.3, -0.5, np.float32(0.7), jnp.float32(0.7), np.int64(2), 1),
    "is_causal": (False, True, np.True_),
    "query_seq_lengths": (None, np.array([6, 2]), [5, 3], jnp.array([1, 6])),
    "key_value_seq_lengths": (None, np.array([4, 99], np.int32), jnp.array([9, 1]), [5, 7]),
    "local_window_size": (None, 2, (2, 1), [0, 3], (5, 0)),
    "implementation": (None, "xla"),
    "return_residual": (False, True),
}


def problem(case):
    """Query, key and value, and the arguments by name."""
    case = dict(case)
    batch, K, dtype = (case.pop(name) for name in ("batch", "kv_heads", "dtype"))
    lead = (B,) if batch else ()
    arrays = [
        jax_normal(i, *lead, length, heads, H, dtype=dtype)
        for i, (length, heads) in enumerate([(T, N), (S, K), (S, K)])
    ]
    for name, make in {"bias": functools.partial(jax_normal, 4), "mask": random_mask}.items():
        shape = case[name]
        if shape is not None:
            shape = (1, *shape[1:]) if len(shape) == 4 and not batch else shape
            case[name] = make(*shape)
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if not batch and case[name] is not None:
            case[name] = case[name][:1]
    if case["scale"] is None:  # of the right sign and size, whatever H
        del case["scale"]
    return arrays, case


def rows_with_keys(case, batch):
    """Which queries have a visible key, ``[*B T N]``, from the definitions of the arguments."""
    i, j = np.arange(T)[:, None], np.arange(S)
    pairs = np.ones((B, N, T, S), bool)
    if case["mask"] is not None:
        pairs &= np.asarray(case["mask"])
    if case["is_causal"]:
        pairs &= band(i, j, right=0)
    if case["local_window_size"] is not None:
        left, right = np.broadcast_to(case["local_window_size"], 2)
        pairs &= band(i, j, left, right)
    for name, place in (("query_seq_lengths", i), ("key_value_seq_lengths", j)):
        if case[name] is not None:
            pairs &= place < np.asarray(case[name])[:, None, None, None]
    rows = pairs.any(axis=-1).swapaxes(-1, -2)
    return rows if batch else rows[0]


def outputs_and_gradients(function, arrays, case, rows):
    """The results, and gradients by query, key, value and bias through rows with a visible key."""
    bias = case["bias"]

    def loss(arrays, bias):
        out = function(*arrays, **{**case, "bias": bias})
        out = out if case["return_residual"] else (out,)
        return (jnp.sin(out[0].astype(jnp.float32)) * rows[..., None]).sum(), out

    by = (0,) if bias is None else (0, 1)
    gradients, out = jax.jit(jax.grad(loss, argnums=by, has_aux=True))(arrays, bias)
    return out, jax.tree.leaves(gradients)


# Bias, mask and scale only broadcast: each of their shapes and types is tried, without pairs.
CASES = pairwise.cases(ARGUMENTS, fast=2, alone=("bias", "mask", "scale"))


@pytest.mark.parametrize("case", CASES)
def test_every_argument(case):
    arrays, case = problem(case)
    rows = rows_with_keys(case, batch=arrays[0].ndim == 4)
    wide = [x.astype(jnp.float32) for x in arrays]
    theirs = {  # which takes arrays of int32 alone
        name: jnp.asarray(x, jnp.int32) if name.endswith("lengths") and x is not None else x
        for name, x in case.items()
    }
    ours, our_gradients = outputs_and_gradients(dot_product_attention, arrays, case, rows)
    exact, exact_gradients = outputs_and_gradients(jax.nn.dot_product_attention, wide, theirs, rows)

    dtype = arrays[0].dtype
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    for x, y, unseen in zip(ours, exact, (0, -np.inf), strict=False):
        assert (x.shape, x.dtype) == (y.shape, dtype)
        np.testing.assert_array_equal(np.asarray(x)[~rows], unseen)
        close_to_largest(np.asarray(x)[rows], np.asarray(y)[rows], tolerance)
    for x, y in zip(our_gradients, exact_gradients, strict=True):
        close_to_largest(x, y, 4 * tolerance)


def test_the_residual_has_the_dtype_of_the_query_and_no_gradient():
    q, k, v = (jax_normal(i, B, T, N, H, dtype=jnp.bfloat16) for i in range(3))

    def residual(q, function, **options):
        lse = function(q, k, v, **options)[1]
        return lse.astype(jnp.float32).sum(), lse

    gradient = jax.jit(
        jax.grad(residual, has_aux=True),
        static_argnums=1,
        static_argnames=("return_residual", "return_lse"),
    )
    for function in (dot_product_attention, jax.nn.dot_product_attention):
        by_query, lse = gradient(q, function, return_residual=True)
        assert lse.dtype == jnp.bfloat16
        assert not by_query.any()
    by_query, lse = gradient(q, attention, return_lse=True)
    assert lse.dtype == jnp.float32
    assert by_query.any()


@pytest.mark.parametrize(
    "blind",
    [
        {"mask": jnp.zeros((1, 1, 1, S), bool)},
        {"key_value_seq_lengths": jnp.zeros(B, jnp.int32)},
        {"local_window_size": (0, 0), "mask": ~jnp.eye(T, S, dtype=bool)[None, None]},
    ],
    ids=["mask", "lengths", "window"],
)
def test_a_query_that_attends_to_no_key_gives_zero_where_jax_nn_gives_a_mean(blind):
    q, k, v = (jax_normal(i, B, n, N, H) for i, n in enumerate((T, S, S)))
    out, lse = dot_product_attention(q, k, v, **blind, return_residual=True)
    theirs = jax.jit(functools.partial(jax.nn.dot_product_attention, **blind))(q, k, v)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    np.testing.assert_allclose(
        theirs, np.broadcast_to(v.mean(axis=1, keepdims=True), theirs.shape), rtol=1e-5, atol=1e-6
    )


def test_lengths_scale_and_bias_that_are_traced_and_batched():
    q, k, v = (jax_normal(i, 3, B, n, N, H) for i, n in enumerate((T, S, S)))
    lengths = jnp.array([[3, 9], [1, 5], [9, 9]], jnp.int32)
    scale, bias = jnp.array([0.1, 0.5, -1.0]), jax_normal(4, 3, N, T, S)

    def run(function, q, k, v, lengths, scale, bias):
        return function(q, k, v, bias, key_value_seq_lengths=lengths, scale=scale)

    ours, theirs = (
        jax.jit(jax.vmap(functools.partial(run, f)))(q, k, v, lengths, scale, bias)
        for f in (dot_product_attention, jax.nn.dot_product_attention)
    )
    close_to_largest(ours, theirs, 1e-5)


@pytest.mark.usefixtures("x64")
def test_float64_and_int64():
    q, k, v = (jax_normal(i, B, T, N, H, dtype=jnp.float64) for i in range(3))
    lengths = jnp.array([2, 5])
    assert lengths.dtype == jnp.int64  # which theirs does not take
    out = dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
    lengths = lengths.astype(jnp.int32)
    theirs = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
    assert out.dtype == theirs.dtype == jnp.float64
    close_to_largest(out, theirs, 1e-6)  # their softmax is in float32


def test_both_refuse_wrong_arguments():
    q, k, v = (jax_normal(i, B, n, N, H) for i, n in enumerate((T, S, S)))
    refused = (
        {"key_value_seq_lengths": jnp.array([3])},
        {"key_value_seq_lengths": jnp.array(3)},
        {"key_value_seq_lengths": jnp.array([3.0, 4.0])},
        {"query_seq_lengths": jnp.array([[3], [4]])},
        {"query_seq_lengths": jnp.array([True, True])},
        {"mask": jnp.ones((1, 1, T, S), jnp.int32)},
        {"mask": jnp.ones((1, 1, T, T), bool)},
        {"mask": jnp.ones((1, 3, T, S), bool)},
        {"bias": jnp.ones((1, 1, 1, B, N, T, S))},
        {"local_window_size": (1, 2, 3)},
        {"implementation": "flash"},
    )
    for wrong in refused:
        (name,) = wrong
        with pytest.raises((TypeError, ValueError), match=name):
            dot_product_attention(q, k, v, **wrong)
        with pytest.raises((AssertionError, TypeError, ValueError)):
            jax.nn.dot_product_attention(q, k, v, **wrong)
