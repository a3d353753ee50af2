"""Latent attention as a module: its formula, caches, both ways to compute it, bad input."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from helpers import close, normal, randomized

from attention_jax import masks, models, nn, reference
from attention_jax.models import Experts, Latent, Layers
from attention_jax.positions import LongRoPE, Rotary, rotary

B, T, E, N, R, H, P, D = 2, 7, 12, 3, 10, 5, 4, 6
SIZES = {"latent_features": R, "head_dim": H, "rotary_dim": P, "value_dim": D}


def module(**options):
    norm = lambda width, rngs: nnx.RMSNorm(width, rngs=rngs)  # noqa: E731
    options = {"rotary": Rotary(50.0), "norm": norm, **SIZES, **options}
    return randomized(nn.LatentAttention(E, N, **options, rngs=nnx.Rngs(0)))


def run(module, x, **options):
    return nnx.jit(lambda m, x, **y: m(x, **y))(module, x, **options)


def normed(x, norm):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])


@pytest.mark.parametrize("queries", [pytest.param(None, marks=pytest.mark.slow), 8])
def test_values_are_those_of_the_formula(queries):
    m = module(query_latent_features=queries, bias=True, scale=0.3)
    x = normal(0, T, E)

    def project(linear, x):
        bias = 0 if linear.bias is None else np.asarray(linear.bias[...])
        return x @ np.asarray(linear.kernel[...]) + bias

    c, r = np.split(project(m.down, x), [R], axis=-1)
    c = normed(c, m.latent_norm)
    r = np.asarray(rotary(r[:, None], np.arange(T), theta=50.0))
    a = x if queries is None else normed(project(m.query_down, x), m.query_norm)
    q, p = np.split(project(m.query, a).reshape(T, N, H + P), [H], axis=-1)
    p = np.asarray(rotary(p, np.arange(T), theta=50.0))
    u, v = np.split(np.asarray(m.key_value_up[...]), [H], axis=-1)
    keys = np.concatenate([np.einsum("tr,rnh->tnh", c, u), np.repeat(r, N, axis=1)], axis=-1)
    heads = reference.attention(
        np.concatenate([q, p], axis=-1),
        keys,
        np.einsum("tr,rnd->tnd", c, v),
        scale=0.3,
        mask=np.tril(np.ones((T, T), bool)),
    )
    assert (m.query.bias, m.down.bias is None) == (None, False)
    close(run(m, x, mask=masks.causal()), project(m.out, heads.out.reshape(T, N * D)), atol=1e-4)


@pytest.mark.parametrize("parts", [[5, 1, 1], pytest.param([2, 5], marks=pytest.mark.slow)])
def test_steps_with_a_cache_equal_the_whole(parts):
    m, x = module(), normal(0, B, T, E)
    cache, found = m.init_cache((B,), 9), []
    for part in np.split(x, np.cumsum(parts)[:-1], axis=1):
        out, cache = run(m, part, cache=cache)
        found.append(out)
    close(np.concatenate(found, axis=1), run(m, x, mask=masks.causal()), atol=1e-5)
    assert (cache.key.shape, cache.value.shape) == ((B, 9, 1, R), (B, 9, 1, P))


def test_both_ways_are_used_and_equal(monkeypatch):
    """The cheaper one: with these widths, latents are absorbed into few queries."""
    m, x = module(), normal(0, B, 40, E)
    choices = {T: m._absorbs(T, 40) for T in (1, 4, 40)}
    assert choices == {1: True, 4: True, 40: False}
    found = []
    for absorbs in (True, False):
        monkeypatch.setattr(nn.LatentAttention, "_absorbs", lambda *_, x=absorbs: x)
        out, _ = run(m, x, cache=m.init_cache((B,), 40))
        found.append(np.asarray(out)[0])
    close(*found, atol=1e-5)


@pytest.mark.slow
def test_rows_of_a_cache_have_counts_of_their_own():
    m, x = module(), normal(0, B, T, E)
    count = np.array([7, 4])
    _, cache = m(x[:, :6], cache=m.init_cache((B,), 9), count=np.array([6, 3]))
    last = np.stack([x[0, 6:7], x[1, 3:4]])
    out, _ = m(last, cache=cache)
    for row, n in enumerate(count):
        close(out[row, 0], m(x[row, :n], mask=masks.causal())[-1], atol=1e-5)


@pytest.mark.slow
def test_a_rolling_cache_of_a_window():
    m, x = module(mask=masks.window(2, 0)), normal(0, B, T, E)
    expected, cache = m(x), m.init_cache((B,), 3, rolling=True)
    for t in range(T):
        out, cache = m(x[:, t : t + 1], cache=cache)
        close(out, expected[:, t : t + 1], atol=1e-5)


LATENT = Latent(features=R, rotary_dim=P, value_dim=D, query_features=8)
DEEPSEEK = Layers(
    features=E,
    num_layers=2,
    num_heads=N,
    head_dim=H,
    hidden=20,
    latent=LATENT,
    rotary=Rotary(),
    norm="rms",
    gated=True,
    activation="silu",
    bias=False,
    feed_forward_bias=False,
    experts=Experts(
        6, 2, hidden=7, gating="sigmoid", groups=3, groups_per_token=2, shared=9, dense_layers=1
    ),
)
TOKENS = np.random.default_rng(0).integers(0, 11, (B, T))


@pytest.fixture(scope="module")
def decoder():
    return randomized(models.Decoder(models.DecoderConfig(11, DEEPSEEK), rngs=nnx.Rngs(0)))


def test_a_decoder_with_padding_and_generation(decoder):
    real = np.arange(T) < np.array([[T], [4]])
    logits = run(decoder, TOKENS, real=real)
    close(logits[1, :4], run(decoder, TOKENS[1:, :4])[0], atol=1e-4)
    tokens = models.generate(decoder, TOKENS, real=real, max_new_tokens=4).tokens
    whole = np.concatenate([TOKENS[1, :4], tokens[1]])[None]
    np.testing.assert_array_equal(run(decoder, whole)[0, 3:-1].argmax(-1), tokens[1])


def test_the_first_layer_is_dense(decoder):
    first, second = (block.feed_forward.sublayer for block in decoder.stack.blocks)
    assert isinstance(first, nn.FeedForward)
    assert isinstance(second, nn.MixtureOfExperts)
    assert (first.down.kernel.shape, second.down.shape) == ((20, E), (6, 7, E))


@pytest.mark.slow
def test_quantized():
    m, x = module(query_latent_features=8), normal(0, B, T, E)
    small = nn.quantized(m)
    assert isinstance(small.key_value_up, nn.Frozen)
    assert small.key_value_up.get_raw_value().scale.shape == (1, N, H + D)
    a, b = (np.ravel(run(m, x, mask=masks.causal())) for m in (small, m))
    assert 0.999 < np.corrcoef(a, b)[0, 1] < 0.9999999


def test_wrong_configurations_raise():
    for entry, x in {
        "num_kv_heads": 1,
        "bias": ("query",),
        "fused": True,
        "query_key_norm": True,
        "sinks": True,
        "gate": True,
    }.items():
        with pytest.raises(ValueError, match=f"{entry} must be .* with latent, got"):
            dataclasses.replace(DEEPSEEK, **{entry: x})
    with pytest.raises(ValueError, match="features must be at least 1"):
        Latent(0, 4)
    with pytest.raises(ValueError, match="scan needs layers of one structure, but the first 1"):
        dataclasses.replace(DEEPSEEK, scan=True)
    with pytest.raises(ValueError, match="rotary_dim must be even, got 3"):
        module(rotary_dim=3)
    scaled = Rotary(scaling=LongRoPE((1.0,) * 2, (2.0,) * 2, 4))
    m = module(rotary=scaled)
    with pytest.raises(NotImplementedError, match="cache cannot be used with LongRoPE"):
        m(normal(0, B, T, E), cache=m.init_cache((B,), 9))
    with pytest.raises(ValueError, match="count must be None without a cache"):
        m(normal(0, B, T, E), count=3)


@pytest.mark.parametrize("options", [{"page_size": 4}, {"quantize": "int8"}], ids=str)
def test_steps_with_other_caches_equal_the_whole(options):
    m = module(query_latent_features=None)
    x = np.random.default_rng(0).normal(size=(2, 7, m.features)).astype(np.float32)
    cache, outs = m.init_cache((2,), 8, **options), []
    for chunk in np.split(x, [4, 6], axis=1):
        out, cache = m(chunk, cache=cache)
        outs.append(out)
    close = {"rtol": 0, "atol": 1e-5 if "page_size" in options else 0.05}
    np.testing.assert_allclose(np.concatenate(outs, 1), m(x, mask=masks.causal()), **close)
