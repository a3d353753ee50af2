"""Every JAX transformation of ``attention``, in float64, over several ragged blocks.

``blockwise`` is a primitive with rules of its own; ``xla`` is plain JAX, whose derivatives are
JAX's, and those are held against finite differences.
"""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from attention_jax import attention, masks, scores

B, T, S, N, K, H, D = 2, 5, 7, 4, 2, 3, 2
pytestmark = pytest.mark.usefixtures("small_blocks", "x64")
each_path = pytest.mark.parametrize("implementation", [None, "blockwise"])
each_setting = pytest.mark.parametrize("setting", ["plain", "masked", "scored"])
KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def parameters(setting, batch=(B,)):
    """All that is differentiated."""
    p = {
        "query": normal(0, *batch, T, N, H),
        "key": normal(1, *batch, S, K, H),
        "value": normal(2, *batch, S, K, D),
    }
    if setting != "plain":
        p |= {"sinks": normal(3, N), "scale": jnp.asarray(0.6)}
    if setting == "scored":
        p |= {"bias": normal(4, N, 1, S), "slopes": abs(normal(5, N))}
    return p


def masked(batch=(B,)):
    """The arrays of a mask: offsets and lengths of each example; the second hides a whole row."""
    offsets, lengths = jnp.array([2, -1], "int32"), jnp.array([7, 4], "int32")
    return masks.causal(jnp.resize(offsets, batch)) & masks.lengths(key=jnp.resize(lengths, batch))


def run(p, setting="plain", mask=None, implementation="blockwise"):
    """Output and lse, the lse of rows that see nothing put to 0."""
    p, options = dict(p), {"mask": mask}
    bias, slopes = p.pop("bias", None), p.pop("slopes", None)
    if bias is not None:
        options["score"] = scores.bias(bias), scores.alibi(slopes), scores.softcap(2.0)
    if setting == "masked":
        options |= {"dropout_rate": 0.3, "dropout_key": KEY}
    out, lse = attention(**p, **options, implementation=implementation, return_lse=True)
    return out, jnp.where(lse == -jnp.inf, 0.0, lse)


def setup(setting, implementation, batch=(B,)):
    """A function of its parameters, the parameters, and the same by way of ``xla``."""
    mask = None if setting == "plain" else masked(batch)

    def f(implementation, p):
        return run(p, setting, mask, implementation)

    p = parameters(setting, batch)
    return functools.partial(f, implementation), p, functools.partial(f, "xla")


def scalar(f):
    """A loss that uses output and lse, with cotangents that vary."""

    def loss(p):
        out, lse = f(p)
        return (jnp.sin(out) * jnp.linspace(0.5, 1, out.size).reshape(out.shape)).sum() + jnp.cos(
            lse
        ).sum()

    return loss


def tangents(p, seed=7):
    return {name: normal(seed + i, *x.shape) for i, (name, x) in enumerate(p.items())}


def close(a, b, tolerance=1e-9):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# --- Derivatives.


ON_EACH_PATH = [("plain", "blockwise"), ("masked", "blockwise"), ("scored", "blockwise")]
ON_EACH_PATH += [("masked", None), ("scored", None)]
on_each_path = pytest.mark.parametrize(("setting", "implementation"), ON_EACH_PATH)


@on_each_path
def test_derivatives_to_second_order_are_finite_differences(setting, implementation):
    f, p, _ = setup(setting, implementation)
    for g in (f, jax.grad(scalar(f))):  # of first order; of first order again, that is of second
        jax.test_util.check_grads(jax.jit(g), (p,), order=1, modes=("fwd", "rev"), eps=1e-5)


@each_setting
def test_gradients_equal_the_materialised_ones(setting):
    f, p, plain = setup(setting, "blockwise")
    got, expected = (jax.jit(jax.value_and_grad(scalar(g)))(p) for g in (f, plain))
    close(got, expected)
    assert all((g != 0).any() for g in jax.tree.leaves(got[1]))


@on_each_path
def test_jvp_and_linearize_agree_with_vjp(setting, implementation):
    f, p, plain = setup(setting, implementation)
    dots = tangents(p)
    out, out_dot = jax.jit(lambda p, d: jax.jvp(f, (p,), (d,)))(p, dots)
    close((out, out_dot), jax.jit(lambda p, d: jax.jvp(plain, (p,), (d,)))(p, dots))
    again, push = jax.linearize(jax.jit(f), p)
    close((again, push(dots)), (out, out_dot))
    cotangents = jax.tree.map(jnp.cos, out)
    _, pull = jax.vjp(jax.jit(f), p)
    pairing = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))  # noqa: E731
    close(pairing(cotangents, out_dot), pairing(*pull(cotangents), dots))
    (transposed,) = jax.linear_transpose(push, dots)(cotangents)
    close(transposed, pull(cotangents)[0])


@each_setting
def test_hessians_equal_the_materialised_ones(setting):
    f, p, plain = setup(setting, "blockwise")
    shared = [n for n in p if n in ("query", "scale", "bias", "slopes")]  # the rest held fixed

    def part(g):
        return lambda q: scalar(g)({**p, **q})

    q = {n: p[n] for n in shared}
    expected = jax.jit(jax.hessian(part(plain)))(q)
    close(jax.jit(jax.hessian(part(f)))(q), expected)
    assert all((h != 0).any() for h in jax.tree.leaves(expected))


@each_setting
def test_higher_derivatives_in_every_order(setting):
    f, p, plain = setup(setting, "blockwise")
    dots, more = tangents(p), tangents(p, 17)

    def reverse_over_reverse(g):
        along = lambda p: pair(jax.grad(scalar(g))(p), dots)  # noqa: E731
        return jax.grad(along)(p)

    def forward_over_reverse(g):
        return jax.jvp(jax.grad(scalar(g)), (p,), (dots,))[1]

    def reverse_over_forward(g):
        return jax.grad(lambda p: jax.jvp(scalar(g), (p,), (dots,))[1])(p)

    def third(g):
        slope = lambda p: jax.jvp(scalar(g), (p,), (dots,))[1]  # noqa: E731
        return jax.grad(lambda p: jax.jvp(slope, (p,), (more,))[1])(p)

    def pair(a, b):
        return sum(jnp.vdot(x, y) for x, y in zip(a.values(), b.values(), strict=True))

    expected = jax.jit(lambda: forward_over_reverse(plain))()
    for way in (reverse_over_reverse, forward_over_reverse, reverse_over_forward):
        close(jax.jit(functools.partial(way, f))(), expected, 1e-8)
    close(jax.jit(lambda: third(f))(), jax.jit(lambda: third(plain))(), 1e-7)


@each_path
def test_jacobians_forward_and_reverse_agree(implementation):
    f, p, plain = setup("masked", implementation)
    g, h = (lambda query, f=f: f({**p, "query": query})[0] for f in (f, plain))
    expected = jax.jit(jax.jacrev(h))(p["query"])
    close(jax.jit(jax.jacfwd(g))(p["query"]), expected)
    close(jax.jit(jax.jacrev(g))(p["query"]), expected)
