"""CLIP: a tower of texts and one of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from attention_jax.models.decoder import DecoderConfig
from attention_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from attention_jax.models.layers import Layers
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig
from attention_jax.models.pretrained.rope import an_object
from attention_jax.models.pretrained.tensors import Form, Path, Tensor, block, linear, norm
from attention_jax.models.pretrained.vit import convolution, image_and_patch
from attention_jax.models.vision import VisionConfig

MODEL_TYPES = ("clip",)
PREFIX = ""
RENAMED: dict[str, str] = {}
IGNORED = (r".*embeddings\.position_ids",)
COPIES: dict[str, str] = {}
OLD_END = 2  # in files of the first release, which read the vector at the largest token
ROW = Form(lambda x: x[None], lambda x: x[0])
LAYER = {
    "self_attn.q_proj": ("attention", "query"),
    "self_attn.k_proj": ("attention", "key"),
    "self_attn.v_proj": ("attention", "value"),
    "self_attn.out_proj": ("attention", "out"),
    "mlp.fc1": ("feed_forward", "up"),
    "mlp.fc2": ("feed_forward", "down"),
}


def from_hf(hf: HFConfig, names: set[str]) -> DualEncoderConfig:
    """Our configuration from Hugging Face's."""
    hf.architecture(("CLIPModel",), "CLIPModel")
    hf.take("logit_scale_init_value", None)  # the value is stored
    features = hf.number("projection_dim", 512)
    text = _tower(hf, "text_config")
    vocabulary, longest = (
        text.number("vocab_size", 49_408),
        text.number("max_position_embeddings", 77),
    )
    end = text.take("eos_token_id", 49_407)
    if not isinstance(end, int) or isinstance(end, bool):
        text.errors.append(f"eos_token_id must be a token, got {end!r}")
        end = OLD_END
    texts = DecoderConfig(
        vocabulary, _layers(text, 512, 2048, 8), positions="learned", max_length=longest
    )
    _finish(hf, text, "text_config")
    vision = _tower(hf, "vision_config")
    image, patch = image_and_patch(vision, 224, 32)
    images = VisionConfig(
        image=image,
        patch=patch,
        channels=vision.number("num_channels", 3),
        layers=_layers(vision, 768, 3072, 12),
        patch_bias=False,
        embedding_norm=True,
    )
    _finish(hf, vision, "vision_config")
    return DualEncoderConfig(texts, images, features, None if end == OLD_END else end)


def _tower(hf: HFConfig, name: str) -> HFConfig:
    """The entries of a tower. An older object takes their place, with its own defaults."""
    newer, older = an_object(hf, name), an_object(hf, f"{name}_dict")
    tower = HFConfig(older or newer)
    tower.only("dropout", 0.0)
    tower.take("projection_dim", None)  # that of the whole model is used
    tower.take("tie_word_embeddings", None)  # there is no head
    return tower


def _layers(hf: HFConfig, features: int, hidden: int, heads: int) -> Layers:
    return Layers(
        features=hf.number("hidden_size", features),
        num_layers=hf.number("num_hidden_layers", 12),
        num_heads=hf.number("num_attention_heads", heads),
        hidden=hf.number("intermediate_size", hidden),
        activation=hf.activation("hidden_act", "quick_gelu"),
        norm_epsilon=hf.number("layer_norm_eps", 1e-5),
        attention_dropout_rate=hf.rate("attention_dropout", 0.0),
    )


def _finish(hf: HFConfig, tower: HFConfig, name: str) -> None:
    try:
        tower.finish(name)
    except ValueError as error:
        hf.errors.append(str(error))


def optional(config: DualEncoderConfig) -> tuple[str, ...]:
    """Tensors of heads that this model does not have."""
    return ()


def to_hf(config: DualEncoderConfig) -> dict[str, Any]:
    """Hugging Face's configuration from ours."""
    rows, columns = config.vision.image
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": config.features,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": config.text.vocabulary,
            "max_position_embeddings": config.text.max_length,
            "eos_token_id": OLD_END if config.end is None else config.end,
            **_entries(config.text.layers),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": rows if rows == columns else [rows, columns],
            "patch_size": config.vision.patch,
            "num_channels": config.vision.channels,
            **_entries(config.vision.layers),
        },
    }


def _entries(layers: Layers) -> dict[str, Any]:
    return {
        "hidden_size": layers.features,
        "intermediate_size": layers.hidden,
        "num_hidden_layers": layers.num_layers,
        "num_attention_heads": layers.num_heads,
        "hidden_act": ACTIVATION_NAMES[layers.activation],
        "layer_norm_eps": layers.norm_epsilon,
        "attention_dropout": layers.attention_dropout_rate,
    }


def model(config: DualEncoderConfig, rngs: nnx.Rngs) -> DualEncoder:
    """The model that the configuration describes."""
    return DualEncoder(config, rngs=rngs)


def tensors(config: DualEncoderConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, and where it belongs in the model."""
    at = "text_model.embeddings"
    yield Tensor(f"{at}.token_embedding.weight", ("text", "embed", "tokens"))
    yield Tensor(f"{at}.position_embedding.weight", ("text", "embed", "positions"))
    yield from _stack("text_model", ("text", "stack"), config.text.layers)
    yield from norm("text_model.final_layer_norm", ("text", "stack", "norm"))
    at = "vision_model.embeddings"
    yield Tensor(f"{at}.class_embedding", ("vision", "class_token", "token"), ROW)
    yield Tensor(f"{at}.position_embedding.weight", ("vision", "positions"))
    form = convolution(config.vision)
    yield Tensor(f"{at}.patch_embedding.weight", ("vision", "embed", "kernel"), form)
    yield from norm("vision_model.pre_layrnorm", ("vision", "norm"))  # their spelling
    yield from _stack("vision_model", ("vision", "stack"), config.vision.layers)
    yield from norm("vision_model.post_layernorm", ("vision", "stack", "norm"))
    yield from linear("text_projection", ("project_text",), bias=False)
    yield from linear("visual_projection", ("project_image",), bias=False)
    yield Tensor("logit_scale", ("log_scale",))


def _stack(start: str, path: Path, layers: Layers) -> Iterator[Tensor]:
    for i in range(layers.num_layers):
        at, paths = f"{start}.encoder.layers.{i}", block(path, i)
        for name, (part, ours) in LAYER.items():
            yield from linear(f"{at}.{name}", (*paths[part], ours))
        yield from norm(f"{at}.layer_norm1", paths["attention_norm"])
        yield from norm(f"{at}.layer_norm2", paths["feed_forward_norm"])
