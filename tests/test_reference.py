"""The oracle, checked by means that share nothing with it.

Its formula against scalar loops, its gradients against finite differences and against automatic
differentiation, and each promise about empty rows, masked keys and errors on its own.
"""

import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from attention_jax import reference
from attention_jax.reference import Bias, Softcap

B, T, S, K, N, H, D = 2, 5, 7, 3, 6, 11, 13  # distinct, N a multiple of K, the others prime
G = N // K
CAP, RATE = 1.7, 0.3


def inputs(seed=0, batch=(B,)):
    """Query, key, value, d_out, d_lse."""
    rng = np.random.default_rng(seed)
    shapes = [(T, N, H), (S, K, H), (S, K, D), (T, N, D), (T, N)]
    return [rng.normal(size=(*batch, *shape)) for shape in shapes]


def every_option(seed=1, batch=(B,)):
    """All options at once. Every query attends to some key, some to few."""
    rng = np.random.default_rng(seed)
    mask = rng.random((*batch, N, T, S)) < 0.6
    mask[..., np.arange(T), np.arange(T)] = True
    return {
        "mask": mask,
        "scores": (
            Bias(rng.normal(size=(N, 1, S))),
            Softcap(CAP),
            Bias(rng.normal(size=(*batch, 1, T, S))),
        ),
        "sinks": rng.normal(size=N),
        "scale": -0.37,
        "keep": rng.random((*batch, N, T, S)) > RATE,
        "dropout_rate": RATE,
    }


ONE_BY_ONE = {
    "plain": {},
    "mask": {"mask": every_option()["mask"]},
    "mask of one row": {"mask": np.arange(S) % 3 > 0},
    "softcap": {"scores": (Softcap(CAP),)},
    "bias": {"scores": (every_option()["scores"][0],)},
    "softcap, then bias": {"scores": every_option()["scores"][1:]},
    "bias, then softcap": {"scores": every_option()["scores"][:2]},
    "sinks": {"sinks": every_option()["sinks"]},
    "scale": {"scale": 0.83},
    "negative scale": {"scale": -0.83},
    "dropout": {"keep": every_option()["keep"], "dropout_rate": RATE},
    "everything": every_option(),
}
each_option = pytest.mark.parametrize("options", ONE_BY_ONE.values(), ids=ONE_BY_ONE.keys())


def literal(query, key, value, options):
    """The definition in scalar loops: `math`, no running maximum, no matrix."""
    *batch, t_len, n_len, width = query.shape
    s_len, kv_len = key.shape[-3:-1]
    full = (*batch, n_len, t_len, s_len)
    mask = np.broadcast_to(options.get("mask", True), full)
    keep = np.broadcast_to(options.get("keep", True), full)
    rate = options.get("dropout_rate", 0.0)
    scale = options.get("scale", width**-0.5)
    out = np.zeros((*batch, t_len, n_len, value.shape[-1]))
    lse, weights = np.zeros((*batch, t_len, n_len)), np.zeros(full)
    for (*b, n, t), _ in np.ndenumerate(weights[..., 0]):
        kv = n // (n_len // kv_len)
        terms = []
        for s in range(s_len):
            logit = scale * sum(query[*b, t, n, h] * key[*b, s, kv, h] for h in range(width))
            for step in options.get("scores", ()):
                if isinstance(step, Softcap):
                    logit = step.cap * math.tanh(logit / step.cap)
                else:
                    logit = logit + np.broadcast_to(step.array, full)[*b, n, t, s]
            terms.append(math.exp(logit) if mask[*b, n, t, s] else 0.0)
        sink = math.exp(options["sinks"][n]) if "sinks" in options else 0.0
        lse[*b, t, n] = math.log(sum(terms) + sink)
        for s in range(s_len):
            weights[*b, n, t, s] = terms[s] / (sum(terms) + sink)
            if keep[*b, n, t, s]:
                out[*b, t, n] += weights[*b, n, t, s] / (1 - rate) * value[*b, s, kv]
    return out, lse, weights


def close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def equal(actual, expected):
    np.testing.assert_equal(actual, expected)


# Forward


