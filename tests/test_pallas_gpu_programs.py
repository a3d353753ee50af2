"""The kernels for GPUs, lowered ahead of time without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import IMPLEMENTATIONS
from helpers import mostly_slow
from jax import export
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from attention_jax import attention, explain, masks, scores
from attention_jax.backends.pallas_gpu import support
from attention_jax.core.positions import Contiguous
from attention_jax.masks.at_positions import mask_at_positions
from attention_jax.scores.at_positions import score_at_positions

NAME = "pallas_gpu interpreted"
interpreted = IMPLEMENTATIONS[NAME]

LOWERED = {
    "causal, bfloat16": ("bfloat16", {"mask": masks.causal()}),
    "window, softcap, float32": (
        "float32",
        {"mask": masks.window(255, 0), "score": scores.softcap(30.0)},
    ),
    "segments, float16": ("float16", {"mask": masks.segments(np.arange(500)[None] // 90)}),
    "dropout, sinks": (
        "bfloat16",
        {
            "dropout_rate": 0.1,
            "dropout_key": jax.random.key(0),
            "sinks": np.zeros(8, jnp.bfloat16),
        },
    ),
    "layout, complement": (
        "bfloat16",
        {
            "mask": (masks.block_sparse(np.eye(8, dtype=bool), 64) | masks.dilated(3))
            & ~masks.chunked(7)
        },
    ),
    "functions with arrays, T5, ALiBi": (
        "bfloat16",
        {
            "mask": masks.mask_fn(lambda b, n, q, k, ids: ids[q] == ids[k], np.arange(500) // 7),
            "score": [
                scores.score_fn(lambda s, b, n, q, k, t: s + t[q - k], np.zeros(1000, np.float32)),
                scores.relative_bias(np.zeros((32, 8), np.float32)),
                scores.alibi(),
            ],
        },
    ),
    "places, global tokens, bias": (
        "bfloat16",
        {
            "mask": mask_at_positions(masks.causal(), np.arange(500)[None], np.arange(500)[None])
            | masks.global_tokens(np.arange(500) < 3),
            "score": scores.bias(np.zeros((500, 500), np.float32)),
        },
    ),
    "scores in a cache": (
        "bfloat16",
        {
            "score": [
                score_at_positions(scores.alibi(), np.arange(500)[None], np.arange(500)[None]),
                score_at_positions(
                    scores.relative_bias(np.zeros((32, 8), np.float32)),
                    Contiguous(np.array([7])),
                    None,
                ),
            ]
        },
    ),
    "numbers that functions close over": (
        "bfloat16",
        {
            "mask": masks.mask_fn(lambda b, n, q, k: q - k < REACH),
            "score": scores.score_fn(lambda s, b, n, q, k: s * SLOPE + 0.5),
        },
    ),
    "neighborhood, lengths": (
        "bfloat16",
        {"mask": masks.neighborhood((10, 50), (3, 5)) & masks.lengths(key=np.array([5]))},
    ),
}


REACH, SLOPE = jnp.int32(77), jnp.float32(0.5)  # arrays of one number

KERNEL = "__gpu$xla.gpu.triton"
# JAX has said so since 0.12.
deprecated = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

CARD = jax.sharding.AbstractMesh(
    (1,),
    ("x",),
    axis_types=(jax.sharding.AxisType.Explicit,),
    abstract_device=jax.sharding.AbstractDevice("NVIDIA A100", num_cores=None, platform="gpu"),
)


def lowered_for_cuda(fn, *args):
    """The program, without a card."""
    unchecked = [export.DisabledSafetyCheck.custom_call(KERNEL)]
    exported = export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=unchecked)(*args)
    return exported.mlir_module()


QUICK_LOWERED = {"causal, bfloat16", "window, softcap, float32", "dropout, sinks"}
QUICK_LOWERED |= {"functions with arrays, T5, ALiBi", "layout, complement"}


@deprecated
@pytest.mark.parametrize("name", mostly_slow(LOWERED, QUICK_LOWERED))
def test_lowers_for_cuda_forward_and_backward(name):
    dtype, options = LOWERED[name]
    q, k = (jax.ShapeDtypeStruct((1, 500, n, 64), dtype) for n in (8, 2))
    v = jax.ShapeDtypeStruct((1, 500, 2, 32), dtype)

    def grads(q, k, v):
        run = lambda *xs: attention(*xs, **options).astype("float32").sum()  # noqa: E731
        return jax.grad(run, (0, 1, 2))(q, k, v)

    with jax.sharding.use_abstract_mesh(CARD):
        assert explain(q, k, v, **options).chosen == "pallas_gpu"
        text = lowered_for_cuda(grads, q, k, v)
    assert text.count(f"custom_call @{KERNEL}") == 3  # forward, rows, columns
    if "bias" not in name:
        assert "500x500" not in text


@deprecated
def test_lowers_for_cuda_where_a_tile_is_wider_and_longer_than_the_arrays():
    q, k, v = (
        jax.ShapeDtypeStruct((1, length, 2, width), jnp.bfloat16)
        for length, width in ((5, 40), (9, 40), (9, 11))
    )
    with jax.sharding.use_abstract_mesh(CARD):
        grads = jax.grad(lambda *xs: attention(*xs).astype("float32").sum(), (0, 1, 2))
        assert lowered_for_cuda(grads, q, k, v).count(f"custom_call @{KERNEL}") == 3


def every_operation(x):
    """A rule with all operations that rules may use; ``x`` float32."""
    for fn in (
        *(jnp.abs, jnp.negative, jnp.sign, jnp.square, jnp.sqrt, jax.lax.rsqrt, jnp.cbrt),
        *(jnp.exp, jnp.exp2, jnp.expm1, jnp.log, jnp.log1p, jax.lax.logistic),
        *(jnp.sin, jnp.cos, jnp.tan, jnp.sinh, jnp.cosh, jnp.tanh),
        *(jax.lax.asin, jax.lax.acos, jax.lax.atan, jax.lax.asinh, jax.lax.acosh, jax.lax.atanh),
        *(jnp.floor, jnp.ceil, jax.lax.stop_gradient, lambda x: jax.lax.integer_pow(x, 3)),
    ):
        x = x + fn(x)
    x = jax.jvp(jnp.tanh, (x,), (x,))[1]
    for fn in (jnp.subtract, jnp.multiply, jnp.divide, jax.lax.pow, jax.lax.rem, jax.lax.atan2):
        x = fn(x, x)
    for fn in (jnp.maximum, jnp.minimum, add_jaxvals):
        x = fn(x, jnp.float32(2))
    x = jax.lax.clamp(jnp.float32(0), x, jnp.float32(1))
    i = jax.lax.bitcast_convert_type(x, jnp.int32) | x.astype(jnp.int32)
    i = i + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    shifts = jax.lax.shift_left, jax.lax.shift_right_arithmetic, jax.lax.shift_right_logical
    for fn in (jnp.bitwise_and, jnp.bitwise_xor, *shifts):
        i = fn(i, jnp.int32(1))
    i = ~jax.sharding.reshard(i, jax.sharding.PartitionSpec(None, None))
    i = jnp.squeeze(jax.lax.reshape(i, (1, *x.shape)), 0)
    for fn in (jnp.less, jnp.less_equal, jnp.greater, jnp.greater_equal, jnp.equal, jnp.not_equal):
        x = jnp.where(fn(i, 1) & jax.lax.is_finite(x), x, jnp.float32(0))
    return x


def add_jaxvals(x, y):
    """The sum of two cotangents: ``add_any``."""
    return jax.vjp(lambda z: (z, z), x)[1]((x, jnp.full_like(x, y)))[0]


@deprecated
def test_a_kernel_has_all_operations_that_rules_may_use():
    def kernel(x, out):
        out[...] = jax.jit(every_operation)(x[...])

    x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    with jax.sharding.use_abstract_mesh(CARD):
        used = set(support._primitives(jax.make_jaxpr(every_operation)(x).jaxpr))
        # The derivative of tanh is an operation of its own since jax 0.12.
        assert used | {"one_minus_square"} == support.POINTWISE
        lowered_for_cuda(
            pl.pallas_call(kernel, out_shape=x, compiler_params=triton.CompilerParams()), x
        )
