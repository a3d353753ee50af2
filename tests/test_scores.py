"""Scores against the checker's formulas in NumPy, tiles against rules, gradients."""

import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from helpers import mostly_slow
from hypothesis import given, settings

from attention_jax import attention_weights, scores
from attention_jax.backends.tile import as_tile, local_axes
from attention_jax.core.axes import Sizes
from attention_jax.core.pytree import full_rank, map_leaves
from attention_jax.scores.distance import skew
from attention_jax.testing import rules

B, N, T, S, H = 2, 6, 11, 13, 5
SIZES = Sizes(B=(B,), T=T, S=S, K=3, G=2, H=H, D=7)
RNG = np.random.default_rng(0)
QI, KJ = np.arange(T, dtype=np.int32)[:, None], np.arange(S, dtype=np.int32)[None, :]
OFFSETS = np.array([-4, 3], np.int32)
SLOPES = RNG.random(N)
BIAS = np.where(RNG.random((B, N, T, S)) < 0.1, -np.inf, RNG.normal(size=(B, N, T, S)))
TABLE = RNG.normal(size=(8, N))  # buckets
VECTORS = RNG.normal(size=(7, N, H))  # distances -3 to 3
QUERY = RNG.normal(size=(B, T, N, H))


def t5(distances, n, table=TABLE, bidirectional=True, max_distance=9):
    return table[rules.t5_bucket(distances, len(table), bidirectional, max_distance), n]


def shaw(distances, b, n, table=VECTORS):
    return np.einsum("th,tsh->ts", QUERY[b, :, n], table[rules.clipped(distances, 3), n])


def counting(s, b, n, q, k):
    return s + jnp.asarray((1 + b) * (n - q + 2 * k)).astype(s.dtype)


def looking_up(s, b, n, q, k, table, factor):
    return s * factor.astype(s.dtype) + table[b, n, q % 3].astype(s.dtype)


LOOKED_UP = RNG.normal(size=(B, N, 3))
TWO = np.array(2.0)

# The score, and its formula on logits s [T S] in head n of example b.
RULES = {
    "softcap": (scores.softcap(1.5), lambda s, b, n: 1.5 * np.tanh(s / 1.5)),
    "alibi": (
        scores.alibi(),
        lambda s, b, n: s - [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3][n] * abs(QI - KJ),
    ),
    "alibi slopes": (scores.alibi(SLOPES), lambda s, b, n: s - SLOPES[n] * abs(QI - KJ)),
    "alibi offset": (
        scores.alibi(SLOPES, offset=-2),
        lambda s, b, n: s - SLOPES[n] * abs(QI - 2 - KJ),
    ),
    "alibi offsets end": (
        scores.alibi(SLOPES, offset=OFFSETS, align="end"),
        lambda s, b, n: s - SLOPES[n] * abs(QI + OFFSETS[b] + S - T - KJ),
    ),
    "bias": (scores.bias(BIAS), lambda s, b, n: s + BIAS[b, n]),
    "bias TS": (scores.bias(BIAS[1, 2]), lambda s, b, n: s + BIAS[1, 2]),
    "bias N11": (scores.bias(BIAS[1, :, :1, :1]), lambda s, b, n: s + BIAS[1, n, 0, 0]),
    "bias B1T1": (scores.bias(BIAS[:, :1, :, :1]), lambda s, b, n: s + BIAS[b, 0, :, :1]),
    "bias S": (scores.bias(BIAS[0, 0, 0]), lambda s, b, n: s + BIAS[0, 0, 0]),
    "relative_bias": (
        scores.relative_bias(TABLE, max_distance=9),
        lambda s, b, n: s + t5(KJ - QI, n),
    ),
    "relative_bias causal": (
        scores.relative_bias(TABLE, bidirectional=False, max_distance=9, offset=2),
        lambda s, b, n: s + t5(KJ - QI - 2, n, bidirectional=False),
    ),
    "relative_bias offsets end": (
        scores.relative_bias(TABLE, max_distance=9, offset=OFFSETS, align="end"),
        lambda s, b, n: s + t5(KJ - QI - OFFSETS[b] - (S - T), n),
    ),
    "relative_embedding": (
        scores.relative_embedding(QUERY, VECTORS),
        lambda s, b, n: s + shaw(KJ - QI, b, n),
    ),
    "relative_embedding one table": (
        scores.relative_embedding(QUERY, VECTORS[:, 0], offset=-3),
        lambda s, b, n: s + shaw(KJ - QI + 3, b, n, np.repeat(VECTORS[:, :1], N, axis=1)),
    ),
    "relative_embedding offsets end": (
        scores.relative_embedding(QUERY, VECTORS, offset=OFFSETS, align="end"),
        lambda s, b, n: s + shaw(KJ - QI - OFFSETS[b] - (S - T), b, n),
    ),
    "score_fn": (
        scores.score_fn(counting),
        lambda s, b, n: s + (1 + b) * (n - QI + 2 * KJ),
    ),
    "score_fn arrays": (
        scores.score_fn(looking_up, jnp.asarray(LOOKED_UP), TWO),
        lambda s, b, n: s * 2 + LOOKED_UP[b, n, QI % 3],
    ),
}
each_rule = pytest.mark.parametrize(("score", "rule"), RULES.values(), ids=RULES)


