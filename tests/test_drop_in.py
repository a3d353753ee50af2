"""The drop-ins in Flax's own modules and beside ``jax.nn``: same parameters, same outputs."""

import functools

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import masks
from attention_jax.nn import attention_fn, dot_product_attention

B, T, S, N, E = 2, 6, 9, 4, 16
# Flax's own modules promote dtypes.
pytestmark = pytest.mark.usefixtures("promotion")


@pytest.fixture
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def close(a, b, tolerance=2e-5):
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


def visible(T=T, S=S):
    """Every query sees some key: where none, Flax gives a mean."""
    seen = np.random.default_rng(3).random((B, N, T, S)) < 0.6
    seen[..., 0] = True
    return jnp.asarray(seen)


X, CONTEXT = normal(0, B, T, E), normal(1, B, S, E)


@pytest.mark.parametrize("mask", [None, "array", "floats"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_linen(dtype, mask):
    mask = {None: None, "array": visible(), "floats": visible().astype(jnp.float32)}[mask]
    theirs, ours = (
        flax.linen.MultiHeadDotProductAttention(
            num_heads=N, dtype=dtype, force_fp32_for_softmax=True, **kwargs
        )
        for kwargs in ({}, {"attention_fn": attention_fn})
    )
    parameters = theirs.init(jax.random.key(0), X, CONTEXT)
    run = [m.apply(parameters, X, CONTEXT, mask=mask, sow_weights=True, mutable="intermediates")
           for m in (ours, theirs)]  # fmt: skip
    tolerance = 2e-5 if dtype is None else 3e-2
    assert run[0][0].dtype == run[1][0].dtype
    close(*(jnp.asarray(out, jnp.float32) for out, _ in run), tolerance)
    close(*(jax.tree.map(lambda x: x.astype(jnp.float32), w) for _, w in run), tolerance)

    def loss(module, p):
        return jnp.sin(module.apply(p, X, CONTEXT, mask=mask).astype(jnp.float32)).sum()

    gradients = [jax.grad(functools.partial(loss, m))(parameters) for m in (ours, theirs)]
    close(*gradients, 2e-4 if dtype is None else 0.3)


def nnx_modules(**options):
    return [
        nnx.MultiHeadAttention(
            num_heads=N, in_features=E, decode=False, rngs=nnx.Rngs(0), **options, **kwargs
        )
        for kwargs in ({"attention_fn": attention_fn}, {})
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_nnx(masked, causal):
    mask = visible(T, T) if masked else None
    ours, theirs = (m(X, mask=mask, is_causal=causal) for m in nnx_modules())
    close(ours, theirs)
    sown = []
    for module in nnx_modules():
        captured = nnx.capture(module, nnx.Intermediate)
        _, intermediates = captured(X, mask=mask, is_causal=causal, sow_weights=True)
        sown.append(intermediates["attention_weights"][0])
    close(*sown)


def test_nnx_decoding_with_flax_cache():
    outs = []
    for module in nnx_modules():
        module.set_attributes(decode=True)
        module.init_cache(X.shape)
        outs.append(jnp.concatenate([module(X[:, i : i + 1]) for i in range(T)], axis=1))
    close(*outs)


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
    kept = same > 0
    assert (kept == kept[:1, :1, :, :1]).all()
    assert 0.3 < kept[0, 0, :, 0].mean() < 0.7
    np.testing.assert_allclose(same[kept], 2 / S, rtol=1e-5)
    assert (kept != (dropped(True, seed=1) > 0)).any()
    each = dropped(False) > 0
    assert not (each == each[:1]).all()
    assert not (each == each[..., :1, :]).all()


def test_broadcast_dropout_with_bias_and_mask():
    bias, mask = normal(5, B, 1, T, S), visible()[None]
    without = dropped(True, rate=0.0, bias=bias, mask=mask)
    kept = dropped(True) > 0
    np.testing.assert_allclose(
        dropped(True, bias=bias, mask=mask), np.where(kept, 2 * without, 0), rtol=1e-5, atol=1e-7
    )


def test_deterministic_and_rate_zero():
    q, k, v = normal(0, B, T, N, 4), normal(1, B, S, N, 4), normal(2, B, S, N, 4)
    plain = attention_fn(q, k, v)
    close(attention_fn(q, k, v, dropout_rate=0.5, deterministic=True), plain)
    close(plain, flax.linen.dot_product_attention(q, k, v))


def test_dtype_promotes_and_casts():
    q, k, v = normal(0, T, N, 4).astype(jnp.bfloat16), normal(1, S, N, 4), normal(2, S, N, 4)
    assert attention_fn(q, k, v).dtype == jnp.float32
    assert attention_fn(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_what_cannot_be_honoured_is_refused():
    x = normal(0, T, N, 8)
    for name in ("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"):
        with pytest.raises(NotImplementedError, match=f"{name} must be None"):
            attention_fn(x, x, x, **{name: jnp.einsum})
    with pytest.raises(NotImplementedError, match="cudnn"):
        dot_product_attention(x, x, x, implementation="cudnn")
    with pytest.raises(ValueError, match="implementation must be one of"):
        dot_product_attention(x, x, x, implementation="flash")
    with pytest.raises(ValueError, match="dropout_rng is None"):
        attention_fn(x, x, x, dropout_rate=0.5)


def test_a_query_that_sees_nothing_gives_zero():
    x = normal(0, T, N, 8)
    out = attention_fn(x, x, x, mask=~masks.prefix(0).to_dense(T, T) & (jnp.arange(T) > T))
    np.testing.assert_array_equal(out, 0)
