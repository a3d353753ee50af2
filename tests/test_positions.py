"""Positions against NumPy twins in float64, written from the papers' formulas for one pair."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal

from attention_jax import attention, masks, positions
from attention_jax.nn import Embeddings
from attention_jax.positions import NTK, DynamicNTK, Linear, Llama3, LongRoPE, YaRN

B, T, N, H = 2, 7, 3, 12
SCALINGS = {
    "none": None,
    "linear": Linear(4.0),
    "ntk": NTK(4.0),
    "dynamic, longer": DynamicNTK(2.0, original=16),
    "dynamic, shorter": DynamicNTK(2.0, original=512),
    "yarn": YaRN(4.0, original=64),
    "yarn, ends not whole": YaRN(4.0, original=64, truncate=False, attention_factor=1.5),
    "llama3": Llama3(8.0, original=64),
}
LENGTH = 40


def twin_frequency(i, width, theta, scaling):
    """Radians per position of pair ``i``, and the factor of cosine and sine."""
    f = theta ** (-2 * i / width)
    if width == 2 and isinstance(scaling, (NTK, DynamicNTK)):
        return 1.0, 1.0  # the one pair does not depend on theta
    match scaling:
        case None:
            return f, 1.0
        case Linear():
            return f / scaling.factor, 1.0
        case NTK():
            return (theta * scaling.factor ** (width / (width - 2))) ** (-2 * i / width), 1.0
        case DynamicNTK():
            longest = max(LENGTH, scaling.original)
            g = scaling.factor * longest / scaling.original - (scaling.factor - 1)
            return (theta * g ** (width / (width - 2))) ** (-2 * i / width), 1.0
        case YaRN():
            ends = [
                width * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (scaling.fast, scaling.slow)
            ]
            if scaling.truncate:
                ends = [math.floor(ends[0]), math.ceil(ends[1])]
            low, high = max(ends[0], 0), min(ends[1], width - 1)
            ramp = min(max((i - low) / (high - low), 0), 1)
            scale = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
            return f * (1 - ramp) + f / scaling.factor * ramp, scale
        case Llama3():
            wavelength = 2 * math.pi / f
            if wavelength < scaling.original / scaling.high:
                return f, 1.0
            if wavelength > scaling.original / scaling.low:
                return f / scaling.factor, 1.0
            smooth = (scaling.original / wavelength - scaling.low) / (scaling.high - scaling.low)
            return (1 - smooth) * f / scaling.factor + smooth * f, 1.0


def twin_rotary(x, at, theta, width, interleaved, scaling):
    out = np.array(x, np.float64)
    for i in range(width // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        f, scale = twin_frequency(i, width, theta, scaling)
        cos, sin = (scale * fn(at * f)[..., None] for fn in (np.cos, np.sin))
        out[..., a], out[..., b] = (
            x[..., a] * cos - x[..., b] * sin,
            x[..., a] * sin + x[..., b] * cos,
        )
    return out


@pytest.mark.parametrize(
    ("name", "width", "interleaved"),
    [(name, None, False) for name in SCALINGS]
    + [(name, 8, True) for name in SCALINGS]
    + [("none", 2, True), ("ntk", 2, False), ("dynamic, longer", 2, True), ("yarn", 2, False)],
)
def test_rotary_equals_its_twin(name, width, interleaved):
    x, at = normal(0, B, T, N, H), np.array([[0, 1, 2, 5, 5, 39, 3], [7, 6, 5, 4, 3, 2, 1]])
    scaling, theta = SCALINGS[name], 500.0
    run = functools.partial(
        positions.rotary, theta=theta, width=width, interleaved=interleaved, scaling=scaling
    )
    expected = twin_rotary(x, at, theta, width or H, interleaved, scaling)
    np.testing.assert_allclose(run(x, at, length=LENGTH), expected, atol=1e-5)
    traced = jax.jit(lambda x, at, length: run(x, at, length=length))(x, at, LENGTH)
    np.testing.assert_allclose(traced, expected, atol=1e-5)
    assert (width == 2) or (np.abs(expected - x) > 1e-3).any(axis=(0, 1, 2))[: width or H].all()


def test_longrope_divides_each_frequency():
    scaling = LongRoPE(
        short=(1.0, 2.0, 3.0), long=(2.0, 4.0, 9.0), original=5, attention_factor=1.5
    )
    plain = np.array(positions.frequencies(6)[0])
    for length, divisors in ((5, scaling.short), (6, scaling.long)):
        f, factor = positions.frequencies(6, scaling=scaling, length=length)
        np.testing.assert_allclose(f, plain / divisors, rtol=1e-6)
        assert factor == 1.5
    # Each row has its own length.
    x, at = normal(0, 2, 3, 1, 6), np.array([[2, 3, 4], [3, 4, 5]])
    rows = positions.Rotary(scaling=scaling)(x, at)
    for i, length in enumerate((5, 6)):
        alone = positions.rotary(x[i], at[i], scaling=scaling, length=length)
        np.testing.assert_allclose(rows[i], alone, atol=1e-6)


def test_only_the_distance_matters():
    q, k = normal(0, 1, T, N, H), normal(1, 1, T, N, H)

    def logits(first):
        at = np.arange(first, first + T)
        a, b = (positions.rotary(x, at, theta=100.0) for x in (q, k))
        return jnp.einsum("btnh,bsnh->bnts", a, b)

    np.testing.assert_allclose(logits(0), logits(100), atol=1e-4)
    assert np.abs(logits(0) - np.einsum("btnh,bsnh->bnts", q, k)).max() > 0.1


@pytest.mark.slow
def test_rotary_under_transformations():
    x, at = jnp.asarray(normal(0, B, T, N, H)), jnp.arange(T) + jnp.array([[0], [9]])
    whole = positions.rotary(x, at)
    chex.assert_trees_all_close(jax.vmap(positions.rotary)(x, at), whole, atol=1e-6)
    # A rotation keeps lengths: the gradient of the squared length is that without it.
    gradient = jax.grad(lambda x: (positions.rotary(x, at) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, 2 * x, atol=1e-5)
    half = positions.rotary(x.astype(jnp.bfloat16), at)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), whole, atol=0.05)


@pytest.mark.parametrize("interleaved", [False, True])
def test_sinusoidal_equals_its_twin(interleaved):
    at, width = np.array([[0, 1, 2], [9, 100, 5]]), 10
    got = positions.sinusoidal(at, width, theta=300.0, interleaved=interleaved)
    for i in range(width // 2):
        angle = at * 300.0 ** (-2 * i / width)
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        np.testing.assert_allclose(got[..., a], np.sin(angle), atol=1e-5)
        np.testing.assert_allclose(got[..., b], np.cos(angle), atol=1e-5)


def test_learned_positions_that_are_constants_of_a_jitted_function():
    table, at = jnp.arange(12.0).reshape(6, 2), jnp.array([3, 1])
    np.testing.assert_array_equal(jax.jit(lambda t: positions.learned(t, at))(table), table[at])
    with pytest.raises(ValueError, match="positions must be from 0 to 2"):
        jax.jit(lambda t: positions.learned(t, at))(table[:3])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SCALINGS)
def test_float64_stays_float64(name):
    """Angles too: in float32 they are off by 1e-4 at position 2000."""
    x, at = normal(0, B, T, N, H).astype(np.float64), 2000 + np.arange(T)
    expected = twin_rotary(x, at, 500.0, H, False, SCALINGS[name])
    run = functools.partial(positions.rotary, theta=500.0, scaling=SCALINGS[name])
    np.testing.assert_allclose(run(x, at, length=LENGTH), expected, atol=1e-11)
    traced = jax.jit(lambda length: run(x, at, length=length))(LENGTH)
    np.testing.assert_allclose(traced, expected, atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_sinusoidal_in_float64():
    at, width = np.array([0, 1, 2000, 30_001]), 10
    got = positions.sinusoidal(at, width, theta=300.0, dtype=jnp.float64)
    angles = at[:, None] * 300.0 ** (-2 * np.arange(width // 2) / width)
    np.testing.assert_allclose(got[:, 0::2], np.sin(angles), atol=1e-11)
    np.testing.assert_allclose(got[:, 1::2], np.cos(angles), atol=1e-11)
    embed = Embeddings(3, width, positions="sinusoidal", param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    tokens = np.zeros(4, np.int32)
    added = embed(tokens, positions=at) - embed.vectors(tokens)
    angles = at[:, None] * 10_000.0 ** (-2 * np.arange(width // 2) / width)
    np.testing.assert_allclose(added[:, 0::2], np.sin(angles), atol=1e-11)


def test_sinusoidal_in_bfloat16_is_rounded_last():
    at = np.arange(300, 310)
    low = positions.sinusoidal(at, 6, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(low, positions.sinusoidal(at, 6).astype(jnp.bfloat16))


def test_learned_positions_and_their_gradient():
    table, at = normal(0, 5, 4), np.array([[4, 0], [1, 1]])
    np.testing.assert_array_equal(positions.learned(table, at), table[at])
    gradient = jax.grad(lambda t: positions.learned(t, at).sum())(jnp.asarray(table))
    np.testing.assert_array_equal(gradient[:, 0], [1, 2, 0, 0, 1])
    outside = jax.jit(positions.learned)(table, jnp.array([0, -1, 5]))
    np.testing.assert_array_equal(np.isnan(outside).all(-1), [False, True, True])


def test_transformer_xl_in_attention_equals_its_formula():
    q, k, v = (normal(i, 1, T, N, H) for i in range(3))
    u, w, table = normal(3, N, H), normal(4, N, H), normal(5, 2 * T - 1, N, H)
    query, score = positions.transformer_xl(q, table, content_bias=u, position_bias=w)
    out = attention(query, k, v, score=score, mask=masks.causal())
    for n in range(N):
        s = np.full((T, T), -np.inf)
        for i in range(T):
            for j in range(i + 1):
                content = (q[0, i, n] + u[n]) @ k[0, j, n]
                s[i, j] = (content + (q[0, i, n] + w[n]) @ table[j - i + T - 1, n]) / H**0.5
        p = np.exp(s - s.max(-1, keepdims=True))
        expected = p / p.sum(-1, keepdims=True) @ v[0, :, n]
        np.testing.assert_allclose(out[0, :, n], expected, atol=1e-5)
