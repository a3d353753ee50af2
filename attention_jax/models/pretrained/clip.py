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
    text, vision = _tower(hf, "text_config"), _tower(hf, "vision_config")
    texts, end = read_text(text)
    images = read_vision(vision)
    _finish(hf, text, "text_config")
    _finish(hf, vision, "vision_config")
    return DualEncoderConfig(texts, images, features, end)


def read_text(hf: HFConfig) -> tuple[DecoderConfig, int | None]:
    """The tower of texts, and the token that ends one."""
    end = hf.take("eos_token_id", 49_407)
    if not isinstance(end, int) or isinstance(end, bool):
        hf.errors.append(f"eos_token_id must be a token, got {end!r}")
        end = OLD_END
    config = DecoderConfig(
        hf.number("vocab_size", 49_408),
        _layers(hf, 512, 2048, 8),
        positions="learned",
        max_length=hf.number("max_position_embeddings", 77),
    )
    return config, None if end == OLD_END else end


def read_vision(hf: HFConfig) -> VisionConfig:
    """The tower of images."""
    image, patch = image_and_patch(hf, 224, 32)
    return VisionConfig(
        image=image,
        patch=patch,
        channels=hf.number("num_channels", 3),
        layers=_layers(hf, 768, 3072, 12),
        patch_bias=False,
        embedding_norm=True,
    )


def _tower(hf: HFConfig, name: str) -> HFConfig:
    """The entries of a tower. An older object takes their place, with its own defaults."""
    newer, older = an_object(hf, name), an_object(hf, f"{name}_dict")
    tower = HFConfig(older or newer)
    tower.take("projection_dim", None)  # that of the whole model is used
    return tower


def _layers(hf: HFConfig, features: int, hidden: int, heads: int) -> Layers:
    hf.only("dropout", 0.0)
    hf.take("tie_word_embeddings", None)  # there is no head
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
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": config.features,
        "text_config": text_entries(config.text, config.end),
        "vision_config": vision_entries(config.vision),
    }


def text_entries(config: DecoderConfig, end: int | None) -> dict[str, Any]:
    """The entries that ``read_text`` reads."""
    return {
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.max_length,
        "eos_token_id": OLD_END if end is None else end,
        **_entries(config.layers),
    }


def vision_entries(config: VisionConfig) -> dict[str, Any]:
    """The entries that ``read_vision`` reads."""
    rows, columns = config.image
    return {
        "model_type": "clip_vision_model",
        "image_size": rows if rows == columns else [rows, columns],
        "patch_size": config.patch,
        "num_channels": config.channels,
        **_entries(config.layers),
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
    yield from text_tensors(config.text, ("text",), projected=True)
    yield from vision_tensors(config.vision, ("vision",), projected=True)
    yield Tensor("logit_scale", ("log_scale",))


def text_tensors(config: DecoderConfig, tower: Path, *, projected: bool) -> Iterator[Tensor]:
    """Those of the tower of texts at this path, with its projection or without."""
    at, path = "text_model", (*tower, "decoder")
    yield Tensor(f"{at}.embeddings.token_embedding.weight", (*path, "embed", "tokens"))
    yield Tensor(f"{at}.embeddings.position_embedding.weight", (*path, "embed", "positions"))
    yield from _stack(at, (*path, "stack"), config.layers)
    yield from norm(f"{at}.final_layer_norm", (*path, "stack", "norm"))
    if projected:
        yield from linear("text_projection", (*tower, "project"), bias=False)


def vision_tensors(config: VisionConfig, tower: Path, *, projected: bool) -> Iterator[Tensor]:
    """Those of the tower of images at this path, with its projection or without."""
    at, path = "vision_model", (*tower, "transformer")
    embeddings, form = f"{at}.embeddings", convolution(config)
    yield Tensor(f"{embeddings}.class_embedding", (*path, "class_token", "token"), ROW)
    yield Tensor(f"{embeddings}.position_embedding.weight", (*path, "positions"))
    yield Tensor(f"{embeddings}.patch_embedding.weight", (*path, "embed", "kernel"), form)
    yield from norm(f"{at}.pre_layrnorm", (*path, "norm"))  # their spelling
    yield from _stack(at, (*path, "stack"), config.layers)
    yield from norm(f"{at}.post_layernorm", (*path, "stack", "norm"))
    if projected:
        yield from linear("visual_projection", (*tower, "project"), bias=False)


def _stack(start: str, path: Path, layers: Layers) -> Iterator[Tensor]:
    for i in range(layers.num_layers):
        at, paths = f"{start}.encoder.layers.{i}", block(path, i)
        for name, (part, ours) in LAYER.items():
            yield from linear(f"{at}.{name}", (*paths[part], ours))
        yield from norm(f"{at}.layer_norm1", paths["attention_norm"])
        yield from norm(f"{at}.layer_norm2", paths["feed_forward_norm"])
