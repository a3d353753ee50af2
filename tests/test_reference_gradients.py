"""The oracle's gradients against finite differences and automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_problems import CAP, RATE, B, G, H, N, S, T, close, each_option, every_option, inputs

from attention_jax import reference
from attention_jax.reference import Bias, Softcap


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
    steps = tuple(options.get("score", ()))
    for i, step in enumerate(steps):
        if isinstance(step, Bias):
            yield i, step.array, lambda x, i=i: loss(score=(*steps[:i], Bias(x), *steps[i + 1 :]))


@pytest.mark.parametrize("use_lse", [True, False], ids=["lse", "no lse"])
@each_option
def test_gradients_equal_finite_differences(options, use_lse):
    arrays = inputs()
    d_lse = arrays[4] if use_lse else None
    gradients = reference.attention_gradients(*arrays[:4], d_lse, **options)
    rng = np.random.default_rng(3)
    for name, x, loss in losses(arrays, options, use_lse):
        gradient = gradients.score[name] if isinstance(name, int) else getattr(gradients, name)
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
        score = (Softcap(CAP), Bias(bias))
        result = reference.head(q, k, v, score=score, sink=sink, scale=scale, **options)
        return np.sum(result.out * d_out) + np.sum(result.lse * d_lse)

    options_at_point = dict(options, score=(Softcap(CAP), Bias(point["bias"])))
    g = reference.head_gradients(
        q, k, v, d_out, d_lse, sink=point["sink"], scale=point["scale"], **options_at_point
    )
    assert g.score[0] is None
    gradients = [g.query, g.key, g.value, g.score[1], g.sinks, g.scale]
    for (name, x), gradient in zip(point.items(), gradients, strict=True):
        for i in np.ndindex(x.shape):
            unit = np.zeros(x.shape)
            unit[i] = 1.0
            numeric = along(lambda x, name=name: loss(**{**point, name: x}), x, unit)
            close(np.asarray(gradient)[i], numeric, 1e-8)


def test_gradients_equal_automatic_differentiation():
    arrays, options = inputs(), every_option()
    first, _, second = options["score"]

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
    assert g.score[1] is None
    actual = [g.query, g.key, g.value, g.score[0], g.score[2], g.sinks, g.scale]
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
    full = reference.attention_gradients(*arrays, score=[Bias(np.zeros((B, N, T, S)))]).score[0]
    own = reference.attention_gradients(*arrays, score=[Bias(np.zeros(shape))]).score[0]
    assert own.shape == shape
    padded = (1,) * (4 - len(shape)) + shape
    axes = tuple(i for i in range(4) if padded[i] == 1)
    close(own, full.sum(axis=axes, keepdims=True).reshape(shape))


def test_without_sinks_their_gradient_is_none():
    assert reference.attention_gradients(*inputs()).sinks is None
    assert reference.head_gradients([[1.0]], [[1.0]], [[1.0]], [[1.0]]).sinks is None
    assert reference.head_gradients([[1.0]], [[1.0]], [[1.0]], [[1.0]], sink=0.0).sinks.shape == ()
