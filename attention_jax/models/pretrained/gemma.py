"""Gemma, Gemma 2 and Gemma 3 (text): like Llama, with other norms and scaled embeddings."""

from __future__ import annotations

import math
from typing import Any

from attention_jax.models.decoder import DecoderConfig
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, ACTIVATIONS, HFConfig
from attention_jax.models.pretrained.llama import (
    NO,
    Llama,
    Options,
    or_null,
    sliding,
    window_entries,
    windows_by_layer,
)
from attention_jax.models.pretrained.rope import an_object, of_layer_type, rope_parameters

# In Gemma 3, the base of each type of layer, and its older entry.
THETAS = {
    "full_attention": ("rope_theta", 1_000_000.0),
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
}


def _gemma(hf: HFConfig, layers: Options, longest: int) -> Options:
    given = hf.take("hidden_act", "gelu_pytorch_tanh")
    # In files that say "gelu", the tanh approximation is meant.
    hf.unused["hidden_act"] = "gelu_pytorch_tanh" if given == "gelu" else given
    activation = hf.activation("hidden_act", "gelu_pytorch_tanh")
    other = hf.take("hidden_activation", None)
    if other is not None and ACTIVATIONS.get(other) != activation:
        hf.errors.append(f"hidden_activation = {other!r} contradicts hidden_act = {given!r}")
    return {"activation": activation}


def _gemma_decoder(hf: HFConfig, layers: Options) -> Options:
    return {"embedding_scale": math.sqrt(layers["features"])}


def _gemma2(hf: HFConfig, layers: Options, longest: int) -> Options:
    num_layers, window = layers["num_layers"], or_null(hf, "sliding_window", 4096)
    hf.same("sliding_window_size", window)
    types = sliding(window, [i % 2 == 0 for i in range(num_layers)])
    return {
        **_activation(hf),
        "scale": hf.number("query_pre_attn_scalar", 256) ** -0.5,
        "softcap": _cap(hf, "attn_logit_softcapping", 50.0),
        "windows": windows_by_layer(hf, num_layers, window, types),
    }


def _gemma3(hf: HFConfig, layers: Options, longest: int) -> Options:
    num_layers, window = layers["num_layers"], hf.number("sliding_window", 4096)
    every = hf.number("sliding_window_pattern", 6)
    if hf.unused.get("layer_types") is not None:
        hf.take("_sliding_window_pattern", None)  # in newer files, of which layer_types is made
    types = sliding(window, [(i + 1) % every != 0 for i in range(num_layers)])
    windows = windows_by_layer(hf, num_layers, window, types)
    given, scaling = an_object(hf, "rope_parameters"), an_object(hf, "rope_scaling")
    if unknown := sorted(given.keys() - THETAS.keys()):
        hf.errors.append(f"rope_parameters must have {sorted(THETAS)}, got {unknown}")
    rotaries = {}
    for kind, (entry, theta) in THETAS.items():
        parameters = {"rope_theta": hf.take(entry, theta)} | dict(given.get(kind) or {})
        parameters |= scaling if kind == "full_attention" else {}
        rotaries[kind] = of_layer_type(hf, kind, parameters, longest, layers["head_dim"])
    return {
        **_activation(hf),
        "scale": hf.number("query_pre_attn_scalar", 256) ** -0.5,
        "windows": windows,
        "rotary": tuple(
            rotaries["full_attention" if w is None else "sliding_attention"] for w in windows
        ),
    }


def _activation(hf: HFConfig) -> Options:
    hf.take("hidden_act", None)  # hidden_activation takes its place
    given = hf.take("hidden_activation", None) or "gelu_pytorch_tanh"
    hf.unused["hidden_activation"] = given
    return {"activation": hf.activation("hidden_activation", "gelu_pytorch_tanh")}


def _cap(hf: HFConfig, name: str, default: float | None) -> float | None:
    cap = or_null(hf, name, default)
    return None if cap is None else float(cap)


def _gemma2_decoder(hf: HFConfig, layers: Options) -> Options:
    cap = _cap(hf, "final_logit_softcapping", 30.0)
    return _gemma_decoder(hf, layers) | {"logits_softcap": cap}


def _gemma3_decoder(hf: HFConfig, layers: Options) -> Options:
    cap = _cap(hf, "final_logit_softcapping", None)
    return _gemma_decoder(hf, layers) | {"logits_softcap": cap}


def _gemma2_entries(config: DecoderConfig) -> Options:
    layers = config.layers
    x = window_entries(layers)
    return x | {
        "hidden_activation": ACTIVATION_NAMES[layers.activation],
        "query_pre_attn_scalar": round(layers.scale**-2),  # type: ignore[operator]
        "sliding_window": x["sliding_window"] or 4096,
        "attn_logit_softcapping": layers.softcap,
        "final_logit_softcapping": config.logits_softcap,
    }


def _gemma3_entries(config: DecoderConfig) -> Options:
    x, layers = _gemma2_entries(config), config.layers
    del x["attn_logit_softcapping"]
    parameters: dict[str, Any] = {
        kind: {"rope_theta": theta, "rope_type": "default"} for kind, (_, theta) in THETAS.items()
    }
    for kind, positions in zip(x["layer_types"], layers.rotaries, strict=True):
        parameters[kind] = rope_parameters(positions)  # type: ignore[arg-type]
    return x | {"rope_parameters": parameters}


FAMILIES = (
    Llama(
        model_type="gemma",
        name="Gemma",
        defaults={
            "max_position_embeddings": 8192,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "tie_word_embeddings": True,
        },
        layers={"norm": "one_plus_rms"},
        only={"use_bidirectional_attention": NO},
        read=_gemma,
        read_decoder=_gemma_decoder,
    ),
    Llama(
        model_type="gemma2",
        name="Gemma2",
        defaults={
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
        },
        layers={"norm": "one_plus_rms", "order": "both"},
        only={"use_bidirectional_attention": NO},
        read=_gemma2,
        read_decoder=_gemma2_decoder,
        write=_gemma2_entries,
    ),
    Llama(
        model_type="gemma3_text",
        name="Gemma3",
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
        },
        layers={"norm": "one_plus_rms", "order": "both", "query_key_norm": True},
        # Hugging Face's code does not use the softcap of attention.
        only={"use_bidirectional_attention": NO, "attn_logit_softcapping": (None,)},
        read=_gemma3,
        read_decoder=_gemma3_decoder,
        write=_gemma3_entries,
    ),
)
