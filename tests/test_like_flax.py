"""``nn.attention_fn`` in Flax's own attention modules: every option of theirs, and every pair.

With the same parameters the results and their gradients must be those of Flax's own attention.
"""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
from flax import nnx
from pairwise import close

from attention_jax.nn import attention_fn

B, T, S, N, E = 2, 5, 7, 4, 16
# Flax's own modules promote dtypes.
pytestmark = pytest.mark.usefixtures("promotion")


@pytest.fixture
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def seen(shape, dtype=bool):
    """Every query sees key 0: where it sees none, theirs gives a mean."""
    some = np.random.default_rng(3).random(shape) < 0.6
    some[..., 0] = True
    return jnp.asarray(some, dtype)


def in_float32(theirs):
    """Their attention in float32, for comparison: its result and its weights are exact."""

    def attend(query, key, value, *, dtype=None, **options):
        out = theirs(query, key, value, dtype=jnp.float32, **options)
        return out.astype(query.dtype)

    return attend


DTYPES = ((None, "float32"), ("bfloat16", "float32"), ("float16", "float32"), (None, "bfloat16"))
ARGUMENTS = {
    "lead": ((), (B,), (B, 3)),
    "dtypes": DTYPES,
    "mask": (None, ((N, T, S), bool), ((1, T, S), bool), ((N, T, S), "float32"), ((1, T, S), "int32")),
    "precision": (None, "highest", jax.lax.Precision.HIGH, ("default", "default")),
    "sow_weights": (False, True),
    "normalize_qk": (False, True),
    "dropout_rate": (0.0, 0.5),
}
LINEN = {**ARGUMENTS, "force_fp32_for_softmax": (False, True), "context": (False, True)}
NNX = {**ARGUMENTS, "num_kv_heads": (N, 2, 1), "is_causal": (False, True)}


def tolerances(dtypes):
    dtype, parameters = (jnp.float32 if x is None else x for x in dtypes)
    eps = max(float(jnp.finfo(x).eps) for x in (dtype, parameters))
    return 8 * eps, 32 * eps


def inputs(case):
    lead, mask = case["lead"], case["mask"]
    cross = case.get("context", False)
    x, context = normal(0, *lead, T, E), normal(1, *lead, S, E)
    if mask is not None:
        (heads, *_), dtype = mask
        mask = seen((*lead, heads, T, S if cross else T), dtype)
    return (x, context) if cross else (x,), mask


@pytest.mark.parametrize("case", pairwise.cases(LINEN, fast=3))
def test_linen(case):
    dtype, param_dtype = case["dtypes"]
    options = {n: case[n] for n in ("precision", "normalize_qk", "dropout_rate", "force_fp32_for_softmax")}
    make = functools.partial(
        flax.linen.MultiHeadDotProductAttention, N, dtype=dtype, param_dtype=param_dtype,
        deterministic=True, **options,
    )  # fmt: skip
    ours, exact = make(attention_fn=attention_fn), make(attention_fn=in_float32(flax.linen.dot_product_attention))
    arrays, mask = inputs(case)
    parameters = ours.init(jax.random.key(0), *arrays)

    def loss(parameters, module):
        call = functools.partial(module.apply, parameters, *arrays, mask=mask)
        out, sown = call(sow_weights=case["sow_weights"], mutable="intermediates")
        return jnp.sin(out.astype(jnp.float32)).sum(), (out, sown)

    compare(case, *(jax.jit(jax.grad(functools.partial(loss, module=m), has_aux=True))(parameters) for m in (ours, exact)))
