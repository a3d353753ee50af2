"""Properties of ``attention`` that hold for any numbers, for each implementation."""

import functools

import chex
import helpers
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, slow
from hypothesis import given, settings

from attention_jax import attention, attention_weights, backends, masks, scores

B, T, S, N, K, H, D = 3, 5, 7, 4, 2, 3, 6
pytestmark = pytest.mark.usefixtures("small_blocks")
each_implementation = pytest.mark.parametrize("implementation", ["xla", "blockwise"])
seeds = st.integers(0, 2**32 - 1)


inputs = functools.partial(helpers.inputs, B=(B,), T=T, S=S, N=N, K=K, H=H, D=D, dtype=np.float32)


def hiding(seed, share=0.4):
    """A dense mask with whole rows and columns hidden."""
    rng = np.random.default_rng(seed)
    array = rng.random((B, N, T, S)) > share
    array[:, :, rng.integers(T)] = False
    array[..., rng.integers(S)] = False
    return array


# --- Properties.


@each_implementation
def test_the_order_of_keys_does_not_matter(implementation):
    @settings(max_examples=15)
    @given(seeds, st.permutations(range(S)))
    def check(seed, order):
        (q, k, v), order = inputs(seed), np.asarray(order)
        bias = np.random.default_rng(seed).normal(size=(N, 1, S)).astype(np.float32)
        run = functools.partial(attention, implementation=implementation, return_lse=True)
        before = run(q, k, v, score=(scores.bias(bias), scores.softcap(3.0)))
        bias = bias[..., order]
        after = run(q, k[:, order], v[:, order], score=(scores.bias(bias), scores.softcap(3.0)))
        close(before, after)

    check()


@each_implementation
def test_halves_merge_by_lse_to_the_whole(implementation):
    @settings(max_examples=15)
    @given(seeds)
    def check(seed):
        q, k, v = inputs(seed, S=8)
        mask = hiding(seed, share=0.7)
        mask = np.concatenate([mask, mask[..., :1]], axis=-1)
        run = functools.partial(attention, q, implementation=implementation, return_lse=True)
        whole, lse = run(k, v, mask=mask)
        parts = [run(k[:, s], v[:, s], mask=mask[..., s]) for s in (np.s_[:4], np.s_[4:])]
        (a, lse_a), (b, lse_b) = parts
        total = jnp.logaddexp(lse_a, lse_b)
        shift = jnp.where(total == -jnp.inf, 0.0, total)
        merged = a * jnp.exp(lse_a - shift)[..., None] + b * jnp.exp(lse_b - shift)[..., None]
        assert (lse == -jnp.inf).any()
        close((whole, lse), (merged, total))

    check()


@each_implementation
def test_a_constant_on_all_logits_moves_only_lse(implementation):
    @settings(max_examples=15)
    @given(seeds, st.floats(-100, 100, width=32))
    def check(seed, constant):
        q, k, v = inputs(seed)
        run = functools.partial(
            attention, q, k, v, mask=hiding(seed), implementation=implementation, return_lse=True
        )
        out, lse = run(score=scores.bias(np.zeros((1,), np.float32)))
        moved_out, moved_lse = run(score=scores.bias(np.full((1,), constant, np.float32)))
        close(out, moved_out, 1e-4)
        close(lse + constant, moved_lse, 1e-4)

    check()


