"""The oracle's promises about empty rows, masked keys and errors, each on its own."""

import math
import re

import numpy as np
import pytest
from reference_problems import (
    CAP,
    RATE,
    B,
    D,
    G,
    H,
    K,
    N,
    S,
    T,
    close,
    equal,
    every_option,
    inputs,
)

from attention_jax import masks, reference
from attention_jax.reference import Bias, Softcap

# Empty rows, masked keys


HIDDEN_KEYS, EMPTY_ROWS = [2, 6], [0, 3]


def partial_mask():
    """[B N T S]: whole keys and whole queries are masked, and single pairs."""
    mask = every_option()["mask"].copy()
    mask[..., HIDDEN_KEYS] = False
    mask[..., EMPTY_ROWS, :] = False
    return mask


def hiding(how, mask):
    """Options that hide what `mask` hides, in several ways."""
    bias = np.where(mask, 0.3, -np.inf)
    return {
        "mask": {"mask": mask},
        "bias": {"score": (Bias(bias),)},
        "softcap, then bias": {"score": (Softcap(CAP), Bias(bias))},
        "bias twice": {"score": (Bias(bias), Bias(np.full((T, S), 0.1)))},
        "both": {"mask": mask, "score": (Bias(bias),)},
    }[how]


each_way = pytest.mark.parametrize(
    "how", ["mask", "bias", "softcap, then bias", "bias twice", "both"]
)


@each_way
def test_a_fully_masked_row_gives_zero(how):
    arrays, options = inputs(), hiding(how, partial_mask())
    result = reference.attention(*arrays[:3], **options)
    assert np.all(result.out[:, EMPTY_ROWS] == 0.0)
    assert np.all(result.lse[:, EMPTY_ROWS] == -np.inf)
    assert np.all(result.weights[:, :, EMPTY_ROWS] == 0.0)
    others = np.setdiff1d(np.arange(T), EMPTY_ROWS)
    assert np.all(np.isfinite(result.lse[:, others]))
    gradients = reference.attention_gradients(*arrays, **options)
    assert np.all(gradients.query[:, EMPTY_ROWS] == 0.0)
    assert np.all(gradients.query[:, others] != 0.0)
    for array in gradients[:3]:
        assert np.all(np.isfinite(array))
    for array in gradients.score:
        if array is not None and array.shape == (B, N, T, S):
            assert np.all(array[:, :, EMPTY_ROWS] == 0.0)


def test_if_all_rows_are_masked_everything_is_zero():
    arrays = inputs()
    options = {"mask": np.zeros((1, 1), bool), "score": (Softcap(CAP), Bias(np.ones((T, S))))}
    result = reference.attention(*arrays[:3], **options)
    assert np.all(result.out == 0.0)
    assert np.all(result.lse == -np.inf)
    gradients = reference.attention_gradients(*arrays, **options)
    assert gradients.scale == 0.0
    for array in (*gradients[:3], gradients.score[1]):
        assert np.all(array == 0.0)


@each_way
def test_with_sinks_the_lse_of_an_empty_row_is_the_sink(how):
    arrays, sinks = inputs(), np.linspace(-1.0, 2.0, N)
    options = hiding(how, np.zeros((B, N, T, S), bool))
    result = reference.attention(*arrays[:3], sinks=sinks, **options)
    assert np.all(result.out == 0.0)
    assert np.all(result.weights == 0.0)
    equal(result.lse, np.broadcast_to(sinks, (B, T, N)))
    gradients = reference.attention_gradients(*arrays, sinks=sinks, **options)
    close(gradients.sinks, arrays[4].sum(axis=(0, 1)))  # lse = sink, so its gradient is d_lse's
    for array in gradients[:3]:
        assert np.all(array == 0.0)


