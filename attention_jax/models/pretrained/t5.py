"""T5, of both versions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx

from attention_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from attention_jax.models.layers import Layers, Relative
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, ACTIVATIONS, HFConfig
from attention_jax.models.pretrained.tensors import Tensor, block, linear, norm

MODEL_TYPES = ("t5",)
PREFIX = ""
RENAMED: dict[str, str] = {}
# A bias that older files store and no code uses.
IGNORED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
COPIES = dict.fromkeys(
    ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    "shared.weight",
)
ARCHITECTURES = ("T5ForConditionalGeneration", "T5WithLMHeadModel")


def from_hf(hf: HFConfig, names: set[str]) -> EncoderDecoderConfig:
    """Our configuration from Hugging Face's. The head is tied if the files have no ``lm_head``."""
    hf.architecture(ARCHITECTURES, "T5ForConditionalGeneration")
    E = hf.number("d_model")
    activation, gated = _activation(hf)
    dropout = hf.rate("dropout_rate", 0.1)
    scaled = hf.flag("scale_decoder_outputs", hf.flag("tie_word_embeddings", True))
    hf.only("is_encoder_decoder", True)
    for name in ("dense_act_fn", "is_gated_act", "classifier_dropout"):
        hf.take(name, None)  # implied by feed_forward_proj; of a head that we do not have
    encoder = Layers(
        features=E,
        num_layers=hf.number("num_layers"),
        num_heads=hf.number("num_heads"),
        head_dim=hf.number("d_kv"),
        hidden=hf.number("d_ff"),
        activation=activation,
        gated=gated,
        norm="rms",
        norm_epsilon=hf.number("layer_norm_epsilon", 1e-6),
        bias=False,
        feed_forward_bias=False,
        relative=Relative(
            hf.number("relative_attention_num_buckets", 32),
            hf.number("relative_attention_max_distance", 128),
        ),
        scale=1.0,
        dropout_rate=dropout,
        feed_forward_dropout_rate=dropout,
        attention_dropout_rate=dropout,
    )
    depth = hf.number("num_decoder_layers", None) or encoder.num_layers
    return EncoderDecoderConfig(
        vocabulary=hf.number("vocab_size"),
        encoder=encoder,
        decoder=dataclasses.replace(encoder, num_layers=depth),
        positions=None,
        tied="lm_head.weight" not in names,
        head_scale=E**-0.5 if scaled else 1.0,
        dropout_rate=dropout,
    )


def _activation(hf: HFConfig) -> tuple[str, bool]:
    name = hf.take("feed_forward_proj", "relu")
    if not isinstance(name, str):
        hf.errors.append(f"feed_forward_proj must be a name, got {name!r}")
        name = "relu"
    gated = name.startswith("gated-")
    # "gated-gelu" means the tanh approximation.
    theirs = "gelu_new" if name == "gated-gelu" else name.removeprefix("gated-")
    if theirs not in ACTIVATIONS:
        hf.errors.append(f"feed_forward_proj = {name!r} is not supported")
    return ACTIVATIONS.get(theirs, "relu"), gated


def optional(config: EncoderDecoderConfig) -> tuple[str, ...]:
    """Tensors of heads that this model does not have."""
    return ()


def to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Hugging Face's configuration from ours."""
    layers = config.encoder
    activation = ACTIVATION_NAMES[layers.activation]
    if layers.gated:
        activation = {"gelu_tanh": "gated-gelu"}.get(layers.activation, f"gated-{activation}")
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocabulary,
        "d_model": layers.features,
        "d_kv": layers.head_dim,
        "d_ff": layers.hidden,
        "num_layers": layers.num_layers,
        "num_decoder_layers": config.decoder.num_layers,
        "num_heads": layers.num_heads,
        "feed_forward_proj": activation,
        "relative_attention_num_buckets": layers.relative.buckets,  # type: ignore[union-attr]
        "relative_attention_max_distance": layers.relative.max_distance,  # type: ignore[union-attr]
        "layer_norm_epsilon": layers.norm_epsilon,
        "dropout_rate": config.dropout_rate,
        # In Hugging Face's T5 this decides whether the input of the head is scaled.
        "tie_word_embeddings": config.head_scale != 1.0,
        "decoder_start_token_id": 0,
    }


def model(config: EncoderDecoderConfig, rngs: nnx.Rngs) -> EncoderDecoder:
    """The model that the configuration describes."""
    return EncoderDecoder(config, rngs=rngs)


def tensors(config: EncoderDecoderConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, and where it belongs in the model."""
    yield Tensor("shared.weight", ("embed", "tokens"))
    for stack, layers in (("encoder", config.encoder), ("decoder", config.decoder)):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Tensor(table, (stack, "relative"))
        sublayers = [("SelfAttention", "attention")]
        if stack == "decoder":
            sublayers.append(("EncDecAttention", "cross"))
        for i in range(layers.num_layers):
            paths = block((stack,), i)
            for j, (name, part) in enumerate(sublayers):
                at = f"{stack}.block.{i}.layer.{j}"
                for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
                    yield from linear(f"{at}.{name}.{theirs}", (*paths[part], ours), bias=False)
                yield from norm(f"{at}.layer_norm", paths[f"{part}_norm"], bias=False)
            at, path = f"{stack}.block.{i}.layer.{len(sublayers)}", paths["feed_forward"]
            names = {"wi_0": "gate", "wi_1": "up"} if layers.gated else {"wi": "up"}
            for theirs, ours in {**names, "wo": "down"}.items():
                yield from linear(f"{at}.DenseReluDense.{theirs}", (*path, ours), bias=False)
            yield from norm(f"{at}.layer_norm", paths["feed_forward_norm"], bias=False)
        yield from norm(f"{stack}.final_layer_norm", (stack, "norm"), bias=False)
    if not config.tied:
        yield from linear("lm_head", ("head",), bias=False)
