"""Drop-ins for Flax's modules and ``jax.nn``: their own options.

That they agree with what they replace is in ``test_like_flax.py`` and ``test_like_jax_nn.py``.
"""

import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, jax_normal

from attention_jax import masks
from attention_jax.nn import attention_fn, dot_product_attention

B, T, S, N, E = 2, 6, 9, 4, 16


def visible():
    """Every query has a visible key; without one, Flax returns a mean."""
    visible_pairs = np.random.default_rng(3).random((B, N, T, S)) < 0.6
    visible_pairs[..., 0] = True
    return jnp.asarray(visible_pairs)


def dropped(broadcast, seed=0, rate=0.5, bias=None, mask=None, shape=(3, B)):
    """Which probabilities survive: with equal logits and one-hot values, the output shows them."""
    q, k = jnp.zeros((*shape, T, N, E)), jnp.zeros((*shape, S, N, E))
    v = jnp.broadcast_to(jnp.eye(S)[:, None, :], (*shape, S, N, S))
    out = attention_fn(
        q, k, v, bias, mask, dropout_rate=rate, broadcast_dropout=broadcast,
        dropout_rng=jax.random.key(seed),
    )  # fmt: skip
    return np.asarray(out)


def test_dropout_is_broadcast_or_not():
    same = dropped(True)
    keep = same > 0
    assert (keep == keep[:1, :1, :, :1]).all()
    assert 0.3 < keep[0, 0, :, 0].mean() < 0.7
    np.testing.assert_allclose(same[keep], 2 / S, rtol=1e-5)
    assert (keep != (dropped(True, seed=1) > 0)).any()
    each = dropped(False) > 0
    assert not (each == each[:1]).all()
    assert not (each == each[..., :1, :]).all()


def test_broadcast_dropout_with_bias_and_mask():
    bias, mask = jax_normal(5, B, 1, T, S), visible()[None]
    without = dropped(True, rate=0.0, bias=bias, mask=mask)
    keep = dropped(True) > 0
    np.testing.assert_allclose(
        dropped(True, bias=bias, mask=mask), np.where(keep, 2 * without, 0), rtol=1e-5, atol=1e-7
    )


def test_deterministic_and_rate_zero():
    q, k, v = jax_normal(0, B, T, N, 4), jax_normal(1, B, S, N, 4), jax_normal(2, B, S, N, 4)
    plain = attention_fn(q, k, v)
    close(attention_fn(q, k, v, dropout_rate=0.5, deterministic=True), plain)
    close(plain, flax.linen.dot_product_attention(q, k, v))


def test_dropout_rates_of_numpy():
    q, v = jnp.zeros((1, T, 1, 2)), jnp.ones((1, T, 1, 2))
    key = jax.random.key(0)
    out = attention_fn(q, q, v, dropout_rate=np.float32(0.5), dropout_rng=key)
    close(out, attention_fn(q, q, v, dropout_rate=0.5, dropout_rng=key))


@pytest.mark.parametrize("dtype", [bool, jnp.int32, jnp.float32, jnp.bfloat16, np.float64])
def test_masks_of_any_dtype_where_none_is_promoted(dtype):
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    x = jax_normal(0, B, T, N, 8)
    mask = np.asarray(visible()[..., :T])
    expected = flax.linen.dot_product_attention(x, x, x, mask=mask)
    close(attention_fn(x, x, x, mask=np.asarray(mask, dtype)), expected)


def test_dtype_promotes_and_casts():
    q, k, v = (
        jax_normal(0, T, N, 4).astype(jnp.bfloat16),
        jax_normal(1, S, N, 4),
        jax_normal(2, S, N, 4),
    )
    with jax.numpy_dtype_promotion("standard"):
        assert attention_fn(q, k, v).dtype == jnp.float32
    assert attention_fn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_promote_dtype_replaces_the_cast():
    def narrow(arrays, *, dtype):
        assert dtype is None
        return [x.astype(jnp.float16) for x in arrays]

    x = jax_normal(0, T, N, 4)
    assert attention_fn(x, x, x, promote_dtype=narrow).dtype == jnp.float16


@pytest.mark.parametrize("precision", [None, "default", jax.lax.Precision.HIGH])
def test_products_have_at_least_the_requested_precision(precision):
    x = jax.ShapeDtypeStruct((T, N, 8), jnp.float32)
    program = str(jax.make_jaxpr(lambda x: attention_fn(x, x, x, precision=precision))(x))
    assert set(re.findall(r"Precision\.(\w+)", program)) == {"HIGHEST"}


def test_unsupported_arguments_raise():
    x = jax_normal(0, T, N, 8)
    for name in ("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"):
        with pytest.raises(NotImplementedError, match=f"{name} must be None"):
            attention_fn(x, x, x, **{name: jnp.einsum})
    with pytest.raises(NotImplementedError, match="cudnn"):
        dot_product_attention(x, x, x, implementation="cudnn")
    with pytest.raises(ValueError, match="implementation must be one of"):
        dot_product_attention(x, x, x, implementation="flash")
    with pytest.raises(ValueError, match="dropout_rng is None"):
        attention_fn(x, x, x, dropout_rate=0.5)


def test_a_query_without_visible_keys_gives_zero():
    x = jax_normal(0, T, N, 8)
    out = attention_fn(x, x, x, mask=~masks.prefix(0).to_dense(T, T) & (jnp.arange(T) > T))
    np.testing.assert_array_equal(out, 0)