@each_option
def test_forward_equals_scalar_loops(options):
    query, key, value, *_ = inputs()
    result = reference.attention(query, key, value, **options)
    for actual, expected in zip(result, literal(query, key, value, options), strict=True):
        assert actual.shape == expected.shape
        close(actual, expected)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)], ids=str)
def test_any_number_of_batch_axes(batch):
    query, key, value, *_ = inputs(batch=batch)
    options = every_option(batch=batch)
    result = reference.attention(query, key, value, **options)
    for actual, expected in zip(result, literal(query, key, value, options), strict=True):
        assert actual.shape == expected.shape
        close(actual, expected)


def test_query_head_n_reads_key_head_n_over_g():
    query, key, value, *_ = inputs()
    shared = reference.attention(query, key, value)
    copied = reference.attention(query, np.repeat(key, G, axis=-2), np.repeat(value, G, axis=-2))
    equal(shared, copied)


def test_default_scale_is_one_over_root_of_width():
    query, key, value, *_ = inputs()
    default = reference.attention(query, key, value)
    equal(default, reference.attention(query, key, value, scale=1 / math.sqrt(H)))


@each_option
def test_weights_sum_to_one_less_the_share_of_the_sink(options):
    query, key, value, *_ = inputs()
    result = reference.attention(query, key, value, **options)
    share = 0.0
    if "sinks" in options:
        share = np.exp(options["sinks"] - result.lse)  # [B T N]
    close(np.moveaxis(result.weights.sum(axis=-1), -2, -1), 1.0 - share + np.zeros((B, T, N)))


def test_a_sink_is_a_key_whose_value_is_zero():
    query, key, value, *_ = inputs()
    sinks = np.linspace(-1.0, 2.0, N)
    with_sinks = reference.attention(query, key, value, sinks=sinks)
    bias = np.zeros((N, 1, S + 1))
    bias[:, 0, -1] = sinks
    extra = [(0, 0), (0, 1), (0, 0), (0, 0)]
    with_a_key = reference.attention(
        query, np.pad(key, extra), np.pad(value, extra), scores=[Bias(bias)], scale=H**-0.5
    )
    close(with_sinks.out, with_a_key.out)
    close(with_sinks.lse, with_a_key.lse)
    close(with_sinks.weights, with_a_key.weights[..., :-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32])
def test_any_dtype_is_computed_in_float64(dtype):
    arrays = [(3 * x).astype(dtype) for x in inputs()]
    bias = np.random.default_rng(2).normal(size=(T, S)).astype(dtype)
    wide = [x.astype(np.float64) for x in arrays]
    options, wide_options = ({"scores": [Bias(b)]} for b in (bias, bias.astype(np.float64)))
    result = reference.attention(*arrays[:3], **options)
    gradients = reference.attention_gradients(*arrays, **options)
    assert all(x.dtype == np.float64 for x in (*result, *gradients[:3], gradients.scores[0]))
    equal(result, reference.attention(*wide[:3], **wide_options))
    equal(gradients, reference.attention_gradients(*wide, **wide_options))


def test_jax_arrays_are_computed_in_float64():
    q, k, v = (x[0, :, 0].astype(np.float32) for x in inputs()[:3])
    bias = np.random.default_rng(2).normal(size=(T, S)).astype(np.float32)
    on_device = reference.head(*map(jnp.asarray, (q, k, v)), scores=[Bias(jnp.asarray(bias))])
    assert all(type(x) is np.ndarray and x.dtype == np.float64 for x in on_device)
    equal(on_device, reference.head(q, k, v, scores=[Bias(bias)]))


def test_large_logits_are_exact():
    # Logits 0, 1e4 and 1e4 - log 3: their exponentials overflow, their softmax is 0, 3/4, 1/4.
    key = np.array([[0.0], [1e4], [1e4 - math.log(3)]])
    result = reference.head([[1.0]], key, np.eye(3), scale=1.0)
    close(result.out, [[0.0, 0.75, 0.25]])
    close(result.lse, [1e4 + math.log(4 / 3)], 1e-15)
    # -1e4 alone would underflow to an empty row.
    close(reference.head([[-1.0]], [[1e4], [1e4]], [[2.0], [4.0]], scale=1.0).out, [[3.0]])
    # The sink may be the largest, too.
    result = reference.head([[1.0]], [[0.0]], [[1.0]], sink=1e4)
    equal((result.out, result.lse), ([[0.0]], [1e4]))


