"""Stacks with rematerialization, and in one scan."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import slow

from attention_jax.models import (
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Layers,
    Relative,
    generate,
    pretrained,
)
from attention_jax.models.running import period
from attention_jax.nn import FeedForward, low_rank, record_weights
from attention_jax.positions import Rotary

V, T = 11, 6
TOKENS = np.random.default_rng(0).integers(1, V, (2, T)).astype(np.int32)
REAL = np.arange(T) < np.array([[T], [4]])
WAYS = {
    "remat": {"remat": True},
    "policy": {"remat": jax.checkpoint_policies.dots_saveable},
    "scan": {"scan": True},
    "scan, remat": {"scan": True, "remat": True},
}


def layers(**more):
    return Layers(**{"features": 8, "num_layers": 4, "num_heads": 2, "hidden": 8, **more})


def decoder(**more):
    more = {"rotary": (Rotary(), None), "windows": (2, None), **more}
    return Decoder(DecoderConfig(V, layers(**more)), rngs=nnx.Rngs(0))


def translator(**more):
    stack = layers(num_layers=2, relative=Relative(4, 8), dropout_rate=0.2, **more)
    config = EncoderDecoderConfig(V, stack, stack, positions=None)
    return EncoderDecoder(config, rngs=nnx.Rngs(0))


MODELS = {
    "decoder": (decoder, lambda model: model(TOKENS, real=REAL)),
    "dropout": (
        lambda **more: decoder(dropout_rate=0.2, attention_dropout_rate=0.2, **more),
        lambda model: model(TOKENS),
    ),
    "translator": (translator, lambda model: model(TOKENS, TOKENS[:, :3], source_real=REAL)),
}


@functools.cache
def results(name, way=None):
    """Result and gradient of one call; with dropout, the result of a second call as well."""
    make, call = MODELS[name]
    graph, parameters, rest = nnx.split(make(**WAYS.get(way, {})), nnx.Param, ...)

    @jax.jit
    def run(parameters, rest):
        def total(parameters):
            model = nnx.merge(graph, parameters, rest, copy=True)
            out = call(model)
            return (out**2).mean(), (out, None if name == "decoder" else call(model))

        return jax.value_and_grad(total, has_aux=True)(parameters)

    return run(parameters, rest)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("decoder", "scan, remat"),
        slow("decoder", "policy"),
        slow("dropout", "remat"),  # each way draws the same dropout
        slow("dropout", "scan"),
        slow("translator", "scan, remat"),
    ],
)
def test_results_and_gradients_are_the_same(name, way):
    found, right = results(name, way), results(name)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_program_of_a_scan_does_not_grow_with_the_layers():
    def equations(num_layers, **way):
        model = decoder(num_layers=num_layers, **way)
        graph, state = nnx.split(model)
        run = jax.make_jaxpr(lambda state: nnx.merge(graph, state, copy=True)(TOKENS))
        return len(run(state).eqns)

    assert equations(4, scan=True) == equations(8, scan=True) < equations(4)


@pytest.mark.slow
def test_a_scan_with_remat_needs_less_memory():
    def temporaries(**way):
        model = decoder(num_layers=8, windows=(None,), **way)
        graph, parameters, rest = nnx.split(model, nnx.Param, ...)
        tokens = np.ones((4, 64), np.int32)

        def total(parameters):
            return (nnx.merge(graph, parameters, rest, copy=True)(tokens) ** 2).mean()

        compiled = jax.jit(jax.grad(total)).lower(parameters).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(scan=True, remat=True) < temporaries(scan=True) / 2


@pytest.mark.slow
def test_generation_under_scan_and_remat_is_the_same():
    plain, other = decoder(), decoder(scan=True, remat=True)
    found, right = (generate(m, TOKENS, max_new_tokens=4).tokens for m in (other, plain))
    np.testing.assert_array_equal(found, right)


def test_weights_are_recorded():
    record = nnx.jit(lambda model: record_weights(model, TOKENS))
    out, weights = record(decoder(scan=True, remat=True))
    right, expected = record(decoder())
    np.testing.assert_array_equal(out, right)
    assert weights.keys() == expected.keys()
    assert len(weights) == 4


def test_recorded_weights_keep_the_order_of_the_model_under_jit():
    model = decoder(num_layers=11)
    _, weights = nnx.eval_shape(lambda: record_weights(model, TOKENS))
    numbers = [int(path.split(".")[2]) for path in weights]
    assert numbers == list(range(11))  # sorted by name, 10 would come before 2


@pytest.mark.slow
def test_parameters_adapters_and_files_are_those_of_a_plain_stack(tmp_path):
    more = {"gated": True, "norm": "rms", "bias": False, "feed_forward_bias": False}
    more |= {"activation": "silu", "windows": (None,)}
    model = decoder(scan=True, remat=True, **more)
    pretrained.save(model, tmp_path)
    loaded = pretrained.load(tmp_path)
    call = nnx.jit(lambda model: model(TOKENS))
    expected = call(model)
    np.testing.assert_allclose(call(loaded), expected, rtol=1e-5, atol=1e-6)
    adapted = low_rank(model, rank=1, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(call(adapted), expected, rtol=1e-5, atol=1e-6)
    loaded.set_attributes(scan=True)
    np.testing.assert_allclose(call(loaded), expected, rtol=1e-5, atol=1e-6)


def test_period():
    assert [period(x) for x in ("a", "aaaa", "abab", "aab", "abcabc", "aba")] == [1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"remat": "dots"}, TypeError, "remat"),
        ({"scan": True, "windows": (2, 2, 2, None)}, ValueError, "scan needs windows that repeat"),
    ],
)
def test_invalid_options_raise(options, error, said):
    with pytest.raises(error, match=said):
        layers(**options)


def test_scan_over_different_blocks_raises():
    model = decoder(scan=True)
    model.stack.blocks[2].attention.order = "post"
    with pytest.raises(
        ValueError, match="block 2 has other modules, options or masks than block 0"
    ):
        model(TOKENS)


class Storing(FeedForward):
    def __call__(self, x):
        self.stored = nnx.Intermediate(x)
        return super().__call__(x)


@pytest.mark.parametrize("way", ["remat", "scan"])
def test_blocks_that_store_intermediates_raise(way):
    model = decoder(**WAYS[way])
    for block in model.stack.blocks:
        block.feed_forward.sublayer = Storing(8, 8, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="remat and scan discard changes"):
        model(TOKENS)
