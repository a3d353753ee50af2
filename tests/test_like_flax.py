"""``nn.attention_fn`` in Flax's own attention modules: every option, and pairs of them.

With the same parameters the results and their gradients must be those of Flax's own attention.
"""

import functools

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
from flax import nnx
from helpers import close_to_largest, jax_normal

from attention_jax.nn import attention_fn

B, T, S, N, E = 2, 5, 7, 4, 16
# Flax's own modules promote dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def some_visible(shape, dtype=bool):
    """Every query attends to key 0: for a query without visible keys, Flax returns a mean."""
    some = np.random.default_rng(3).random(shape) < 0.6
    some[..., 0] = True
    return jnp.asarray(some, dtype)


def in_float32(theirs):
    """Flax's attention with products and softmax in float32."""

    @functools.wraps(theirs)
    def attend(query, key, value, *, dtype=None, **options):
        out = theirs(query, key, value, dtype=jnp.float32, **options)
        return out.astype(query.dtype)

    return attend


ARGUMENTS = {
    "lead": ((), (B,), (B, 3)),
    "dtypes": (
        (None, "float32"),
        ("bfloat16", "float32"),
        ("float16", "bfloat16"),
        (None, "bfloat16"),
    ),
    "heads_of_mask": (None, N, 1),
    "dtype_of_mask": (bool, "float32", "int32"),
    "precision": (None, "highest", jax.lax.Precision.HIGH, ("default", "default")),
    "sow_weights": (False, True),
    "normalize_qk": (False, True),
    "dropout_rate": (0.0, 0.5),
    "context": (False, True),
}
LINEN = {**ARGUMENTS, "force_fp32_for_softmax": (False, True)}
NNX = {**ARGUMENTS, "num_kv_heads": (N, 2, 1), "is_causal": (False, True)}


def inputs(case):
    """What a module is called with: tokens, or tokens and a context; and a mask."""
    lead, heads = case["lead"], case["heads_of_mask"]
    x, context = jax_normal(0, *lead, T, E), jax_normal(1, *lead, S, E)
    arrays = (x, context) if case["context"] else (x,)
    mask = None
    if heads is not None:
        mask = some_visible((*lead, heads, T, arrays[-1].shape[-2]), case["dtype_of_mask"])
    return arrays, mask


def compare(case, run, parameters, ours, theirs, in_float32):
    """``run`` with three modules: dtypes must be Flax's, numbers those in float32.

    ``run(parameters, module)`` gives a loss, and whatever else.
    """

    def both(module):
        return jax.grad(functools.partial(run, module=module), has_aux=True)

    (gradient, out), (exact_gradient, exact) = (
        jax.jit(both(module))(parameters) for module in (ours, in_float32)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(out, jax.eval_shape(both(theirs), parameters)[1])
    narrowest = max(float(jnp.finfo(x or "float32").eps) for x in case["dtypes"])
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(exact), strict=True):
        close_to_largest(x, y, 8 * narrowest)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact_gradient), strict=True):
        close_to_largest(x, y, 32 * narrowest)


@pytest.mark.parametrize("case", pairwise.cases(LINEN, fast=1, alone=("precision",)))
def test_linen(case):
    arrays, mask = inputs(case)
    dtype, param_dtype = case["dtypes"]
    names = ("precision", "normalize_qk", "dropout_rate", "force_fp32_for_softmax")
    make = functools.partial(
        flax.linen.MultiHeadDotProductAttention,
        N,
        dtype=dtype,
        param_dtype=param_dtype,
        deterministic=True,
        **{name: case[name] for name in names},
    )
    theirs = flax.linen.dot_product_attention

    def run(parameters, module):
        out, sown = module.apply(
            parameters,
            *arrays,
            mask=mask,
            sow_weights=case["sow_weights"],
            mutable="intermediates",
        )
        return jnp.sin(out.astype(jnp.float32)).sum(), (out, sown)

    parameters = jax.jit(make().init)(jax.random.key(0), *arrays)
    modules = (make(attention_fn=f) for f in (attention_fn, theirs, in_float32(theirs)))
    compare(case, run, parameters, *modules)


