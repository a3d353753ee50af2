"""Phi-3 and Phi-4: like Llama, with fused projections and rotary positions for a part of a head."""

from __future__ import annotations

from typing import Any

from attention_jax.models.decoder import DecoderConfig
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.llama import (
    NO,
    Llama,
    Options,
    one_window,
    or_null,
)
from attention_jax.models.pretrained.rope import ORIGINAL, partial_factor, rope_parameters, rotary
from attention_jax.positions import LongRoPE

_OLDER = {"su", "yarn"}


def _phi3(hf: HFConfig, layers: Options, longest: int) -> Options:
    hf.unused.setdefault(ORIGINAL, 4096)
    for entry in ("rope_scaling", "rope_parameters"):
        scaling: Any = hf.unused.get(entry)
        # Older names; the first files have "yarn" for what has never been YaRN.
        if isinstance(scaling, dict) and {scaling.get("rope_type", scaling.get("type"))} & _OLDER:
            hf.unused[entry] = scaling | {"rope_type": "longrope"}
    return {
        "windows": (or_null(hf, "sliding_window", None),),
        "rotary": rotary(hf, longest, partial=1.0, head_dim=layers["head_dim"]),
        "dropout_rate": hf.rate("resid_pdrop", 0.0),
    }


def _phi3_decoder(hf: HFConfig, layers: Options) -> Options:
    return {"dropout_rate": hf.rate("embd_pdrop", 0.0)}


def _phi3_entries(config: DecoderConfig) -> Options:
    layers = config.layers
    positions: Any = layers.rotary
    partial = {"partial_rotary_factor": partial_factor(positions, layers.head_dim)}  # type: ignore[arg-type]
    original = {}
    if isinstance(positions.scaling, LongRoPE):  # there, its value takes precedence
        original = {ORIGINAL: positions.scaling.original}
    return {
        **one_window(config),
        **original,
        "rope_parameters": rope_parameters(positions) | partial,
        "resid_pdrop": layers.dropout_rate,
        "embd_pdrop": config.dropout_rate,
    }


FAMILIES = (
    Llama(
        model_type="phi3",
        name="Phi3",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        biases=(),
        layers={"fused": True},
        padding=32_000,
        only={"lm_head_bias": NO, "full_attn_mod": (1, None), "interpolate_factor": (1, None)},
        read=_phi3,
        read_decoder=_phi3_decoder,
        write=_phi3_entries,
    ),
)
