"""Small models of every family, and checkpoint folders like published ones."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

from attention_jax import models
from attention_jax.models import pretrained
from attention_jax.models.pretrained import tensor_files
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


DROPOUT_TWICE = models.Pooler(dropout=True)
# What the encoders of other families have beside what a BERT has.
ENCODERS = {
    "roberta": {"first_position": 2, "pooler": True, "pooler_config": DROPOUT_TWICE},
    "distilbert": {"types": 0, "pooler_config": models.Pooler("relu")},
    "electra": {"embedding_features": 4, "pooler_config": models.Pooler("gelu", dropout=True)},
    "mpnet": {
        "first_position": 2,
        "types": 0,
        "pooler": True,
        "pooler_config": DROPOUT_TWICE,
    },
    "modernbert": {
        "types": 0,
        "positions": None,
        "max_length": 8192,
        "pooler_config": models.Pooler("gelu", bias=False, norm=True, tokens=True),
        "head_bias": False,
    },
}
ENCODER_LAYERS = {
    "distilbert": {"attention_output_dropout_rate": 0.0},
    "mpnet": {"relative": models.Relative()},
    "modernbert": {
        **PLAIN,
        "order": "pre",
        "norm_epsilon": 1e-5,
        "norm_bias": False,
        "first_norm": False,
        "gated": True,
        "fused": True,
        "rotary": Rotary(160_000.0),
    },
}


def bert_model(layers=BERT, **head):
    options = {"types": 2, "embedding_norm": True, "max_length": 6, **head}
    return models.Encoder(models.EncoderConfig(11, layers, **options), rngs=nnx.Rngs(0))


@functools.cache
def make(kind):
    rngs = nnx.Rngs(0)
    match kind:
        case "gpt2":
            layers = models.Layers(**SMALL, fused=True, activation="gelu_tanh")
            config = models.DecoderConfig(11, layers, positions="learned", max_length=6)
            return models.Decoder(config, rngs=rngs)
        case "gpt_neox":
            layers = models.Layers(**SMALL, fused=True, parallel=True, rotary=Rotary(width=2))
            return models.Decoder(models.DecoderConfig(11, layers, tied=False), rngs=rngs)
        case "opt":
            layers = models.Layers(**SMALL, activation="relu")
            options = {"positions": "learned", "max_length": 6, "first_position": 2}
            return models.Decoder(models.DecoderConfig(11, layers, **options), rngs=rngs)
        case "mixtral":
            mixture = dataclasses.replace(LLAMA, experts=models.Experts(3, 2))
            return models.Decoder(models.DecoderConfig(11, mixture, tied=False), rngs=rngs)
        case "deepseek_v3":
            routing = {"gating": "sigmoid", "groups": 2, "groups_per_token": 1, "shared": 5}
            deepseek = dataclasses.replace(
                LLAMA,
                num_layers=2,
                rotary=Rotary(interleaved=True),
                latent=models.Latent(6, 2, query_features=4),
                experts=models.Experts(4, 2, hidden=5, **routing, dense_layers=1),
            )
            return models.Decoder(models.DecoderConfig(11, deepseek, tied=False), rngs=rngs)
        case "llama" | "llama tied":
            return models.Decoder(models.DecoderConfig(11, LLAMA, tied="tied" in kind), rngs=rngs)
        case "gemma2":
            return models.Decoder(
                models.DecoderConfig(11, GEMMA, embedding_scale=8**0.5), rngs=rngs
            )
        case "t5":
            config = models.EncoderDecoderConfig(11, T5, T5, positions=None, head_scale=8**-0.5)
            return models.EncoderDecoder(config, rngs=rngs)
        case "whisper":
            layers = models.Layers(**SMALL, bias=("query", "value", "out"))
            config = models.SpeechConfig(11, layers, layers, max_length=6, mels=3, frames=8)
            return models.SpeechTransformer(config, rngs=rngs)
        case "vit":
            config = models.VisionConfig((4, 4), 2, models.Layers(**SMALL), channels=1)
            return models.VisionTransformer(config, rngs=rngs)
        case "clip" | "clip_text" | "clip_vision":
            layers = models.Layers(**SMALL, activation="quick_gelu")
            text = models.DecoderConfig(11, layers, positions="learned", max_length=6)
            image = {"channels": 1, "patch_bias": False, "embedding_norm": True}
            vision = models.VisionConfig((4, 4), 2, layers, **image)
            if kind == "clip_text":
                return models.TextTower(models.TextTowerConfig(text, end=10), rngs=rngs)
            if kind == "clip_vision":
                return models.ImageTower(models.ImageTowerConfig(vision, 6), rngs=rngs)
            config = models.DualEncoderConfig(text, vision, 6, end=10)
            return models.DualEncoder(config, rngs=rngs)
        case "bert":
            return bert_model(pooler=True)
        case name if name in ENCODERS:
            layers = dataclasses.replace(BERT, **ENCODER_LAYERS.get(name, {}))
            return bert_model(layers, **ENCODERS[name])
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
        arrays = dict(tensor_files.File(Path(folder) / "model.safetensors"))
        return arrays, json.loads((Path(folder) / "config.json").read_text())


# As many tokens as the small BERT knows.
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat", "##s", "?"]


def write_tokenizer(folder, tokens=VOCABULARY):
    """Writes ``tokenizer.json`` like that of BERT, with a truncation of its own to be ignored."""
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(tokens[:4])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.enable_truncation(3)
    made.enable_padding(length=9)
    made.save(str(folder / "tokenizer.json"))
    return folder


def write_modules(folder, *, pool="mean", normalize=True, max_length=None):
    """Writes what sentence-transformers writes beside a model."""
    kinds = ["Transformer", "Pooling", *["Normalize"] * normalize]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    entries = {f"pooling_mode_{x}": x.startswith(f"{pool}_to") for x in flags}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 8, **entries})
    )
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": max_length, "do_lower_case": False})
    )
    return folder


def saved(tmp_path):
    """The folder of a saved model, with tensors and entries added or replaced; and the model."""

    def write(kind, change=lambda arrays: arrays, **entries):
        arrays, config = checkpoint(kind)
        arrays, config = change(dict(arrays)), config | entries
        tensor_files.write(tmp_path / "model.safetensors", arrays, arrays.values())
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path, make(kind)

    return write
