"""Weights as 8-bit integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import jax_normal, mostly_slow

from attention_jax import models
from attention_jax.core.int8 import quantize
from attention_jax.models import pretrained
from attention_jax.nn import Frozen, low_rank, merged, quantized

TOKENS = np.array([[3, 1, 4, 1, 5, 9]])


@pytest.fixture(scope="module")
def decoder():
    layers = models.Layers(
        features=32, num_layers=2, num_heads=2, fused=True, activation="gelu_tanh"
    )
    config = models.DecoderConfig(60, layers, positions="learned", max_length=8)
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    model.eval()
    return model


@nnx.jit
def run(model):
    return model(TOKENS)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_weight_is_within_half_a_step(axis, dtype):
    x = jax_normal(0, 5, 7, dtype=dtype) * jnp.asarray([1, 1e-3, 100, 1, 0, 1, 1], dtype)
    q = quantize(x, axis)
    exact, found = (np.asarray(y, np.float64) for y in (x, q[...]))
    step = np.abs(exact).max(axis, keepdims=True) / 127
    rounding = 2.0 ** (-7 if dtype == "bfloat16" else -22) * np.abs(exact)
    assert (np.abs(found - exact) <= step * (0.5 + 2.0**-7) + rounding).all()
    assert q.integers.dtype == jnp.int8
    assert q[...].dtype == x.dtype
    assert q.scale.size == x.shape[1 - axis]
    assert (q.shape, q.ndim, q.size) == (x.shape, x.ndim, x.size)


def test_a_model_computes_nearly_the_same(decoder):
    small = quantized(decoder)
    right, found = (np.asarray(run(model)) for model in (decoder, small))
    error = np.abs(found - right).max() / np.abs(right).max()
    assert 0 < error < 0.03


def test_the_widened_weights_give_the_same_result_exactly(decoder):
    """Only the weights are rounded; nothing else changes."""
    small = quantized(decoder)
    graph, state = nnx.split(small)
    wide = {
        path: nnx.Param.from_metadata(x[...], x.get_metadata()) if isinstance(x, Frozen) else x
        for path, x in nnx.to_flat_state(state)
    }
    model = nnx.merge(graph, nnx.from_flat_state(wide))
    np.testing.assert_allclose(run(small), run(model), atol=1e-6)


@pytest.mark.slow
def test_generation_with_caches(decoder):
    small, tokens = quantized(decoder), TOKENS[:, :3]
    for _ in range(3):
        logits = np.asarray(small(tokens))
        tokens = np.concatenate([tokens, logits[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(
        models.generate(small, TOKENS[:, :3], max_new_tokens=3).tokens, tokens[:, 3:]
    )


@pytest.mark.parametrize("param_dtype", mostly_slow(["float32", "bfloat16"], {"float32"}))
def test_load_quantizes_as_quantized_does(decoder, param_dtype, tmp_path):
    pretrained.save(decoder, tmp_path)
    small = pretrained.load(tmp_path, quantize="int8", param_dtype=jnp.dtype(param_dtype))
    wide = pretrained.load(tmp_path, param_dtype=jnp.dtype(param_dtype))
    same = quantized(wide)
    for (path, x), (_, y) in zip(
        *(nnx.to_flat_state(nnx.state(m)) for m in (small, same)), strict=True
    ):
        assert type(x) is type(y)
        assert type(x.get_raw_value()) is type(y.get_raw_value()), path
        jax.tree.map(np.testing.assert_array_equal, x.get_raw_value(), y.get_raw_value())
    size, full = (
        sum(x.nbytes for x in jax.tree.leaves(nnx.state(m, (nnx.Param, Frozen))))
        for m in (small, wide)
    )
    assert size < full * {"float32": 0.32, "bfloat16": 0.6}[param_dtype]


@pytest.mark.slow
def test_low_rank_adapters_are_trained_over_quantized_weights(decoder):
    adapted = low_rank(quantized(decoder), rank=1, where=("out",), rngs=nnx.Rngs(1))
    gradients = nnx.grad(lambda model: model(TOKENS).sum())(adapted)
    names = {path[-1] for path, _ in nnx.to_flat_state(gradients)}
    assert names == {"lora_a", "lora_b"}
    whole = merged(adapted)
    np.testing.assert_allclose(run(whole), run(adapted), atol=1e-5)
    trained = {path[-2] for path, x in nnx.to_flat_state(nnx.state(whole, nnx.Param))}
    assert "out" in trained
    assert "query_key_value" not in {
        path[-2]
        for path, _ in nnx.to_flat_state(nnx.grad(lambda m: m(TOKENS).sum())(whole))
        if path[-1] == "kernel"
    }


def test_errors(decoder, tmp_path):
    small = quantized(decoder)
    with pytest.raises(ValueError, match="model is quantized: save the original model"):
        pretrained.save(small, tmp_path)
    with pytest.raises(ValueError, match="model is quantized: resize the original model"):
        models.resize_vocabulary(small, 70)
    with pytest.raises(ValueError, match="model must have projections or embeddings"):
        quantized(small)
    with pytest.raises(ValueError, match="model has low-rank adapters: quantize it first"):
        quantized(low_rank(decoder, rank=1, rngs=nnx.Rngs(1)))
    with pytest.raises(ValueError, match="x must be finite to be quantized"):
        quantize(np.array([[1.0, np.inf]], np.float32), 0)
    with pytest.raises(ValueError, match="quantize must be 'int8' or None, got 'int4'"):
        pretrained.load(tmp_path, quantize="int4")
