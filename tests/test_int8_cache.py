"""Caches of 8-bit integers: a quarter of the memory, and a stated error."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, normal, randomized, slow
from test_models import DECODERS

from attention_jax import attention, cache, masks, models

R, T, N, K, H = 2, 9, 4, 2, 64
WINDOW = 4
KINDS = {
    "plain": (lambda **o: cache.init((R,), capacity=T, **o), None),
    "rolling": (
        lambda **o: cache.init((R,), capacity=WINDOW, rolling=True, **o),
        masks.window(WINDOW - 1, 0),
    ),
    "paged": (lambda **o: cache.init_paged(R, capacity=T, page_size=4, **o), None),
}


def empty(kind, quantize="int8", **options):
    options = {"num_kv_heads": K, "head_dim": H, "quantize": quantize, **options}
    return KINDS[kind][0](**options)


def inputs(dtype=np.float32):
    return [jnp.asarray(normal(i, R, T, n, H)).astype(dtype) for i, n in enumerate((N, K, K))]


def in_chunks(kind, arrays, cuts, quantize="int8"):
    cached, parts = empty(kind, quantize, dtype=arrays[0].dtype), []
    call = jax.jit(functools.partial(cache.attend, mask=KINDS[kind][1]))
    for a, b in itertools.pairwise(cuts):
        out, cached = call(cached, *(x[:, a:b] for x in arrays))
        parts.append(out)
    return jnp.concatenate(parts, 1), cached


def rounded(x):
    """Each token of each head to multiples of its largest entry over 127."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / scale) * scale


@pytest.mark.parametrize("kind", ["plain", "rolling", "paged"])
def test_attention_is_that_to_rounded_keys_and_values(kind):
    arrays = inputs()
    query, key, value = arrays
    expected = attention(
        query,
        rounded(key).astype(np.float32),
        rounded(value).astype(np.float32),
        mask=masks.causal() if KINDS[kind][1] is None else KINDS[kind][1],
    )
    for cuts in ([0, 5, 9], [0, 1, 2, 3, 9]):  # also where new tokens overwrite old ones
        close(in_chunks(kind, arrays, cuts)[0], expected, tolerance=1e-4)


def test_keys_and_values_are_within_half_a_step():
    _, key, value = inputs()
    cached = empty("plain").append(key, value)
    for stored, exact in ((cached.key, key), (cached.value, value)):
        step = np.abs(exact).max(-1, keepdims=True) / 127
        assert (np.abs(stored[...] - exact) <= step / 2 * (1 + 1e-5)).all()
        assert (np.abs(stored[...] - exact).max() > step.min() / 4).all()  # and it does round


def test_the_error_of_attention_follows_from_that_of_keys_and_values():
    """|out - exact| <= max |v| / 254 + 2 max |v| max |ds|, with |ds| <= |q|_1 max |k| / 254 / 8."""
    query, key, value = arrays = inputs()
    out, _ = in_chunks("plain", arrays, [0, T])
    exact = attention(*arrays, mask=masks.causal())
    logits = np.abs(query).sum(-1).max() * np.abs(key).max() / 254 / np.sqrt(H)
    bound = np.abs(value).max() * (1 / 254 + 2 * logits)
    error = np.abs(out - exact).max()
    assert error <= bound
    assert error <= 0.02  # much less, since errors of many numbers cancel


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "least"), [(jnp.float32, 3.7), (jnp.bfloat16, 1.9)])
def test_memory(kind, dtype, least):
    def size(quantize):
        cached = jax.eval_shape(lambda: empty(kind, quantize, dtype=dtype))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cached.key, cached.value)))

    assert size(None) / size("int8") > least


def test_bfloat16():
    arrays = inputs(jnp.bfloat16)
    out, cached = in_chunks("plain", arrays, [0, 5, 9])
    exact, _ = in_chunks("plain", arrays, [0, 5, 9], None)
    assert out.dtype == cached.key.dtype == jnp.bfloat16
    close(out.astype(np.float32), exact.astype(np.float32), tolerance=0.05)


def test_nan_is_not_rounded_away():
    _, key, value = inputs()
    cached = empty("plain").append(key.at[0, 1, 0, 3].set(jnp.inf), value)
    stored = np.asarray(cached.key[...])
    assert not np.isfinite(stored[0, 1, 0]).any()
    assert np.isfinite(np.delete(stored.reshape(R * T * K, H), 1 * K, axis=0)).all()


@pytest.mark.parametrize("options", [{}, slow({"page_size": 4})])
def test_a_decoder_with_int8_caches(options):
    model = randomized(models.Decoder(DECODERS["rotary, windows"], rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 13, (2, T))
    run = nnx.jit(lambda model, caches: model(tokens, caches=caches)[0])
    exact = run(model, model.init_caches((2,), T))
    found = run(model, model.init_caches((2,), T, quantize="int8", **options))
    error = np.abs(found - exact).max()
    assert 0 < error < 0.05 * np.abs(exact).max()


def test_another_name_is_refused():
    with pytest.raises(ValueError, match='quantize must be "int8" or None'):
        empty("plain", "int4")