@each_implementation
def test_query_head_n_reads_key_head_n_over_g(implementation):
    q, k, v = inputs()
    run = functools.partial(attention, mask=masks.causal(), implementation=implementation)

    def loss(q, k, v):
        return jnp.sin(run(q, k, v)).sum()

    def repeated(q, k, v):
        return loss(q, jnp.repeat(k, N // K, axis=2), jnp.repeat(v, N // K, axis=2))

    grad = functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    close(jax.jit(grad(loss))(q, k, v), jax.jit(grad(repeated))(q, k, v))


# --- vmap is the batch axis.


def moved(arrays, axes):
    return [jnp.moveaxis(x, 0, a) for x, a in zip(arrays, axes, strict=True)]


@each_implementation
@pytest.mark.parametrize("axes", [(0, 0, 0), (1, 2, 3), (3, 0, 1)])
def test_vmap_over_any_axes_is_the_batch_axis(axes, implementation):
    q, k, v = inputs()
    run = functools.partial(
        attention, mask=masks.causal(), implementation=implementation, return_lse=True
    )
    mapped = jax.jit(jax.vmap(run, in_axes=axes))(*moved((q, k, v), axes))
    close(mapped, jax.jit(run)(q, k, v), 1e-6)


def partial_problems():
    rng = np.random.default_rng(3)
    q, k, v = inputs(B=())
    base = {
        "query": q,
        "key": k,
        "value": v,
        "mask": masks.lengths(key=jnp.int32(5)) & masks.causal(jnp.int32(1)),
        "score": (scores.bias(jnp.asarray(rng.normal(size=(1, T, S)), jnp.float32)),),
        "sinks": jnp.linspace(-1.0, 1.0, N),
        "scale": jnp.float32(0.4),
        "dropout_key": jax.random.key(0),
    }
    bias = lambda: scores.bias(jnp.asarray(rng.normal(size=(1, T, S)), jnp.float32))  # noqa: E731
    keys = jax.random.split(jax.random.key(4), B)
    more = {
        "query": [{"query": inputs(i, B=())[0]} for i in range(B)],
        "value": [{"value": inputs(i, B=())[2]} for i in range(B)],
        "mask": [
            {"mask": masks.lengths(key=jnp.int32(n)) & masks.causal(jnp.int32(o))}
            for n, o in ((0, 0), (3, 5), (7, -1))
        ],
        "score": [{"score": (bias(),)} for _ in range(B)],
        "numbers": [
            {"sinks": jnp.linspace(-x, 1.0, N), "scale": x, "dropout_key": key}
            for x, key in zip(jnp.array([-0.5, 0.0, 2.0]), keys, strict=True)
        ],
    }
    return base, more


@pytest.mark.parametrize(
    "name", ["query", slow("mask"), slow("numbers"), slow("value"), slow("score")]
)
def test_vmap_over_some_arguments_is_a_loop(name):
    base, more = partial_problems()

    def run(own):
        arguments = {**base, **own}
        return attention(**arguments, dropout_rate=0.3, implementation="blockwise", return_lse=True)

    stack = lambda *xs: jnp.stack(xs)  # noqa: E731
    mapped = jax.jit(jax.vmap(run))(jax.tree.map(stack, *more[name]))
    close(mapped, jax.tree.map(stack, *map(jax.jit(run), more[name])), 1e-6)


# --- Compilations.


@pytest.fixture
def traces(monkeypatch):
    """Counts how often an implementation is traced."""
    count = []

    class Counting(backends.XLA):
        def run(self, call, spec):
            count.append(spec)
            return super().run(call, spec)

    monkeypatch.setitem(backends.IMPLEMENTATIONS, "xla", Counting())
    jax.clear_caches()
    return count


def fresh_masks(i):
    """Equal in structure, each built anew; arrays differ with ``i``."""
    return [
        masks.causal(align="end") & masks.window(3, None),
        masks.lengths(key=np.array([i, 5, 7], np.int32)) | masks.prefix(2),
        masks.block_sparse(np.eye(4, dtype=bool), 2),
        np.arange(S) % (2 + i) > 0,
    ]


def test_equal_shapes_and_masks_trace_once(traces):
    for which in range(4):
        traces.clear()
        for i in range(3):
            q, k, v = inputs(i)
            attention(q, k, v, mask=fresh_masks(i)[which], score=scores.softcap(2.0), scale=0.1 * i)
        assert len(traces) == 1
    attention(q, k, v, mask=masks.dense(fresh_masks(i)[3]), score=scores.softcap(2.0), scale=1.0)
    assert len(traces) == 1  # a bool array is short for dense
    attention(q, k, v, mask=masks.window(2, None))
    assert len(traces) == 2


def test_under_jit_too_equal_masks_trace_once():
    @jax.jit
    @chex.assert_max_traces(1)
    def run(q, k, v, mask):
        return attention(q, k, v, mask=mask, score=scores.alibi())

    for i in range(3):
        run(*inputs(i), fresh_masks(i)[1] & fresh_masks(i)[2])


# --- dtypes, emptiness.


def test_a_python_int_is_a_scale():
    q, k, v = inputs()
    chex.assert_trees_all_equal(attention(q, k, v, scale=2), attention(q, k, v, scale=2.0))


@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [
        ("bfloat16", "blockwise"),
        ("float16", "xla"),
        slow("float32", "xla"),
        slow("float64", "blockwise"),
    ],
)
def test_output_in_the_dtype_of_the_query_and_lse_in_at_least_float32(dtype, implementation, x64):
    q, k, v = inputs(dtype=dtype)
    options = {
        "mask": masks.causal(),
        "score": (scores.alibi(), scores.bias(np.ones((T, S), np.float32)), scores.softcap(9.0)),
        "sinks": jnp.ones(N, jnp.float32),
        "scale": jnp.float64(0.7),
    }
    wide = "float64" if dtype == "float64" else "float32"

    def loss(q, k, v, sinks):
        out, lse = attention(
            q, k, v, **{**options, "sinks": sinks}, implementation=implementation, return_lse=True
        )
        assert (out.dtype, lse.dtype) == (dtype, wide)
        return out.astype(wide).sum() + lse.sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, options["sinks"])
    assert [g.dtype for g in gradients] == [dtype, dtype, dtype, "float32"]
    assert attention_weights(q, k, **options).dtype == wide


