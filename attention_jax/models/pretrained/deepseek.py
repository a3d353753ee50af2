"""DeepSeek-V2 and V3: like Llama, with latent attention, and experts in groups."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from attention_jax.models.decoder import DecoderConfig
from attention_jax.models.layers import Experts, Latent, Layers
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.llama import Llama, Options, experts_of, or_null, read_routing
from attention_jax.models.pretrained.rope import growth, rope_parameters, rotary
from attention_jax.positions import Rotary, YaRN

NORM_EPSILON = 1e-6  # of the latents; no entry says so


def _attention(hf: HFConfig, layers: Options, longest: int, *, interleaved: bool) -> Options:
    heads, kv_heads = layers["num_heads"], layers["num_kv_heads"]
    if kv_heads != heads:
        hf.errors.append(f"num_key_value_heads = {kv_heads} contradicts num_attention_heads")
    H, P = hf.number("qk_nope_head_dim", 128), hf.number("qk_rope_head_dim", 64)
    hf.same("qk_head_dim", H + P)
    mscale = _mscale(hf)
    positions = rotary(hf, longest, head_dim=P)
    return {
        "num_kv_heads": heads,
        "head_dim": H,
        "latent": Latent(
            features=hf.number("kv_lora_rank", 512),
            rotary_dim=P,
            value_dim=hf.number("v_head_dim", 128),
            query_features=or_null(hf, "q_lora_rank", 1536),
            norm_epsilon=NORM_EPSILON,
        ),
        "rotary": dataclasses.replace(positions, interleaved=interleaved),
        "scale": _scale(H + P, positions, mscale) if mscale else None,
    }


def _mscale(hf: HFConfig) -> Any:
    """``mscale_all_dim`` of the rope parameters, which ``rotary`` reads too."""
    given = hf.unused.get("rope_scaling") or hf.unused.get("rope_parameters")
    x = given.get("mscale_all_dim") if isinstance(given, dict) else None
    if x is None or (isinstance(x, int | float) and x >= 0):
        return x
    hf.errors.append(f"mscale_all_dim must not be negative, got {x!r}")
    return None


def _scale(width: int, positions: Rotary, mscale: float) -> float | None:
    """The scale of the logits with YaRN, whose temperature is applied to the whole head."""
    if not isinstance(positions.scaling, YaRN):
        return None
    return width**-0.5 * growth(positions.scaling.factor, mscale) ** 2


def _attention_entries(layers: Layers) -> Options:
    latent = layers.latent
    if latent is None:
        raise NotImplementedError("latent must be given")
    return {
        "head_dim": latent.rotary_dim,
        "qk_nope_head_dim": layers.head_dim,
        "qk_rope_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "kv_lora_rank": latent.features,
        "q_lora_rank": latent.query_features,
        "rope_parameters": {
            **rope_parameters(layers.rotary),  # type: ignore[arg-type]
            **_mscale_entry(layers, layers.head_dim + latent.rotary_dim),  # type: ignore[operator]
        },
    }


def _mscale_entry(layers: Layers, width: int) -> Options:
    """The entry of which ``_scale`` makes the scale of the layers, despite rounding."""
    positions: Any = layers.rotary
    if layers.scale is None:
        return {}
    if not isinstance(positions.scaling, YaRN) or positions.scaling.factor <= 1:
        raise NotImplementedError("scale must be None without YaRN")
    temperature = math.sqrt(layers.scale * math.sqrt(width))
    near = (temperature - 1) / (growth(positions.scaling.factor, 1.0) - 1)
    tries = [round(near, 9), *(near + i * math.ulp(near) for i in range(-8, 9))]
    fits = (x for x in tries if x > 0 and _scale(width, positions, x) == layers.scale)
    found = next(fits, None)
    if found is None:
        raise NotImplementedError("scale must be one that YaRN makes")
    return {"mscale_all_dim": found}


def _experts(hf: HFConfig, number: int, shared: int, hidden: int, dense: int) -> Options:
    """The options of ``Experts`` that both versions have, given the defaults of their sizes."""
    read_routing(hf)
    for entry in ("aux_loss_alpha", "seq_aux", "ep_size"):  # of the loss, and of several devices
        hf.take(entry, None)
    hf.only("moe_layer_freq", 1, None)
    first = hf.take("first_k_dense_replace", dense)
    if not isinstance(first, int) or first < 0:
        hf.errors.append(f"first_k_dense_replace must be a number of layers, got {first!r}")
        first = 0
    width = hf.number("moe_intermediate_size", hidden)
    return {
        "number": hf.number("n_routed_experts", number),
        "hidden": width,
        "shared": width * hf.number("n_shared_experts", shared),
        "scale": float(hf.number("routed_scaling_factor", 1.0 if dense == 0 else 2.5)),
        "dense_layers": first,
    }


def _experts_entries(experts: Experts, layers: Layers) -> Options:
    width = experts.hidden or layers.hidden
    shared, rest = divmod(experts.shared or 0, width)  # type: ignore[operator]
    if rest or not shared:
        raise NotImplementedError("shared must be a multiple of the width of an expert")
    return {
        "n_routed_experts": experts.number,
        "num_experts_per_tok": experts.per_token,
        "n_shared_experts": shared,
        "moe_intermediate_size": width,
        "routed_scaling_factor": experts.scale,
        "first_k_dense_replace": experts.dense_layers,
        "n_group": experts.groups,
        "topk_group": experts.groups_per_token,
        "norm_topk_prob": experts.normalize,
    }


def _v2(hf: HFConfig, layers: Options, longest: int) -> Options:
    hf.only("scoring_func", "softmax", None)
    hf.only("norm_topk_prob", False, None)
    experts = _experts(hf, number=64, shared=2, hidden=1407, dense=0)
    groups, kept = or_null(hf, "n_group", None), or_null(hf, "topk_group", None)
    method = hf.take("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        hf.errors.append(f"topk_method = {method!r} is not supported, only 'greedy' and its groups")
    if method == "greedy":
        groups = kept = None
    experts |= {"groups": groups or 1, "groups_per_token": kept or 1}
    chosen = {"per_token": hf.number("num_experts_per_tok"), "normalize": False}
    return {
        **_attention(hf, layers, longest, interleaved=True),
        "experts": Experts(**experts, **chosen),
    }


def _v2_entries(config: DecoderConfig) -> Options:
    layers, experts = config.layers, experts_of(config.layers)
    return {
        **_attention_entries(layers),
        **_experts_entries(experts, layers),
        "topk_method": "greedy" if experts.groups == 1 else "group_limited_greedy",
    }


def _v3(hf: HFConfig, layers: Options, longest: int) -> Options:
    hf.only("scoring_func", "sigmoid", None)
    hf.only("topk_method", "noaux_tc", None)
    for entry in ("num_nextn_predict_layers", "num_mtp_layers"):  # two names; it is left out
        hf.only(entry, 1, 0, None)
    return {
        **_attention(hf, layers, longest, interleaved=hf.flag("rope_interleave", True)),
        "experts": Experts(
            **_experts(hf, number=256, shared=1, hidden=2048, dense=3),
            per_token=hf.number("num_experts_per_tok", 8),
            groups=hf.number("n_group", 8),
            groups_per_token=hf.number("topk_group", 4),
            normalize=hf.flag("norm_topk_prob", True),
            gating="sigmoid",
        ),
    }


def _v3_entries(config: DecoderConfig) -> Options:
    layers: Any = config.layers
    return {
        **_attention_entries(layers),
        **_experts_entries(experts_of(layers), layers),
        "rope_interleave": layers.rotary.interleaved,
        "num_nextn_predict_layers": 0,
    }


FAMILIES = (
    Llama(
        model_type="deepseek_v2",
        name="DeepseekV2",
        only={"mlp_bias": (False, None)},
        read=_v2,
        write=_v2_entries,
    ),
    Llama(
        model_type="deepseek_v3",
        name="DeepseekV3",
        defaults={"max_position_embeddings": 4096},
        read=_v3,
        write=_v3_entries,
        predicts_further=True,
    ),
)
