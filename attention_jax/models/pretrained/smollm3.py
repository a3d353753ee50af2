"""SmolLM3: like Llama, with layers without positions."""

from __future__ import annotations

from attention_jax.models.decoder import DecoderConfig
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.llama import (
    Llama,
    Options,
    or_null,
    sliding,
    window_entries,
    windows_by_layer,
)
from attention_jax.models.pretrained.rope import rope_parameters, rotary


def _smollm3(hf: HFConfig, layers: Options, longest: int) -> Options:
    num_layers = layers["num_layers"]
    every = hf.number("no_rope_layer_interval", 4)
    given = hf.take("no_rope_layers", None)  # in spite of its name, 1 for rotary positions
    if given is None:
        given = [int((i + 1) % every != 0) for i in range(num_layers)]
    if not isinstance(given, list) or len(given) < num_layers or not set(given) <= {0, 1}:
        hf.errors.append(f"no_rope_layers must be {num_layers} of 0 and 1, got {given!r}")
        given = [1] * num_layers
    window = or_null(hf, "sliding_window", None)
    window = window if hf.flag("use_sliding_window", False) else None
    hf.take("max_window_layers", None)  # in published files; the family does not use it
    types = sliding(window, [not x for x in given[:num_layers]])
    positions = rotary(hf, longest, theta=2_000_000.0, head_dim=layers["head_dim"])
    return {
        "windows": windows_by_layer(hf, num_layers, window, types),
        "rotary": tuple(positions if x else None for x in given[:num_layers]),
    }


def _smollm3_entries(config: DecoderConfig) -> Options:
    (positions,) = {x for x in config.layers.rotaries if x is not None}
    return {
        **window_entries(config.layers),
        "use_sliding_window": config.layers.windows != (None,) * config.layers.num_layers,
        "rope_parameters": rope_parameters(positions),
        "no_rope_layers": [int(x is not None) for x in config.layers.rotaries],
    }


FAMILIES = (
    Llama(
        model_type="smollm3",
        name="SmolLM3",
        defaults={
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        biases=("attention_bias", "mlp_bias"),
        padding=128_004,
        read=_smollm3,
        write=_smollm3_entries,
    ),
)
