"""Recurrent mechanisms: chunk by chunk, token by token, and their formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow
from jax.test_util import check_grads

from attention_jax import masks
from attention_jax.mechanisms import (
    PackedState,
    delta_rule,
    gated_linear_attention,
    linear_attention,
    retention,
)

B, T, K, G, H, D = 2, 150, 2, 2, 3, 5  # more than two chunks, the last one partial
N = K * G
CAUSAL = masks.causal()


def arrays(T=T, dtype=np.float64):
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.normal(size=(B, T, n, w)).astype(dtype) for n, w in ((N, H), (K, H), (K, D))
    )
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    gates = np.log(rng.uniform(0.5, 1, size=(B, T, K, H))).astype(dtype)
    gates[0, T // 2] = -np.inf  # forgets all
    beta = rng.uniform(0, 1, size=(B, T, K)).astype(dtype)
    return query, key, value, gates, beta


def run(name, *arrays, mask=CAUSAL, segments=None, state=None, return_state=False):
    return jitted(name, return_state)(*arrays, mask, segments, state)


@functools.cache
def jitted(name, return_state):
    def call(query, key, value, gates, beta, mask, segments, state):
        options = {"mask": mask, "segments": segments}
        options |= {"state": state, "return_state": return_state}
        if name == "linear":
            return linear_attention(query, key, value, **options)
        if name == "retention":
            return retention(query, key, value, **options)
        if name == "gated":
            return gated_linear_attention(query, key, value, gates, **options)
        if name == "scalar gates":
            return gated_linear_attention(query, key, value, gates[..., :1], **options)
        return delta_rule(query, key, value, beta, **options)

    return jax.jit(call)


NAMES = ["linear", "retention", "gated", "scalar gates", "delta"]
every = pytest.mark.parametrize("name", NAMES)
# Retention is gated linear attention with a scalar gate that is the same for all tokens.
DISTINCT = [name for name in NAMES if name != "retention"]
distinct = pytest.mark.parametrize("name", DISTINCT)
# A default run takes two: gates per entry, and the delta rule.
two_by_default = pytest.mark.parametrize("name", mostly_slow(DISTINCT, {"gated", "delta"}))


def oracle(name, query, key, value, gates, beta):
    """Token by token, one head of one example at a time."""

    def elu_plus_1(x):
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    out = np.zeros((*query.shape[:3], D))
    for b, n in np.ndindex(B, N):
        g = n // G
        matrix, total = np.zeros((H, D)), np.zeros(H)
        for t in range(query.shape[1]):
            q, k, v = query[b, t, n], key[b, t, g], value[b, t, g]
            if name == "linear":
                q, k = elu_plus_1(q), elu_plus_1(k)
                total += k
                matrix += np.outer(k, v)
                out[b, t, n] = q @ matrix / (q @ total)
                continue
            if name == "retention":
                matrix = (1 - 2.0 ** -(5 + 7 * g / (K - 1))) * matrix + np.outer(k, v)
            elif name == "gated":
                matrix = np.exp(gates[b, t, g])[:, None] * matrix + np.outer(k, v)
            elif name == "scalar gates":
                matrix = np.exp(gates[b, t, g, 0]) * matrix + np.outer(k, v)
            else:
                matrix = matrix + beta[b, t, g] * np.outer(k, v - matrix.T @ k)
            out[b, t, n] = q @ matrix / np.sqrt(H)
    return out


@every
@pytest.mark.usefixtures("x64")
def test_matches_the_formula_token_by_token(name):
    found = run(name, *arrays())
    np.testing.assert_allclose(found, oracle(name, *arrays()), rtol=1e-10, atol=1e-12)


@two_by_default
@pytest.mark.usefixtures("x64")
def test_resuming_from_a_state_equals_the_whole_sequence(name):
    """The steps of decoding equal the parallel form, however the sequence is cut."""
    given = arrays(T=20)
    whole, last = run(name, *given, return_state=True)
    state, parts = None, []
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 20)):
        part = [x[:, start:stop] for x in given]
        out, state = run(name, *part, state=state, return_state=True)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state, last, rtol=1e-10, atol=1e-12)


@two_by_default
def test_padding_is_skipped(name):
    """Padding changes nothing, whatever it holds."""
    given = arrays(T=9, dtype=np.float32)
    real = np.ones((B, 9), bool)
    real[:, [2, 7]] = False
    padded = [x.copy() for x in given]
    for x in padded:
        x[:, [2, 7]] = np.nan
    mask = CAUSAL & masks.padding(real)
    found, state = run(name, *padded, mask=mask, return_state=True)
    without, same = run(name, *(x[:, real[0]] for x in given), return_state=True)
    np.testing.assert_allclose(found[:, real[0]], without, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, same, rtol=1e-5, atol=1e-6)
    assert not found[:, [2, 7]].any()

    def total(*x):
        return run(name, *x, mask=mask).sum()

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*padded):
        assert np.isfinite(gradient).all()
        assert not gradient[:, [2, 7]].any()


# --- Several documents in one row.

# Longer than a chunk, across chunk borders, of one token, after padding, with padding inside.
DOCUMENTS = np.full((B, T), -1)
DOCUMENTS[0, :70], DOCUMENTS[0, 70:71], DOCUMENTS[0, 71:90] = 5, 3, 4
DOCUMENTS[0, 95:140] = 5
DOCUMENTS[0, 100:103] = -1
DOCUMENTS[1, 2:50], DOCUMENTS[1, 50:129], DOCUMENTS[1, 129:] = 0, 1, 2


def alone(name, given, ids):
    """The oracle on each document by itself; 0 for padding."""
    out = np.zeros((*given[0].shape[:3], D))
    for b in range(B):
        real = np.flatnonzero(ids[b] >= 0)
        starts = np.flatnonzero(np.diff(ids[b][real])) + 1
        for at in np.split(real, starts):
            both = oracle(name, *(x[:, at] for x in given))  # of which one example counts
            out[b, at] = both[b]
    return out


@every
@pytest.mark.usefixtures("x64")
def test_packed_documents_equal_separate_ones(name):
    given = arrays()
    padded = [
        np.where((DOCUMENTS < 0).reshape(B, T, *[1] * (x.ndim - 2)), np.nan, x) for x in given
    ]
    found = run(name, *padded, segments=DOCUMENTS)
    np.testing.assert_allclose(found, alone(name, given, DOCUMENTS), rtol=1e-10, atol=1e-12)


@two_by_default
@pytest.mark.usefixtures("x64")
def test_a_packed_state_resumes_its_own_document_only(name):
    """Wherever the row is cut: within a document, where another begins, within padding."""
    given, state, parts = arrays(), None, []
    for start, stop in ((0, 50), (50, 100), (100, 150)):
        out, state = run(
            name,
            *(x[:, start:stop] for x in given),
            segments=DOCUMENTS[:, start:stop],
            state=state,
            return_state=True,
        )
        parts.append(out)
    whole, last = run(name, *given, segments=DOCUMENTS, return_state=True)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state.state, last.state, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(state.segment, [5, 2])
    np.testing.assert_array_equal(last.segment, [5, 2])


@distinct
@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gradients_stay_within_documents(name):
    given, ids = arrays(T=80), DOCUMENTS[:, 60:140]
    document = np.flatnonzero(ids[0] == 4)

    def total(*x, segments=None):
        return (run(name, *x, segments=segments) ** 2).sum()

    gradients = jax.jit(jax.grad(total, range(5)))
    together = gradients(*given, segments=ids)
    alone = gradients(*(x[:, document] for x in given))
    for packed, separate in zip(together, alone, strict=True):
        assert np.isfinite(packed).all()
        assert not packed[ids < 0].any()
        # The first gate of a document has nothing to forget.
        found, right = packed[0, document][1:], separate[0, 1:]
        np.testing.assert_allclose(found, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"segments": np.zeros((B, 4))}, TypeError, "segments must be integers, got float64"),
        (
            {"segments": np.zeros((3, 4), int)},
            ValueError,
            r"must broadcast to \[\*B T\] with \*B = \(2,\), T = 4",
        ),
        (
            {"state": PackedState(np.zeros((B, K, H, D)), np.zeros(B, int))},
            TypeError,
            "PackedState",
        ),
        (
            {"segments": np.zeros(4, int), "state": jnp.zeros((B, K, H, D))},
            TypeError,
            "state must be a PackedState with segments",
        ),
    ],
)
def test_invalid_segments_raise(options, error, said):
    query, key, value, gates, _ = arrays(T=4, dtype=np.float32)
    with pytest.raises(error, match=said):
        gated_linear_attention(query, key, value, gates, **options)


def test_segments_require_a_causal_mask():
    query, key, value, *_ = arrays(T=4, dtype=np.float32)
    with pytest.raises(ValueError, match="return_state and segments require"):
        linear_attention(query, key, value, segments=np.zeros(4, int))


@two_by_default
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulates_in_float32(name, dtype):
    low = [jnp.asarray(x, dtype) for x in arrays()]
    found, state = run(name, *low, return_state=True)
    assert found.dtype == dtype
    assert state.dtype == "float32"
    exact = oracle(name, *(np.asarray(x, np.float64) for x in low))
    error = np.abs(np.asarray(found, np.float64) - exact).max()
    assert error <= 32 * float(jnp.finfo(dtype).eps) * np.abs(exact).max()


@distinct
@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gradients_match_finite_differences(name):
    query, key, value, gates, beta = arrays(T=70)
    gates = np.maximum(gates, -3)

    def total(*x):
        return (run(name, *x) ** 2).sum()

    check_grads(total, (query, key, value, gates, beta), order=1, modes=["fwd", "rev"])


@two_by_default
def test_an_empty_call_returns_the_state(name):
    given = arrays(T=5, dtype=np.float32)
    _, state = run(name, *given, return_state=True)
    out, same = run(name, *(x[:, :0] for x in given), state=state, return_state=True)
    assert out.shape == (B, 0, N, D)
    np.testing.assert_array_equal(state, same)


@two_by_default
def test_later_tokens_do_not_affect_earlier_outputs(name):
    given = arrays(dtype=np.float32)
    changed = [np.concatenate([x[:, :100], x[:, 100:] / 3], axis=1) for x in given]
    first, second = (run(name, *x)[:, :100] for x in (given, changed))
    np.testing.assert_array_equal(first, second)


def test_memory_is_linear():
    """Of the backward pass too: no array of all pairs, nor a state for each token."""

    def total(q, k, v, g):
        return gated_linear_attention(q, k, v, g).sum()

    def temporaries(T):
        x, g = (jax.ShapeDtypeStruct((T, 1, w), "float32") for w in (16, 1))
        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3))).lower(x, x, x, g).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16_384) < 5 * temporaries(4096)
    assert temporaries(16_384) < 16_384 * 16 * 4 * 40
