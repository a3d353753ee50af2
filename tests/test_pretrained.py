"""Checkpoints: the logits of Hugging Face's own models, both ways; files that are refused."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")


from attention_jax.models import pretrained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

V, T, B = 31, 11, 3
LENGTHS = np.array([T, 7, 1])
REAL = np.arange(T) < LENGTHS[:, None]

BERT = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
LLAMA = {
    "vocab_size": V,
    "hidden_size": 20,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_theta": 500.0}
T5 = {
    "vocab_size": V,
    "d_model": 20,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
}
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
}


def scaled(**parameters):
    return {**LLAMA, "rope_parameters": {**ROPE, **parameters}}


MODELS = {
    "bert": ("BertModel", BERT),
    "bert tokens": ("BertForMaskedLM", BERT | {"hidden_act": "relu"}),
    "bert classes": ("BertForSequenceClassification", BERT | {"num_labels": 5}),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": V,
            "n_positions": 20,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt2 unscaled": (
        "GPT2LMHeadModel",
        {
            "vocab_size": V,
            "n_positions": 20,
            "n_embd": 24,
            "n_layer": 1,
            "n_head": 3,
            "n_inner": 30,
            "scale_attn_weights": False,
            "activation_function": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama biased, tied": (
        "LlamaForCausalLM",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama linear": ("LlamaForCausalLM", scaled(rope_type="linear", factor=2.0)),
    "llama dynamic": (
        "LlamaForCausalLM",
        scaled(rope_type="dynamic", factor=2.0) | {"max_position_embeddings": 8},
    ),
    "llama yarn": (
        "LlamaForCausalLM",
        scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "llama 3": (
        "LlamaForCausalLM",
        scaled(
            rope_type="llama3",
            factor=8.0,
            original_max_position_embeddings=32,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
    ),
    "llama yarn, mscale": (
        "LlamaForCausalLM",
        scaled(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=0.7,
            mscale_all_dim=0.3,
        ),
    ),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 4}),
    "gemma2": (
        "Gemma2ForCausalLM",
        LLAMA
        | {
            "num_hidden_layers": 3,
            "sliding_window": 4,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5 1.1": (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "vit": ("ViTModel", VIT),
    "vit classes": ("ViTForImageClassification", VIT | {"num_labels": 5, "qkv_bias": False}),
}

LEFT_OUT = {"vit": [r"pooler\..*"]}  # which ours does not have


def peer(name, seed=0):
    """Hugging Face's model, with every parameter random: at zeros and ones mistakes hide."""
    architecture, options = MODELS[name]
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**options, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.2 * torch.randn(x.shape, generator=generator))
    return model


def tokens(seed, shape=(B, T)):
    return np.random.default_rng(seed).integers(3, V, shape)


def theirs(name, model):
    with torch.no_grad():
        if name.startswith("vit"):
            images = np.random.default_rng(0).normal(size=(B, 2, 12, 12)).astype(np.float32)
            out = model(torch.tensor(images))
        elif name.startswith("t5"):
            out = model(
                input_ids=torch.tensor(tokens(0)),
                attention_mask=torch.tensor(REAL.astype(int)),
                decoder_input_ids=torch.tensor(tokens(1, (B, 6))),
            )
        else:
            types = {"token_type_ids": torch.tensor(tokens(2) % 2)} if "bert" in name else {}
            mask = torch.tensor(REAL.astype(int))
            out = model(torch.tensor(tokens(0)), attention_mask=mask, **types)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def ours(name, model):
    if name.startswith("vit"):
        images = np.random.default_rng(0).normal(size=(B, 2, 12, 12)).astype(np.float32)
        return model(images.transpose(0, 2, 3, 1))
    if name.startswith("t5"):
        return model(tokens(0), tokens(1, (B, 6)), source_real=REAL)
    types = {"types": tokens(2) % 2} if "bert" in name else {}
    return model(tokens(0), real=REAL, **types)


def assert_same(name, a, b, atol=1e-4):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    if a.shape[:2] == (B, T):  # what stands at padding is no result
        a, b = a[REAL], b[REAL]
    assert np.ptp(a) > 0.1  # else there is nothing to compare
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model as Hugging Face writes it, made when it is asked for."""
    made = {}

    def folder(name):
        if name not in made:
            path = tmp_path_factory.mktemp("checkpoint")
            model = peer(name)
            model.save_pretrained(path)
            made[name] = path, theirs(name, model)
        return made[name]

    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_theirs(name, folders):
    path, expected = folders(name)
    assert_same(name, ours(name, pretrained.load(path, ignore=LEFT_OUT.get(name, ()))), expected)


@pytest.mark.parametrize("name", MODELS)
def test_what_we_save_they_load(name, folders, tmp_path):
    path, expected = folders(name)
    model = pretrained.load(path, ignore=LEFT_OUT.get(name, ()))
    pretrained.save(model, tmp_path)
    cls = getattr(transformers, MODELS[name][0])
    back, report = cls.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    lost = {key: names for key, names in report.items() if names}
    if name == "vit":  # their head, which ours does not have
        lost = {k: v for k, v in lost.items() if any("pooler" not in str(n) for n in v)}
    assert not lost
    assert_same(name, theirs(name, back.eval()), expected)
    assert pretrained.load(tmp_path).config == model.config
