"""The running softmax: any split of the keys, in any order, is the whole softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention_jax.core import softmax

T, S, D = 3, 12, 5
WHOLE = (4, 4, 4)  # blocks of keys


def problem(seed, hidden, size):
    """Logits, among them ``-inf``, whole blocks of it and whole rows; values."""
    rng = np.random.default_rng(seed)
    s = size * rng.normal(size=(T, S))
    s[rng.random((T, S)) < hidden] = -np.inf
    s[:, rng.permutation(3)[0] * 4 :][:, :4] = -np.inf if hidden else 0.0
    s[rng.integers(T)] = -np.inf if hidden > 0.5 else 1.0
    return s, rng.normal(size=(S, D))


def exact(s, v, sink=-np.inf):
    """Output and lse in NumPy; a fully masked row is 0."""
    m = np.maximum(s.max(-1, keepdims=True), sink)
    m = np.where(m == -np.inf, 0, m)
    e = np.exp(s - m)
    total = e.sum(-1, keepdims=True) + np.exp(sink - m)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, m + np.log(total), -np.inf)[:, 0]
    return e @ v / np.where(total > 0, total, 1), lse


@jax.jit
def state_of(s, v):
    return softmax.update(softmax.start(s.shape[0], v.shape[1], s.dtype), s, v)


merge = jax.jit(softmax.merge)
update = jax.jit(softmax.update)


@jax.jit
def finish(*state):
    """Output and lse, whose two parts the library keeps apart."""
    out, m, log_l = softmax.finish(*state)
    return out, m + log_l


problems = st.builds(
    problem,
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.sampled_from([1.0, 1e3, 1e30]),
)


def blocks(s, v, order):
    """States of three blocks of keys, the keys shuffled among them."""
    parts = np.split(np.asarray(order), 3)
    return [state_of(jnp.asarray(s[:, p]), jnp.asarray(v[p])) for p in parts]


def check(state, s, v):
    for got, expected in zip(finish(state), exact(s, v), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["left to right", "right to left", "one by one"])
def test_any_split_merges_to_the_whole(how, x64):
    @given(problems, st.permutations(range(S)))
    def run(p, order):
        s, v = p
        a, b, c = blocks(s, v, order)
        if how == "left to right":
            state = merge(merge(a, b), c)
        elif how == "right to left":
            state = merge(a, merge(b, c))
        else:
            state = softmax.start(T, D, jnp.float64)
            for part in np.split(np.asarray(order), 3):
                state = update(state, jnp.asarray(s[:, part]), jnp.asarray(v[part]))
        check(state, s, v)

    run()


@given(problems, st.permutations(range(S)))
def test_merge_commutes_and_has_a_neutral_state(p, order):
    s, v = (x.astype(np.float32) for x in p)
    a, b, _ = blocks(s, v, order)
    nothing = softmax.start(T, D, jnp.float32)
    for left, right in ((merge(a, b), merge(b, a)), (merge(a, nothing), a), (merge(nothing, a), a)):
        for x, y in zip(left, right, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_no_keys_give_zero_and_lse_minus_infinity():
    out, lse = finish(softmax.start(T, D, jnp.float32))
    assert (out == 0).all()
    assert (lse == -jnp.inf).all()
    hidden = state_of(jnp.full((T, 4), -jnp.inf), jnp.ones((4, D)))
    out, lse = finish(hidden)
    assert (out == 0).all()
    assert (lse == -jnp.inf).all()


@given(problems, st.sampled_from([-np.inf, -2.0, 0.0, 700.0]))
def test_a_sink_joins_the_denominator_once(p, sink):
    s, v = (x.astype(np.float32) for x in p)
    state = state_of(jnp.asarray(s), jnp.asarray(v))
    got = finish(state, jnp.float32(sink))
    for x, expected in zip(got, exact(s.astype(float), v.astype(float), sink), strict=True):
        np.testing.assert_allclose(x, expected, rtol=2e-5, atol=2e-6)


def test_dropout_does_not_change_the_normalizer(x64):
    s, v = problem(0, 0.0, 1.0)
    keep = np.random.default_rng(0).integers(0, 2, (T, S)) * 2.0
    state = softmax.update(softmax.start(T, D, jnp.float64), *map(jnp.asarray, (s, v, keep)))
    out, lse = finish(state)
    p = np.exp(s - exact(s, v)[1][:, None])
    np.testing.assert_allclose(lse, exact(s, v)[1], rtol=1e-12)
    np.testing.assert_allclose(out, (p * keep) @ v, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_dtype_of_the_state_is_kept(dtype, x64):
    state = state_of(jnp.zeros((T, S), dtype), jnp.zeros((S, D), dtype))
    assert {x.dtype for x in (*merge(state, state), *finish(state))} == {jnp.dtype(dtype)}


def test_gradients_at_masked_keys_are_zero_not_nan(x64):
    s, v = problem(1, 0.9, 1.0)
    assert (s == -np.inf).all(1).any()

    def loss(s, v):
        halves = [state_of(s[:, :6], v[:6]), state_of(s[:, 6:], v[6:])]
        out, lse = finish(softmax.merge(*halves))
        return out.sum() + jnp.where(lse == -jnp.inf, 0.0, lse).sum()

    ds, dv = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(s), jnp.asarray(v))
    assert jnp.isfinite(dv).all()
    assert (ds[s == -np.inf] == 0).all()
