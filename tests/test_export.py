"""jax.export with sizes that have names in place of numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import jax_normal, slow
from jax import export

import attention_jax as aj
from attention_jax import masks, nn, scores
from attention_jax.models import Decoder, DecoderConfig, Layers

B, T, S = export.symbolic_shape("b, t, s")


def shapes(b, t, s):
    return [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((*b, t, 4, 8), (*b, s, 2, 8))]


def arrays(b, t, s):
    return [jax_normal(i, *x.shape) for i, x in enumerate(shapes(b, t, s))]


def close(fn, exported, *args):
    got, expected = exported.call(*args), jax.jit(fn)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def everything(implementation, q, k):
    def run(q, k):
        out = aj.attention(
            q,
            k,
            k,
            mask=masks.causal() & masks.segments(jnp.zeros(q.shape[1], int)),
            score=(scores.alibi(), scores.score_fn(lambda s, b, n, i, j: s * 1.5)),
            dropout_rate=0.2,
            dropout_key=jax.random.key(0),
            implementation=implementation,
        )
        return (out**2).sum(), out

    return jax.grad(run, argnums=(0, 1), has_aux=True)(q, k)


@pytest.mark.parametrize("implementation", ["xla", slow("blockwise")])
def test_a_symbolic_batch(implementation):
    def fn(q, k):
        return everything(implementation, q, k)

    exported = export.export(jax.jit(fn))(*shapes((B,), 20, 20))
    q, k = arrays((3,), 20, 20)
    expected = jax.jit(fn)(q, k)
    for b in (1, 3):  # the first example has the same dropout in a batch of one
        for x, y in zip(
            jax.tree.leaves(exported.call(q[:b], k[:b])), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(x, y[:b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(align="end"),
        slow(masks.window(2, 0) & masks.prefix(4)),
        slow(masks.mask_fn(lambda b, n, q, k: (q + k) % 3 > 0)),
    ],
    ids=["causal at the end", "window", "mask_fn"],
)
def test_symbolic_lengths(mask):
    def fn(q, k):
        return aj.attention(q, k, k, mask=mask, score=scores.alibi(), return_lse=True)

    exported = export.export(jax.jit(fn))(*shapes((B,), T, S))
    for t, s in ((7, 9), (300, 17)):
        close(fn, exported, *arrays((2,), t, s))


def test_symbolic_lengths_are_refused_by_what_has_blocks():
    def fn(q, k):
        return aj.attention(q, k, k, implementation="blockwise")

    with pytest.raises(NotImplementedError, match=r"T or S is symbolic.* These can: xla"):
        export.export(jax.jit(fn))(*shapes((B,), T, S))


def test_weights_modules_and_models():
    def weights(q, k):
        return aj.attention_weights(q, k, mask=masks.causal())

    close(weights, export.export(jax.jit(weights))(*shapes((B,), T, S)), *arrays((2,), 5, 6))
    module = nn.MultiHeadAttention(16, num_heads=4, mask=masks.causal(), rngs=nnx.Rngs(0))
    flax = nnx.MultiHeadAttention(
        num_heads=4, in_features=16, attention_fn=nn.attention_fn, decode=False, rngs=nnx.Rngs(0)
    )
    for layer in (module, flax):

        def run(x, layer=layer):
            return layer(x)

        exported = export.export(jax.jit(run))(jax.ShapeDtypeStruct((B, T, 16), jnp.float32))
        close(run, exported, jax.random.normal(jax.random.key(0), (3, 7, 16)))


@pytest.mark.parametrize("positions", ["learned", slow("sinusoidal")])
def test_a_decoder(positions):
    layers = Layers(features=16, num_heads=4, num_layers=2, windows=(None, 4))
    config = DecoderConfig(layers=layers, vocabulary=13, max_length=64, positions=positions)
    model = Decoder(config, rngs=nnx.Rngs(0))

    def run(tokens):
        return model(tokens)

    exported = export.export(jax.jit(run))(jax.ShapeDtypeStruct((B, T), jnp.int32))
    close(run, exported, jnp.arange(14, dtype=jnp.int32).reshape(2, 7) % 13)