@pytest.mark.parametrize("case", pairwise.cases(NNX, fast=1, alone=("precision",)))
def test_nnx(case):
    arrays, mask = inputs(case)
    dtype, param_dtype = case["dtypes"]
    names = ("precision", "normalize_qk", "dropout_rate", "num_kv_heads")
    make = functools.partial(
        nnx.MultiHeadAttention,
        N,
        E,
        dtype=dtype,
        param_dtype=param_dtype,
        deterministic=True,
        decode=False,
        rngs=nnx.Rngs(0),
        **{name: case[name] for name in names},
    )
    theirs = nnx.dot_product_attention
    options = {"mask": mask, "is_causal": case["is_causal"], "sow_weights": case["sow_weights"]}

    def run(parameters, module):
        graph, _, rest = nnx.split(module, nnx.Param, ...)
        captured = nnx.capture(nnx.merge(graph, parameters, rest), nnx.Intermediate)
        out, sown = captured(*arrays, **options)
        return jnp.sin(out.astype(jnp.float32)).sum(), (out, nnx.to_pure_dict(sown))

    ours, *others = (make(attention_fn=f) for f in (attention_fn, theirs, in_float32(theirs)))
    compare(case, run, nnx.state(ours, nnx.Param), ours, *others)


@pytest.mark.parametrize("bias", [(B, N, T, S), (1, 1, T, S), (N, 1, S), (S,)])
def test_functions_with_a_bias(bias):
    q, k, v, bias = (
        jax_normal(i, *x) for i, x in enumerate([(B, T, N, 8), *[(B, S, N, 8)] * 2, bias])
    )
    mask = some_visible((B, 1, T, S))
    out = attention_fn(q, k, v, bias, mask)
    for theirs in (flax.linen.dot_product_attention, nnx.dot_product_attention):
        close_to_largest(out, jax.jit(theirs)(q, k, v, bias, mask), 1e-5)


def test_nnx_decoding_with_flax_cache():
    x, outs = jax_normal(0, B, T, E), []
    for function in (attention_fn, nnx.dot_product_attention):
        module = nnx.MultiHeadAttention(
            N, E, num_kv_heads=2, attention_fn=function, decode=True, rngs=nnx.Rngs(0)
        )
        module.init_cache(x.shape)
        step = nnx.jit(lambda module, x: module(x))
        outs.append(jnp.concatenate([step(module, x[:, i : i + 1]) for i in range(T)], axis=1))
    close_to_largest(*outs, 1e-5)


def test_linen_decoding_with_flax_cache():
    x, outs = jax_normal(0, B, T, E), []
    for function in (attention_fn, flax.linen.dot_product_attention):
        module = flax.linen.MultiHeadAttention(N, attention_fn=function, decode=True)
        variables = module.init(jax.random.key(0), x)
        step, ys = jax.jit(functools.partial(module.apply, mutable="cache")), []
        for i in range(T):
            y, changed = step(variables, x[:, i : i + 1])
            variables = variables | changed
            ys.append(y)
        outs.append(jnp.concatenate(ys, axis=1))
    close_to_largest(*outs, 1e-5)


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_in_linen_and_nnx(broadcast):
    """Equal random keys drop the same pairs, others do not; the mean is preserved."""
    x, rate = jax_normal(0, B, T, E), 0.4
    options = {"broadcast_dropout": broadcast, "dropout_rate": rate, "attention_fn": attention_fn}
    linen = flax.linen.MultiHeadDotProductAttention(N, **options)
    parameters = linen.init(jax.random.key(0), x, deterministic=True)
    module = nnx.MultiHeadAttention(N, E, decode=False, rngs=nnx.Rngs(0), **options)

    def of_linen(key, deterministic=False):
        return linen.apply(parameters, x, deterministic=deterministic, rngs={"dropout": key})

    def of_nnx(key, deterministic=False):
        return nnx.merge(*nnx.split(module))(
            x, deterministic=deterministic, rngs=nnx.Rngs(dropout=key)
        )

    keys = jax.random.split(jax.random.key(1), 400)
    for run in (of_linen, of_nnx):
        outs = np.asarray(jax.jit(jax.vmap(run))(keys.at[1].set(keys[0])))
        np.testing.assert_array_equal(outs[0], outs[1])
        assert not (outs[1] == outs[2]).all()
        error = outs.std(axis=0) / np.sqrt(len(outs))
        assert (np.abs(outs.mean(axis=0) - run(keys[0], deterministic=True)) < 6 * error).all()


def test_an_einsum_of_a_module_is_refused():
    x = jax_normal(0, B, T, E)
    options = {"qk_attn_weights_einsum_cls": lambda: jnp.einsum}
    options["attn_weights_value_einsum_cls"] = options["qk_attn_weights_einsum_cls"]
    module = flax.linen.MultiHeadAttention(N, attention_fn=attention_fn, **options)
    with pytest.raises(NotImplementedError, match="qk_attn_weights_einsum must be None"):
        module.init(jax.random.key(0), x)
