"""Checkpoints of decoders: hidden states, logits and cached steps equal those of Hugging Face."""

import tempfile
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")


import peers  # noqa: E402

from attention_jax.models import generate, pretrained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

V, T, B = 31, 11, 5
LENGTHS = np.array([T, 7, 1, 5, 10])[:, None]
REAL = np.arange(T) < LENGTHS
REAL[3:] = REAL[3:, ::-1]  # the last rows are padded on the left
TOKENS = np.random.default_rng(0).integers(3, V, (B, T))

# Every option that matters has a value that is not neutral, in widths that differ from each other.
LLAMA = {
    "vocab_size": V,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT_NEOX = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "layer_norm_eps": 0.1,
    "rotary_pct": 0.4,
    "rotary_emb_base": 50,
    "hidden_act": "gelu_fast",
}
OPT = {
    "vocab_size": V,
    "hidden_size": 20,
    "word_embed_proj_dim": 20,
    "ffn_dim": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 13,
}
LONGROPE = LLAMA | {
    "hidden_size": 24,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 50.0,
        "short_factor": [1.0, 1.3, 2.0],
        "long_factor": [1.5, 3.0, 5.0],
    },
}
DEEPSEEK = {name: x for name, x in LLAMA.items() if name not in ("head_dim", "rms_norm_eps")} | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.3,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4}
MODELS = {
    "qwen2": ("Qwen2ForCausalLM", LLAMA | WINDOWS | {"max_window_layers": 1}),
    "qwen2, tied": ("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"attention_bias": True}),
    "qwen3, windows": (
        "Qwen3ForCausalLM",
        LLAMA | WINDOWS | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma": ("GemmaForCausalLM", LLAMA),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA | {"no_rope_layer_interval": 2, "mlp_bias": True}),
    "smollm3, windows": (
        "SmolLM3ForCausalLM",
        LLAMA | WINDOWS | {"no_rope_layers": [0, 1], "attention_bias": True},
    ),
    "phi3": ("Phi3ForCausalLM", LLAMA | {"sliding_window": 4}),
    "phi3, partial": (
        "Phi3ForCausalLM",
        LLAMA | {"partial_rotary_factor": 0.7, "tie_word_embeddings": True},
    ),
    "phi3, longrope": ("Phi3ForCausalLM", LONGROPE),
    "olmo2": ("Olmo2ForCausalLM", LLAMA | {"attention_bias": True}),
    "granite": (
        "GraniteForCausalLM",
        LLAMA
        | {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 49.0,
            "mlp_bias": True,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        LLAMA
        | {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 12,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
                "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0},
            },
        },
    ),
    "mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 5, "sliding_window": 4}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        LLAMA | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12},
    ),
    "qwen3_moe, normalized": (
        "Qwen3MoeForCausalLM",
        LLAMA
        | WINDOWS
        | {"num_experts": 4, "norm_topk_prob": True, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 12, "attention_bias": True},
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        DEEPSEEK
        | {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}
        | {"rope_parameters": DEEPSEEK_YARN, "attention_bias": True},
    ),
    "deepseek_v2, lite": ("DeepseekV2ForCausalLM", DEEPSEEK | {"q_lora_rank": None}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK | {"n_group": 3, "topk_group": 2, "rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek_v3, halves": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK
        | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False}
        | {"attention_bias": True, "n_shared_experts": 1},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", GPT_NEOX),
    "gpt_neox, in sequence": (
        "GPTNeoXForCausalLM",
        GPT_NEOX | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0},
    ),
    "opt": ("OPTForCausalLM", OPT),
    "opt, norms after": (
        "OPTForCausalLM",
        OPT | {"do_layer_norm_before": False, "enable_bias": False, "tie_word_embeddings": False},
    ),
}


def peer(name):
    return peers.peer(*MODELS[name])


def theirs(model, real):
    """Hidden states and logits."""
    places = torch.tensor(np.maximum(real.cumsum(-1) - 1, 0))
    mask = torch.tensor(real.astype(int))
    with torch.no_grad():
        out = model(
            torch.tensor(TOKENS),
            attention_mask=mask,
            position_ids=places,
            output_hidden_states=True,
        )
    return out.hidden_states[-1].numpy(), out.logits.numpy()


def assert_same(ours, expected, real):
    for a, b in zip(ours, expected, strict=True):
        a, b = np.asarray(a)[real], b[real]  # results at padding are undefined
        assert np.ptp(b) > 0.1  # otherwise the comparison is empty
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def loaded_from(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return pretrained.load(folder)


@pytest.fixture(scope="module")
def loaded():
    """Each model of Hugging Face, and ours loaded from what it writes."""
    made = {}

    def load(name):
        if name not in made:
            model = peer(name)
            made[name] = model, loaded_from(model)
        return made[name]

    return load


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_logits_equal_hugging_face(name, loaded):
    model, ours = loaded(name)
    hidden = ours.hidden(TOKENS, real=REAL)
    assert_same((hidden, ours.logits(hidden)), theirs(model, REAL), REAL)


@pytest.mark.parametrize("name", MODELS)
def test_steps_with_caches_equal_the_whole(name, loaded):
    model, ours = loaded(name)
    caches, logits = ours.init_caches((B,), T), []
    for part in np.split(TOKENS, [T - 2, T - 1], axis=1):
        new, caches = ours(part, caches=caches)
        logits.append(new)
    everything = np.ones((B, T), bool)
    expected = theirs(model, everything)[1:]
    assert_same((np.concatenate(logits, axis=1),), expected, everything)


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_loads_what_we_save(name, loaded, tmp_path):
    model, ours = loaded(name)
    pretrained.save(ours, tmp_path)
    back, report = type(model).from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not {key: names for key, names in report.items() if names}
    for a, b in zip(theirs(back.eval(), REAL), theirs(model, REAL), strict=True):
        np.testing.assert_allclose(a[REAL], b[REAL], rtol=1e-6, atol=1e-6)
    assert pretrained.load(tmp_path).config == ours.config


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_greedy_generation_equals_hugging_face(name, loaded):
    model, ours = loaded(name)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(TOKENS), max_new_tokens=6, do_sample=False, eos_token_id=None
        ).numpy()[:, T:]
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(generate(ours, TOKENS, max_new_tokens=6).tokens, expected)


def test_longrope_of_longer_sequences(monkeypatch):
    """Hugging Face takes the longest row of a batch, ours each row alone."""
    entries = LONGROPE | {"original_max_position_embeddings": 8}
    monkeypatch.setitem(MODELS, "longer", ("Phi3ForCausalLM", entries))
    model, everything = peer("longer"), np.ones((B, T), bool)
    ours = loaded_from(model)
    logits = np.asarray(ours(TOKENS))
    assert_same((logits,), theirs(model, everything)[1:], everything)
    assert np.abs(ours(TOKENS[:, :8]) - logits[:, :8]).max() > 0.01
    with pytest.raises(
        NotImplementedError, match="cache cannot be used with LongRoPE beyond its 8"
    ):
        ours(TOKENS, caches=ours.init_caches((B,), T))


SIZES = {key: LLAMA[key] for key in list(LLAMA)[:5]} | {"hidden_size": 32}


@pytest.mark.parametrize("name", dict.fromkeys(cls for cls, _ in MODELS.values()))
def test_defaults_of_missing_entries_equal_hugging_face(name):
    given = dict(SIZES)
    if name.startswith("OPT"):
        given["ffn_dim"] = given.pop("intermediate_size")
    if name.startswith("DeepseekV2"):
        given["num_experts_per_tok"] = 3  # without a default
    if name.startswith("DeepseekV3"):
        given["num_key_value_heads"] = given["num_attention_heads"]  # the default is 128
    config = getattr(transformers, name).config_class(**given)
    a, b = peers.read(config, given)
    assert a == b
