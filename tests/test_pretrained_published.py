"""Configurations of decoders as they are published: what is read, and what is refused."""

import dataclasses
import json
import re

import checkpoints
import numpy as np
import pytest
from checkpoints import assert_same
from flax import nnx

from attention_jax.models import Experts, Latent, pretrained
from attention_jax.models.pretrained import families
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.positions import Linear, LongRoPE, Rotary, YaRN

saved = pytest.fixture(checkpoints.saved)

COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": [1, 106],
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
}


def sizes(E, hidden, num_layers, num_heads, num_kv_heads, vocabulary, longest):
    heads = {} if num_kv_heads is None else {"num_key_value_heads": num_kv_heads}
    return COMMON | {
        "hidden_size": E,
        "intermediate_size": hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": longest,
        **heads,
    }


QWEN2 = sizes(896, 4864, 24, 14, 2, 151_936, 32_768) | {  # Qwen2.5-0.5B
    "hidden_act": "silu",
    "max_window_layers": 24,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
}
QWEN3 = sizes(1024, 3072, 28, 16, 8, 151_936, 40_960) | {  # Qwen3-0.6B
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
GEMMA = sizes(2048, 16_384, 18, 8, 1, 256_000, 8192) | {  # gemma-2b
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
}
GEMMA3 = sizes(1152, 6912, 26, 4, 1, 262_144, 32_768) | {  # gemma-3-1b-it
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
SMOLLM2 = sizes(576, 1536, 30, 9, 3, 49_152, 8192) | {  # SmolLM2-135M
    "attention_bias": False,
    "hidden_act": "silu",
    "is_llama_config": True,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
SMOLLM3 = sizes(2048, 11_008, 36, 16, 4, 128_256, 65_536) | {  # SmolLM3-3B
    "attention_bias": False,
    "hidden_act": "silu",
    "layer_types": ["full_attention"] * 36,
    "max_window_layers": 28,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
PHI3 = sizes(3072, 8192, 32, 32, 32, 32_064, 4096) | {  # Phi-3-mini-4k-instruct
    "attention_bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
}
OLMO2 = sizes(2048, 8192, 16, 16, 16, 100_352, 4096) | {  # OLMo-2-0425-1B
    "attention_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
}
GRANITE = sizes(2048, 8192, 40, 32, 8, 49_152, 131_072) | {  # granite-3.1-2b-base
    "attention_bias": False,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "hidden_act": "silu",
    "logits_scaling": 8.0,
    "mlp_bias": False,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": True,
}
GPT_NEOX = sizes(512, 2048, 6, 8, None, 50_304, 2048) | {  # pythia-70m
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
}
MIXTRAL = sizes(4096, 14_336, 32, 32, 8, 32_000, 32_768) | {  # Mixtral-8x7B-v0.1
    "hidden_act": "silu",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
QWEN3_MOE = sizes(2048, 6144, 48, 32, 4, 151_936, 40_960) | {  # Qwen3-30B-A3B
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
DEEPSEEK = {
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "ep_size": 1,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
}
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK_V2 = sizes(2048, 10_944, 27, 16, 16, 102_400, 163_840) | DEEPSEEK  # DeepSeek-V2-Lite
DEEPSEEK_V2 |= {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
}
DEEPSEEK_V3 = (
    sizes(7168, 18_432, 61, 128, 128, 129_280, 163_840)
    | DEEPSEEK
    | {  # DeepSeek-V3
        "first_k_dense_replace": 3,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
    }
)
OPT = COMMON | {  # opt-125m
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "prefix": "</s>",
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
FILES = {
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma3_text": GEMMA3,
    "llama": SMOLLM2,
    "smollm3": SMOLLM3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "granite": GRANITE,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
}
FAMILIES = {kind: family for family in families.FAMILIES for kind in family.MODEL_TYPES}


def configured(kind, **changes):
    x = HFConfig({"model_type": kind, **FILES[kind], **changes})
    config = FAMILIES[kind].from_hf(x, set())
    x.finish(kind)
    return config


LOCAL, GLOBAL = Rotary(10_000.0), Rotary(1_000_000.0)
EXPECTED = {
    "qwen2": {"bias": ("query", "key", "value"), "windows": (None,) * 24, "head_dim": 64},
    "qwen3": {"bias": False, "query_key_norm": True, "head_dim": 128, "rotary": GLOBAL},
    "gemma": {"activation": "gelu_tanh", "norm": "one_plus_rms", "order": "pre", "softcap": None},
    "gemma3_text": {
        "windows": ((512,) * 5 + (None,)) * 4 + (512,) * 2,
        "rotary": ((LOCAL,) * 5 + (GLOBAL,)) * 4 + (LOCAL,) * 2,
        "scale": 1 / 16,
    },
    "llama": {"num_kv_heads": 3, "norm_epsilon": 1e-5, "rotary": Rotary(1e5)},
    "smollm3": {"rotary": (*[Rotary(5e6)] * 3, None) * 9},
    "phi3": {"fused": True, "windows": (2047,) * 32, "rotary": Rotary(), "bias": False},
    "olmo2": {"order": "after", "query_key_norm": "joint"},
    "granite": {"scale": 0.015625, "residual_scale": 0.22},
    "mixtral": {"experts": Experts(8, 2), "windows": (None,) * 32, "hidden": 14_336},
    "qwen3_moe": {"experts": Experts(128, 8), "query_key_norm": True, "hidden": 768},
    "deepseek_v2": {
        "experts": Experts(64, 6, False, 1408, shared=2816, dense_layers=1),
        "latent": Latent(512, 64, 128),
        "head_dim": 128,
        "hidden": 10_944,
        "rotary": Rotary(interleaved=True, scaling=YaRN(40.0, 4096, attention_factor=1.0)),
        # (128 + 64) ** -0.5 * (0.0707 ln 40 + 1) ** 2
        "scale": 0.11472138679292611,
    },
    "deepseek_v3": {
        "experts": Experts(
            256, 8, True, 2048, "sigmoid", 8, 4, scale=2.5, shared=2048, dense_layers=3
        ),
        "latent": Latent(512, 64, 128, 1536),
        "bias": False,
    },
    "gpt_neox": {"parallel": True, "fused": True, "rotary": Rotary(width=16), "bias": True},
    "opt": {"activation": "relu", "order": "pre", "dropout_rate": 0.1},
}


@pytest.mark.parametrize("kind", FILES)
def test_published_files_are_read_and_written(kind):
    config = configured(kind)
    layers = config.layers
    assert {name: getattr(layers, name) for name in EXPECTED[kind]} == EXPECTED[kind]
    family, entries = families.of_config(config, {})
    assert (family, entries["model_type"]) == (FAMILIES[kind], kind)


def test_options_of_the_decoder():
    granite = configured("granite")
    assert (granite.embedding_scale, granite.head_scale, granite.tied) == (12.0, 0.125, True)
    assert configured("gemma").embedding_scale == 2048**0.5
    assert (configured("opt").first_position, configured("opt").max_length) == (2, 2048)


def test_windows_of_some_layers():
    qwen = configured("qwen2", use_sliding_window=True, max_window_layers=20)
    assert qwen.layers.windows == (None,) * 20 + (32_768,) * 4
    smollm = configured("smollm3", use_sliding_window=True, sliding_window=9, layer_types=None)
    assert smollm.layers.windows == (None, None, None, 9) * 9


@pytest.mark.parametrize("kind", ["gemma3_text", "granite", "deepseek_v3"])
def test_scales_of_zero_are_not_written(kind):
    config = configured(kind, num_hidden_layers=4)
    wrong = dataclasses.replace(config, head_scale=0.0)
    layers = dataclasses.replace(config.layers, scale=0.0)
    for x in (wrong, dataclasses.replace(config, layers=layers)):
        with pytest.raises(NotImplementedError, match="no family of checkpoints can express"):
            families.of_config(x, {})


def test_rotary_entries():
    gemma = {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    local, *_, far = configured("gemma3_text", **gemma).layers.rotaries[:6]
    assert (local, far) == (LOCAL, Rotary(5.0, scaling=Linear(8.0)))
    assert configured("phi3", partial_rotary_factor=0.75).layers.rotary == Rotary(width=72)
    scaling = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    longer = configured("phi3", rope_scaling=scaling, max_position_embeddings=131_072).layers.rotary
    factor = 1.1902380714238083  # sqrt(1 + ln 32 / ln 4096)
    assert longer == Rotary(scaling=LongRoPE((1.0,) * 48, (2.0,) * 48, 4096, factor))
    parameters = {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}}
    neox = FILES["gpt_neox"] | parameters
    assert configured("gpt_neox", **neox).layers.rotary == Rotary(9.0, width=32)


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}


def with_masks(arrays):
    """As in older files; the head has its name in Hugging Face's newer models."""
    at, ones = "gpt_neox.layers.0.attention", np.ones((2, 2), np.float32)
    masks = {f"{at}.{name}": ones for name in ("bias", "masked_bias", "rotary_emb.inv_freq")}
    return {x.replace("embed_out", "lm_head"): y for x, y in arrays.items()} | masks


def without_prefix(arrays):
    return {name.removeprefix("model."): x for name, x in arrays.items()}


@pytest.mark.parametrize(("kind", "change"), [("gpt_neox", with_masks), ("opt", without_prefix)])
def test_tensors_of_other_files(kind, change, saved):
    folder, expected = saved(kind, change)
    assert_same(pretrained.load(folder), expected)


@pytest.mark.parametrize(("vocabulary", "end"), [(51_864, 50_256), (51_865, 50_257)])
def test_the_end_of_a_transcript_in_whisper(vocabulary, end):
    config = dataclasses.replace(checkpoints.make("whisper").config, vocabulary=vocabulary)
    entries = families.of_config(config, {})[1]
    assert (entries["eos_token_id"], entries["decoder_start_token_id"]) == (end, end + 1)


def test_tensors_of_a_tower_of_clip(saved):
    """Those without a projection have lost their prefix in newer files."""
    folder, expected = saved("clip_text")
    assert_same(pretrained.load(folder), expected)
    folder, _ = saved("clip_text", lambda x: {y.removeprefix("text_model."): x[y] for y in x})
    assert_same(pretrained.load(folder), expected)
    folder, expected = saved("clip_vision")
    assert_same(pretrained.load(folder), expected)
    with pytest.warns(UserWarning, match=r"left out visual_projection\.weight"):
        plain = pretrained.load(folder, config={"architectures": ["CLIPVisionModel"]})
    images = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
    vectors = np.asarray(plain(images))
    np.testing.assert_allclose(expected.project(vectors), expected(images), atol=1e-5)
    assert plain.config.features is None


def test_tensors_of_experts(saved):
    folder, expected = saved("mixtral")
    assert_same(pretrained.load(folder), expected)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    folder, _ = saved("mixtral", lambda arrays: {x: arrays[x] for x in arrays if x != name})
    with pytest.raises(ValueError, match=f"{re.escape(name)} is missing"):
        pretrained.load(folder)


def with_another_layer(arrays):
    """As published: it predicts the token after the next."""
    more = {x.replace("layers.1", "layers.2"): y for x, y in arrays.items() if "layers.1" in x}
    return arrays | more | {"model.layers.2.eh_proj.weight": np.ones((8, 16), np.float32)}


def test_every_parameter_is_gathered_once(saved, tmp_path, monkeypatch):
    """Not once for each of the experts that it holds."""
    _, model = saved("deepseek_v3")
    gathered = []
    on_host = pretrained.on_host
    monkeypatch.setattr(pretrained, "on_host", lambda x: gathered.append(x) or on_host(x))
    pretrained.save(model, tmp_path / "again")
    assert len(gathered) == len(nnx.to_flat_state(nnx.state(model)))
    assert_same(pretrained.load(tmp_path / "again"), model)


def test_tensors_of_deepseek(saved):
    folder, expected = saved("deepseek_v3", with_another_layer)
    with pytest.warns(UserWarning, match=r"left out .*model\.layers\.2\.eh_proj\.weight"):
        assert_same(pretrained.load(folder), expected)
    with pytest.warns(UserWarning, match="left out"):
        half = pretrained.load(folder, param_dtype="bfloat16")
    experts = half.stack.blocks[1].feed_forward.sublayer
    assert experts.correction.dtype == np.float32  # rounded, it could choose other experts
    pretrained.save(half, folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("mscale", [1.0, 0.3, 1 / 3, 0.123456789123])
def test_scales_of_yarn_are_written(mscale):
    scaling = YARN | {"mscale": 0.7, "mscale_all_dim": mscale}
    config = configured("deepseek_v3", rope_scaling=scaling, num_hidden_layers=4)
    entries = families.of_config(config, {})[1]
    assert entries["rope_parameters"]["mscale_all_dim"] == pytest.approx(mscale, rel=1e-14)
    other = dataclasses.replace(config.layers, rotary=Rotary(interleaved=True))
    with pytest.raises(NotImplementedError, match="no family of checkpoints can express"):
        families.of_config(dataclasses.replace(config, layers=other), {})


NEAR = {"rope_parameters": {"rope_theta": 5.0}}
REFUSED = [
    ("qwen2", {"use_mrope": True}, "use_mrope = True is not supported"),
    ("qwen2", {"attention_bias": True}, "attention_bias = True is not supported"),
    ("qwen2", {"max_window_layers": None}, "max_window_layers must be a number of layers"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 24}, "24 of ['full_attention'], got"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types must be 28 of"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    ("gemma", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' contradicts"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not"),
    ("gemma3_text", {"sliding_window": None}, "sliding_window must be a positive number"),
    ("gemma3_text", NEAR, "rope_parameters must have ['full_attention', 'sliding_attention']"),
    (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_type": "linear"}}},
        "full_attention: rope type 'linear': factor is missing",
    ),
    (
        "phi3",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 1},
        "at least 2, got 1",
    ),
    ("gemma3_text", {"_sliding_window_pattern": 2}, "_sliding_window_pattern = 2 is unknown"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must be 36 of 0 and 1"),
    ("phi3", {"rope_scaling": LONGROPE}, "short_factor must have 48 numbers, got 3"),
    ("phi3", {"mlp_bias": True}, "mlp_bias = True is not supported"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias = True is not supported"),
    ("phi3", {"partial_rotary_factor": 0.16}, "must give an even number of rotated features"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = [0] is not supported"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' is not supported"),
    ("deepseek_v2", {"num_key_value_heads": 8}, "num_key_value_heads = 8 contradicts"),
    ("deepseek_v2", {"first_k_dense_replace": -1}, "must be a number of layers, got -1"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
    ("deepseek_v3", {"rope_scaling": YARN | {"mscale_all_dim": "1"}}, "must not be negative"),
    ("deepseek_v3", {"quantization_config": {"fmt": "e4m3"}}, "{'quantization_config': None}"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is unknown"),
    ("granite", {"logits_scaling": 0}, "logits_scaling must be a positive number"),
    ("gpt_neox", {"rotary_pct": 1.5}, "partial_rotary_factor must be in (0, 1], got 1.5"),
    ("gpt_neox", {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob = 0.1 is not supported"),
    ("opt", {"word_embed_proj_dim": 512}, "word_embed_proj_dim = 512 is not supported"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True is not"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
]


@pytest.mark.parametrize(("kind", "entries", "message"), REFUSED)
def test_entries_without_support_are_refused(kind, entries, message):
    with pytest.raises(ValueError, match="is not supported") as error:
        configured(kind, **entries)
    assert message in str(error.value)
