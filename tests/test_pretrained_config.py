"""Checkpoints as they are published: the entries of their ``config.json``."""

import checkpoints
import pytest
from checkpoints import assert_same

from attention_jax.models import pretrained
from attention_jax.models.pretrained import families
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.positions import Linear, Llama3, Rotary, YaRN

saved = pytest.fixture(checkpoints.saved)

FIRST_BERT = {  # of google-research's own code
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
}
OLD_DUMP = {  # what transformers 3 and 4 wrote when asked for all
    "is_encoder_decoder": False,
    "is_decoder": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "torchscript": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "bad_words_ids": None,
    "finetuning_task": None,
    "xla_device": None,
}
PUBLISHED = {
    "distilgpt2": ("gpt2", {"_num_labels": 1, "n_ctx": 1024, "summary_type": "cls_index"}),
    "gpt2, older": ("gpt2", OLD_DUMP | {"predict_special_tokens": True, "output_past": True}),
    "bert-base-chinese": ("bert", FIRST_BERT),
    "a cross-encoder": (
        "bert classes",
        {
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "sentence_transformers": {
                "activation_fn": "torch.nn.modules.linear.Identity",
                "version": "4.1.0.dev0",
            },
            "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
        },
    ),
    "xlm-roberta-base": (
        "roberta",
        {
            "model_type": "xlm-roberta",
            "architectures": ["XLMRobertaModel"],
            "output_past": True,
            "position_embedding_type": "absolute",
        },
    ),
    "distilbert-base-uncased": (
        "distilbert",
        {
            "architectures": ["DistilBertModel"],
            "sinusoidal_pos_embds": False,
            "tie_weights_": True,
            "qa_dropout": 0.1,
            "seq_classif_dropout": 0.2,
        },
    ),
    "electra-small-generator, headless": (
        "electra",
        {
            "summary_activation": "gelu",
            "summary_last_dropout": 0.1,
            "summary_type": "first",
            "summary_use_proj": True,
            "position_embedding_type": "absolute",
        },
    ),
    "ModernBERT-base": (
        "modernbert",
        {
            "architectures": ["ModernBertModel"],
            "rope_parameters": None,
            "layer_types": None,
            "global_attn_every_n_layers": 3,
            "global_rope_theta": 160_000.0,
            "local_attention": 128,
            "local_rope_theta": 10_000.0,
            "classifier_activation": "gelu",
            "classifier_pooling": "cls",
            "classifier_dropout": 0.0,
            "decoder_bias": True,
            "deterministic_flash_attn": False,
            "initializer_cutoff_factor": 2.0,
            "layer_norm_eps": 1e-05,
            "position_embedding_type": "absolute",
            "reference_compile": None,
            "sparse_prediction": False,
            "sparse_pred_ignore_index": -100,
        },
    ),
    "clip-vit-base-patch32": (
        "clip",
        {
            "initializer_factor": 1.0,
            "logit_scale_init_value": 2.6592,
            "_commit_hash": None,
            "text_config_dict": {
                **OLD_DUMP,
                "dropout": 0.0,
                "projection_dim": 512,
                "tie_word_embeddings": True,
                "tf_legacy_loss": False,
                "typical_p": 1.0,
                "vocab_size": 11,
                "max_position_embeddings": 6,
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 12,
            },
            "vision_config_dict": None,
        },
    ),
    "mpnet-base": ("mpnet", {"relative_attention_num_buckets": 32, "_num_labels": 2}),
    "SmolLM": (
        "llama tied",
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "rope_scaling": None,
            "pretraining_tp": 1,
            "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        },
    ),
    "llama-7b": ("llama", {"max_sequence_length": 2048, "pad_token_id": 0}),
    "of unsloth": ("llama", {"unsloth_version": "2024.9", "unsloth_fixed": True}),
    "gemma-2-9b": (
        "gemma2",
        {
            "sliding_window_size": 4,
            "cache_implementation": "hybrid",
            "hidden_act": "gelu_pytorch_tanh",
            "_attn_implementation_autoset": True,
        },
    ),
    "t5-small": (
        "t5",
        {"n_positions": 512, "output_past": True, "architectures": ["T5WithLMHeadModel"]},
    ),
    "whisper-tiny": (
        "whisper",
        {
            "begin_suppress_tokens": [220, 50257],
            "classifier_proj_size": 256,
            "decoder_layerdrop": 0.0,
            "encoder_layerdrop": 0.0,
            "forced_decoder_ids": [[1, 50259], [2, 50359], [3, 50363]],
            "init_std": 0.02,
            "mask_time_prob": 0.05,
            "mask_feature_min_masks": 0,
            "max_length": 448,
            "median_filter_width": 7,
            "num_hidden_layers": 1,
            "scale_embedding": False,
            "suppress_tokens": [],
            "use_weighted_layer_sum": False,
        },
    ),
    "vit": ("vit", {"encoder_stride": 16, "pooler_act": "tanh", "pooler_output_size": 8}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_harmless_config_entries_are_accepted(name, saved):
    kind, entries = PUBLISHED[name]
    folder, expected = saved(kind, **entries)
    assert_same(pretrained.load(folder), expected)


HARMFUL = [
    ("llama", {"is_llama_config": False}, "is_llama_config = False is not supported"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved = True is not supported"),
    ("mistral", {"attention_bias": True}, "attention_bias = True is not supported"),
    ("mistral", {"sliding_window_size": 8}, "sliding_window_size = 8 contradicts 4096"),
    ("gemma2", {"sliding_window": 4, "sliding_window_size": 8}, "contradicts 4"),
    ("gemma2", {"mlp_bias": True}, "mlp_bias = True is not supported"),
    ("llama", {"rope_theta": None}, "rope_theta must be a positive number, got None"),
    ("llama", {"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
    ("llama", {"max_position_embeddings": None}, "must be a positive number, got None"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM'"),
    ("bert", {"directionality": "left"}, "directionality = 'left' is not supported"),
    ("bert", {"pooler_type": "mean"}, "pooler_type = 'mean' is not supported"),
    ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads = {'0': [1]} is not supported"),
    ("bert", {"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported"),
    ("roberta", {"pad_token_id": None}, "pad_token_id must be a token, got None"),
    ("xlm-roberta", {"max_position_embeddings": 2}, "max_position_embeddings must be above 2"),
    ("camembert", {"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
    ("camembert", {"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
    ("distilbert", {"tie_weights_": False}, "tie_weights_ = False is not supported"),
    ("distilbert", {"qa_dropout": 1.5}, "qa_dropout must be in [0, 1), got 1.5"),
    ("distilbert", {"hidden_act": "relu"}, "hidden_act = 'relu' is unknown"),
    ("electra", {"embedding_size": 0}, "embedding_size must be a positive number, got 0"),
    ("mpnet", {"relative_attention_num_buckets": 16}, "= 16 is not supported, only 32"),
    ("mpnet", {"classifier_dropout": 0.1}, "classifier_dropout = 0.1 is unknown"),
    ("clip", {"text_config": {"dropout": 0.1}}, "dropout = 0.1 is not supported"),
    (
        "clip",
        {"vision_config": {"new": 1}},
        "of vision_config is not supported: new = 1",
    ),
    ("clip_text_model", {"dropout": 0.1}, "dropout = 0.1 is not supported"),
    ("clip_text_model", {"eos_token_id": None}, "eos_token_id must be a token, got None"),
    ("clip_vision_model", {"patch_size": [2, 4]}, "only squares"),
    ("clip", {"text_config": 3}, "text_config must be an object, got 3"),
    ("modernbert", {"classifier_pooling": "max"}, "must be one of ['cls', 'mean'], got 'max'"),
    ("modernbert", {"decoder_bias": False}, "decoder_bias = False is not supported"),
    ("modernbert", {"layer_types": ["chunked_attention"]}, "layer_types must be 1 of"),
    ("modernbert", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters must have entries"),
    (
        "modernbert",
        {"rope_scaling": {"rope_type": "nonsense"}},
        "sliding_attention: rope type 'nonsense': not supported",
    ),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate"),
    ("t5", {"feed_forward_proj": None}, "feed_forward_proj must be a name, got None"),
    ("whisper", {"encoder_layerdrop": 0.1}, "encoder_layerdrop = 0.1 is not supported"),
    ("whisper", {"apply_spec_augment": True}, "apply_spec_augment = True is not supported"),
    ("whisper", {"num_hidden_layers": 6}, "num_hidden_layers = 6 contradicts 4"),
    ("vit", {"image_size": [224]}, "image_size must be one or two positive integers, got [224]"),
    ("vit", {"patch_size": [16, 8]}, "patch_size = (16, 8) is not supported, only squares"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "config={'quantization_config': None} ignores"),
]
FAMILIES = {kind: family for family in families.FAMILIES for kind in family.MODEL_TYPES}
LLAMA_SIZES = {
    "vocab_size": 5,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
}
T5_SIZES = {"d_kv": 2, "d_ff": 8, "num_layers": 1, "num_heads": 2}
SIZES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), LLAMA_SIZES),
    **dict.fromkeys(("electra", "mpnet", "modernbert"), LLAMA_SIZES),
    "distilbert": {"vocab_size": 5, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2},
    "gpt2": {"vocab_size": 5, "n_embd": 8, "n_layer": 1, "n_head": 2},
    "llama": LLAMA_SIZES,
    "mistral": LLAMA_SIZES,
    "gemma2": LLAMA_SIZES,
    "t5": {"vocab_size": 5, "d_model": 8, **T5_SIZES},
    "vit": LLAMA_SIZES,
    "clip": {},
    "clip_text_model": {},
    "clip_vision_model": {},
    "whisper": {},
}


def configured(kind, names=(), **entries):
    x = HFConfig({"model_type": kind, **SIZES[kind], **entries})
    config = FAMILIES[kind].from_hf(x, set(names))
    x.finish(kind)
    return config


@pytest.mark.parametrize(("kind", "entries", "message"), HARMFUL)
def test_harmful_entries_raise(kind, entries, message):
    with pytest.raises(ValueError, match=r"config.json of .* is not supported") as error:
        configured(kind, **entries)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "LlamaForQuestionAnswering"),
        ("llama", "LlamaModel"),
        ("mistral", "MistralForSequenceClassification"),
        ("gemma2", "Gemma2Model"),
        ("bert", "BertForMultipleChoice"),
        ("roberta", "RobertaForMultipleChoice"),
        ("xlm-roberta", "XLMRobertaForCausalLM"),
        ("distilbert", "DistilBertForMultipleChoice"),
        ("electra", "ElectraForCausalLM"),
        ("mpnet", "MPNetForMultipleChoice"),
        ("modernbert", "ModernBertForMultipleChoice"),
        ("clip", "CLIPForImageClassification"),
        ("clip_text_model", "CLIPModel"),
        ("clip_vision_model", "CLIPForImageClassification"),
        ("gpt2", "GPT2ForSequenceClassification"),
        ("t5", "T5EncoderModel"),
        ("vit", "ViTForMaskedImageModeling"),
        ("whisper", "WhisperForAudioClassification"),
    ],
)
def test_unsupported_heads_raise(kind, name):
    with pytest.raises(ValueError, match=rf"architectures = \['{name}'\] is not supported, only"):
        configured(kind, architectures=[name])


def test_defaults_equal_those_of_hugging_face():
    """As in the configuration classes of transformers 5.24; a null is not the same."""
    assert configured("mistral").layers.windows == (4096,)
    assert configured("mistral").layers.num_kv_heads == 8
    assert configured("mistral").max_length == 131_072
    assert configured("mistral", sliding_window=None).layers.windows == (None,)
    gemma = configured("gemma2")
    assert (gemma.layers.softcap, gemma.logits_softcap) == (50.0, 30.0)
    assert (gemma.layers.num_kv_heads, gemma.layers.head_dim) == (4, 256)
    assert (gemma.max_length, gemma.layers.windows) == (8192, (4096,))
    gemma = configured("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (gemma.layers.softcap, gemma.logits_softcap) == (None, None)


def test_defaults_and_precedence_of_clip():
    config = configured("clip", text_config={"eos_token_id": 2, "num_hidden_layers": 3})
    assert (config.end, config.features, config.text.max_length) == (None, 512, 77)
    assert (config.text.layers.num_layers, config.vision.layers.num_heads) == (3, 12)
    newer, older = {"num_attention_heads": 2, "eos_token_id": 2}, {"hidden_size": 24}
    config = configured("clip", text_config=newer, text_config_dict=older)
    layers = config.text.layers
    assert (config.end, layers.features, layers.num_heads) == (49_407, 24, 8)


def test_layers_of_modernbert_alternate():
    config = configured("modernbert", num_hidden_layers=5, local_attention=8, local_rope_theta=7.0)
    assert config.layers.windows == (None, 9, 9, None, 9)  # 4 tokens on either side
    wide, narrow = Rotary(160_000.0), Rotary(7.0)
    assert config.layers.rotaries == (wide, narrow, narrow, wide, narrow)
    given = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3.0}}
    config = configured("modernbert", num_hidden_layers=2, rope_parameters=given)
    assert config.layers.rotaries == (Rotary(3.0, scaling=Linear(2.0)), Rotary(10_000.0))
    config = configured("modernbert", num_hidden_layers=2, global_attn_every_n_layers=1)
    assert config.layers.windows == (None, None)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        # The older entry wins; the newer one beside it fills in what it leaves out.
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            Rotary(10_000.0, scaling=YaRN(4.0, 16)),
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            Rotary(7.0),
        ),
        ({"rope_theta": 5.0, "rope_scaling": YARN}, Rotary(5.0, scaling=YaRN(4.0, 16))),
        # An original length beside wins over one inside.
        (
            {"original_max_position_embeddings": 32, "rope_scaling": YARN},
            Rotary(scaling=YaRN(4.0, 32)),
        ),
        ({"rope_scaling": YARN | {"factor": None}}, Rotary(scaling=YaRN(128.0, 16))),
        (
            {"rope_scaling": YARN | {"finetuned": True, "mscale": 2.0}},
            Rotary(scaling=YaRN(4.0, 16)),
        ),
        # 0.1 ln 4 = 0.138629
        (
            {"rope_scaling": YARN | {"mscale": 2.0, "mscale_all_dim": 1.0}},
            Rotary(scaling=YaRN(4.0, 16, attention_factor=1.2772588722239782 / 1.138629436111989)),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                }
            },
            Rotary(scaling=Llama3(8.0, 2048)),
        ),
        ({"partial_rotary_factor": 1.0}, Rotary()),
    ],
)
def test_rotary_entries_mean_the_same_as_in_hugging_face(entries, expected):
    assert configured("llama", **entries).layers.rotary == expected


def test_an_unknown_rope_scaling_besides_parameters_raises():
    with pytest.raises(ValueError, match="rope type 'nonsense': not supported"):
        configured(
            "llama", rope_scaling={"type": "nonsense"}, rope_parameters={"rope_type": "default"}
        )


def test_entries_can_be_replaced(saved):
    folder, expected = saved("gpt2", something_new=1, activation_function="quick_gelu")
    with pytest.raises(ValueError, match=r"something_new = 1 is unknown"):
        pretrained.load(folder)
    config = {"something_new": None, "activation_function": "gelu_new"}
    assert_same(pretrained.load(folder, config=config), expected)
