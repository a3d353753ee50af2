"""Each mechanism against its formula in NumPy, and at the edges.

The oracles loop over everything in float64, one head of one example at a time, and import nothing
of ours.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import softmax
from jax.test_util import check_grads

from attention_jax import masks, mechanisms, scores
from attention_jax.mechanisms import (
    absorbed_latent_attention,
    additive_attention,
    additive_weights,
    differential_attention,
    differential_weight,
    inverted_attention,
    latent_attention,
    linear_attention,
    linformer_attention,
    performer_features,
    routing_attention,
    slot_attention,
    topk_attention,
    update_centroids,
)

B, T, S, K, G, H, D = 2, 5, 7, 2, 3, 3, 11
N = K * G
RNG = np.random.default_rng(0)


def normal(*shape):
    """Numbers that bfloat16 represents exactly, so that all dtypes get the same input."""
    return np.asarray(RNG.normal(size=shape).astype(jnp.bfloat16), np.float64)


QUERY, KEY, VALUE = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, D)
VECTOR, MIXINGS, CENTROIDS = normal(N, H), normal(2, K, 4, S), normal(K, 3, H)

VISIBLE = np.random.default_rng(1).random((B, N, T, S)) < 0.6
VISIBLE[:, :, 1] = False  # a query without visible keys
VISIBLE[0, :, :, 2] = False  # a key that no query attends to
REAL = np.ones((B, S), bool)
REAL[0, 2] = REAL[1, 5:] = False
PADDING = masks.padding(REAL, queries=T)
ALL = np.ones((B, N, T, S), bool)


# --- The formulas.


def softmax_rows(s, seen):
    """Over the visible keys of each row; 0 for a row without any."""
    p = np.zeros_like(s)
    for i in range(len(s)):
        if seen[i].any():
            p[i, seen[i]] = softmax(s[i, seen[i]])
    return p


def additive_head(q, k, v, seen, n):
    return softmax_rows(np.tanh(q[:, None] + k[None]) @ VECTOR[n], seen) @ v


def shares(q, k, seen):
    return softmax_rows((q @ k.T / np.sqrt(H)).T, seen.T).T


def inverted_head(q, k, v, seen, n):
    return shares(q, k, seen) @ v


def slot_head(q, k, v, seen, n):
    A = shares(q, k, seen)
    total = A.sum(1, keepdims=True)
    return A @ v / np.where(total == 0, 1, total)


def topk_head(q, k, v, seen, n):
    s = np.where(seen, q @ k.T / np.sqrt(H), -np.inf)
    best = np.argsort(-s, axis=1, kind="stable")[:, :3]
    kept = np.zeros_like(seen)
    np.put_along_axis(kept, best, True, axis=1)
    return softmax_rows(s, seen & kept) @ v


def linear_head(q, k, v, seen, n):
    def elu_plus_1(x):
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    w = np.where(seen, elu_plus_1(q) @ elu_plus_1(k).T, 0)
    total = w.sum(1, keepdims=True)
    return w @ v / np.where(total == 0, 1, total)


def linformer_head(q, k, v, seen, n):
    E, F = MIXINGS[:, n // G]
    real = seen[0][:, None]
    k, v = E @ np.where(real, k, 0), F @ np.where(real, v, 0)
    return softmax_rows(q @ k.T / np.sqrt(H), np.ones((T, 4), bool)) @ v


def routing_head(q, k, v, seen, n):
    of_q, of_k = ((x @ CENTROIDS[n // G].T).argmax(1) for x in (q, k))
    return softmax_rows(q @ k.T / np.sqrt(H), seen & (of_q[:, None] == of_k[None])) @ v


def oracle(head, query, key, value, seen):
    """A formula on every head of every example."""
    out = np.zeros((B, T, N, D))
    for b, n in np.ndindex(B, N):
        g = n // (N // key.shape[2])
        seen_rows = np.where(seen[b, n].any(0)[:, None], value[b, :, g], 0)
        out[b, :, n] = head(query[b, :, n], key[b, :, g], seen_rows, seen[b, n], n)
    return out


def additive(query, key, value, *, mask=None):
    """Additive attention has a key for every query head."""
    key, value = (jnp.repeat(x, G, axis=-2) for x in (key, value))
    return additive_attention(query, key, value, jnp.asarray(VECTOR, query.dtype), mask=mask)


def linformer(query, key, value, **options):
    return linformer_attention(query, key, value, *jnp.asarray(MIXINGS, query.dtype), **options)


def routing(query, key, value, **options):
    return routing_attention(query, key, value, jnp.asarray(CENTROIDS, query.dtype), **options)


MECHANISMS = {
    "additive": (additive, additive_head),
    "inverted": (inverted_attention, inverted_head),
    "slot": (slot_attention, slot_head),
    "topk": (functools.partial(topk_attention, k=3), topk_head),
    "linear": (linear_attention, linear_head),
    "linformer": (linformer, linformer_head),
    "routing": (routing, routing_head),
}
DENSE = ["additive", "inverted", "slot", "topk"]  # those that take any mask
MECHANISMS = {name: (jax.jit(f), head) for name, (f, head) in MECHANISMS.items()}
every = pytest.mark.parametrize("name", MECHANISMS)


def masked(name):
    """A mask, with an empty row and column if possible, and the visible pairs."""
    if name in DENSE:
        return VISIBLE, VISIBLE
    return PADDING, np.broadcast_to(REAL[:, None, None], ALL.shape)


@every
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("with_mask", [False, True])
def test_matches_the_formula(name, with_mask):
    mechanism, head = MECHANISMS[name]
    mask, seen = masked(name) if with_mask else (None, ALL)
    out = mechanism(QUERY, KEY, VALUE, mask=mask)
    np.testing.assert_allclose(out, oracle(head, QUERY, KEY, VALUE, seen), rtol=1e-11, atol=1e-13)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulates_in_float32_and_returns_the_dtype_of_the_query(name, dtype):
    mechanism, head = MECHANISMS[name]
    low = [jnp.asarray(x, dtype) for x in (QUERY, KEY, VALUE)]
    out = mechanism(*low)
    assert out.dtype == dtype
    exact = oracle(head, QUERY, KEY, VALUE, ALL)
    error = np.abs(np.asarray(out, np.float64) - exact).max()
    assert error <= 8 * float(jnp.finfo(dtype).eps) * np.abs(exact).max()


@every
def test_masked_keys_may_hold_anything_and_get_no_gradient(name):
    mechanism, _ = MECHANISMS[name]
    query, key, value = (x.astype(np.float32) for x in (QUERY, KEY, VALUE))
    key[0, 2], value[0, 2] = np.nan, np.inf
    mask, _ = masked(name)

    def total(*x):
        return mechanism(*x, mask=mask).sum()

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    value, gradients = both(query, key, value)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not gradients[1][0, 2].any()
    assert not gradients[2][0, 2].any()
    if name in DENSE:
        assert not gradients[0][:, 1].any()  # the query without visible keys


@every
@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gradients_match_finite_differences(name):
    mechanism, _ = MECHANISMS[name]
    mask, _ = masked(name)

    def total(*x):
        return (mechanism(*x, mask=mask) ** 2).sum()

    modes = ["rev"] if name == "routing" else ["fwd", "rev"]
    check_grads(total, (QUERY, KEY, VALUE), order=1, modes=modes)


@every
def test_vmap_equals_the_batch_axis_and_no_keys_give_zero(name):
    mechanism, _ = MECHANISMS[name]
    query, key, value = (x.astype(np.float32) for x in (QUERY, KEY, VALUE))
    one = jax.jit(jax.vmap(mechanism))(query, key, value)
    np.testing.assert_allclose(one, mechanism(query, key, value), rtol=2e-5, atol=1e-6)
    if name != "linformer":  # whose mixings are of a number of keys
        assert not mechanism(query, key[:, :0], value[:, :0]).any()
    assert mechanism(query[:, :0], key, value).shape == (B, 0, N, D)


# --- Additive.


def test_weights_sum_to_1():
    query, vector = QUERY.astype(np.float32), VECTOR.astype(np.float32)
    weights = jax.jit(additive_weights)(query, query[:, :3], vector)
    assert weights.shape == (B, N, T, 3)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


# --- Inverted and slots.


@pytest.mark.usefixtures("x64")
def test_inverted_weights_sum_to_1_over_queries_and_slots_average():
    ones = np.ones((B, S, K, 1))
    shares, average = MECHANISMS["inverted"][0], MECHANISMS["slot"][0]
    won = np.sum(shares(QUERY, KEY, ones), axis=1)  # over queries: all of each key
    np.testing.assert_allclose(won, S, rtol=1e-12)
    np.testing.assert_allclose(average(QUERY, KEY, ones), 1, rtol=1e-12)


def test_a_slot_whose_weights_underflow_still_has_a_mean():
    query = np.float32([100, -100]).reshape(2, 1, 1)
    key, value = np.float32([1, 2]).reshape(2, 1, 1), np.float32([3, 5]).reshape(2, 1, 1)
    out = MECHANISMS["slot"][0](query, key, value)  # the second slot's shares are e^-200 and e^-400
    np.testing.assert_allclose(out.ravel(), [4, 3], rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_scores_are_applied_before_the_mechanism():
    out = inverted_attention(QUERY, KEY, VALUE, score=scores.softcap(1e9), scale=0.5)
    plain = inverted_attention(QUERY, KEY, VALUE, scale=0.5)
    np.testing.assert_allclose(out, plain, rtol=1e-6)


# --- Top k.


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_all_keys_are_softmax_attention_and_equal_scores_take_the_first():
    from attention_jax import attention

    run = jax.jit(functools.partial(topk_attention, k=99, mask=masks.causal()))
    out = run(QUERY, KEY, VALUE)
    np.testing.assert_allclose(out, attention(QUERY, KEY, VALUE, mask=masks.causal()), rtol=1e-12)
    value = np.arange(3.0).reshape(3, 1, 1)
    assert topk_attention(value[:1], np.ones((3, 1, 1)), value, k=1).item() == 0


# --- Linear.


def test_performer_features_approximate_softmax():
    from attention_jax import attention

    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(64, 1, 64)).astype(np.float32) for _ in range(3))
    q, k = q / 2, k / 2
    exact = attention(q, k, v)
    errors = []
    for count in (64, 4096):
        features = performer_features(jax.random.key(0), 64, count)
        out = jax.jit(functools.partial(linear_attention, features=features))(q, k, v)
        errors.append(float(np.abs(out - exact).mean()))
    assert errors[1] < 0.35 * errors[0]  # 1 / sqrt(64) of it, and some of chance
    assert errors[1] < 0.05


def test_performer_features_stay_finite():
    rng = np.random.default_rng(0)
    q, k, v = (30 * rng.normal(size=(64, 1, 16)).astype(np.float32) for _ in range(3))
    features = performer_features(jax.random.key(0), 16, 64)
    run = jax.jit(functools.partial(linear_attention, features=features))
    assert np.isfinite(run(q, k, v)).all()
    with pytest.raises(ValueError, match="width H = 8"):
        linear_attention(q, k, v, features=performer_features(jax.random.key(0), 8, 64))


# --- Differential.


@pytest.mark.usefixtures("x64")
def test_differential_attention_matches_the_formula():
    weight = np.linspace(0.1, 0.9, G)
    value = RNG.normal(size=(B, S, 1, D))
    out = jax.jit(differential_attention)(QUERY, KEY, value, weight, mask=VISIBLE[:, :G])
    for b, n in np.ndindex(B, G):
        p = [
            softmax_rows(QUERY[b, :, 2 * n + i] @ KEY[b, :, i].T / np.sqrt(H), VISIBLE[b, n])
            for i in (0, 1)
        ]
        exact = (p[0] - weight[n] * p[1]) @ value[b, :, 0]
        np.testing.assert_allclose(out[b, :, n], exact, rtol=1e-11, atol=1e-13)
    assert not out[:, 1].any()


def test_differential_weight():
    one = np.ones(4, np.float32)
    found = float(differential_weight(query_1=one, key_1=one, query_2=0 * one, key_2=one, layer=2))
    np.testing.assert_allclose(found, np.exp(4) - 1 + 0.8 - 0.6 * np.exp(-0.6), rtol=1e-6)


# --- Latent.


@pytest.fixture
def latents():
    rng = np.random.default_rng(0)
    P, R = 2, 5
    shapes = (B, T, N, H), (B, T, N, P), (B, T, R), (B, T, P), (R, N, H), (R, N, D)
    return [rng.normal(size=shape) for shape in shapes]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", [latent_attention, absorbed_latent_attention])
def test_latent_attention_matches_the_formula_in_both_forms(latents, form):
    query, query_rotary, latent, key_rotary, key_up, value_up = latents
    out = jax.jit(functools.partial(form, mask=masks.causal()))(*latents)
    seen = np.tril(np.ones((T, T), bool))
    for b, n in np.ndindex(B, N):
        s = query[b, :, n] @ (latent[b] @ key_up[:, n]).T + query_rotary[b, :, n] @ key_rotary[b].T
        exact = softmax_rows(s / np.sqrt(H + 2), seen) @ (latent[b] @ value_up[:, n])
        np.testing.assert_allclose(out[b, :, n], exact, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_decoding_from_cached_latents_equals_all_at_once(latents):
    query, query_rotary, latent, key_rotary, *up = latents
    whole = jax.jit(functools.partial(latent_attention, mask=masks.causal()))(*latents)
    step = jax.jit(
        lambda *arrays, count: absorbed_latent_attention(*arrays, mask=masks.lengths(key=count))
    )
    cache = np.zeros_like(latent), np.zeros_like(key_rotary)  # all that is kept of a token
    for i in range(T):
        cache[0][:, i], cache[1][:, i] = latent[:, i], key_rotary[:, i]
        one = slice(i, i + 1)
        out = step(query[:, one], query_rotary[:, one], *cache, *up, count=i + 1)
        np.testing.assert_allclose(out, whole[:, one], rtol=1e-11, atol=1e-13)


# --- Routing.


@pytest.mark.usefixtures("x64")
def test_routing_is_causal_by_position_not_by_order():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, 40, n, H)) for n in (N, K, K))
    out = jax.jit(functools.partial(routing, mask=masks.causal()))(q, k, v)
    before = np.tril(np.ones((40, 40), bool))
    for b, n in np.ndindex(B, N):
        of_q, of_k = (x @ CENTROIDS[n // G].T for x in (q[b, :, n], k[b, :, n // G]))
        seen = before & (of_q.argmax(1)[:, None] == of_k.argmax(1)[None])
        exact = softmax_rows(q[b, :, n] @ k[b, :, n // G].T / np.sqrt(H), seen) @ v[b, :, n // G]
        np.testing.assert_allclose(out[b, :, n], exact, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_centroids_move_to_the_means_of_their_clusters():
    moved = jax.jit(functools.partial(update_centroids, decay=0.9, mask=PADDING))(
        CENTROIDS, QUERY, KEY
    )
    for n in range(K):
        means = []
        for x in (QUERY[:, :, n * G : (n + 1) * G].reshape(-1, H), KEY[REAL][:, n]):
            own = (x @ CENTROIDS[n].T).argmax(1)
            means.append([x[own == c].mean(0) if (own == c).any() else None for c in range(3)])
        for c in range(3):
            found = [m[c] for m in means if m[c] is not None]
            exact = 0.9 * CENTROIDS[n, c] + 0.1 * np.mean(found, 0) if found else CENTROIDS[n, c]
            np.testing.assert_allclose(moved[n, c], exact, rtol=1e-11)


def test_k_means_finds_clusters():
    rng = np.random.default_rng(0)
    true = np.eye(4)[:, None] * 5
    x = (true[rng.integers(0, 4, 200)] + 0.1 * rng.normal(size=(200, 1, 4))).astype(np.float32)
    centroids = np.eye(4, dtype=np.float32)[None] + 0.3
    step = jax.jit(functools.partial(update_centroids, decay=0.5))
    for _ in range(20):
        centroids = step(centroids, x, x)
    np.testing.assert_allclose(centroids[0], 5 * np.eye(4), atol=0.1)


# --- In modules.


@pytest.mark.slow
@pytest.mark.parametrize("name", mechanisms.NAMED)
def test_named_mechanisms_replace_attention_in_a_module(name):
    from flax import nnx

    from attention_jax.nn import MultiHeadAttention

    mask = masks.causal() if name == "retention" else None
    module = MultiHeadAttention(
        8, num_heads=2, attention=mechanisms.NAMED[name], mask=mask, rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    total, gradients = nnx.jit(nnx.value_and_grad(lambda module: module(x).sum()))(module)
    assert np.isfinite(total)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_default_arguments_are_accepted():
    x = np.ones((5, 2, 4), np.float32)
    linear = mechanisms.NAMED["linear"]
    assert linear(x, x, x, score=(), sinks=None, scale=None, dropout_rate=0.0).shape == x.shape


def test_every_mechanism_names_its_source():
    for name in mechanisms.__all__:
        thing = getattr(mechanisms, name)
        helpers = ("as_attention", "additive_weights", "clusters", "update_centroids")
        if inspect.isfunction(thing) and name not in (*helpers, "differential_weight"):
            lines = inspect.getdoc(thing)
            assert "Source: " in lines or name == "absorbed_latent_attention", name
