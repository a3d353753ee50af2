"""Published checkpoints: unusual entries, older names, copies and extra heads."""

import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import models
from attention_jax.models import pretrained
from attention_jax.models.pretrained import bert, gpt2, llama, safetensors, t5, vit
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.positions import Llama3, Rotary, YaRN

TOKENS = np.array([[3, 1, 4]])
SMALL = {"features": 8, "num_layers": 1, "num_heads": 2, "hidden": 12}
PLAIN = {"bias": False, "feed_forward_bias": False}
LLAMA = models.Layers(**SMALL, **PLAIN, rotary=Rotary(), norm="rms", gated=True, activation="silu")
GEMMA = models.Layers(
    **SMALL,
    **PLAIN,
    rotary=Rotary(),
    norm="one_plus_rms",
    order="both",
    gated=True,
    activation="gelu_tanh",
    scale=256**-0.5,
    windows=(4,),
)
BERT = models.Layers(**SMALL, order="post", norm_epsilon=1e-12)
T5 = models.Layers(
    **SMALL,
    **PLAIN,
    relative=models.Relative(),
    norm="rms",
    norm_epsilon=1e-6,
    activation="relu",
    scale=1.0,
)


def bert_model(**head):
    options = {"types": 2, "embedding_norm": True, "max_length": 6, **head}
    return models.Encoder(models.EncoderConfig(11, BERT, **options), rngs=nnx.Rngs(0))


@functools.cache
def make(kind):
    rngs = nnx.Rngs(0)
    match kind:
        case "gpt2":
            layers = models.Layers(**SMALL, fused=True, activation="gelu_tanh")
            config = models.DecoderConfig(11, layers, positions="learned", max_length=6)
            return models.Decoder(config, rngs=rngs)
        case "llama" | "llama tied":
            return models.Decoder(models.DecoderConfig(11, LLAMA, tied="tied" in kind), rngs=rngs)
        case "gemma2":
            return models.Decoder(
                models.DecoderConfig(11, GEMMA, embedding_scale=8**0.5), rngs=rngs
            )
        case "t5":
            config = models.EncoderDecoderConfig(11, T5, T5, positions=None, head_scale=8**-0.5)
            return models.EncoderDecoder(config, rngs=rngs)
        case "vit":
            config = models.VisionConfig((4, 4), 2, models.Layers(**SMALL), channels=1)
            return models.VisionTransformer(config, rngs=rngs)
        case "bert":
            return bert_model(pooler=True)
        case "bert tokens":
            return bert_model(head="tokens")
        case "bert classes":
            return bert_model(head="classes", classes=1, pooler=True)


def assert_same(model, expected):
    """The same parameters in the same places: what they give need not be computed."""
    a, b = (dict(nnx.to_flat_state(nnx.state(x, nnx.Param))) for x in (model, expected))
    assert a.keys() == b.keys()
    for path, x in a.items():
        np.testing.assert_array_equal(x.get_value(), b[path].get_value(), err_msg=str(path))


@functools.cache
def checkpoint(kind):
    """Its tensors and its entries."""
    with tempfile.TemporaryDirectory() as folder:
        pretrained.save(make(kind), folder)
        arrays = dict(safetensors.File(Path(folder) / "model.safetensors"))
        return arrays, json.loads((Path(folder) / "config.json").read_text())


@pytest.fixture
def saved(tmp_path):
    """A folder with a model of a kind, with more tensors and entries, or other ones; and it."""

    def write(kind, change=lambda arrays: arrays, **entries):
        arrays, config = checkpoint(kind)
        arrays, config = change(dict(arrays)), config | entries
        safetensors.write(tmp_path / "model.safetensors", arrays, arrays.values())
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path, make(kind)

    return write


