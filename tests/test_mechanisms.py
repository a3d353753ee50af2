"""Each mechanism against its formula in NumPy, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attention_jax.mechanisms import additive_attention, additive_weights

B, T, S, N, H, D = 2, 3, 5, 7, 11, 13


def additive_oracle(query, key, value, vector, visible):
    """Loops over everything, in float64."""
    out = np.zeros((B, T, N, D))
    for b, i, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(visible[b, n, i])
        if not len(seen):
            continue
        logits = np.array([np.tanh(query[b, i, n] + key[b, j, n]) @ vector[n] for j in seen])
        weights = np.exp(logits - logits.max())
        out[b, i, n] = weights / weights.sum() @ value[b, seen, n]
    return out


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, N, H), (B, S, N, D), (N, H)
    return [rng.normal(size=shape) for shape in shapes]


@pytest.fixture
def visible():
    seen = np.random.default_rng(1).random((B, N, T, S)) < 0.6
    seen[:, :, 1] = False  # a query that sees nothing
    seen[0, :, :, 2] = False  # a key that nothing sees
    return seen


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("masked", [False, True])
def test_additive_attention_is_its_formula(arrays, visible, masked):
    out = additive_attention(*arrays, mask=visible if masked else None)
    seen = visible if masked else np.ones_like(visible)
    np.testing.assert_allclose(out, additive_oracle(*arrays, seen), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_additive_attention_sums_in_float32_and_returns_the_dtype_of_the_query(arrays, dtype):
    low = [jnp.asarray(x, dtype) for x in arrays]
    out = additive_attention(*low)
    assert out.dtype == dtype
    exact = additive_oracle(*(np.asarray(x, np.float64) for x in low), np.ones((B, N, T, S), bool))
    eps = float(jnp.finfo(dtype).eps)
    assert np.abs(np.asarray(out, np.float64) - exact).max() <= 8 * eps * np.abs(exact).max()


def test_what_nothing_sees_may_hold_anything_and_gets_no_gradient(arrays, visible):
    query, key, value, vector = (x.astype(np.float32) for x in arrays)
    key[0, 2], value[0, 2] = np.nan, np.inf

    def total(*x):
        return additive_attention(*x, mask=visible).sum()

    assert np.isfinite(total(query, key, value, vector))
    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(query, key, value, vector)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    assert not gradients[0][:, 1].any()  # the query that sees nothing
    assert not gradients[1][0, 2].any()
    assert not gradients[2][0, 2].any()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gradients_are_those_of_finite_differences(arrays, visible):
    def total(*x):
        return (additive_attention(*x, mask=visible) ** 2).sum()

    check_grads(total, arrays, order=1, modes=["fwd", "rev"])


def test_vmap_equals_the_batch_axis_and_no_keys_give_0(arrays):
    query, key, value, vector = (x.astype(np.float32) for x in arrays)
    one = jax.vmap(additive_attention, in_axes=(0, 0, 0, None))(query, key, value, vector)
    np.testing.assert_allclose(one, additive_attention(query, key, value, vector), rtol=1e-5)
    assert not additive_attention(query, key[:, :0], value[:, :0], vector).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({1: np.zeros((B, S, N, H + 1), np.float32)}, "key must have shape"),
        ({2: np.zeros((B, S + 1, N, D), np.float32)}, "value must have shape"),
        ({3: np.zeros((N, H + 1), np.float32)}, "vector must have shape"),
    ],
)
def test_shapes_that_do_not_fit_are_named(arrays, change, said):
    arrays = [change.get(i, x.astype(np.float32)) for i, x in enumerate(arrays)]
    with pytest.raises(ValueError, match=said):
        additive_attention(*arrays)


def test_weights_sum_to_1(arrays):
    query, key, _, vector = (x.astype(np.float32) for x in arrays)
    weights = additive_weights(query, key, vector)
    assert weights.shape == (B, N, T, S)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
