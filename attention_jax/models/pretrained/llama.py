"""Llama, Mistral and Gemma 2: rotary positions, RMS norms, gated feed-forward layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from flax import nnx

from attention_jax.models.decoder import Decoder, DecoderConfig
from attention_jax.models.layers import Layers
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig
from attention_jax.models.pretrained.rope import rope_parameters, rotary
from attention_jax.models.pretrained.tensors import Tensor, block, linear, norm

MODEL_TYPES = ("llama", "mistral", "gemma2")
PREFIX = "model."
RENAMED: dict[str, str] = {}
IGNORED = (r".*rotary_emb\.inv_freq",)
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
NAMES = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2"}
# Hugging Face's defaults of entries that a file may omit.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8},
    "gemma2": {"max_position_embeddings": 8192, "num_key_value_heads": 4},
}


def from_hf(hf: HFConfig, names: set[str]) -> DecoderConfig:
    """Our configuration from Hugging Face's."""
    kind = hf.take("model_type", "llama")
    hf.architecture((f"{NAMES[kind]}ForCausalLM",), f"{NAMES[kind]}ForCausalLM")
    defaults = DEFAULTS[kind]
    num_layers, num_heads = hf.number("num_hidden_layers"), hf.number("num_attention_heads")
    E = hf.number("hidden_size")
    longest = hf.number("max_position_embeddings", defaults["max_position_embeddings"])
    shared: dict[str, Any] = {
        "features": E,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": _or_null(hf, "num_key_value_heads", defaults["num_key_value_heads"])
        or num_heads,
        "head_dim": _or_null(hf, "head_dim", 256 if kind == "gemma2" else None) or E // num_heads,
        "hidden": hf.number("intermediate_size"),
        "gated": True,
        "norm_epsilon": hf.number("rms_norm_eps", 1e-6),
        "bias": kind != "mistral" and hf.flag("attention_bias", False),
        "feed_forward_bias": kind == "llama" and hf.flag("mlp_bias", False),
        "rotary": rotary(hf, longest),
        "attention_dropout_rate": hf.rate("attention_dropout", 0.0),
    }
    hf.only("pretraining_tp", 1, *range(2, 65))  # how products are split: no effect on the result
    vocabulary, tied = hf.number("vocab_size"), hf.flag("tie_word_embeddings", kind == "gemma2")
    window = _or_null(hf, "sliding_window", 4096) if kind != "llama" else None
    _redundant_entries(hf, kind, window)
    if kind != "gemma2":
        layers = Layers(
            **shared,
            norm="rms",
            activation=hf.activation("hidden_act", "silu"),
            windows=(window,),
        )
        return DecoderConfig(vocabulary, layers, max_length=longest, tied=tied)
    hf.only("use_bidirectional_attention", None, False)
    hf.take("hidden_act", None)  # hidden_activation takes its place
    activation = hf.take("hidden_activation", None) or "gelu_pytorch_tanh"
    hf.unused["hidden_activation"] = activation
    cap = _or_null(hf, "attn_logit_softcapping", 50.0)
    logits_cap = _or_null(hf, "final_logit_softcapping", 30.0)
    layers = Layers(
        **shared,
        norm="one_plus_rms",
        order="both",
        activation=hf.activation("hidden_activation", "gelu_pytorch_tanh"),
        scale=hf.number("query_pre_attn_scalar", 256) ** -0.5,
        softcap=None if cap is None else float(cap),
        windows=_windows(hf, num_layers, window),
    )
    return DecoderConfig(
        vocabulary,
        layers,
        max_length=longest,
        tied=tied,
        embedding_scale=math.sqrt(E),
        logits_softcap=None if logits_cap is None else float(logits_cap),
    )


def _or_null(hf: HFConfig, name: str, default: Any) -> Any:
    """A positive number, or None for null; the default only if the entry is missing."""
    return hf.number(name, None) if name in hf.unused else default


