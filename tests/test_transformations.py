"""Every JAX transformation of ``attention``, in float64, over several ragged blocks.

``xla`` is plain JAX, compared with finite differences. ``blockwise`` is a primitive with its own
rules, compared with ``xla``.
"""

import functools

import helpers
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from helpers import jax_normal, slow
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax import attention, masks, scores

B, T, S, N, K, H, D = 2, 5, 7, 4, 2, 3, 2
pytestmark = pytest.mark.usefixtures("small_blocks", "x64")
each_setting = pytest.mark.parametrize("setting", ["plain", slow("everything")])
KEY = jax.random.key(0)


def parameters(setting, batch=(B,)):
    """All arrays that are differentiated."""
    p = {
        "query": jax_normal(0, *batch, T, N, H),
        "key": jax_normal(1, *batch, S, K, H),
        "value": jax_normal(2, *batch, S, K, D),
    }
    if setting == "everything":
        p |= {"sinks": jax_normal(3, N), "scale": jnp.asarray(0.6)}
        p |= {"bias": jax_normal(4, N, 1, S), "slopes": abs(jax_normal(5, N))}
    return p


def some_mask(b=B):
    """Offsets and lengths of each example; in the second, some queries have no visible key."""
    offsets, lengths = jnp.array([2, -1], "int32"), jnp.array([7, 4], "int32")
    return masks.causal(jnp.resize(offsets, b)) & masks.lengths(key=jnp.resize(lengths, b))


def run(p, mask=None, *, implementation, dropout=True):
    """Output and lse; the lse of rows without visible keys is set to 0."""
    p, options = dict(p), {"mask": mask}
    bias, slopes = p.pop("bias", None), p.pop("slopes", None)
    if bias is not None:
        options["score"] = scores.bias(bias), scores.alibi(slopes), scores.softcap(2.0)
        if dropout:
            options |= {"dropout_rate": 0.3, "dropout_key": KEY}
    out, lse = attention(**p, **options, implementation=implementation, return_lse=True)
    return out, jnp.where(lse == -jnp.inf, 0.0, lse)


def setup(setting, *implementations, b=B):
    """Parameters, and functions of them by each of these ways."""
    mask = None if setting == "plain" else some_mask(b)
    ways = [functools.partial(run, mask=mask, implementation=i) for i in implementations]
    return parameters(setting, (b,)), *ways


def scalar(f):
    """A loss that uses output and lse, with cotangents that vary."""

    def loss(*args):
        out, lse = f(*args)
        weights = jnp.linspace(0.5, 1.0, out.size).reshape(out.shape)
        return (jnp.sin(out) * weights).sum() + jnp.cos(lse).sum()

    return loss


def tangents(p, seed=7):
    return {name: jax_normal(seed + i, *x.shape) for i, (name, x) in enumerate(p.items())}


def dot(a, b):
    products = jax.tree.map(jnp.vdot, a, b)
    return sum(jax.tree.leaves(products))


def close(a, b, tolerance=1e-9):
    helpers.close(a, b, tolerance)


def stacked(xs):
    return jax.tree.map(lambda *x: jnp.stack(x), *xs)


# --- Derivatives.


@pytest.mark.slow
def test_derivatives_equal_finite_differences():
    p, f = setup("everything", None)
    check = functools.partial(jax.test_util.check_grads, args=(p,), order=1, eps=1e-5)
    check(jax.jit(f), modes=("fwd", "rev"))
    check(jax.jit(jax.grad(scalar(f))), modes=("fwd", "rev"))  # second order


@each_setting
def test_gradients_equal_the_materialized_ones(setting):
    p, f, plain = setup(setting, "blockwise", "xla")
    got, expected = (jax.jit(jax.value_and_grad(scalar(g)))(p) for g in (f, plain))
    close(got, expected)
    assert all((g != 0).any() for g in jax.tree.leaves(got[1]))


@pytest.mark.slow
def test_jvp_linearize_and_vjp_agree():
    p, f, plain = setup("everything", "blockwise", "xla")
    dots = tangents(p)
    expected = jax.jit(lambda p, d: jax.jvp(plain, (p,), (d,)))(p, dots)
    close(jax.jit(lambda p, d: jax.jvp(f, (p,), (d,)))(p, dots), expected)
    out, push = jax.linearize(jax.jit(f), p)
    close((out, push(dots)), expected)
    cotangents = jax.tree.map(jnp.cos, out)
    (pulled,) = jax.vjp(jax.jit(f), p)[1](cotangents)
    close(dot(cotangents, expected[1]), dot(pulled, dots))
    close(jax.linear_transpose(push, dots)(cotangents)[0], pulled)


