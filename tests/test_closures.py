"""Arrays that functions of masks and scores close over: gradients, transformations, values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import jax_normal, slow

import attention_jax as aj
from attention_jax import masks, scores

# 257 tokens: one more than `xla` is chosen for.
IMPLEMENTATIONS = ("xla", "blockwise")
mostly_blockwise = pytest.mark.parametrize("implementation", ["blockwise", slow("xla")])


X = jax_normal(0, 1, 20, 2, 4)


def loss(w, implementation, x=X, f=lambda s, w: s * w):
    score = scores.score_fn(lambda s, b, n, q, k: f(s, w))
    return (aj.attention(x, x, x, score=score, implementation=implementation) ** 2).sum()


def as_argument(w, x=X, f=lambda s, w: s * w):
    """The same with ``w`` as an argument of the function, materialized."""
    score = scores.score_fn(lambda s, b, n, q, k, w: f(s, w), w)
    return (aj.attention(x, x, x, score=score, implementation="xla") ** 2).sum()


TRANSFORMED = {
    "value": lambda f: f,
    "jit": jax.jit,
    "grad": jax.grad,
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "jvp": lambda f: jax.jit(lambda w: jax.jvp(f, (w,), (jnp.ones_like(w),))[1]),
    "hessian": lambda f: jax.jit(jax.hessian(f)),
    "vmap": lambda f: lambda w: jax.vmap(f)(jnp.stack([w, 2 * w])),
    "scan": lambda f: lambda w: jax.lax.scan(lambda c, w: (c, f(w)), 0, jnp.stack([w, 2 * w]))[1],
    "checkpoint": lambda f: jax.jit(jax.grad(jax.checkpoint(f))),
}


# ``xla`` is plain JAX: a default run checks its gradient alone.
@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "blockwise") for name in TRANSFORMED), ("jit of grad", "xla")]
    + [slow(name, "xla") for name in ("jvp", "hessian", "vmap")],
)
def test_a_traced_number_under_transformations(name, implementation):
    w = jnp.float32(0.7)
    got = TRANSFORMED[name](lambda w: loss(w, implementation))(w)
    np.testing.assert_allclose(got, TRANSFORMED[name](as_argument)(w), rtol=2e-4)


@mostly_blockwise
def test_the_gradient_equals_finite_differences(implementation):
    got = jax.jit(jax.grad(loss), static_argnums=1)(1.0, implementation)
    expected = (loss(1.01, implementation) - loss(0.99, implementation)) / 0.02
    np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_table_and_its_gradient(implementation):
    def run(table, implementation, closed):
        rule = lambda s, b, n, q, k, table: s + table[n, jnp.abs(q - k) % 5]  # noqa: E731
        if closed:
            score = scores.score_fn(lambda *indices: rule(*indices, table))
        else:
            score = scores.score_fn(rule, table)
        return (aj.attention(X, X, X, score=score, implementation=implementation) ** 2).sum()

    table = jax_normal(1, 2, 5)
    got = jax.jit(jax.grad(run), static_argnums=(1, 2))(table, implementation, True)
    np.testing.assert_allclose(got, jax.grad(run)(table, "xla", False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mask_closes_over_a_traced_array(implementation):
    ids = jnp.arange(20) // 7

    def run(x, ids):
        mask = masks.mask_fn(lambda b, n, q, k: ids[q] == ids[k]) & masks.causal()
        return aj.attention(x, x, x, mask=mask, implementation=implementation)

    segments = aj.attention(X, X, X, mask=masks.segments(ids) & masks.causal())
    np.testing.assert_allclose(jax.jit(run)(X, ids), segments, atol=1e-6)
    both = jax.vmap(run, (None, 0))(X, jnp.stack([ids, 0 * ids]))
    np.testing.assert_allclose(both[0], segments, atol=1e-6)
    np.testing.assert_allclose(both[1], aj.attention(X, X, X, mask=masks.causal()), atol=1e-6)


@mostly_blockwise
def test_a_function_with_a_custom_derivative(implementation):
    @jax.custom_jvp
    def straight(x):
        return jnp.round(4 * x) / 4

    straight.defjvps(lambda t, ans, x: 3.0 * t)
    f = lambda s, w: straight(jax.nn.softplus(s * w))  # noqa: E731
    for transformed in (jax.grad, lambda f: jax.jit(jax.hessian(f))):
        got = transformed(lambda w: loss(w, implementation, f=f))(0.7)
        expected = transformed(lambda w: as_argument(w, f=f))(jnp.float32(0.7))
        np.testing.assert_allclose(got, expected, rtol=2e-4)


@mostly_blockwise
def test_nnx_parameters_that_a_function_closes_over(implementation):
    def run(w, x):
        score = scores.score_fn(lambda s, b, n, q, k: s * w[...])
        return (aj.attention(x, x, x, score=score, implementation=implementation) ** 2).sum()

    w = nnx.Param(jnp.float32(0.7))
    gradient = nnx.jit(nnx.grad(run))(w, X)[...]
    np.testing.assert_allclose(gradient, jax.grad(as_argument)(0.7), rtol=1e-4)


def test_one_function_and_a_parameter_that_changes_outside_of_jit():
    w = nnx.Param(jnp.float32(0.7))
    score = scores.score_fn(lambda s, b, n, q, k: s * w[...])
    for value in (0.7, -0.2):
        w[...] = jnp.float32(value)
        got = (aj.attention(X, X, X, score=score) ** 2).sum()
        np.testing.assert_allclose(got, as_argument(jnp.float32(value)), rtol=1e-5)


def test_python_numbers_that_change_outside_of_jit():
    held = {}
    score = scores.score_fn(lambda s, b, n, q, k: s * held["w"])
    for w in (1.0, 2.0, np.float32(3.0)):
        held["w"] = w
        got = (aj.attention(X, X, X, score=score) ** 2).sum()
        np.testing.assert_allclose(got, as_argument(jnp.float32(w)), rtol=1e-5)


def test_a_new_lambda_on_every_call_is_compiled_once():
    def call(w):
        return aj.attention(X, X, X, score=scores.score_fn(lambda s, b, n, q, k: s * w + 0.25))

    from attention_jax.api import _attention

    call(jnp.float32(1.0))
    before = _attention._cache_size()
    call(jnp.float32(2.0))
    assert _attention._cache_size() == before


def test_weights_and_mechanisms_take_closures():
    def weights(w):
        score = scores.score_fn(lambda s, b, n, q, k: s * w)
        return aj.attention_weights(X, X, score=score)[0, 0, 0, 1]

    expected = jax.grad(lambda w: jax.nn.softmax(w * X[0, :1, 0] @ X[0, :, 0].T / 2)[0, 1])(0.7)
    np.testing.assert_allclose(jax.jit(jax.grad(weights))(0.7), expected, rtol=1e-4)


def test_explain_names_what_a_gpu_kernel_cannot_close_over():
    shape = jax.ShapeDtypeStruct((1, 512, 4, 64), "bfloat16")
    table, number = jnp.arange(4.0), jnp.float32(2)

    def reason(score):
        plan = aj.explain(shape, shape, shape, score=score, platform="gpu")
        return plan.chosen, plan.reasons["pallas_gpu"]

    closed = scores.score_fn(lambda s, b, n, q, k: s + table[n])
    chosen, why = reason(closed)
    assert chosen == "blockwise"
    assert "closes over an array, or over a number while it takes arrays: pass it" in why
    assert reason(scores.score_fn(lambda s, b, n, q, k, t: s + t[n], table))[0] == "pallas_gpu"
    assert reason(scores.score_fn(lambda s, b, n, q, k: s * number))[0] == "pallas_gpu"


def test_arrays_of_functions_that_need_a_whole_tile():
    known = np.linspace(0, 1, 20, dtype=np.float32)
    f = lambda w: lambda s, b, n, q, k: s + jnp.asarray(w)[q[:, 0]][:, None]  # noqa: E731
    for implementation in IMPLEMENTATIONS:  # known arrays may stay in the program
        out = aj.attention(X, X, X, score=scores.score_fn(f(known)), implementation=implementation)
        assert out.shape == X.shape
    with pytest.raises(TypeError, match=r"score_fn: fn closes over traced arrays .* pass these"):
        jax.jit(lambda w: aj.attention(X, X, X, score=scores.score_fn(f(w))))(known)


@mostly_blockwise
def test_what_a_score_function_may_return(implementation):
    def gradient(fn):
        def run(x):
            score = scores.score_fn(fn)
            return (aj.attention(x, x, x, score=score, implementation=implementation) ** 2).sum()

        return jax.jit(jax.grad(run))(X)

    plain = gradient(lambda s, b, n, q, k: s)
    low = gradient(lambda s, b, n, q, k: s.astype(jnp.bfloat16))
    np.testing.assert_allclose(low, plain, atol=0.05)
    flat = gradient(lambda s, b, n, q, k: s * 0)
    np.testing.assert_allclose(gradient(lambda s, b, n, q, k: 0.0), flat, atol=1e-5)
    np.testing.assert_allclose(gradient(lambda s, b, n, q, k: q), flat, atol=1e-5)


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (
            lambda s, b, n, q, k: s > 0,
            TypeError,
            "score_fn: fn must return real logits, got .*bool",
        ),
        (lambda s, b, n, q, k: (s, s), TypeError, "score_fn: fn must return one array, got 2"),
        (
            lambda s, b, n, q, k: None,
            TypeError,
            r"score_fn: fn must return one array, got 0 \(None",
        ),
        (
            lambda s, b, n, q, k: jnp.zeros((3, 1, 1)),
            ValueError,
            r"broadcasts to the tile .*3, 1, 1",
        ),
    ],
)
def test_what_a_score_function_may_not_return(fn, error, message):
    with pytest.raises(error, match=message):
        aj.attention(X, X, X, score=scores.score_fn(fn))


def test_what_functions_must_take():
    with pytest.raises(TypeError, match=r"mask_fn: fn is called as fn\(b, n, q, k, .* with 4"):
        aj.attention(X, X, X, mask=masks.mask_fn(lambda q, k: q >= k))
    with pytest.raises(TypeError, match=r"score_fn: fn is called as fn\(s, b, n, q, k.* with 6"):
        aj.attention(X, X, X, score=scores.score_fn(lambda s, b, n, q, k: s, jnp.ones(3)))


def test_what_a_mask_function_may_not_return():
    with pytest.raises(TypeError, match=r"mask_fn: fn must return bools, .* got dtype int32"):
        aj.attention(X, X, X, mask=masks.mask_fn(lambda b, n, q, k: q))
    with pytest.raises(ValueError, match=r"mask_fn: .* broadcasts to the tile"):
        aj.attention(X, X, X, mask=masks.mask_fn(lambda b, n, q, k: jnp.zeros((2, 2, 2), bool)))
    everything = aj.attention(X, X, X, mask=masks.mask_fn(lambda b, n, q, k: True))
    np.testing.assert_allclose(everything, aj.attention(X, X, X), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["blockwise", "xla"])
def test_second_derivatives_of_nested_custom_rules(implementation):
    """The derivative of sinc has a custom rule itself."""
    f = lambda s, w: s * jnp.sinc(w)  # noqa: E731
    got = jax.hessian(lambda w: loss(w, implementation, f=f))(0.0)
    expected = jax.hessian(lambda w: as_argument(w, f=f))(jnp.float32(0.0))
    assert abs(expected) > 1
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_of_a_complex_table(implementation):
    def run(table, implementation):
        turn = jnp.complex64(1 + 2j)
        rule = lambda s, b, n, q, k: s * jnp.real(table[(q - k) % 3] * turn)  # noqa: E731
        score = scores.score_fn(rule)
        return (aj.attention(X, X, X, score=score, implementation=implementation) ** 2).sum()

    table = jax.lax.complex(jax_normal(1, 3), jax_normal(2, 3))
    got = jax.grad(run)(table, implementation)
    step = 1e-2
    slopes = [
        (run(table.at[0].add(d), "xla") - run(table.at[0].add(-d), "xla")) / (2 * step)
        for d in (jnp.complex64(step), jnp.complex64(step * 1j))
    ]
    np.testing.assert_allclose(got[0], float(slopes[0]) - 1j * float(slopes[1]), rtol=2e-2)


TABLE = jax_normal(3, 20)


@pytest.mark.parametrize(
    "fn",
    [
        lambda s, b, n, q, k: jax.nn.relu(s),
        lambda s, b, n, q, k: jax.nn.relu(s * TABLE[0]),
        jax.jit(lambda s, b, n, q, k: s + TABLE[k]),
    ],
    ids=["rule", "rule and array", "jit and array"],
)
def test_the_same_function_is_compiled_once(fn):
    from attention_jax.api import _attention

    score = scores.score_fn(fn)
    aj.attention(X, X, X, score=score)
    before = _attention._cache_size()
    aj.attention(X, X, X, score=score)
    assert _attention._cache_size() == before


def test_functions_that_differ_only_in_their_derivative_are_unequal():
    def gradient(factor):
        straight = jax.custom_jvp(lambda x: x + 0)
        straight.defjvps(lambda t, ans, x: factor * t)
        score = scores.score_fn(lambda s, b, n, q, k: straight(s))
        return jax.grad(lambda x: (aj.attention(x, X, X, score=score) ** 2).sum())(X)

    np.testing.assert_allclose(gradient(2.0), 2 * gradient(1.0), rtol=1e-4)


# --- Numbers that are not part of the program, and constants that are.


def test_numbers_outside_the_block_map_are_compiled_once():
    from attention_jax.api import _attention

    def call(x):
        score = (scores.softcap(x), scores.alibi(offset=int(x)))
        key = jax.random.key(0)
        return aj.attention(X, X, X, score=score, dropout_rate=x / 10, dropout_key=key, scale=x)

    call(1.0)
    before = _attention._cache_size()
    second = call(2.0)
    assert _attention._cache_size() == before
    inside = jax.jit(lambda: call(2.0))()
    np.testing.assert_allclose(second, inside, atol=1e-6)


@pytest.mark.parametrize("kind", ["mask", "bias", "closure"])
def test_large_constants_are_hidden_from_constant_folding(kind):
    visible = np.tril(np.ones((300, 300), bool))
    x = jax_normal(0, 1, 300, 1, 4)

    def run(x):
        if kind == "mask":
            options = {"mask": visible}
        elif kind == "bias":
            options = {"score": scores.bias(np.where(visible, 0, -np.inf).astype(np.float32))}
        else:
            options = {"mask": masks.mask_fn(lambda b, n, q, k: jnp.asarray(visible)[q, k])}
        return aj.attention(x, x, x, **options)

    lowered = jax.jit(run).lower(x)
    assert "optimization_barrier" in lowered.as_text()
    expected = aj.attention(x, x, x, mask=masks.causal())
    np.testing.assert_allclose(jax.jit(run)(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "backend", [aj.backends.Blockwise(8, 8), aj.backends.PallasGPU(interpret=True)], ids=str
)
def test_a_float_in_a_mask_function_gets_no_gradient(backend):
    """It is an operand that varies, and the backward pass must leave it out."""
    x = np.random.default_rng(0).normal(size=(1, 20, 1, 16)).astype(np.float32)

    def loss(width, x, mask=None, implementation=backend):
        if mask is None:
            mask = masks.mask_fn(lambda b, n, q, k: jnp.abs(q - k).astype(jnp.float32) < width)
        return jnp.sin(aj.attention(x, x, x, mask=mask, implementation=implementation)).sum()

    d_width, d_x = jax.jit(jax.grad(loss, (0, 1)))(jnp.float32(3.5), x)
    band = np.abs(np.arange(20)[:, None] - np.arange(20)) < 3.5
    expected = jax.grad(lambda x: loss(0.0, x, band, "xla"))(x)
    assert d_width == 0.0
    np.testing.assert_allclose(d_x, expected, atol=1e-5)
