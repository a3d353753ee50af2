"""Safetensors: round trips, and invalid files are refused."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import models
from attention_jax.models import pretrained
from attention_jax.models.pretrained import tensor_files

LAYERS = models.Layers(
    features=8, num_layers=2, num_heads=2, hidden=12, fused=True, activation="gelu_tanh"
)
CONFIG = models.DecoderConfig(11, LAYERS, positions="learned", max_length=6)


def raw(header, data=b"", length=None):
    """A file from the bytes of its header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_arrays_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.array(2.5, np.float64),
        "bf16": np.asarray(jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)),
        "transposed": rng.integers(0, 9, (4, 3)).T,
    }
    tensor_files.write(tmp_path / "x", arrays, arrays.values())
    file = tensor_files.File(tmp_path / "x")
    assert list(file) == list(arrays)
    for name, x in arrays.items():
        np.testing.assert_array_equal(file[name], x)
        assert file[name].dtype == x.dtype


BROKEN = {
    "empty": b"",
    "no header": b"\x01\x02",
    "header longer than the file": raw(b"{}", length=1000),
    "header of 2^63 bytes": raw(b"{}", length=2**63),
    "not JSON": raw(b"{'a': 1}"),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "not an object": raw(b"[1, 2]"),
    "nested without end": raw(b"[" * 100_000),
    "cut short": raw({"a": entry(0, 8)}, b"\0" * 7),
    "too long": raw({"a": entry(0, 8)}, b"\0" * 9),
    "before its beginning": raw({"a": entry(-8, 0)}, b""),
    "backwards": raw({"a": entry(8, 0)}, b"\0" * 8),
    "more bytes than the shape": raw({"a": entry(0, 12)}, b"\0" * 12),
    "a shape that overflows": raw({"a": entry(0, 8, (2**62, 2**62))}, b"\0" * 8),
    "a negative shape": raw({"a": entry(0, 8, (-1, -2))}, b"\0" * 8),
    "a float as a shape": raw({"a": entry(0, 8, (2.0,))}, b"\0" * 8),
    "a bool as an offset": raw({"a": entry(False, 8)}, b"\0" * 8),
    "overlap": raw({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12),
    "a gap": raw({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20),
    "no dtype": raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins",
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_files_raise(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=r"model.safetensors is not a valid safetensors file"):
        tensor_files.File(path)


def test_a_package_that_is_not_installed(tmp_path, monkeypatch):
    tensor_files.write(tmp_path / "x", {}, [])
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"safetensors is not installed: pip install -e '\.\[pretrained\]'$",
    ):
        tensor_files.File(tmp_path / "x")


def test_a_dtype_that_numpy_does_not_have_raises(tmp_path):
    (tmp_path / "x").write_bytes(raw({"a": entry(0, 2, dtype="F8_E4M3")}, b"\0" * 2))
    with pytest.raises(ValueError, match=r"x: a has dtype F8_E4M3, expected one of \['F64', "):
        tensor_files.File(tmp_path / "x")["a"]


def test_a_valid_file_loads():
    """The cases above are invalid only in what their names say."""
    assert BROKEN["cut short"] + b"\0" == raw({"a": entry(0, 8)}, b"\0" * 8)


@pytest.fixture
def folder(tmp_path):
    pretrained.save(models.Decoder(CONFIG, rngs=nnx.Rngs(0)), tmp_path)
    return tmp_path


def rewritten(folder, change):
    """The folder with its tensors changed: ``change`` gets and gives a dict."""
    path = folder / "model.safetensors"
    arrays = change(dict(tensor_files.File(path)))
    tensor_files.write(path, arrays, arrays.values())
    return folder


def described(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


TOKENS = np.array([[3, 1, 4]])


def test_models_round_trip(folder):
    model = models.Decoder(CONFIG, rngs=nnx.Rngs(0))
    back = pretrained.load(folder)
    assert back.config == CONFIG
    np.testing.assert_array_equal(back(TOKENS), model(TOKENS))


def test_shards(folder):
    whole = pretrained.load(folder)(TOKENS)
    arrays = dict(tensor_files.File(folder / "model.safetensors"))
    places = {}
    for i, name in enumerate(arrays):
        places[name] = f"model-{i % 3}.safetensors"
    for shard in set(places.values()):
        part = {name: x for name, x in arrays.items() if places[name] == shard}
        tensor_files.write(folder / shard, part, part.values())
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    np.testing.assert_array_equal(pretrained.load(folder)(TOKENS), whole)
    index.write_text(json.dumps({"weight_map": {"a": "../model-0.safetensors"}}))
    with pytest.raises(ValueError, match="files of its own folder"):
        pretrained.load(folder)


def test_bfloat16(folder):
    def halved(arrays):
        return {name: x.astype(jnp.bfloat16) for name, x in arrays.items()}

    model = pretrained.load(rewritten(folder, halved))
    assert model.embed.tokens.dtype == jnp.float32
    small = pretrained.load(folder, param_dtype=jnp.bfloat16)
    assert small.embed.tokens.dtype == jnp.bfloat16
    np.testing.assert_array_equal(small.embed.tokens[...].astype(jnp.float32), model.embed.tokens)
    pretrained.save(small, folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_all_errors_of_tensors_are_reported_at_once(folder):
    def change(arrays):
        del arrays["transformer.wpe.weight"]
        arrays["transformer.ln_f.weight"] = np.zeros(9, np.float32)
        arrays["transformer.ln_f.bias"] = np.zeros(8, np.int32)
        arrays["extra.weight"] = np.zeros(3, np.float32)
        return arrays

    with pytest.raises(ValueError, match="tensors do not fit") as error:
        pretrained.load(rewritten(folder, change))
    for part in (
        "transformer.wpe.weight is missing",
        "transformer.ln_f.weight has shape [9], expected [8]",
        "transformer.ln_f.bias has dtype I32",
        "extra.weight is not expected",
    ):
        assert part in str(error.value)


def test_tensors_can_be_left_out_by_name(folder):
    rewritten(folder, lambda arrays: {**arrays, "extra.weight": np.zeros(3, np.float32)})
    pretrained.load(folder, ignore=[r"extra\..*"])
    with pytest.raises(ValueError, match=r"wpe\.weight is missing"):
        pretrained.load(folder, ignore=[r"extra\..*", r"transformer\.wpe\..*"])
    with pytest.raises(ValueError, match="ignore must be a list"):
        pretrained.load(folder, ignore=r"extra\..*")


def test_older_names_are_known(folder):
    """GPT-2 without its prefix and with the masks and the copy that were once stored."""
    expected = pretrained.load(folder)(TOKENS)

    def older(arrays):
        arrays = {name.removeprefix("transformer."): x for name, x in arrays.items()}
        arrays["h.0.attn.bias"] = np.ones((1, 1, 6, 6), np.uint8)
        arrays["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
        return arrays | {"lm_head.weight": arrays["wte.weight"]}

    np.testing.assert_array_equal(pretrained.load(rewritten(folder, older))(TOKENS), expected)


def test_older_names_of_bert(tmp_path):
    layers = models.Layers(features=8, num_layers=1, num_heads=2, order="post", hidden=12)
    config = models.EncoderConfig(11, layers, types=2, embedding_norm=True, head="tokens")
    pretrained.save(models.Encoder(config, rngs=nnx.Rngs(0)), tmp_path)
    expected = pretrained.load(tmp_path)(TOKENS)

    def older(arrays):
        def name(x):
            return x.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )

        copies = {
            "cls.predictions.decoder.weight": arrays["bert.embeddings.word_embeddings.weight"]
        }
        positions = {"bert.embeddings.position_ids": np.arange(512)[None]}
        return {name(x): array for x, array in arrays.items()} | copies | positions

    np.testing.assert_array_equal(pretrained.load(rewritten(tmp_path, older))(TOKENS), expected)


REFUSED = {
    "activation_function": ("tanhexp", "activation_function = 'tanhexp' is not supported"),
    "scale_attn_by_inverse_layer_idx": (True, "scale_attn_by_inverse_layer_idx = True"),
    "add_cross_attention": (True, "add_cross_attention = True"),
    "tie_word_embeddings": ("no", "tie_word_embeddings must be true or false"),
    "architectures": (["GPT2ForTokens"], "only ['GPT2LMHeadModel', 'GPT2Model']"),
    "vocab_size": (None, "vocab_size must be a positive number, got None"),
    "n_embd": ("wide", "n_embd must be a positive number"),
    "resid_pdrop": (2, "resid_pdrop must be in"),
    "something_new": (1, "something_new = 1 is unknown"),
    "model_type": ("mamba", "model_type 'mamba', expected one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_entries_raise(name, folder):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=r"config.json") as error:
        pretrained.load(described(folder, **{name: value}))
    assert message in str(error.value)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 5,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -1.0}}, "factor must be positive"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "short_factor": 0.7}},
            "entries ['short_factor'] are not supported",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"hidden_act": "xielu"}, "hidden_act = 'xielu'"),
        ({"sliding_window": 4}, "sliding_window = 4 is unknown"),
        ({"model_type": "gemma2", "layer_types": ["linear_attention"]}, "layer_types must be"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional"),
        ({"model_type": "bert", "architectures": ["BertForTokens"]}, "BertForTokens"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "relative_key"),
        ({"model_type": "vit", "architectures": ["ViTForMasks"]}, "ViTForMasks"),
        ({"model_type": "t5", "feed_forward_proj": "gated-mish"}, "gated-mish"),
    ],
)
def test_unsupported_features_of_a_family_raise(entries, message, folder):
    (folder / "config.json").write_text(json.dumps(LLAMA | entries))
    with pytest.raises(ValueError, match=r"config.json of .* is not supported") as error:
        pretrained.load(folder)
    assert message in str(error.value)


def test_missing_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "pytorch_model.bin").write_bytes(BROKEN["a pickle"])
    with pytest.raises(FileNotFoundError, match="other formats are not read"):
        pretrained.load(tmp_path)


def test_a_model_of_no_family_is_not_saved(tmp_path):
    import dataclasses

    layers = dataclasses.replace(LAYERS, sinks=True)
    config = dataclasses.replace(CONFIG, layers=layers)
    with pytest.raises(NotImplementedError, match="no family of checkpoints"):
        pretrained.save(models.Decoder(config, rngs=nnx.Rngs(0)), tmp_path)


def test_a_loaded_model_is_in_evaluation_mode(folder):
    model = pretrained.load(described(folder, attn_pdrop=0.5, resid_pdrop=0.5), seed=1)
    still = model(TOKENS)
    np.testing.assert_array_equal(still, model(TOKENS))
    model.train()
    assert np.abs(model(TOKENS) - model(TOKENS)).max() > 1e-4