def in_float64(score):
    """The score with its floating arrays in float64; needs x64."""
    wide = lambda x: jnp.asarray(x, jnp.float64 if x.dtype.kind == "f" else None)  # noqa: E731
    return jax.tree.map(wide, score)


@each_rule
def test_each_score_follows_its_rule(score, rule, x64):
    s, score = RNG.normal(size=(T, S)), in_float64(score).resolve(T, S, N)
    for b, n in [(0, 0), (1, 4), (1, 5)]:
        got = jax.jit(score.score)(jnp.asarray(s), b, n, QI, KJ)
        np.testing.assert_allclose(got, rule(s, b, n), rtol=1e-6, atol=1e-6)


@each_rule
def test_logits_keep_their_dtype(score, rule):
    for dtype in (jnp.float32, jnp.bfloat16):
        s = jax.ShapeDtypeStruct((T, S), dtype)
        scored = jax.eval_shape(lambda s: score.resolve(T, S, N).score(s, 1, 2, QI, KJ), s)
        assert scored.dtype == dtype


def test_a_bias_of_minus_infinity_masks_nan_and_inf():
    array = np.array([0.5, -np.inf, -np.inf, -np.inf], np.float32)
    s = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf])
    got = scores.bias(array).score(s, 0, 0, 0, np.arange(4))
    assert got.tolist() == [1.5, -math.inf, -math.inf, -math.inf]


def test_scores_that_depend_on_lengths_raise_before_these_are_known():
    for score in (
        scores.alibi(),
        scores.alibi(SLOPES, align="end"),
        scores.relative_bias(TABLE, align="end"),
        scores.relative_embedding(QUERY, VECTORS, align="end"),
    ):
        with pytest.raises(ValueError, match=r"once T"):
            score.score(jnp.zeros(()), 0, 0, 1, 1)


# --- A tile is the rule on its pairs.


def cut(score, b, n, q0, k0, t, s):
    """The score as a backend gives it to a tile of ``t x s`` pairs at ``(q0, k0)``."""

    def window(x, leaf):
        for axis, letter in enumerate(local_axes(leaf)):
            if letter in "TS" and x.shape[axis] > 1:
                start, size = (q0, t) if letter == "T" else (k0, s)
                x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
        return as_tile(x, leaf)

    whole = full_rank(score.resolve(T, S, N), SIZES, "score")
    return map_leaves(window, whole.at(b, n, slice(None), slice(None)))


@each_rule
def test_tile_equals_rule_at_any_place(score, rule, x64):
    t, s = 4, 3
    logits, score = jnp.asarray(RNG.normal(size=(t, s))), in_float64(score)

    @jax.jit
    def both(b, n, q0, k0):
        tile = cut(score, b, n, q0, k0, t, s).tile(logits, b, n, q0, k0)
        q, k = q0 + jnp.arange(t, dtype="int32")[:, None], k0 + jnp.arange(s, dtype="int32")
        return tile, score.resolve(T, S, N).score(logits, b, n, q, k[None])

    @settings(max_examples=25)
    @given(
        st.integers(0, B - 1), st.integers(0, N - 1), st.integers(0, T - t), st.integers(0, S - s)
    )
    def check(b, n, q0, k0):
        place = map(np.int32, (b, n, q0, k0))
        np.testing.assert_allclose(*both(*place), rtol=1e-12, atol=1e-12)

    check()


