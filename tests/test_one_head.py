"""One head on plain arrays: the formulas of the blockwise backend without its primitives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow

from attention_jax import attention, masks, scores
from attention_jax.backends.blockwise import one_head_backward, one_head_forward

T, S, H, D = 7, 9, 4, 3
OPTIONS = {
    "plain": {},
    "causal, softcap": {"mask": masks.causal(), "score": scores.softcap(3.0)},
    "lengths, bias, sink": {
        "mask": masks.lengths(key=jnp.int32(5)),
        "score": scores.bias(jnp.linspace(-1.0, 1.0, T * S).reshape(1, T, S)),
        "sink": 0.5,
    },
    "window, dropout": {
        "mask": masks.window(3, 1),
        "dropout_rate": 0.3,
        "dropout_key": jax.random.key(1),
    },
}


def problem():
    shapes = {"q": (T, H), "k": (S, H), "v": (S, D), "d_out": (T, D), "d_lse": (T,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes.values(), strict=True)]


def by_attention(q, k, v, bias, sink, options):
    """Output and lse of the same head by the public function."""
    options = dict(options)
    options.pop("sink", None)
    if bias is not None:
        options["score"] = scores.bias(bias)
    out, lse = attention(
        *(x[:, None] for x in (q, k, v)),
        **options,
        sinks=None if sink is None else sink[None],
        implementation="xla",
        return_lse=True,
    )
    return out[:, 0], lse[:, 0]


@pytest.mark.parametrize("name", mostly_slow(OPTIONS, {"window, dropout"}))
def test_output_and_gradients_equal_attention(name):
    options = OPTIONS[name]
    q, k, v, d_out, d_lse = problem()
    bias = options["score"].array if "bias" in name else None
    sink = jnp.float32(options["sink"]) if "sink" in options else None

    @jax.jit
    def by_name(*arrays):
        expected, pull = jax.vjp(lambda *x: by_attention(*x, options), *arrays)
        return expected, pull((d_out, d_lse))

    expected, (dq, dk, dv, dbias, dsink) = by_name(q, k, v, bias, sink)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)  # noqa: E731
    jax.tree.map(close, one_head_forward(q, k, v, block=(3, 4), **options), expected)
    got = one_head_backward(q, k, v, d_out, d_lse, block=(3, 4), **options)
    jax.tree.map(close, (got.query, got.key, got.value), (dq, dk, dv))
    if bias is not None:
        close(got.score[0], dbias[0])
    if sink is not None:
        close(got.sink, dsink)


@pytest.mark.slow
def test_loops_run_in_python_without_jit(capsys):
    q, k, v, *_ = problem()

    def printed(s, b, n, q, k):
        jax.debug.callback(lambda: None)
        if not isinstance(s, jax.core.Tracer):
            print("concrete tile", s.shape)
        return s

    with jax.disable_jit():
        out, _ = one_head_forward(q, k, v, block=(3, 4), score=scores.score_fn(printed))
    expected, _ = by_attention(q, k, v, None, None, {})
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)
    assert "concrete tile (3, 4)" in capsys.readouterr().out
