"""OPT: learned positions, of which the first has row 2, and ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from attention_jax.models.decoder import Decoder, DecoderConfig
from attention_jax.models.layers import Layers
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig
from attention_jax.models.pretrained.tensors import Tensor, block, linear, norm

MODEL_TYPES = ("opt",)
PREFIX = "model."
RENAMED: dict[str, str] = {}
IGNORED: tuple[str, ...] = ()
COPIES = {"lm_head.weight": "model.decoder.embed_tokens.weight"}


def from_hf(hf: HFConfig, names: set[str]) -> DecoderConfig:
    """Our configuration from Hugging Face's."""
    hf.architecture(("OPTForCausalLM",), "OPTForCausalLM")
    E = hf.number("hidden_size", 768)
    width = hf.number("word_embed_proj_dim", None)
    if width not in (None, E):
        hf.errors.append(
            f"word_embed_proj_dim = {width} is not supported, only hidden_size = {E}: "
            f"embeddings are not projected"
        )
    hf.only("_remove_final_layer_norm", False, None)
    hf.only("layer_norm_elementwise_affine", True, None)
    for name in ("layerdrop", "activation_dropout"):
        hf.only(name, 0.0, None)
    hf.take("init_std", None)
    bias = hf.flag("enable_bias", True)
    return DecoderConfig(
        vocabulary=hf.number("vocab_size", 50_272),
        layers=Layers(
            features=E,
            num_layers=hf.number("num_hidden_layers", 12),
            num_heads=hf.number("num_attention_heads", 12),
            hidden=hf.number("ffn_dim", 3072),
            activation=hf.activation("activation_function", "relu"),
            order="pre" if hf.flag("do_layer_norm_before", True) else "post",
            bias=bias,
            feed_forward_bias=bias,
            dropout_rate=hf.rate("dropout", 0.1),
            attention_dropout_rate=hf.rate("attention_dropout", 0.0),
        ),
        positions="learned",
        max_length=hf.number("max_position_embeddings", 2048),
        first_position=2,
        tied=hf.flag("tie_word_embeddings", True),
    )


def optional(config: DecoderConfig) -> tuple[str, ...]:
    """Tensors of heads that this model does not have."""
    return ()


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Hugging Face's configuration from ours."""
    layers = config.layers
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": config.vocabulary,
        "hidden_size": layers.features,
        "word_embed_proj_dim": layers.features,
        "ffn_dim": layers.hidden,
        "num_hidden_layers": layers.num_layers,
        "num_attention_heads": layers.num_heads,
        "max_position_embeddings": config.max_length,
        "activation_function": ACTIVATION_NAMES[layers.activation],
        "do_layer_norm_before": layers.order == "pre",
        "enable_bias": layers.bias,
        "dropout": layers.dropout_rate,
        "attention_dropout": layers.attention_dropout_rate,
        "tie_word_embeddings": config.tied,
    }


def model(config: DecoderConfig, rngs: nnx.Rngs) -> Decoder:
    """The model that the configuration describes."""
    return Decoder(config, rngs=rngs)


def tensors(config: DecoderConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, and where it belongs in the model."""
    layers, top = config.layers, f"{PREFIX}decoder"
    bias = bool(layers.bias)
    yield Tensor(f"{top}.embed_tokens.weight", ("embed", "tokens"))
    yield Tensor(f"{top}.embed_positions.weight", ("embed", "positions"))
    for i in range(layers.num_layers):
        at, paths = f"{top}.layers.{i}", block(("stack",), i)
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            path = *paths["attention"], ours
            yield from linear(f"{at}.self_attn.{theirs}_proj", path, bias=bias)
        yield from linear(f"{at}.fc1", (*paths["feed_forward"], "up"), bias=bias)
        yield from linear(f"{at}.fc2", (*paths["feed_forward"], "down"), bias=bias)
        yield from norm(f"{at}.self_attn_layer_norm", paths["attention_norm"])
        yield from norm(f"{at}.final_layer_norm", paths["feed_forward_norm"])
    if layers.order == "pre":
        yield from norm(f"{top}.final_layer_norm", ("stack", "norm"))
    if not config.tied:
        yield from linear("lm_head", ("head",), bias=False)