def test_a_sink_of_minus_infinity_is_no_sink():
    arrays, mask = inputs(), partial_mask()
    none = reference.attention(*arrays[:3], mask=mask)
    equal(none, reference.attention(*arrays[:3], mask=mask, sinks=np.full(N, -np.inf)))
    g = reference.attention_gradients(*arrays, mask=mask, sinks=np.full(N, -np.inf))
    assert np.all(g.sinks == 0.0)
    equal(g[:3], reference.attention_gradients(*arrays, mask=mask)[:3])


@pytest.mark.parametrize("sinks", [None, np.linspace(-1.0, 2.0, N)], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@each_way
def test_masked_keys_and_queries_may_hold_anything(how, poison, sinks):
    mask = partial_mask()
    options = {**hiding(how, mask), "sinks": sinks}
    clean = inputs()
    planted = [x.copy() for x in clean]
    query, key, value, d_out, d_lse = planted
    key[:, HIDDEN_KEYS] = poison
    value[:, HIDDEN_KEYS] = poison
    query[:, EMPTY_ROWS] = poison
    d_out[:, EMPTY_ROWS] = poison
    if sinks is None:  # with a sink, lse of an empty row is the sink, whose gradient d_lse is
        d_lse[:, EMPTY_ROWS] = poison
    forward = reference.attention(query, key, value, **options)
    backward = reference.attention_gradients(*planted, **options)
    assert all(np.all(np.isfinite(x)) for x in (forward.out, *backward[:3], backward.scale))
    equal(forward, reference.attention(*clean[:3], **options))
    equal(backward, reference.attention_gradients(*clean, **options))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_masked_entries_of_a_bias_may_hold_anything(poison):
    arrays, mask = inputs(), partial_mask()
    bias = np.random.default_rng(5).normal(size=(B, N, T, S))
    clean, planted = (
        {"mask": mask, "score": (Bias(b), Softcap(CAP), Bias(-b))}
        for b in (bias, np.where(mask, bias, poison))
    )
    equal(reference.attention(*arrays[:3], **planted), reference.attention(*arrays[:3], **clean))
    g = reference.attention_gradients(*arrays, **planted)
    equal(g, reference.attention_gradients(*arrays, **clean))
    assert np.all(g.score[0][~mask] == 0.0)
    assert np.all(g.score[2][~mask] == 0.0)


def test_a_key_masked_in_one_head_stays_out_of_that_head_only():
    query, key, value, *_ = inputs()
    mask = np.ones((N, 1, S), bool)
    mask[0, :, 2] = False  # heads 0 and 1 read the same key head
    clean = reference.attention(query, key, value, mask=mask)
    key[:, 2, 0] = value[:, 2, 0] = np.nan
    planted = reference.attention(query, key, value, mask=mask)
    equal(planted.out[:, :, 0], clean.out[:, :, 0])
    assert np.all(np.isnan(planted.out[:, :, 1]))


def test_nan_at_a_visible_key_reaches_the_result():
    query, key, value, *_ = inputs()
    value[0, 0, 0, 0] = np.nan
    out = reference.attention(query, key, value).out
    assert np.all(np.isnan(out[0, :, :G, 0]))
    assert np.isnan(out).sum() == T * G


def test_a_softcap_after_a_bias_makes_masked_keys_visible():
    arrays = inputs()
    bias = np.where(np.arange(S) < 4, 0.0, -np.inf)
    result = reference.attention(*arrays[:3], score=(Bias(bias), Softcap(CAP)))
    visible_again = np.exp(-CAP - np.moveaxis(result.lse, -1, -2))  # [B N T]
    close(result.weights[..., 4:], np.stack([visible_again] * (S - 4), axis=-1))
    gradients = reference.attention_gradients(*arrays, score=(Bias(bias), Softcap(CAP)))
    assert all(np.all(np.isfinite(x)) for x in gradients[:3])
    assert np.all(gradients.score[0][4:] == 0.0)
    assert np.all(gradients.score[0][:4] != 0.0)
    assert np.all(gradients.key[:, 4:] == 0.0)
    assert np.all(gradients.value[:, 4:] != 0.0)


@pytest.mark.parametrize("step", [Softcap(CAP), Bias(np.ones((T, S)))], ids=["softcap", "bias"])
def test_one_step_is_a_sequence_of_one(step):
    *qkv, d_out, d_lse = inputs()
    equal(reference.attention(*qkv, score=step), reference.attention(*qkv, score=[step]))
    alone = reference.attention_gradients(*qkv, d_out, d_lse, score=step)
    listed = reference.attention_gradients(*qkv, d_out, d_lse, score=[step])
    equal(alone[:3], listed[:3])


def test_examples_are_independent():
    arrays, options = inputs(), every_option()
    arrays[0][1], arrays[1][1], arrays[2][1] = np.nan, np.nan, np.nan
    bad = reference.attention(*arrays[:3], **options)
    good = reference.attention(*inputs()[:3], **options)
    equal([x[0] for x in bad], [x[0] for x in good])


@pytest.mark.parametrize("sinks", [None, np.ones(N)], ids=["no sinks", "sinks"])
@pytest.mark.parametrize(("t", "s", "batch"), [(T, 0, B), (0, S, B), (0, 0, B), (T, S, 0)])
def test_no_keys_no_queries_no_examples(t, s, batch, sinks):
    query, key = np.ones((batch, t, N, H)), np.ones((batch, s, K, H))
    value, d_out, d_lse = (
        np.ones((batch, s, K, D)),
        np.ones((batch, t, N, D)),
        np.ones((batch, t, N)),
    )
    options = {
        "mask": np.ones((t, s), bool),
        "score": (Softcap(CAP), Bias(np.ones((1, s)))),
        "sinks": sinks,
        "keep": np.ones((t, s), bool),
        "dropout_rate": RATE,
    }
    result = reference.attention(query, key, value, **options)
    assert [x.shape for x in result] == [d_out.shape, d_lse.shape, (batch, N, t, s)]
    assert np.all(result.out == 0.0)
    assert np.all(result.lse == (-np.inf if sinks is None else 1.0))
    g = reference.attention_gradients(query, key, value, d_out, d_lse, **options)
    assert [x.shape for x in g[:3]] == [query.shape, key.shape, value.shape]
    assert all(np.all(x == 0.0) for x in (*g[:3], g.score[1], g.scale))
    assert g.score[1].shape == (1, s)
    if sinks is not None:
        equal(g.sinks, np.full(N, float(batch * t)))


def test_no_heads():
    query, key = np.ones((B, T, 0, H)), np.ones((B, S, 0, H))
    assert reference.attention(query, key, key).out.shape == (B, T, 0, H)


# Errors


def wrong(**changes):
    names = ["query", "key", "value"]
    arguments = {**dict(zip(names, inputs(), strict=False)), **changes}
    return lambda: reference.attention(**arguments)


def wrong_gradients(**changes):
    arrays = dict(zip(["query", "key", "value", "d_out", "d_lse"], inputs(), strict=True))
    return lambda: reference.attention_gradients(**{**arrays, **changes})


ERRORS = {
    "query must have shape [*B T N H], got (11,)": wrong(query=np.ones(H)),
    "key must have shape [*B S K H] with *B = (2,), H = 11, got (2, 7, 3, 4)": wrong(
        key=np.ones((B, S, K, 4))
    ),
    "key must have shape [*B S K H] with *B = (2,), H = 11, got (7, 3, 11)": wrong(
        key=np.ones((S, K, H))
    ),
    "value must have shape [*B S K D] with *B = (2,), S = 7, K = 3, got (2, 5, 3, 13)": wrong(
        value=np.ones((B, 5, K, D))
    ),
    "key has 4 heads (K) but query has 6 (N): N must be a multiple of K": wrong(
        key=np.ones((B, S, 4, H)), value=np.ones((B, S, 4, D))
    ),
    "key has 0 heads (K) but query has 6 (N): K must be at least 1": wrong(
        key=np.ones((B, S, 0, H)), value=np.ones((B, S, 0, D))
    ),
    "query and key must have a width (H) of at least 1, got 0": wrong(
        query=np.ones((B, T, N, 0)), key=np.ones((B, S, K, 0))
    ),
    "mask must be bool, got float64": wrong(mask=np.ones((T, S))),
    "mask must be bool, got object: convert a Mask with mask.to_dense(T, S)": wrong(
        mask=masks.causal()
    ),
    "mask must broadcast to [*B N T S] = (2, 6, 5, 7), got (7, 5)": wrong(
        mask=np.ones((S, T), bool)
    ),
    "mask must broadcast to [*B N T S] = (2, 6, 5, 7), got (1, 2, 6, 5, 7)": wrong(
        mask=np.ones((1, B, N, T, S), bool)
    ),
    "query_positions must be integers, got float64": wrong(query_positions=np.ones(T)),
    "query_positions must have shape [T] or [*B T] with T = 5 and *B = (2,), got (7,)": wrong(
        query_positions=np.arange(S)
    ),
    "key_positions must have shape [S] or [*B S] with S = 7 and *B = (2,), got (3, 7)": wrong(
        key_positions=np.ones((3, S), int)
    ),
    "keep must be bool, got int64": wrong(keep=np.ones((T, S), np.int64)),
    "keep must broadcast to [*B N T S] = (2, 6, 5, 7), got (3, 1, 1)": wrong(
        keep=np.ones((K, 1, 1), bool)
    ),
    "keep must be given with a dropout_rate of 0.3, got None": wrong(dropout_rate=RATE),
    "dropout_rate must be in [0, 1), got 1.0": wrong(keep=np.True_, dropout_rate=1.0),
    "dropout_rate must be in [0, 1), got -0.1": wrong(keep=np.True_, dropout_rate=-0.1),
    "score[1].array must broadcast to [*B N T S] = (2, 6, 5, 7), got (7, 1)": wrong(
        score=(Softcap(CAP), Bias(np.ones((S, 1))))
    ),
    "score must be Softcap or Bias, or a sequence of them, got 3.0": wrong(score=3.0),
    "score must be Softcap or Bias, or a sequence of them, got [3.0]": wrong(score=[3.0]),
    "sinks must have shape [N] with N = 6, got (3,)": wrong(sinks=np.ones(K)),
    "scale must be one number, got shape (6,)": wrong(scale=np.ones(N)),
    "scale must be finite, got nan": wrong(scale=math.nan),
    "scale must be finite, got -inf": wrong(scale=-math.inf),
    "cap must be positive and finite, got 0.0": lambda: Softcap(0.0),
    "cap must be positive and finite, got nan": lambda: Softcap(math.nan),
    "cap must be positive and finite, got inf": lambda: Softcap(math.inf),
    "d_out must have shape [*B T N D] with *B = (2,), T = 5, N = 6, D = 13, got (13,)": (
        wrong_gradients(d_out=np.ones(D))
    ),
    "d_lse must have shape [*B T N] with *B = (2,), T = 5, N = 6, got (2, 6, 5)": wrong_gradients(
        d_lse=np.ones((B, N, T))
    ),
    "q must have shape [T H], got (2, 5, 6, 11)": lambda: reference.head(*inputs()[:3]),
    "k must have shape [S H] with H = 2, got (1, 3)": lambda: reference.head(
        [[1.0, 2.0]], [[1.0, 2.0, 3.0]], [[1.0]]
    ),
    "sink must have shape [], got (1,)": lambda: reference.head(
        [[1.0]], [[1.0]], [[1.0]], sink=np.ones(1)
    ),
    "mask must broadcast to [T S] = (1, 1), got (2, 1)": lambda: reference.head(
        [[1.0]], [[1.0]], [[1.0]], mask=[[True], [True]]
    ),
}


@pytest.mark.parametrize(("message", "call"), ERRORS.items(), ids=ERRORS.keys())
def test_errors_name_the_argument_and_what_was_expected_and_given(message, call):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
