"""Granite: like Llama, with multipliers."""

from __future__ import annotations

import math

from attention_jax.models.decoder import DecoderConfig
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.llama import Llama, Options


def _granite(hf: HFConfig, layers: Options, longest: int) -> Options:
    return {
        "scale": float(hf.number("attention_multiplier", 1.0)),
        "residual_scale": float(hf.number("residual_multiplier", 1.0)),
    }


def _granite_decoder(hf: HFConfig, layers: Options) -> Options:
    return {
        "embedding_scale": float(hf.number("embedding_multiplier", 1.0)),
        "head_scale": 1 / hf.number("logits_scaling", 1.0),
    }


def _granite_entries(config: DecoderConfig) -> Options:
    return {
        "attention_multiplier": config.layers.scale,
        "residual_multiplier": config.layers.residual_scale,
        "embedding_multiplier": config.embedding_scale,
        "logits_scaling": _inverse(config.head_scale),
    }


def _inverse(x: float) -> float:
    """The ``y`` with ``1 / y == x``, despite rounding."""
    near = 1 / x
    tries = float(round(near)), near, math.nextafter(near, 0), math.nextafter(near, math.inf)
    return next((y for y in tries if y and 1 / y == x), near)


FAMILIES = (
    Llama(
        model_type="granite",
        name="Granite",
        biases=("attention_bias", "mlp_bias"),
        read=_granite,
        read_decoder=_granite_decoder,
        write=_granite_entries,
    ),
)