@pytest.mark.slow
def test_hessians_equal_the_materialized_ones():
    p, f, plain = setup("everything", "blockwise", "xla")
    q = {n: p[n] for n in p if n in ("query", "scale", "bias", "slopes")}  # the rest held fixed

    def hessian(g):
        return jax.jit(jax.hessian(lambda q: scalar(g)({**p, **q})))(q)

    expected = hessian(plain)
    close(hessian(f), expected)
    assert all((h != 0).any() for h in jax.tree.leaves(expected))


@pytest.mark.slow
def test_second_and_third_derivatives_in_any_order():
    p, f, plain = setup("everything", "blockwise", "xla")
    dots, more = tangents(p), tangents(setup("plain")[0], 17)

    def reverse_over_reverse(g):
        return jax.grad(lambda p: dot(jax.grad(scalar(g))(p), dots))(p)

    def forward_over_reverse(g):
        return jax.jvp(jax.grad(scalar(g)), (p,), (dots,))[1]

    def reverse_over_forward(g):
        return jax.grad(lambda p: jax.jvp(scalar(g), (p,), (dots,))[1])(p)

    def third(g):
        slope = lambda p: jax.jvp(scalar(g), (p,), ({n: dots[n] for n in p},))[1]  # noqa: E731
        return jax.grad(lambda p: jax.jvp(slope, (p,), (more,))[1])(p)

    expected = jax.jit(lambda: forward_over_reverse(plain))()
    for way in (reverse_over_reverse, reverse_over_forward):
        close(jax.jit(functools.partial(way, f))(), expected, 1e-8)
    p, f, plain = setup("plain", "blockwise", "xla")
    close(jax.jit(lambda: third(f))(), jax.jit(lambda: third(plain))(), 1e-7)


@pytest.mark.slow
def test_arrays_of_learned_scores_have_derivatives_to_second_order():
    """T5's table, Shaw's table and query, arrays of a function; from one score into the next."""
    query, key, value = (parameters("plain")[n] for n in ("query", "key", "value"))
    p = {
        "t5": jax_normal(1, 8, N),
        "shaw": jax_normal(2, 5, N, H),
        "query": query,
        "factor": jax_normal(3, N),
        "column": jax_normal(4, B, S),
    }

    def changed(s, b, n, q, k, factor, column):
        return s * factor[n] + column[b, k]

    def f(implementation, p):
        score = (
            scores.relative_bias(p["t5"], max_distance=9, align="end"),
            scores.relative_embedding(p["query"], p["shaw"], offset=1),
            scores.score_fn(changed, p["factor"], p["column"]),
            scores.softcap(4.0),
        )
        options = {"mask": some_mask(), "score": score, "implementation": implementation}
        out, lse = attention(query, key, value, **options, return_lse=True)
        return out, jnp.where(lse == -jnp.inf, 0.0, lse)

    def derivatives(implementation):
        loss = scalar(functools.partial(f, implementation))
        return jax.jit(lambda p, d: jax.jvp(jax.grad(loss), (p,), (d,)))(p, tangents(p))

    got, expected = derivatives("blockwise"), derivatives("xla")
    close(got, expected)
    assert all((g != 0).any() for g in jax.tree.leaves(got))


# --- Control flow.


@pytest.mark.slow
def test_scan_over_layers_and_its_gradient():
    x, scales = jax_normal(0, B, T, N, H), jnp.array([0.3, -0.5, 0.9])
    mask = masks.causal()

    def layer(implementation, x, scale):
        out = attention(x, x, x, mask=mask, scale=scale, implementation=implementation)
        return x + out, out.sum()

    def looped(x, scales):
        sums = []
        for scale in scales:
            x, total = layer("xla", x, scale)
            sums.append(total)
        return x, jnp.stack(sums)

    def scanned(x, scales):
        step = jax.checkpoint(functools.partial(layer, "blockwise"))
        return jax.lax.scan(step, x, scales)

    got, expected = (
        jax.jit(jax.value_and_grad(scalar(f), argnums=(0, 1)))(x, scales) for f in (scanned, looped)
    )
    close(got, expected)


# --- vmap.


