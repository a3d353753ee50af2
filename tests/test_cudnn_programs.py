"""The programs that ``jax.nn`` compiles for cuDNN, read without a card."""

import functools
import json
import re
from unittest import mock

import cudnn_calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cudnn_calls import (
    F32,
    SUPPORTED,
    dot_product_attention,
    inputs,
    output,
    shared_bias,
)

# Private: the only way to compile for cuDNN without a GPU.
from jax._src.cudnn import fused_attention_stablehlo

from attention_jax import masks, scores

calls = pytest.fixture(cudnn_calls.calls)


class FakeVersions:
    """Of cuDNN, which is not installed here."""

    @staticmethod
    def cudnn_get_version():
        return 91300


def compiled(fn, *arguments):
    """The calls of cuDNN in the program for a card: target, configuration, types."""
    with mock.patch.object(fused_attention_stablehlo, "cuda_versions", FakeVersions):
        text = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    found = []
    for line in text.splitlines():
        if match := re.search(r'@__(cudnn\S+)\(.*?backend_config = "(.*?)", .* : (\(.*)', line):
            config = json.loads(match[2].replace("\\22", '"'))["cudnn_fmha_backend_config"]
            found.append((match[1], config, match[3]))
    return found


@pytest.mark.parametrize(
    ("name", "kind", "window"),
    [
        ("plain", "PADDING", 0),
        ("causal", "PADDING_CAUSAL", 0),
        ("window", "PADDING_CAUSAL", 4),  # (i - 4, i]: three keys beside self
        ("window of self alone", "PADDING_CAUSAL", 1),
        ("key lengths", "PADDING", 0),
        ("causal and lengths", "PADDING_CAUSAL", 0),
    ],
)
def test_program_for_a_card(name, kind, window):
    fn = functools.partial(output, **SUPPORTED[name])
    ((target, config, types),) = compiled(fn, *inputs())
    assert target == "cudnn$fmhaSoftmax"
    assert config["mask_type"] == kind
    assert config["sliding_window_length"] == window
    assert config["fmha_scale"] == 0.3
    assert config["dropout_rate"] == 0.0
    assert types.startswith("(tensor<6x10x6x8xbf16>, tensor<6x10x2x8xbf16>, tensor<6x10x2x8xbf16>")


def test_program_without_lengths():
    """Lengths that are multiples of a tile are not passed."""
    for mask, kind in (
        (None, "NO_MASK"),
        (masks.causal(), "CAUSAL"),
        (masks.window(3, 0), "CAUSAL"),
    ):
        ((_, config, types),) = compiled(functools.partial(output, mask=mask), *inputs(128))
        assert config["mask_type"] == kind
        assert "i32" not in types


def test_program_in_float16():
    fn = functools.partial(output, mask=masks.causal())
    ((_, config, types),) = compiled(fn, *inputs(dtype=np.float16))
    assert config["intermediate_tensor_shape"]["element_type"] == "F16"
    assert "bf16" not in types


def gradients(*x, **options):
    return jax.grad(lambda x: output(*x, **options).astype(F32).sum())(x)


def test_program_of_gradients():
    fn = functools.partial(gradients, **SUPPORTED["causal and lengths"])
    forward, backward = compiled(fn, *inputs())
    assert forward[0] == "cudnn$fmhaSoftmax"
    assert backward[0] == "cudnn$fmhaSoftmaxBackward"
    assert backward[1]["mask_type"] == "PADDING_CAUSAL"

    def of_bias(*x):
        return jax.grad(lambda b: output(*x, score=scores.bias(b)).astype(F32).sum())(shared_bias)

    _, (target, _, types) = compiled(of_bias, *inputs())
    assert target == "cudnn$fmhaScaleBiasSoftmaxBackward"
    assert "tensor<1x6x10x10xbf16>" in types.split("->")[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "in_axes"), [("grad of vmap", (1, 0, None)), ("vmap of grad", (None, 2, 0))]
)
def test_vmap(order, in_axes, calls):
    """Any axis, or none, of any array: one call for all, the same numbers; on a GPU as well."""
    x = tuple(
        a if axis is None else jnp.moveaxis(jnp.stack([a, a + a]), 0, axis)
        for a, axis in zip(inputs(B=()), in_axes, strict=True)
    )
    own = np.array([3, 10], np.int32)

    def one(q, k, v, length, b):
        mask = masks.causal() & masks.lengths(query=length, key=length)
        return output(q, k, v, mask=mask, score=scores.bias(b)).astype(F32).sum()

    axes = (*in_axes, 0, None)
    if order == "vmap of grad":
        program = jax.vmap(jax.grad(one, (0, 1, 2, 4)), axes)
    else:
        program = jax.grad(lambda *x: jax.vmap(one, axes)(*x).sum(), (0, 1, 2, 4))
    arguments = (*x, own, shared_bias)
    found = jax.jit(program)(*arguments)
    picked = [
        [
            a if axis is None else jnp.take(a, i, axis)
            for a, axis in zip(arguments, axes, strict=True)
        ]
        for i in range(2)
    ]
    each = [jax.jit(jax.grad(one, (0, 1, 2, 4)))(*p) for p in picked]
    for d, axis, *parts in zip(found, (*in_axes, None), *each, strict=True):
        if order == "vmap of grad":
            right = jnp.stack(parts)
        else:
            right = sum(parts) if axis is None else jnp.stack(parts, axis)
        np.testing.assert_allclose(d.astype(F32), right.astype(F32), rtol=0.02, atol=0.02)
    with mock.patch.object(jax.nn, "dot_product_attention", dot_product_attention):
        for _, _, types in compiled(program, *arguments):
            assert types.startswith("(tensor<2x10x6x8xbf16>")


def test_vmap_of_vmap():
    x = jnp.stack([jnp.stack([inputs(B=())[0]] * 3)] * 2)
    key, value = inputs(B=())[1:]
    inner = jax.vmap(gradients, (0, None, None))
    ((_, _, types), _) = compiled(jax.vmap(inner, (0, None, None)), x, key, value)
    assert types.startswith("(tensor<6x10x6x8xbf16>")


def test_vmap_of_a_shared_bias_is_refused():
    def one(q, k, v):
        return output(q, k, v, score=scores.bias(shared_bias[:1]))

    with pytest.raises(
        NotImplementedError, match=r"under vmap the bias of score must have .* Ask for .*'xla'"
    ):
        compiled(jax.vmap(one), *inputs(B=(2,)))