@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_a_shift_of_all_logits_moves_only_lse(shift):
    query, key, value, d_out, _ = inputs()
    shifted = {"scores": [Bias(np.array(shift))]}
    result = reference.attention(query, key, value, **shifted)
    plain = reference.attention(query, key, value)
    close(result.out, plain.out, 1e-11)
    close(result.lse, plain.lse + shift, 1e-11)
    of_shift = reference.attention_gradients(query, key, value, d_out, **shifted).scores[0]
    close(of_shift, 0.0, 1e-12)


# Backward


def along(loss, x, direction, h=1e-5):
    """The derivative of `loss` at `x` along `direction`, by central differences."""
    return (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)


def losses(arrays, options, use_lse=True):
    """For every differentiable argument: its name, its value, the loss as its function."""
    query, key, value, d_out, d_lse = arrays

    def loss(query=query, key=key, value=value, **changes):
        result = reference.attention(query, key, value, **{**options, **changes})
        return np.sum(result.out * d_out) + (np.sum(result.lse * d_lse) if use_lse else 0.0)

    yield "query", query, lambda x: loss(query=x)
    yield "key", key, lambda x: loss(key=x)
    yield "value", value, lambda x: loss(value=x)
    yield "scale", np.float64(options.get("scale", H**-0.5)), lambda x: loss(scale=x)
    if "sinks" in options:
        yield "sinks", options["sinks"], lambda x: loss(sinks=x)
    steps = tuple(options.get("scores", ()))
    for i, step in enumerate(steps):
        if isinstance(step, Bias):
            yield i, step.array, lambda x, i=i: loss(scores=(*steps[:i], Bias(x), *steps[i + 1 :]))


@pytest.mark.parametrize("use_lse", [True, False], ids=["lse", "no lse"])
@each_option
def test_gradients_equal_finite_differences(options, use_lse):
    arrays = inputs()
    d_lse = arrays[4] if use_lse else None
    gradients = reference.attention_gradients(*arrays[:4], d_lse, **options)
    rng = np.random.default_rng(3)
    for name, x, loss in losses(arrays, options, use_lse):
        gradient = gradients.scores[name] if isinstance(name, int) else getattr(gradients, name)
        assert np.shape(gradient) == x.shape, name
        for direction in rng.normal(size=(3, *x.shape)):
            close(np.sum(gradient * direction), along(loss, x, direction), 1e-7)


def test_each_entry_of_each_gradient_equals_finite_differences():
    t, s, h, d = 3, 5, 2, 7
    rng = np.random.default_rng(4)
    q, k, v, d_out, d_lse = (
        rng.normal(size=shape) for shape in [(t, h), (s, h), (s, d), (t, d), (t,)]
    )
    options = {
        "mask": np.tri(t, s, 1, dtype=bool),
        "keep": rng.random((t, s)) > RATE,
        "dropout_rate": RATE,
    }
    point = {
        "q": q,
        "k": k,
        "v": v,
        "bias": rng.normal(size=s),
        "sink": np.float64(0.3),
        "scale": np.float64(-2),
    }

    def loss(q, k, v, bias, sink, scale):
        scores = (Softcap(CAP), Bias(bias))
        result = reference.head(q, k, v, scores=scores, sink=sink, scale=scale, **options)
        return np.sum(result.out * d_out) + np.sum(result.lse * d_lse)

    options_at_point = dict(options, scores=(Softcap(CAP), Bias(point["bias"])))
    g = reference.head_gradients(
        q, k, v, d_out, d_lse, sink=point["sink"], scale=point["scale"], **options_at_point
    )
    assert g.scores[0] is None
    gradients = [g.query, g.key, g.value, g.scores[1], g.sinks, g.scale]
    for (name, x), gradient in zip(point.items(), gradients, strict=True):
        for i in np.ndindex(x.shape):
            unit = np.zeros(x.shape)
            unit[i] = 1.0
            numeric = along(lambda x, name=name: loss(**{**point, name: x}), x, unit)
            close(np.asarray(gradient)[i], numeric, 1e-8)


