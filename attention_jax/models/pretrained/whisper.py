"""Whisper: speech to text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from attention_jax.models.layers import Layers
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig
from attention_jax.models.pretrained.tensors import Form, Path, Tensor, block, linear, norm
from attention_jax.models.speech import SpeechConfig, SpeechTransformer

MODEL_TYPES = ("whisper",)
PREFIX = "model."
RENAMED: dict[str, str] = {}
IGNORED: tuple[str, ...] = ()
COPIES = {"proj_out.weight": "model.decoder.embed_tokens.weight"}
ARCHITECTURE = "WhisperForConditionalGeneration"
BIASED = ("query", "value", "out")  # keys have none
PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
ENGLISH, ENGLISH_END = 51_864, 50_256  # tokens of the English models, and the one that ends a text
# Of generation and its timestamps, and of a head that we do not have.
UNUSED = (
    "alignment_heads",
    "classifier_proj_size",
    "forced_decoder_ids",
    "init_std",
    "is_multilingual",
    "lang_to_id",
    "max_initial_timestamp_index",
    "median_filter_width",
    "no_timestamps_token_id",
    "task_to_id",
)


def from_hf(hf: HFConfig, names: set[str]) -> SpeechConfig:
    """Our configuration from Hugging Face's."""
    hf.architecture((ARCHITECTURE,), ARCHITECTURE)
    for entry in UNUSED:
        hf.take(entry, None)
    for entry in ("encoder_layerdrop", "decoder_layerdrop"):
        hf.only(entry, 0.0)
    for entry in ("scale_embedding", "use_weighted_layer_sum", "apply_spec_augment"):
        hf.only(entry, False)
    for axis in ("time", "feature"):  # what the augmentation would mask
        for entry in ("prob", "length", "min_masks"):
            hf.take(f"mask_{axis}_{entry}", None)
    hf.only("is_encoder_decoder", True)
    dropout = hf.rate("dropout", 0.0)
    shared = {
        "features": hf.number("d_model", 384),
        "activation": hf.activation("activation_function", "gelu"),
        "bias": BIASED,
        "dropout_rate": dropout,
        "feed_forward_dropout_rate": hf.rate("activation_dropout", 0.0),
        "attention_dropout_rate": hf.rate("attention_dropout", 0.0),
    }
    encoder, decoder = (
        Layers(
            num_layers=hf.number(f"{stack}_layers", 4),
            num_heads=hf.number(f"{stack}_attention_heads", 6),
            hidden=hf.number(f"{stack}_ffn_dim", 1536),
            **shared,
        )
        for stack in ("encoder", "decoder")
    )
    hf.same("num_hidden_layers", encoder.num_layers)
    return SpeechConfig(
        vocabulary=hf.number("vocab_size", 51_865),
        encoder=encoder,
        decoder=decoder,
        max_length=hf.number("max_target_positions", 448),
        tied=hf.flag("tie_word_embeddings", True),
        dropout_rate=dropout,
        mels=hf.number("num_mel_bins", 80),
        frames=2 * hf.number("max_source_positions", 1500),
    )


def optional(config: SpeechConfig) -> tuple[str, ...]:
    """Tensors of heads that this model does not have."""
    return ()


def to_hf(config: SpeechConfig) -> dict[str, Any]:
    """Hugging Face's configuration from ours."""
    layers = config.decoder
    x = {
        "model_type": "whisper",
        "architectures": [ARCHITECTURE],
        "is_encoder_decoder": True,
        "vocab_size": config.vocabulary,
        "num_mel_bins": config.mels,
        "d_model": layers.features,
        "activation_function": ACTIVATION_NAMES[layers.activation],
        "dropout": config.dropout_rate,
        "attention_dropout": layers.attention_dropout_rate,
        "activation_dropout": layers.feed_forward_dropout_rate,
        "max_source_positions": config.frames // 2,
        "max_target_positions": config.max_length,
        "tie_word_embeddings": config.tied,
    }
    for stack, own in (("encoder", config.encoder), ("decoder", layers)):
        x[f"{stack}_layers"] = own.num_layers
        x[f"{stack}_attention_heads"] = own.num_heads
        x[f"{stack}_ffn_dim"] = own.hidden
    # The end and the start of a transcript, one token later in the vocabularies of many languages.
    end = ENGLISH_END + (config.vocabulary > ENGLISH)
    for name, token in (("bos", end), ("eos", end), ("pad", end), ("decoder_start", end + 1)):
        x[f"{name}_token_id"] = min(token, config.vocabulary - 1)
    return x


def model(config: SpeechConfig, rngs: nnx.Rngs) -> SpeechTransformer:
    """The model that the configuration describes."""
    return SpeechTransformer(config, rngs=rngs)


# [out, in, 3] in Hugging Face, [3 in, out] in ours: three frames side by side.
CONVOLUTION = Form(
    lambda x: x.transpose(2, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(3, -1, x.shape[-1]).transpose(2, 1, 0),
)


def tensors(config: SpeechConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, and where it belongs in the model."""
    convolutions = ("conv1", "convolution"), ("conv2", "halving_convolution")
    for theirs, ours in convolutions:
        yield Tensor(f"model.encoder.{theirs}.weight", (ours, "kernel"), CONVOLUTION)
        yield Tensor(f"model.encoder.{theirs}.bias", (ours, "bias"))
    yield Tensor("model.encoder.embed_positions.weight", ("positions",))
    yield from _stack("encoder", config.encoder, {"self_attn": "attention"})
    yield Tensor("model.decoder.embed_tokens.weight", ("embed", "tokens"))
    yield Tensor("model.decoder.embed_positions.weight", ("embed", "positions"))
    attention = {"self_attn": "attention", "encoder_attn": "cross"}
    yield from _stack("decoder", config.decoder, attention)
    if not config.tied:
        yield from linear("proj_out", ("head",), bias=False)


def _stack(stack: str, layers: Layers, attention: dict[str, str]) -> Iterator[Tensor]:
    for i in range(layers.num_layers):
        at, paths = f"model.{stack}.layers.{i}", block((stack,), i)
        for name, part in attention.items():
            for theirs, ours in PROJECTIONS.items():
                path: Path = (*paths[part], ours)
                yield from linear(f"{at}.{name}.{theirs}", path, bias=ours in BIASED)
            yield from norm(f"{at}.{name}_layer_norm", paths[f"{part}_norm"])
        for theirs, ours in (("fc1", "up"), ("fc2", "down")):
            yield from linear(f"{at}.{theirs}", (*paths["feed_forward"], ours))
        yield from norm(f"{at}.final_layer_norm", paths["feed_forward_norm"])
    yield from norm(f"model.{stack}.layer_norm", (stack, "norm"))
