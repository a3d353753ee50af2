"""What of a model is trained, and how fast: rates by layer, frozen layers, adapters, Muon."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomized, slow
from line import LINE

from attention_jax.models import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Layers,
)
from attention_jax.nn import Frozen
from experiments.training import optimizers, tuning
from experiments.training.config import TrainConfig
from experiments.training.steps import trainer
from experiments.training.task import Loss

LAYERS = Layers(features=8, num_layers=3, num_heads=2)
TOKENS = np.array([[3, 1, 4, 1], [5, 9, 2, 0]], np.int32)


class Classifier(nnx.Module):
    """An encoder below a head."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.encoder = Encoder(EncoderConfig(10, LAYERS, max_length=4), rngs=rngs)
        self.classify = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, tokens):
        return self.classify(self.encoder(tokens).mean(axis=1))


def configured(**options):
    given = {"steps": 4, "batch_size": 2, "warmup": 0.0, "weight_decay": 0.0, "clip": 1e9}
    return TrainConfig(**{**given, **options})


def paths(model, kind=nnx.Param):
    """The weights of a kind, by path."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat}


def first_update(model, **options):
    """The first update of each weight for a gradient of ones, by path."""
    optimizer = optimizers.make(configured(**options), model)
    weights = nnx.state(model, nnx.Param)
    updates = updated(optimizer, jax.tree.map(jnp.ones_like, weights), weights)
    return {".".join(map(str, p)): np.asarray(x[...]) for p, x in nnx.to_flat_state(updates)}


def updated(optimizer, gradient, weights):
    """The first update."""
    with jax.numpy_dtype_promotion("standard"):  # as in the loop
        return jax.jit(optimizer.update)(gradient, optimizer.init(weights), weights)[0]


# --- Rates by layer.


def test_the_rate_decays_from_the_head_to_the_embeddings():
    for name, update in first_update(Classifier(), layer_decay=0.5, learning_rate=0.1).items():
        expected = 0.1
        if name.startswith("encoder.embed"):
            expected = 0.1 * 0.5**4
        elif name.startswith("encoder.stack.blocks"):
            expected = 0.1 * 0.5 ** (3 - int(name.split(".")[3]))
        np.testing.assert_allclose(update, -expected, rtol=1e-4, err_msg=name)


def test_an_encoder_may_be_the_model_itself():
    encoder = Classifier().encoder
    assert tuning.place(encoder, "freeze") == ((), "stack", 3)
    assert tuning.place(Classifier(), "freeze") == (("encoder",), "stack", 3)


@pytest.mark.parametrize("option", [{"layer_decay": 0.9}, {"freeze": 0}, {"low_rank": 1}])
def test_options_of_layers_need_an_encoder(option):
    linear, config = LINE.init(None, None, nnx.Rngs(0)), configured(**option)
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} needs a model with one encoder.*Line has none"):
        optimizers.make(config, tuning.prepared(linear, config))


# --- Frozen layers.


@pytest.mark.parametrize("layers", [slow(0), 2])
def test_frozen_layers_keep_their_weights_and_the_others_learn(layers):
    config = configured(freeze=layers, batch_size=2)
    model = tuning.prepared(randomized(Classifier()), config)
    frozen = {"encoder.embed", *(f"encoder.stack.blocks.{i}" for i in range(layers))}
    for name in paths(model, Frozen):
        assert any(name.startswith(x) for x in frozen)
    for name in paths(model):
        assert not any(name.startswith(x) for x in frozen)
    before = paths(model) | paths(model, Frozen)
    assert before.keys() == paths(Classifier()).keys()
    training = trainer(
        lambda config, model, batch: Loss((model(batch) ** 2).sum(), jnp.float32(4)), config, model
    )
    state, *_ = training.update(training.put(training.initial), TOKENS, 0)
    after = training.model(state.weights)
    for name, x in (paths(after) | paths(after, Frozen)).items():
        changed = not np.array_equal(x, before[name])
        assert changed != any(name.startswith(x) for x in frozen), name


def test_more_frozen_layers_than_there_are_raise():
    with pytest.raises(ValueError, match=r"freeze must be at most 3, the number of layers.*got 4"):
        tuning.prepared(Classifier(), configured(freeze=4))


# --- Adapters.


def test_low_rank_trains_adapters_and_the_head_alone():
    plain, tokens = randomized(Classifier()), TOKENS
    expected = plain(tokens)
    model = tuning.prepared(plain, configured(low_rank=2))
    np.testing.assert_allclose(model(tokens), expected, atol=1e-6)
    assert {name.split(".")[-1] for name in paths(model) if name.startswith("encoder")} == {
        "lora_a",
        "lora_b",
    }
    assert {name for name in paths(model) if not name.startswith("encoder")} == {
        "classify.kernel",
        "classify.bias",
    }
    above = tuning.prepared(model, configured(freeze=2))
    assert all(".blocks.2." in name for name in paths(above) if name.startswith("encoder"))


def test_low_rank_leaves_a_decoder_as_it_is():
    config = EncoderDecoderConfig(10, LAYERS, LAYERS)
    plain = EncoderDecoder(config, rngs=nnx.Rngs(0))
    decoder = {name for name in paths(plain) if name.startswith("decoder")}
    assert tuning.place(plain, "low_rank") == ((), "encoder", 3)
    model = tuning.prepared(plain, configured(low_rank=1))
    trained = paths(model).keys()
    assert decoder < trained
    assert all(".lora_" in name for name in trained - decoder)


# --- Muon.


@pytest.mark.slow
def test_muon_orthogonalizes_the_matrices_of_layers_and_only_those():
    model = Decoder(DecoderConfig(10, LAYERS), rngs=nnx.Rngs(0))
    weights = nnx.state(model, nnx.Param)
    optimizer = optimizers.make(configured(optimizer="muon", learning_rate=0.1), model)
    random = randomized(nnx.clone(model))
    updates = updated(optimizer, nnx.state(random, nnx.Param), weights)
    assert jax.tree.structure(updates) == jax.tree.structure(weights)
    for path, x in nnx.to_flat_state(updates):
        update = np.asarray(x[...])
        if "blocks" in path and update.ndim == 2:
            scale = 0.1 * 0.2 * max(update.shape) ** 0.5
            sizes = np.linalg.svd(update, compute_uv=False) / scale
            assert (sizes > 0.5).all()
            assert (sizes < 1.4).all()
        else:
            np.testing.assert_allclose(np.abs(update), 0.1, rtol=1e-3, err_msg=str(path))


def test_muon_without_layers_raises():
    linear = LINE.init(None, None, nnx.Rngs(0))
    with pytest.raises(ValueError, match="optimizer muon needs matrices of transformer layers"):
        optimizers.make(configured(optimizer="muon"), linear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
        ({"layer_decay": 1.1}, r"layer_decay must be in \(0, 1\], got 1.1"),
        ({"freeze": -1}, "freeze must be at least 0, got -1"),
        ({"low_rank": -1}, "low_rank must be at least 0, got -1"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(configured(), **options)
