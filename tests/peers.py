"""Small models of every family by their entries in Hugging Face's configuration.

The functions need torch and transformers: their tests skip without.
"""

from attention_jax.models.pretrained import families
from attention_jax.models.pretrained.hf_config import HFConfig

V = 31  # tokens

BERT = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
ROBERTA = BERT | {"type_vocab_size": 3, "pad_token_id": 2, "layer_norm_eps": 1e-3}
ELECTRA = BERT | {"embedding_size": 16, "type_vocab_size": 3, "layer_norm_eps": 1e-3}
MPNET = BERT | {"layer_norm_eps": 1e-3}
MODERNBERT = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 20,
    "local_attention": 5,
    "norm_eps": 1e-3,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "cls_token_id": 0,
    "sep_token_id": 1,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}
BIASED = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
DISTILBERT = {
    "vocab_size": V,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 40,
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
WHISPER = {
    "vocab_size": V,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 28,
    "num_mel_bins": 6,
    "max_source_positions": 9,
    "max_target_positions": 20,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
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


CLIP = {
    "projection_dim": 10,
    "text_config": {
        "vocab_size": V,
        "hidden_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 30,
        "max_position_embeddings": 15,
        "eos_token_id": V - 1,
        "bos_token_id": 0,
        "layer_norm_eps": 1e-3,
    },
    "vision_config": {**VIT, "hidden_act": "relu", "layer_norm_eps": 1e-3},
}


def scaled(**parameters):
    return {**LLAMA, "rope_parameters": {**ROPE, **parameters}}


MODELS = {
    "bert": ("BertModel", BERT),
    "bert tokens": ("BertForMaskedLM", BERT | {"hidden_act": "relu"}),
    "bert classes": ("BertForSequenceClassification", BERT | {"num_labels": 5}),
    "bert one class, dropout": (
        "BertForSequenceClassification",
        BERT | {"num_labels": 1, "classifier_dropout": 0.3, "problem_type": "regression"},
    ),
    "bert tags": (
        "BertForTokenClassification",
        BERT | {"id2label": {0: "O", 1: "B", 2: "I"}, "label2id": {"O": 0, "B": 1, "I": 2}},
    ),
    "bert spans": ("BertForQuestionAnswering", BERT),
    "roberta": ("RobertaModel", ROBERTA),
    "roberta tokens": ("RobertaForMaskedLM", ROBERTA),
    "xlm-roberta classes": (
        "XLMRobertaForSequenceClassification",
        ROBERTA | {"num_labels": 3, "classifier_dropout": 0.3},
    ),
    "camembert tags": ("CamembertForTokenClassification", ROBERTA | {"hidden_act": "relu"}),
    "roberta spans": ("RobertaForQuestionAnswering", ROBERTA),
    "distilbert": ("DistilBertModel", DISTILBERT | {"activation": "relu"}),
    "distilbert tokens": ("DistilBertForMaskedLM", DISTILBERT | {"activation": "relu"}),
    "distilbert classes": (
        "DistilBertForSequenceClassification",
        DISTILBERT | {"num_labels": 3, "seq_classif_dropout": 0.4},
    ),
    "distilbert tags": ("DistilBertForTokenClassification", DISTILBERT | {"dropout": 0.3}),
    "distilbert spans": ("DistilBertForQuestionAnswering", DISTILBERT),
    "electra": ("ElectraModel", ELECTRA),
    "electra replaced": ("ElectraForPreTraining", ELECTRA | {"hidden_act": "relu"}),
    "electra tokens": ("ElectraForMaskedLM", ELECTRA),
    "electra of one width": ("ElectraForMaskedLM", ELECTRA | {"embedding_size": 24}),
    "electra classes": (
        "ElectraForSequenceClassification",
        ELECTRA | {"num_labels": 3, "hidden_act": "relu"},
    ),
    "electra tags": ("ElectraForTokenClassification", ELECTRA),
    "electra spans": ("ElectraForQuestionAnswering", ELECTRA),
    "mpnet": ("MPNetModel", MPNET | {"hidden_act": "relu"}),
    "mpnet tokens": ("MPNetForMaskedLM", MPNET),
    "mpnet classes": ("MPNetForSequenceClassification", MPNET | {"num_labels": 3}),
    "mpnet tags": ("MPNetForTokenClassification", MPNET),
    "mpnet spans": ("MPNetForQuestionAnswering", MPNET),
    "modernbert": ("ModernBertModel", MODERNBERT),
    "modernbert tokens": (
        "ModernBertForMaskedLM",
        MODERNBERT | {"hidden_activation": "silu", "classifier_activation": "relu"},
    ),
    "modernbert tokens, biased": ("ModernBertForMaskedLM", MODERNBERT | BIASED),
    "modernbert classes": (
        "ModernBertForSequenceClassification",
        MODERNBERT | {"num_labels": 3, "classifier_dropout": 0.2, "mlp_dropout": 0.1},
    ),
    "modernbert mean classes": (
        "ModernBertForSequenceClassification",
        MODERNBERT | BIASED | {"classifier_pooling": "mean", "attention_dropout": 0.1},
    ),
    "modernbert tags": (
        "ModernBertForTokenClassification",
        MODERNBERT
        | {"layer_types": [*["sliding_attention", "full_attention"] * 2, "full_attention"]},
    ),
    "modernbert spans": ("ModernBertForQuestionAnswering", MODERNBERT),
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
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
    "whisper untied, relu": (
        "WhisperForConditionalGeneration",
        WHISPER | {"tie_word_embeddings": False, "activation_function": "relu", "dropout": 0.1},
    ),
    "clip": ("CLIPModel", CLIP),
    "clip of the first release": (
        "CLIPModel",
        CLIP | {"text_config": CLIP["text_config"] | {"eos_token_id": 2, "attention_dropout": 0.1}},
    ),
    "clip_text": ("CLIPTextModel", CLIP["text_config"]),
    "clip_text projected": (
        "CLIPTextModelWithProjection",
        CLIP["text_config"] | {"projection_dim": 10, "attention_dropout": 0.1},
    ),
    "clip_vision": ("CLIPVisionModel", CLIP["vision_config"]),
    "clip_vision projected": (
        "CLIPVisionModelWithProjection",
        CLIP["vision_config"] | {"projection_dim": 10},
    ),
    "vit": ("ViTModel", VIT),
    "vit classes": ("ViTForImageClassification", VIT | {"num_labels": 5, "qkv_bias": False}),
}


def peer(architecture, options, seed=0):
    """Hugging Face's model, with every parameter random, since zeros and ones hide mistakes."""
    import torch
    import transformers

    cls = getattr(transformers, architecture)
    torch.manual_seed(1 + seed)
    model = cls(cls.config_class(**options, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        corrections = [x for name, x in model.named_buffers() if name.endswith("correction_bias")]
        for x in (*model.parameters(), *corrections):
            x.add_(0.2 * torch.randn(x.shape, generator=generator))
    return model


def read(config, given):
    """Our configuration from the entries given to Hugging Face's ``config``, and from all of it."""
    whole = config.to_dict()
    whole.pop("architectures", None)
    (family,) = (x for x in families.FAMILIES if config.model_type in x.MODEL_TYPES)
    for entries in (given, whole):
        x = HFConfig({"model_type": config.model_type, **entries})
        yield family.from_hf(x, set())
        x.finish("model")