def test_gradients_equal_automatic_differentiation():
    arrays, options = inputs(), every_option()
    first, _, second = options["scores"]

    def loss(query, key, value, first, second, sinks, scale):
        key, value = jnp.repeat(key, G, axis=2), jnp.repeat(value, G, axis=2)
        logits = CAP * jnp.tanh((scale * jnp.einsum("btnh,bsnh->bnts", query, key) + first) / CAP)
        logits = jnp.where(options["mask"], logits + second, -jnp.inf)
        sinks = jnp.broadcast_to(sinks[:, None, None], (B, N, T, 1))
        joined = jnp.concatenate([logits, sinks], axis=-1)
        weights = jax.nn.softmax(joined, axis=-1)[..., :-1]
        weights = jnp.where(options["keep"], weights, 0.0) / (1 - RATE)
        lse = jnp.einsum("bnt->btn", jax.nn.logsumexp(joined, axis=-1))
        out = jnp.einsum("bnts,bsnd->btnd", weights, value)
        return jnp.sum(out * arrays[3]) + jnp.sum(lse * arrays[4])

    with jax.enable_x64(True):
        at = [*arrays[:3], first.array, second.array, options["sinks"], options["scale"]]
        expected = jax.jit(jax.grad(loss, argnums=tuple(range(7))))(*map(jnp.asarray, at))
        expected = [np.asarray(x) for x in expected]
    assert expected[0].dtype == np.float64
    g = reference.attention_gradients(*arrays, **options)
    assert g.scores[1] is None
    actual = [g.query, g.key, g.value, g.scores[0], g.scores[2], g.sinks, g.scale]
    for a, e in zip(actual, expected, strict=True):
        assert np.shape(a) == e.shape
        close(a, e)


def test_delta_is_the_row_sum_of_out_times_its_gradient():
    arrays, options = inputs(), every_option()
    result = reference.attention(*arrays[:3], **options)
    # What lies on the sink's logit is sink share * (d_lse - delta): solve for delta.
    share = np.exp(options["sinks"] - result.lse)
    delta = np.sum(result.out * arrays[3], axis=-1)
    sinks = reference.attention_gradients(*arrays, **options).sinks
    close(sinks, np.sum(share * (arrays[4] - delta), axis=(0, 1)))


@pytest.mark.parametrize(
    "shape", [(), (1,), (S,), (T, 1), (1, S), (N, 1, 1), (B, 1, T, S)], ids=str
)
def test_the_gradient_of_a_bias_has_its_shape(shape):
    arrays = inputs()
    full = reference.attention_gradients(*arrays, scores=[Bias(np.zeros((B, N, T, S)))]).scores[0]
    own = reference.attention_gradients(*arrays, scores=[Bias(np.zeros(shape))]).scores[0]
    assert own.shape == shape
    padded = (1,) * (4 - len(shape)) + shape
    axes = tuple(i for i in range(4) if padded[i] == 1)
    close(own, full.sum(axis=axes, keepdims=True).reshape(shape))


def test_without_sinks_there_is_no_gradient_of_them():
    assert reference.attention_gradients(*inputs()).sinks is None
    assert reference.head_gradients([[1.0]], [[1.0]], [[1.0]], [[1.0]]).sinks is None
    assert reference.head_gradients([[1.0]], [[1.0]], [[1.0]], [[1.0]], sink=0.0).sinks.shape == ()


# Empty rows, masked keys


HIDDEN_KEYS, EMPTY_ROWS = [2, 6], [0, 3]


def partial_mask():
    """[B N T S], keys that no query sees and queries that see no key, and holes besides."""
    mask = every_option()["mask"].copy()
    mask[..., HIDDEN_KEYS] = False
    mask[..., EMPTY_ROWS, :] = False
    return mask


