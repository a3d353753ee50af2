"""Sentence embeddings: what a checkpoint describes, batches of texts, and wrong folders."""

import json

import checkpoints
import numpy as np
import pytest
from flax import nnx

from attention_jax.models import Embedder, EmbedderConfig, embed, pretrained

TEXTS = ["the cat", "the cat sat", "on", "", "the mat ?"]


@pytest.fixture
def folder(tmp_path):
    folder, _ = checkpoints.saved(tmp_path)("bert")
    checkpoints.write_tokenizer(folder)
    return checkpoints.write_modules(folder)


def write(file, x):
    file.write_text(json.dumps(x))


def changed(file, **entries):
    write(file, json.loads(file.read_text()) | entries)


def test_embeddings_do_not_depend_on_the_batch(folder):
    model, tokenizer = pretrained.load_embedder(folder), pretrained.load_tokenizer(folder)
    assert model.config.encoder.pool == "mean"
    got = embed(model, tokenizer, TEXTS, batch_size=2)
    assert got.shape == (5, 8)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
    alone = embed(model, tokenizer, TEXTS[1:2])
    np.testing.assert_allclose(got[1:2], alone, rtol=1e-4, atol=1e-5)
    assert np.ptp(got, axis=0).max() > 0.1


def test_long_texts_are_cut_at_the_length_of_the_checkpoint(folder):
    changed(folder / "sentence_bert_config.json", max_seq_length=4)
    model, tokenizer = pretrained.load_embedder(folder), pretrained.load_tokenizer(folder)
    assert model.config.max_length == 4
    with pytest.warns(UserWarning, match="1 of 2 texts were cut to max_length = 4"):
        a, b = embed(model, tokenizer, ["the cat sat", "the cat"])
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def older(folder):
    """The encoder in a folder of its own."""
    (folder / "0_Transformer").mkdir()
    names = "config.json", "model.safetensors", "tokenizer.json", "sentence_bert_config.json"
    for name in names:
        (folder / name).rename(folder / "0_Transformer" / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    write(folder / "modules.json", modules)


def newer(folder):
    """The mode by its name, modules by their new places, and a head of other training."""
    pooling = {"embedding_dimension": 8, "pooling_mode": "cls", "include_prompt": True}
    write(folder / "1_Pooling" / "config.json", pooling)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    write(folder / "modules.json", modules)
    pretrained.save(checkpoints.make("bert tokens"), folder)
    write(folder / "config_sentence_transformers.json", {"default_prompt_name": None})


@pytest.mark.parametrize(("change", "pool"), [(older, "mean"), (newer, "first")])
def test_folders_of_other_versions(folder, change, pool):
    change(folder)
    model = pretrained.load_embedder(folder)
    kind = "bert tokens" if change is newer else "bert"
    checkpoints.assert_same(model.encoder.stack, checkpoints.make(kind).stack)
    assert model.config.encoder.pool == pool


def without_modules(folder):
    (folder / "modules.json").unlink()


def with_dense(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    write(folder / "modules.json", modules)


def of_another_family(folder):
    pretrained.save(checkpoints.make("gpt2"), folder)


def pooling(**entries):
    return lambda folder: changed(folder / "1_Pooling" / "config.json", **entries)


WRONG = {
    "no modules": (without_modules, FileNotFoundError, r"must have modules\.json, which describes"),
    "a dense layer": (with_dense, ValueError, r"Transformer, Pooling and possibly Normalize, got"),
    "not modules": (lambda f: write(f / "modules.json", {"a": 1}), ValueError, "a list of modules"),
    "outside": (
        lambda f: write(f / "modules.json", [{"type": "a.Transformer", "path": "../x"}]),
        ValueError,
        r"path must name a folder inside, got '\.\./x'",
    ),
    "another family": (
        of_another_family,
        ValueError,
        r"must have a model_type of bert, .* for sentence embeddings, got 'gpt2'",
    ),
    "two modes": (
        pooling(pooling_mode_cls_token=True),
        ValueError,
        r"one pooling mode, cls or mean, got \['cls', 'mean'\]",
    ),
    "another mode": (
        pooling(pooling_mode_mean_tokens=False, pooling_mode_lasttoken=True),
        ValueError,
        r"one pooling mode, cls or mean, got \['lasttoken'\]",
    ),
    "an unknown option": (pooling(something=3), ValueError, "something = 3 is unknown"),
    "lower case": (
        lambda f: changed(f / "sentence_bert_config.json", do_lower_case=True),
        ValueError,
        "do_lower_case = true is not supported",
    ),
    "a prompt": (
        lambda f: write(f / "config_sentence_transformers.json", {"default_prompt_name": "query"}),
        ValueError,
        "default_prompt_name = 'query' is not supported",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_descriptions_that_are_not_supported_raise(folder, name):
    change, error, message = WRONG[name]
    change(folder)
    with pytest.raises(error, match=message):
        pretrained.load_embedder(folder)


def test_wrong_texts_and_tokenizers_raise(folder):
    model, tokenizer = pretrained.load_embedder(folder), pretrained.load_tokenizer(folder)
    for texts in ([], "the cat"):
        with pytest.raises(ValueError, match="texts must be a list of one or more strings"):
            embed(model, tokenizer, texts)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        embed(model, tokenizer, TEXTS, batch_size=0)
    (folder / "config.json").unlink()
    checkpoints.write_tokenizer(folder, [*checkpoints.VOCABULARY, "dog"])
    with pytest.raises(ValueError, match="tokenizer must be that of the model, which knows 11 tok"):
        embed(model, pretrained.load_tokenizer(folder), TEXTS)


def test_a_text_without_tokens_is_no_nan():
    """A normalized zero stays zero."""
    config = EmbedderConfig(checkpoints.bert_model(pool="mean").config)
    model = Embedder(config, rngs=nnx.Rngs(0))
    x = model(checkpoints.TOKENS, real=np.zeros((1, 3), bool))
    np.testing.assert_array_equal(x, 0)