def _redundant_entries(hf: HFConfig, kind: str, window: int | None) -> None:
    """Entries of published files that repeat others, or state what always holds."""
    hf.take("max_sequence_length", None)  # max_position_embeddings in the first released code
    if kind == "llama":
        hf.only("is_llama_config", True, None)
        hf.only("rope_interleaved", False, None)
    else:
        hf.only("mlp_bias", False, None)
        hf.same("sliding_window_size", window)
    if kind == "mistral":
        hf.only("attention_bias", False, None)


def _windows(hf: HFConfig, num_layers: int, window: int | None) -> tuple[int | None, ...]:
    names = {"sliding_attention": window, "full_attention": None}
    types = hf.take("layer_types", None)
    if types is None:
        types = [("sliding_attention", "full_attention")[i % 2] for i in range(num_layers)]
    if len(types) != num_layers or not set(types) <= set(names):
        hf.errors.append(f"layer_types must be {num_layers} of {sorted(names)}, got {types}")
        return (None,)
    return tuple(names[t] for t in types)


def optional(config: DecoderConfig) -> tuple[str, ...]:
    """Tensors of heads that this model does not have."""
    return ()


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Hugging Face's configuration from ours."""
    layers = config.layers
    gemma, windows = layers.norm == "one_plus_rms", set(layers.windows) - {None}
    kind = "gemma2" if gemma else "mistral" if windows else "llama"
    x: dict[str, Any] = {
        "model_type": kind,
        "architectures": [f"{NAMES[kind]}ForCausalLM"],
        "vocab_size": config.vocabulary,
        "hidden_size": layers.features,
        "intermediate_size": layers.hidden,
        "num_hidden_layers": layers.num_layers,
        "num_attention_heads": layers.num_heads,
        "num_key_value_heads": layers.num_kv_heads,
        "head_dim": layers.head_dim,
        "hidden_activation" if gemma else "hidden_act": ACTIVATION_NAMES[layers.activation],
        "max_position_embeddings": config.max_length or 2048,
        "rms_norm_eps": layers.norm_epsilon,
        "rope_parameters": rope_parameters(layers.rotary),  # type: ignore[arg-type]
        "tie_word_embeddings": config.tied,
        "attention_dropout": layers.attention_dropout_rate,
    }
    if kind != "mistral":
        x["attention_bias"] = layers.bias
    if kind == "llama":
        x["mlp_bias"] = layers.feed_forward_bias
    if kind == "mistral":
        (x["sliding_window"],) = windows
    if gemma:
        x |= {
            "query_pre_attn_scalar": round(layers.scale**-2),  # type: ignore[operator]
            "sliding_window": next(iter(windows), 4096),
            "layer_types": [
                "full_attention" if w is None else "sliding_attention" for w in layers.windows
            ],
            "attn_logit_softcapping": layers.softcap,
            "final_logit_softcapping": config.logits_softcap,
        }
    return x


def model(config: DecoderConfig, rngs: nnx.Rngs) -> Decoder:
    """The model that the configuration describes."""
    return Decoder(config, rngs=rngs)


def tensors(config: DecoderConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, and where it belongs in the model."""
    layers = config.layers
    bias = bool(layers.bias)
    yield Tensor(f"{PREFIX}embed_tokens.weight", ("embed", "tokens"))
    for i in range(layers.num_layers):
        at, paths = f"{PREFIX}layers.{i}", block(("stack",), i)
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            path = *paths["attention"], ours
            yield from linear(f"{at}.self_attn.{theirs}_proj", path, bias=bias)
        for name in ("gate", "up", "down"):
            path = *paths["feed_forward"], name
            yield from linear(f"{at}.mlp.{name}_proj", path, bias=layers.feed_forward_bias)
        norms = {"input": "attention_norm", "post_attention": "feed_forward_norm"}
        if layers.order == "both":
            norms["post_attention"] = "attention_norm_after"
            norms["pre_feedforward"] = "feed_forward_norm"
            norms["post_feedforward"] = "feed_forward_norm_after"
        for theirs, ours in norms.items():
            yield from norm(f"{at}.{theirs}_layernorm", paths[ours], bias=False)
    yield from norm(f"{PREFIX}norm", ("stack", "norm"), bias=False)
    if not config.tied:
        yield from linear("lm_head", ("head",), bias=False)
