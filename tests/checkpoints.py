"""Small models of every family, and checkpoint folders like published ones."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

from attention_jax import models
from attention_jax.models import pretrained
from attention_jax.models.pretrained import safetensors
from attention_jax.positions import Rotary

TOKENS = np.array([[3, 1, 4]])
SMALL = {"features": 8, "num_layers": 1, "num_heads": 2, "hidden": 12}
PLAIN = {"bias": False, "feed_forward_bias": False}
LLAMA = models.Layers(**SMALL, **PLAIN, rotary=Rotary(), norm="rms", gated=True, activation="silu")
GEMMA = models.Layers(
    **SMALL,
    **PLAIN,
    rotary=Rotary(),
    norm="one_plus_rms",
    order="both",
    gated=True,
    activation="gelu_tanh",
    scale=256**-0.5,
    windows=(4,),
)
BERT = models.Layers(**SMALL, order="post", norm_epsilon=1e-12)
T5 = models.Layers(
    **SMALL,
    **PLAIN,
    relative=models.Relative(),
    norm="rms",
    norm_epsilon=1e-6,
    activation="relu",
    scale=1.0,
)


def bert_model(**head):
    options = {"types": 2, "embedding_norm": True, "max_length": 6, **head}
    return models.Encoder(models.EncoderConfig(11, BERT, **options), rngs=nnx.Rngs(0))


@functools.cache
def make(kind):
    rngs = nnx.Rngs(0)
    match kind:
        case "gpt2":
            layers = models.Layers(**SMALL, fused=True, activation="gelu_tanh")
            config = models.DecoderConfig(11, layers, positions="learned", max_length=6)
            return models.Decoder(config, rngs=rngs)
        case "llama" | "llama tied":
            return models.Decoder(models.DecoderConfig(11, LLAMA, tied="tied" in kind), rngs=rngs)
        case "gemma2":
            return models.Decoder(
                models.DecoderConfig(11, GEMMA, embedding_scale=8**0.5), rngs=rngs
            )
        case "t5":
            config = models.EncoderDecoderConfig(11, T5, T5, positions=None, head_scale=8**-0.5)
            return models.EncoderDecoder(config, rngs=rngs)
        case "vit":
            config = models.VisionConfig((4, 4), 2, models.Layers(**SMALL), channels=1)
            return models.VisionTransformer(config, rngs=rngs)
        case "bert":
            return bert_model(pooler=True)
        case "bert tokens":
            return bert_model(head="tokens")
        case "bert classes":
            config = models.ClassifierConfig(bert_model(pooler=True).config, ("LABEL_0",))
            return models.Classifier(config, rngs=rngs)
        case "bert tags":
            config = models.TaggerConfig(bert_model().config, ("O", "B", "I"))
            return models.Tagger(config, rngs=rngs)
        case "bert spans":
            return models.Reader(models.ReaderConfig(bert_model().config), rngs=rngs)


def assert_same(model, expected):
    """Checks that all parameters are equal, so that outputs need not be computed."""
    a, b = (dict(nnx.to_flat_state(nnx.state(x, nnx.Param))) for x in (model, expected))
    assert a.keys() == b.keys()
    for path, x in a.items():
        np.testing.assert_array_equal(x.get_value(), b[path].get_value(), err_msg=str(path))


@functools.cache
def checkpoint(kind):
    """The tensors and the configuration entries of a model."""
    with tempfile.TemporaryDirectory() as folder:
        pretrained.save(make(kind), folder)
        arrays = dict(safetensors.File(Path(folder) / "model.safetensors"))
        return arrays, json.loads((Path(folder) / "config.json").read_text())


def saved(tmp_path):
    """The folder of a saved model, with tensors and entries added or replaced; and the model."""

    def write(kind, change=lambda arrays: arrays, **entries):
        arrays, config = checkpoint(kind)
        arrays, config = change(dict(arrays)), config | entries
        safetensors.write(tmp_path / "model.safetensors", arrays, arrays.values())
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path, make(kind)

    return write