@each_implementation
def test_float64_is_float64_throughout(implementation, x64):
    """A float32 anywhere inside would show at 1e-7."""
    q, k, v = inputs(dtype=np.float64)
    out = attention(q, k, v, mask=masks.causal(align="end"), implementation=implementation)
    logits = np.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k) / H**0.5
    i, j = np.arange(T)[:, None], np.arange(S)
    e = np.where(j <= i + S - T, np.exp(logits), 0)
    p = e / e.sum(-1, keepdims=True)
    expected = np.einsum("bkgts,bskd->btkgd", p, v).reshape(B, T, N, D)
    np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("b", "t", "s"), [(B, T, 0), (B, 0, S), (0, T, S), (0, 0, 0)])
def test_no_keys_no_queries_no_examples(b, t, s):
    q, k, v = inputs(B=(b,), T=t, S=s)
    ids = np.zeros((b, t + s), np.int32)
    options = {
        "mask": masks.segments(ids[:, :t], ids[:, t:]) & masks.lengths(key=ids[:, :1].sum(1)),
        "score": (scores.bias(jnp.ones((b, 1, t, s))), scores.alibi(offset=ids[:, :1].sum(1))),
        "sinks": jnp.linspace(-1.0, 1.0, N),
        "dropout_rate": 0.5,
        "dropout_key": jax.random.key(0),
    }
    for chosen, lse_is in (({}, -np.inf), (options, options["sinks"])):

        def loss(q, k, v, chosen=chosen):
            out, lse = attention(q, k, v, **chosen, return_lse=True)
            return (jnp.sin(out) + 1).sum(), (out, lse)

        gradients, (out, lse) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        assert out.shape == (b, t, N, D)
        assert (out == 0).all()
        np.testing.assert_array_equal(lse, np.broadcast_to(lse_is, (b, t, N)))
        assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
        assert all((g == 0).all() for g in gradients)
    assert attention_weights(q, k).shape == (b, N, t, s)


# --- Weights.


def test_weights_are_the_probabilities_behind_the_output():
    q, k, v = inputs()
    mask, sinks = hiding(0), jnp.linspace(-1.0, 1.0, N)
    options = {"mask": mask, "score": (scores.softcap(2.0), scores.alibi()), "scale": -0.3}
    weights = attention_weights(q, k, **options)
    assert weights.shape == (B, N, T, S)
    assert (np.asarray(weights)[~mask] == 0).all()
    close(weights.sum(-1), mask.any(-1).astype(np.float32), 1e-6)
    with_sinks = attention_weights(q, k, sinks=sinks, **options)
    for p, more in ((weights, {}), (with_sinks, {"sinks": sinks})):
        out, lse = attention(q, k, v, **options, **more, return_lse=True)
        close(jnp.einsum("bnts,bsnd->btnd", p, jnp.repeat(v, N // K, axis=2)), out)
    share = jnp.exp(sinks - lse).transpose(0, 2, 1)
    close(with_sinks.sum(-1) + share, jnp.ones((B, N, T)))


def test_a_function_evaluated_at_run_time_in_blocks_of_the_librarys_own():
    q, k, v = inputs(B=(1,), T=300, S=300)
    mask = masks.mask_fn(lambda b, n, q, k: (q - k) ** 2 < 900, evaluate=True)
    run = functools.partial(attention, q, k, v, mask=mask)
    close(run(implementation="blockwise"), run(implementation="xla"))
