"""Qwen2, with biases of query, key and value; Qwen3, with normalized heads, and with experts."""

from __future__ import annotations

from attention_jax.models.decoder import DecoderConfig
from attention_jax.models.layers import Experts
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.llama import (
    NO,
    Llama,
    Options,
    experts_of,
    one_window,
    or_null,
    read_routing,
    sliding,
    window_entries,
    windows_by_layer,
)


def _qwen(hf: HFConfig, layers: Options, longest: int) -> Options:
    window, num_layers = or_null(hf, "sliding_window", 4096), layers["num_layers"]
    window = window if hf.flag("use_sliding_window", False) else None
    first = hf.take("max_window_layers", 28)
    if not isinstance(first, int) or first < 0:
        hf.errors.append(f"max_window_layers must be a number of layers, got {first!r}")
        first = 0
    types = sliding(window, [i >= first for i in range(num_layers)])
    return {"windows": windows_by_layer(hf, num_layers, window, types)}


def _qwen3_moe(hf: HFConfig, layers: Options, longest: int) -> Options:
    read_routing(hf)
    hf.only("decoder_sparse_step", 1, None)  # layers without experts
    hf.only("mlp_only_layers", [], None)
    hf.take("max_window_layers", None)  # in published files; the family does not use it
    window = or_null(hf, "sliding_window", 4096)
    number = hf.number("num_local_experts", 128)
    number = hf.number("num_experts", number)
    normalize = hf.flag("norm_topk_prob", False)
    return {
        "hidden": hf.number("moe_intermediate_size", 768),
        "windows": (window if hf.flag("use_sliding_window", False) else None,),
        "experts": Experts(number, hf.number("num_experts_per_tok", 8), normalize),
    }


def _qwen_entries(config: DecoderConfig) -> Options:
    x = window_entries(config.layers)
    return x | {"use_sliding_window": x["sliding_window"] is not None}


def _qwen3_moe_entries(config: DecoderConfig) -> Options:
    experts, x = experts_of(config.layers), one_window(config)
    return {
        **x,
        "use_sliding_window": x["sliding_window"] is not None,
        "moe_intermediate_size": config.layers.hidden,
        "num_experts": experts.number,
        "num_experts_per_tok": experts.per_token,
        "norm_topk_prob": experts.normalize,
    }


FAMILIES = (
    Llama(
        model_type="qwen2",
        name="Qwen2",
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 32},
        biases=(),
        layers={"bias": ("query", "key", "value")},
        only={"use_mrope": NO},
        read=_qwen,
        write=_qwen_entries,
    ),
    Llama(
        model_type="qwen3",
        name="Qwen3",
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
        layers={"query_key_norm": True},
        read=_qwen,
        write=_qwen_entries,
    ),
    Llama(
        model_type="qwen3_moe",
        name="Qwen3Moe",
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 4},
        layers={"query_key_norm": True},
        read=_qwen3_moe,
        write=_qwen3_moe_entries,
    ),
)
