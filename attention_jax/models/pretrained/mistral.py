"""Mistral and Mixtral: like Llama, with a window in all layers; Mixtral has experts."""

from __future__ import annotations

from attention_jax.models.decoder import DecoderConfig
from attention_jax.models.layers import Experts
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.llama import (
    Llama,
    Options,
    experts_of,
    one_window,
    or_null,
    read_routing,
)


def _mistral(hf: HFConfig, layers: Options, longest: int) -> Options:
    window = or_null(hf, "sliding_window", 4096)
    hf.same("sliding_window_size", window)
    return {"windows": (window,)}


def _mixtral(hf: HFConfig, layers: Options, longest: int) -> Options:
    read_routing(hf)
    hf.only("router_jitter_noise", 0.0, None)
    number = hf.number("num_experts", 8)  # another name
    number = hf.number("num_local_experts", number)
    return {
        "windows": (or_null(hf, "sliding_window", None),),
        "experts": Experts(number, hf.number("num_experts_per_tok", 2)),
    }


def _mixtral_entries(config: DecoderConfig) -> Options:
    experts = experts_of(config.layers)
    return {
        **one_window(config),
        "num_local_experts": experts.number,
        "num_experts_per_tok": experts.per_token,
    }


FAMILIES = (
    Llama(
        model_type="mistral",
        name="Mistral",
        defaults={"max_position_embeddings": 131_072, "num_key_value_heads": 8},
        biases=(),
        read=_mistral,
        write=one_window,
    ),
    Llama(
        model_type="mixtral",
        name="Mixtral",
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
        },
        biases=(),
        experts=("block_sparse_moe", "w1", "w3", "w2"),
        read=_mixtral,
        write=_mixtral_entries,
    ),
)
