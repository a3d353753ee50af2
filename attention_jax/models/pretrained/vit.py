"""ViT: logits of classes, or the vectors of the patches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from attention_jax.models.layers import Layers
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig, labels
from attention_jax.models.pretrained.tensors import Form, Tensor, block, linear, norm
from attention_jax.models.vision import VisionConfig, VisionTransformer

MODEL_TYPES = ("vit",)
PREFIX = "vit."
RENAMED: dict[str, str] = {}
IGNORED: tuple[str, ...] = ()
COPIES: dict[str, str] = {}
WITHOUT_BATCH = Form(lambda x: x[0], lambda x: x[None])
ARCHITECTURES = ("ViTModel", "ViTForImageClassification")


def from_hf(hf: HFConfig, names: set[str]) -> VisionConfig:
    """Our configuration from Hugging Face's."""
    architecture = hf.architecture(ARCHITECTURES, "ViTModel")
    image, patch = image_and_patch(hf, 224, 16)
    dropout = hf.rate("hidden_dropout_prob", 0.0)
    for name in ("encoder_stride", "pooler_output_size", "pooler_act"):
        hf.take(name, None)  # of heads that we do not have
    classes = None
    if architecture == "ViTForImageClassification":
        classes = hf.classes()
    bias: Any = hf.flag("qkv_bias", True) or ("out",)
    return VisionConfig(
        image=image,
        patch=patch,
        channels=hf.number("num_channels", 3),
        classes=classes,
        layers=Layers(
            features=hf.number("hidden_size"),
            num_layers=hf.number("num_hidden_layers"),
            num_heads=hf.number("num_attention_heads"),
            hidden=hf.number("intermediate_size"),
            activation=hf.activation("hidden_act", "gelu"),
            norm_epsilon=hf.number("layer_norm_eps", 1e-12),
            bias=bias,
            dropout_rate=dropout,
            attention_dropout_rate=hf.rate("attention_probs_dropout_prob", 0.0),
        ),
        dropout_rate=dropout,
    )


def image_and_patch(hf: HFConfig, image: int, patch: int) -> tuple[tuple[int, int], int]:
    """The sides of images and that of patches, from their entries or these defaults."""
    sides, (rows, columns) = _pair(hf, "image_size", image), _pair(hf, "patch_size", patch)
    if rows != columns:
        hf.errors.append(f"patch_size = {(rows, columns)} is not supported, only squares")
    return sides, rows


def _pair(hf: HFConfig, name: str, default: int) -> tuple[int, int]:
    """Rows and columns, from one number for both or two."""
    given = hf.take(name, default)
    pair = given if isinstance(given, list) else [given, given]
    if len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
        hf.errors.append(f"{name} must be one or two positive integers, got {given!r}")
        return default, default
    return pair[0], pair[1]


def optional(config: VisionConfig) -> tuple[str, ...]:
    """Tensors of heads that this model does not have."""
    return (r"pooler\..*", r"classifier\..*")


def to_hf(config: VisionConfig) -> dict[str, Any]:
    """Hugging Face's configuration from ours."""
    layers, (rows, columns) = config.layers, config.image
    x: dict[str, Any] = {
        "model_type": "vit",
        "architectures": [ARCHITECTURES[config.classes is not None]],
        "image_size": rows if rows == columns else [rows, columns],
        "patch_size": config.patch,
        "num_channels": config.channels,
        "hidden_size": layers.features,
        "num_hidden_layers": layers.num_layers,
        "num_attention_heads": layers.num_heads,
        "intermediate_size": layers.hidden,
        "hidden_act": ACTIVATION_NAMES[layers.activation],
        "hidden_dropout_prob": layers.dropout_rate,
        "attention_probs_dropout_prob": layers.attention_dropout_rate,
        "layer_norm_eps": layers.norm_epsilon,
        "qkv_bias": layers.bias is True,
    }
    return x | labels(config.classes)


def model(config: VisionConfig, rngs: nnx.Rngs) -> VisionTransformer:
    """The model that the configuration describes."""
    return VisionTransformer(config, rngs=rngs)


def convolution(config: VisionConfig) -> Form:
    """The layout of the projection of patches, which is a convolution in Hugging Face."""
    E, p, c = config.layers.features, config.patch, config.channels
    return Form(
        lambda x: x.transpose(2, 3, 1, 0).reshape(p * p * c, E),
        lambda x: x.reshape(p, p, c, E).transpose(3, 2, 0, 1),
    )


def tensors(config: VisionConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, and where it belongs in the model."""
    start = "" if config.classes is None else PREFIX
    at = f"{start}embeddings"
    yield Tensor(f"{at}.cls_token", ("class_token", "token"), WITHOUT_BATCH)
    yield Tensor(f"{at}.position_embeddings", ("positions",), WITHOUT_BATCH)
    yield Tensor(
        f"{at}.patch_embeddings.projection.weight", ("embed", "kernel"), convolution(config)
    )
    yield Tensor(f"{at}.patch_embeddings.projection.bias", ("embed", "bias"))
    biased = config.layers.bias is True
    for i in range(config.layers.num_layers):
        at, paths = f"{start}encoder.layer.{i}", block(("stack",), i)
        for part in ("query", "key", "value"):
            name = f"{at}.attention.attention.{part}"
            yield from linear(name, (*paths["attention"], part), bias=biased)
        yield from linear(f"{at}.attention.output.dense", (*paths["attention"], "out"))
        yield from norm(f"{at}.layernorm_before", paths["attention_norm"])
        yield from norm(f"{at}.layernorm_after", paths["feed_forward_norm"])
        yield from linear(f"{at}.intermediate.dense", (*paths["feed_forward"], "up"))
        yield from linear(f"{at}.output.dense", (*paths["feed_forward"], "down"))
    yield from norm(f"{start}layernorm", ("stack", "norm"))
    if config.classes is not None:
        yield from linear("classifier", ("classify",))