# --- HFConfig.

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
    "vit": ("vit", {"encoder_stride": 16, "pooler_act": "tanh", "pooler_output_size": 8}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_harmless_entries(name, saved):
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
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate"),
    ("t5", {"feed_forward_proj": None}, "feed_forward_proj must be a name, got None"),
    ("vit", {"image_size": [224]}, "image_size must be one or two positive integers, got [224]"),
    ("vit", {"patch_size": [16, 8]}, "patch_size = (16, 8) is not supported, only squares"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "config={'quantization_config': None} ignores"),
]
FAMILIES = {kind: family for family in (bert, gpt2, llama, t5, vit) for kind in family.MODEL_TYPES}
LLAMA_SIZES = {
    "vocab_size": 5,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
}
T5_SIZES = {"d_kv": 2, "d_ff": 8, "num_layers": 1, "num_heads": 2}
SIZES = {
    "bert": LLAMA_SIZES,
    "gpt2": {"vocab_size": 5, "n_embd": 8, "n_layer": 1, "n_head": 2},
    "llama": LLAMA_SIZES,
    "mistral": LLAMA_SIZES,
    "gemma2": LLAMA_SIZES,
    "t5": {"vocab_size": 5, "d_model": 8, **T5_SIZES},
    "vit": LLAMA_SIZES,
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
        ("bert", "BertForTokenClassification"),
        ("gpt2", "GPT2ForSequenceClassification"),
        ("t5", "T5EncoderModel"),
        ("vit", "ViTForMaskedImageModeling"),
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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        # The older entry wins, and what is beside it counts where it says nothing.
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


# --- Tensors.


def test_bert_base_uncased(saved):
    """Older names, and heads of pretraining that the model has no place for."""

    def published(arrays):
        arrays = {
            name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
            for name, x in arrays.items()
        }
        return arrays | {
            "bert.pooler.dense.weight": np.ones((8, 8), np.float32),
            "bert.pooler.dense.bias": np.ones(8, np.float32),
            "cls.seq_relationship.weight": np.ones((2, 8), np.float32),
            "cls.seq_relationship.bias": np.ones(2, np.float32),
        }

    folder, expected = saved(
        "bert tokens", published, gradient_checkpointing=False, position_embedding_type="absolute"
    )
    with pytest.warns(UserWarning, match=r"left out bert\.pooler.*seq_relationship") as warned:
        model = pretrained.load(folder)
    assert len(warned) == 1
    assert_same(model, expected)
    ignore = [r"bert\.pooler\..*", r"cls\.seq_relationship\..*"]
    assert_same(pretrained.load(folder, ignore=ignore), expected)
    with pytest.warns(UserWarning, match=r"left out cls\.predictions"):
        vectors = pretrained.load(folder, config={"architectures": ["BertModel"]})
    assert vectors.pooler is not None
    assert_same(vectors.stack, model.stack)
    with pytest.warns(UserWarning, match="left out"):
        same = pretrained.load(folder, config={"architectures": ["BertForPreTraining"]})
    assert_same(same, expected)


def test_bert_without_a_pooler(saved):
    def without(arrays):
        return {name: x for name, x in arrays.items() if "pooler" not in name}

    folder, expected = saved("bert", without)
    model = pretrained.load(folder)
    assert_same(model.stack, expected.stack)
    assert model.pooler is None
    pretrained.save(model, folder)
    assert pretrained.load(folder).config == model.config


def test_a_pooler_of_vit_is_left_out_with_a_warning(saved):
    folder, expected = saved(
        "vit", lambda x: x | {"pooler.dense.weight": np.ones((8, 8), np.float32)}
    )
    with pytest.warns(UserWarning, match=r"left out pooler\.dense\.weight"):
        model = pretrained.load(folder)
    assert_same(model, expected)


COPIES = [
    ("gpt2", "lm_head.weight", "transformer.wte.weight"),
    ("llama tied", "lm_head.weight", "model.embed_tokens.weight"),
    ("gemma2", "lm_head.weight", "model.embed_tokens.weight"),
    ("bert tokens", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("bert tokens", "cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("t5", "encoder.embed_tokens.weight", "shared.weight"),
    ("t5", "decoder.embed_tokens.weight", "shared.weight"),
    ("t5", "lm_head.weight", "shared.weight"),
]


@pytest.mark.parametrize(("kind", "copy", "original"), COPIES)
def test_copies_may_be_stored_with_or_without_the_original(kind, copy, original, saved):
    folder, expected = saved(kind, lambda arrays: arrays | {copy: arrays[original]})
    model = pretrained.load(folder)
    assert_same(model, expected)

    def alone(arrays):
        return {copy if name == original else name: x for name, x in arrays.items()}

    folder, expected = saved(kind, alone)
    assert_same(pretrained.load(folder), expected)


@pytest.mark.parametrize(("kind", "copy", "original"), COPIES[:-1])
def test_a_copy_that_differs_raises(kind, copy, original, saved):
    folder, expected = saved(kind, lambda arrays: arrays | {copy: arrays[original] + 1})
    with pytest.raises(ValueError, match=f"{copy} should be a copy of {original} but differs"):
        pretrained.load(folder)
    ignored = pretrained.load(folder, ignore=[copy.replace(".", r"\.")])
    assert_same(ignored, expected)


@pytest.mark.parametrize(("kind", "copy", "original"), [COPIES[0], COPIES[1], COPIES[-1]])
def test_an_untied_head_is_used_if_the_config_says_so(kind, copy, original, saved):
    """Of T5 the tensors say it: its entry is about the scale of what the head sees."""
    doubled = "lm_head.weight"
    folder, expected = saved(kind, lambda arrays: arrays | {doubled: 2 * arrays[original]})
    config = {} if kind == "t5" else {"tie_word_embeddings": False}
    model = pretrained.load(folder, config=config)
    assert not model.config.tied
    np.testing.assert_array_equal(model.head.kernel, 2 * expected.embed.tokens[...].T)
    pretrained.save(model, folder)
    again = pretrained.load(folder)
    assert again.config == model.config
    assert_same(again, model)


def test_copies_that_differ_from_each_other(saved):
    def two(arrays):
        table = arrays.pop("shared.weight")
        names = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
        return arrays | {names[0]: table, names[1]: table + 1}

    folder, _ = saved("t5", two)
    with pytest.raises(ValueError, match=r"decoder\.embed_tokens\.weight should be a copy of"):
        pretrained.load(folder)


def test_a_missing_head_raises_with_advice(saved):
    def headless(arrays):
        return {name: x for name, x in arrays.items() if name != "lm_head.weight"}

    folder, _ = saved("llama", headless)
    with pytest.raises(ValueError, match=r"lm_head.weight is missing \(config=\{'tie_word"):
        pretrained.load(folder)
    assert pretrained.load(folder, config={"tie_word_embeddings": True}).config.tied


def test_long_lists_of_tensors_are_truncated(saved):
    folder, _ = saved("llama", lambda arrays: {f"other.{name}": x for name, x in arrays.items()})
    with pytest.raises(ValueError, match=r"and 4 more like these") as error:
        pretrained.load(folder)
    assert str(error.value).count("is missing") == 8


def test_overflow_in_float16_raises(saved):
    def large(arrays):
        arrays["transformer.ln_f.weight"] = np.full(8, 1e5, np.float32)
        return arrays

    folder, _ = saved("gpt2", large)
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight overflows param_dtype"):
        pretrained.load(folder, param_dtype=jnp.float16)
    with pytest.raises(ValueError, match="param_dtype must be a floating one"):
        pretrained.load(folder, param_dtype=jnp.int8)


def test_a_hub_name_raises():
    with pytest.raises(FileNotFoundError, match=r"got 'org/name'.*Nothing is downloaded"):
        pretrained.load("org/name")


@pytest.mark.parametrize(
    "dtypes",
    [{"param_dtype": jnp.float16}, pytest.param({"dtype": jnp.float16}, marks=pytest.mark.slow)],
)
def test_t5_in_float16_has_a_float32_residual_stream(dtypes, saved):
    """What the feed-forward layers give passes 65,504; the norms bring it back."""

    def large(arrays):
        return {name: x * np.float32(5e4 if ".wo." in name else 1) for name, x in arrays.items()}

    folder, _ = saved("t5", large)
    wide, narrow = pretrained.load(folder), pretrained.load(folder, **dtypes)
    keys = jax.eval_shape(lambda: narrow.encode(TOKENS).contexts[0].key)
    assert keys.dtype == jnp.float16

    @nnx.jit
    def both(model):
        return model(TOKENS, TOKENS), model.encoder.blocks[0](model.embed(TOKENS))

    expected, summed = both(wide)
    assert np.abs(summed).max() > 65_504
    got = nnx.jit(lambda model: model(TOKENS, TOKENS))(narrow)
    np.testing.assert_allclose(got, expected, atol=4e-3 * np.abs(expected).max())