def hiding(how, mask):
    """Options that hide what `mask` hides, in several ways."""
    bias = np.where(mask, 0.3, -np.inf)
    return {
        "mask": {"mask": mask},
        "bias": {"scores": (Bias(bias),)},
        "softcap, then bias": {"scores": (Softcap(CAP), Bias(bias))},
        "bias twice": {"scores": (Bias(bias), Bias(np.full((T, S), 0.1)))},
        "both": {"mask": mask, "scores": (Bias(bias),)},
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
    for array in gradients.scores:
        if array is not None and array.shape == (B, N, T, S):
            assert np.all(array[:, :, EMPTY_ROWS] == 0.0)


def test_if_all_rows_are_masked_everything_is_zero():
    arrays = inputs()
    options = {"mask": np.zeros((1, 1), bool), "scores": (Softcap(CAP), Bias(np.ones((T, S))))}
    result = reference.attention(*arrays[:3], **options)
    assert np.all(result.out == 0.0)
    assert np.all(result.lse == -np.inf)
    gradients = reference.attention_gradients(*arrays, **options)
    assert gradients.scale == 0.0
    for array in (*gradients[:3], gradients.scores[1]):
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
        {"mask": mask, "scores": (Bias(b), Softcap(CAP), Bias(-b))}
        for b in (bias, np.where(mask, bias, poison))
    )
    equal(reference.attention(*arrays[:3], **planted), reference.attention(*arrays[:3], **clean))
    g = reference.attention_gradients(*arrays, **planted)
    equal(g, reference.attention_gradients(*arrays, **clean))
    assert np.all(g.scores[0][~mask] == 0.0)
    assert np.all(g.scores[2][~mask] == 0.0)


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
    result = reference.attention(*arrays[:3], scores=(Bias(bias), Softcap(CAP)))
    visible_again = np.exp(-CAP - np.moveaxis(result.lse, -1, -2))  # [B N T]
    close(result.weights[..., 4:], np.stack([visible_again] * (S - 4), axis=-1))
    gradients = reference.attention_gradients(*arrays, scores=(Bias(bias), Softcap(CAP)))
    assert all(np.all(np.isfinite(x)) for x in gradients[:3])
    assert np.all(gradients.scores[0][4:] == 0.0)
    assert np.all(gradients.scores[0][:4] != 0.0)
    assert np.all(gradients.key[:, 4:] == 0.0)
    assert np.all(gradients.value[:, 4:] != 0.0)


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
        "scores": (Softcap(CAP), Bias(np.ones((1, s)))),
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
    assert all(np.all(x == 0.0) for x in (*g[:3], g.scores[1], g.scale))
    assert g.scores[1].shape == (1, s)
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
    "key has 0 heads (K) but query has 6 (N): N must be a multiple of K": wrong(
        key=np.ones((B, S, 0, H)), value=np.ones((B, S, 0, D))
    ),
    "query and key must have a width (H) of at least 1, got 0": wrong(
        query=np.ones((B, T, N, 0)), key=np.ones((B, S, K, 0))
    ),
    "mask must be bool, got float64": wrong(mask=np.ones((T, S))),
    "mask must broadcast to [*B N T S] = (2, 6, 5, 7), got (7, 5)": wrong(
        mask=np.ones((S, T), bool)
    ),
    "mask must broadcast to [*B N T S] = (2, 6, 5, 7), got (1, 2, 6, 5, 7)": wrong(
        mask=np.ones((1, B, N, T, S), bool)
    ),
    "keep must be bool, got int64": wrong(keep=np.ones((T, S), np.int64)),
    "keep must broadcast to [*B N T S] = (2, 6, 5, 7), got (3, 1, 1)": wrong(
        keep=np.ones((K, 1, 1), bool)
    ),
    "keep must be given with a dropout_rate of 0.3, got None": wrong(dropout_rate=RATE),
    "dropout_rate must be in [0, 1), got 1.0": wrong(keep=np.True_, dropout_rate=1.0),
    "dropout_rate must be in [0, 1), got -0.1": wrong(keep=np.True_, dropout_rate=-0.1),
    "scores[1].array must broadcast to [*B N T S] = (2, 6, 5, 7), got (7, 1)": wrong(
        scores=(Softcap(CAP), Bias(np.ones((S, 1))))
    ),
    "scores must be a sequence of Softcap and Bias steps, got Softcap(cap=1.7)": wrong(
        scores=Softcap(CAP)
    ),
    "scores must be a sequence of Softcap and Bias steps, got [3.0]": wrong(scores=[3.0]),
    "sinks must have shape [N] with N = 6, got (3,)": wrong(sinks=np.ones(K)),
    "scale must be one number, got shape (6,)": wrong(scale=np.ones(N)),
    "cap must be a positive number, got 0.0": lambda: Softcap(0.0),
    "cap must be a positive number, got nan": lambda: Softcap(math.nan),
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