@pytest.mark.slow
def test_vmap_of_grad_and_grad_of_vmap():
    p, f, plain = setup("everything", "blockwise", "xla")
    many = [jax.tree.map(lambda x, i=i: x * (1 + 0.1 * i), p) for i in range(3)]
    one = jax.jit(jax.grad(scalar(plain)))
    expected = stacked([one(q) for q in many])
    close(jax.jit(jax.vmap(jax.grad(scalar(f))))(stacked(many)), expected)
    total = jax.jit(jax.grad(lambda p: jax.vmap(scalar(f))(p).sum()))
    close(total(stacked(many)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("query", "jvp"), ("bias", "vjp")])
def test_vmap_of_derivatives_over_one_argument(name, mode):
    """Only that argument, or only tangents and cotangents, have the axis, as their last one."""
    p, f, plain = setup("everything", "blockwise", "xla")
    xs = [jax_normal(i, *p[name].shape) for i in range(3)]
    dots, shape = tangents(p), jax.eval_shape(f, p)

    def derivative(g, x, dot):
        p_, dots_ = {**p, name: x}, {**dots, name: dot}
        if mode == "jvp":
            return jax.jvp(g, (p_,), (dots_,))[1]
        return jax.vjp(g, p_)[1]((dot, jnp.ones(shape[1].shape)))[0]

    seconds = [jax_normal(9 + i, *(xs[0] if mode == "jvp" else shape[0]).shape) for i in range(3)]
    last = functools.partial(jnp.stack, axis=-1)
    one = jax.jit(functools.partial(derivative, plain))
    mapped = jax.jit(jax.vmap(functools.partial(derivative, f), in_axes=(-1, None)))
    close(mapped(last(xs), seconds[0]), stacked([one(x, seconds[0]) for x in xs]))
    mapped = jax.jit(jax.vmap(functools.partial(derivative, f), in_axes=(None, -1)))
    close(mapped(xs[0], last(seconds)), stacked([one(xs[0], d) for d in seconds]))


# --- Several devices.

SPECS = {
    "batch": {"query": P("x"), "key": P("x"), "value": P("x")},
    "heads": {"query": P(None, None, "x"), "key": P(None, None, "x"), "value": P(None, None, "x")},
}
SPECS["heads"] |= {"sinks": P("x"), "bias": P("x"), "slopes": P("x")}


@pytest.mark.parametrize(("over", "implementation"), [slow("batch", "blockwise"), ("heads", None)])
def test_shard_map_and_its_gradients(over, implementation):
    devices = 8 if over == "batch" else 2
    p, plain = setup("everything", "xla", b=8)
    mesh, spec = Mesh(np.array(jax.devices()[:devices]), "x"), SPECS[over]
    specs = {name: spec.get(name, P()) for name in p}
    lse_spec = spec["query"]
    mask = some_mask(8)
    mask_specs = jax.tree.map(lambda _: P("x") if over == "batch" else P(), mask)

    def local(p, mask):
        return run(p, mask, implementation=implementation, dropout=False)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, mask_specs), out_specs=(spec["query"], lse_spec)
    )
    plain = functools.partial(plain, dropout=False)
    got = jax.jit(jax.value_and_grad(scalar(lambda p: sharded(p, mask))))(p)
    close(got, jax.jit(jax.value_and_grad(scalar(plain)))(p))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [None, "blockwise"])
def test_sharded_arrays_under_jit_drop_the_same_pairs(implementation):
    p, f, plain = setup("everything", implementation, "xla", b=8)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("b", "n"))
    split = NamedSharding(mesh, P("b", None, "n"))
    placed = {n: jax.device_put(x, split) if x.ndim == 4 else x for n, x in p.items()}
    placed["bias"] = p["bias"]
    got = jax.jit(jax.value_and_grad(scalar(f)))(placed)
    close(got, jax.jit(jax.value_and_grad(scalar(plain)))(p))


def test_a_checkpoint_that_saves_the_results_runs_the_forward_pass_once():
    x = jnp.ones((300, 2, 4))
    policies = jax.checkpoint_policies
    saved = policies.save_only_these_names("attention_out", "attention_lse")

    def loss(x):
        return attention(x, x, x, mask=masks.causal(), implementation="blockwise").sum()

    for policy, count in ((saved, 1), (policies.nothing_saveable, 2)):
        gradient = jax.grad(jax.checkpoint(loss, policy=policy))
        text = str(jax.make_jaxpr(gradient)(x))
        assert text.count("attention_blockwise_forward[") == count
    # The last one saves nothing, as jax.checkpoint does by default.
    np.testing.assert_allclose(jax.jit(gradient)(x), jax.jit(jax.grad(loss))(x), atol=1e-5)
