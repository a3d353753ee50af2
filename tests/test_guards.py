"""Guards: identities that refuse the transformations that a kernel does not have, in words."""

import functools

import cudnn_calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cudnn_calls import SUPPORTED, dot_product_attention, inputs, output
from test_cudnn_programs import compiled

from attention_jax.backends.guards import guard

calls = pytest.fixture(cudnn_calls.calls)


def kernel(x, y, **options):
    x, y = guard((x, y), "kernel", "'xla'", **options)
    return (jnp.sin(x) * y).sum()


reverse_only = functools.partial(kernel, forward_mode=False)
X, Y = jnp.arange(3.0), jnp.ones(3)

FIRST = {
    "grad": lambda f: jax.grad(f, (0, 1))(X, Y),
    "jit of grad": lambda f: jax.jit(jax.grad(f, (0, 1)))(X, Y),
    "grad of jit": lambda f: jax.grad(jax.jit(f), (0, 1))(X, Y),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f), (0, 1))(X, Y),
    "vjp": lambda f: jax.vjp(f, X, Y)[1](jnp.float32(1)),
    "grad of scan": lambda f: jax.grad(
        lambda x, y: jax.lax.scan(lambda c, _: (c + f(x, y), None), 0.0, None, 3)[0], (0, 1)
    )(X, Y),
    "grad of vmap": lambda f: jax.grad(
        lambda x, y: jax.vmap(f, (0, None))(jnp.stack([x, 2 * x]), y).sum(), (0, 1)
    )(X, Y),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f, (0, 1)), (0, None))(jnp.stack([X, Y]), Y),
    "vmap of grad of jit": lambda f: jax.vmap(jax.grad(jax.jit(f), (0, 1)), (0, None))(
        jnp.stack([X, Y]), Y
    ),
    "vmap of grad of checkpoint": lambda f: jax.vmap(jax.grad(jax.checkpoint(f)), (0, None))(
        jnp.stack([X, Y]), Y
    ),
    "vmap of jit of grad of scan": lambda f: jax.vmap(
        jax.jit(
            jax.grad(lambda x, y: jax.lax.scan(lambda c, _: (c + f(x, y), None), 0.0, None, 3)[0])
        ),
        (0, None),
    )(jnp.stack([X, Y]), Y),
    "of one argument": lambda f: jax.grad(f)(X, Y),
    "jacrev": lambda f: jax.jacrev(f)(X, Y),
}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("fn", [kernel, reverse_only], ids=["both modes", "reverse only"])
def test_first_derivatives_in_reverse_mode(name, fn):
    found, right = FIRST[name](fn), FIRST[name](lambda x, y: (jnp.sin(x) * y).sum())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


FORWARD = {
    "jvp": lambda f: jax.jvp(f, (X, Y), (X, Y)),
    "jit of jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x, Y), (x, Y)))(X),
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (X, Y), (X, Y)),
    "jacfwd": lambda f: jax.jacfwd(f)(X, Y),
    "linearize": lambda f: jax.linearize(f, X, Y)[1](X, Y),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode(name):
    FORWARD[name](kernel)
    with pytest.raises(
        NotImplementedError,
        match=r"implementation 'kernel' cannot: it has no forward-mode derivative .*'xla'",
    ):
        FORWARD[name](reverse_only)


SECOND = {
    "hessian": lambda f: jax.hessian(f)(X, Y),
    "grad of grad": lambda f: jax.grad(lambda x: jax.grad(f)(x, Y).sum())(X),
    "jit": lambda f: jax.jit(jax.grad(lambda x: jax.grad(f)(x, Y).sum()))(X),
    "mixed": lambda f: jax.grad(lambda y: jax.grad(f)(X, y).sum())(Y),
    "jvp of grad": lambda f: jax.jvp(lambda x: jax.grad(f)(x, Y), (X,), (X,)),
    "grad of grad of jit": lambda f: jax.grad(lambda x: jax.grad(jax.jit(f))(x, Y).sum())(X),
}


@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("fn", [kernel, reverse_only], ids=["both modes", "reverse only"])
def test_second_derivatives(name, fn):
    with pytest.raises(
        NotImplementedError, match="'kernel' cannot: it can be differentiated only once"
    ):
        SECOND[name](fn)


def test_vmap():
    with pytest.raises(NotImplementedError, match=r"'kernel' cannot: it maps nothing. Ask for .*"):
        jax.vmap(functools.partial(kernel, batched="it maps nothing"), (0, None))(X[None], Y)
    assert kernel(X, Y, batched="it maps nothing") == kernel(X, Y)


# --- cuDNN, with the stand-in and as the program for a card.


@pytest.mark.parametrize("name", ["causal", "bias and lengths"])
def test_cudnn_says_what_to_ask_for(name, calls):
    options, x = SUPPORTED[name], inputs()

    def loss(*x):
        return output(*x, **options).astype(jnp.float32).sum()

    with pytest.raises(
        NotImplementedError,
        match=r"implementation 'cudnn' cannot: .*implementation=\('pallas_gpu', 'blockwise'\)",
    ):
        jax.jvp(loss, x, x)
    with pytest.raises(NotImplementedError, match="'cudnn' cannot: it can be differentiated only"):
        jax.eval_shape(jax.hessian(loss), *x)


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.hessian])
def test_cudnn_refuses_while_compiling_for_a_card(transform):
    def loss(*x):
        return output(*x, **SUPPORTED["causal"]).astype(jnp.float32).sum()

    assert dot_product_attention is jax.nn.dot_product_attention
    with pytest.raises(NotImplementedError, match="implementation 'cudnn' cannot"):
        compiled(transform(loss), *inputs())