@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 5), (5, 1), (3, 4), (4, 3)])
def test_skew_moves_diagonals_to_columns(t, s):
    x = np.arange(t * (t + s - 1)).reshape(t, -1)
    expected = [[x[i, j + t - 1 - i] for j in range(s)] for i in range(t)]
    assert skew(jnp.asarray(x)).tolist() == expected


# --- Buckets and slopes.


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num", "most"), [(32, 128), (8, 9), (4, 100), (12, 1000), (64, 512)])
def test_buckets_are_those_of_t5(num, most, bidirectional):
    distances = np.arange(-600, 601, dtype=np.int32)
    expected = rules.t5_bucket(distances, num, bidirectional, most).tolist()
    options = {"num_buckets": num, "bidirectional": bidirectional, "max_distance": most}
    assert scores.relative_buckets(distances, **options).tolist() == expected
    traced = jax.jit(lambda d: scores.relative_buckets(d, **options))
    assert traced(distances).tolist() == expected


def test_alibi_slopes_are_the_published_ones_for_any_number_of_heads():
    for n in range(1, 40):
        slopes = scores.alibi_slopes(n)
        assert slopes.shape == (n,)
        np.testing.assert_allclose(slopes, rules.alibi_slopes(n), rtol=1e-6)


# --- Derivatives.

DIFFERENTIABLE = {name: score for name, (score, _) in RULES.items() if jax.tree.leaves(score)}


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        [n for n in DIFFERENTIABLE if "offset" not in n],
        {"bias", "alibi slopes", "relative_bias", "relative_embedding", "score_fn arrays"},
    ),
)
def test_gradients_of_every_array_of_a_score(name, x64):
    score = in_float64(DIFFERENTIABLE[name])
    if "bias" in name and "relative" not in name:  # differences of infinities are NaN
        score = jax.tree.map(lambda x: jnp.where(x == -jnp.inf, 0.5, x), score)
    s, weights = jnp.asarray(RNG.normal(size=(2, T, S)))

    def loss(score, s, tiled):
        if tiled:
            return (weights * cut(score, 1, 2, 0, 0, T, S).tile(s, 1, 2, 0, 0)).sum()
        return (weights * score.resolve(T, S, N).score(s, 1, 2, QI, KJ)).sum()

    for tiled in (False, True):
        f = jax.jit(functools.partial(loss, tiled=tiled))
        jax.test_util.check_grads(f, (score, s), order=1, modes=["rev"], eps=1e-5)
    gradients = jax.jit(jax.grad(f))(score, s)
    assert all((g != 0).any() for g in jax.tree.leaves(gradients))


def test_equal_scores_hash_alike():
    builds = [
        lambda: scores.softcap(2.0),
        lambda: scores.softcap(3.0),
        scores.alibi,
        lambda: scores.alibi(SLOPES.copy()),
        lambda: scores.bias(BIAS.copy()),
        lambda: scores.relative_bias(TABLE.copy()),
        lambda: scores.relative_bias(TABLE.copy(), bidirectional=False),
        lambda: scores.relative_embedding(QUERY.copy(), VECTORS.copy()),
        lambda: scores.score_fn(counting),
        lambda: scores.score_fn(looking_up, LOOKED_UP.copy(), TWO),
    ]
    for i, build in enumerate(builds):
        assert hash(build()) == hash(build())
        assert [k for k, other in enumerate(builds) if other() == build()] == [i]
        leaves, structure = jax.tree.flatten(build())
        assert jax.tree.unflatten(structure, leaves) == build()


@pytest.mark.usefixtures("x64")
def test_alibi_slopes_are_float64_for_float64_inputs():
    x = np.random.default_rng(0).normal(size=(1, 12, 9, 4))
    slopes = 2.0 ** -np.array([*range(1, 9), 0.5])  # the last is no float32
    distance = np.abs(np.arange(12)[:, None] - np.arange(12))
    s = np.einsum("tnh,snh->nts", x[0], x[0]) / 2 - slopes[:, None, None] * distance
    p = np.exp(s - s.max(-1, keepdims=True))
    expected = p / p.sum(-1, keepdims=True)
    got = attention_weights(x, x, score=scores.alibi())
    np.testing.assert_allclose(got[0], expected, rtol=1e-12)
