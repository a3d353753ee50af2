"""Heads over an encoder: fresh ones, checkpoints of them, and their labels."""

import functools
import json

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import TOKENS, assert_same
from flax import nnx
from helpers import mostly_slow

from attention_jax import models
from attention_jax.models import pretrained

saved = pytest.fixture(checkpoints.saved)

REAL = np.array([[True, True, False]])
FRESH = {
    "classes": lambda x: models.classifier(x, ["no", "yes"], rngs=nnx.Rngs(1)),
    "mean": lambda x: models.classifier(x, ["no", "yes"], pool="mean", rngs=nnx.Rngs(1)),
    "tags": lambda x: models.tagger(x, ["O", "B", "I"], rngs=nnx.Rngs(1)),
    "spans": lambda x: models.reader(x, rngs=nnx.Rngs(1)),
}


def parameters(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("head", FRESH)
@pytest.mark.parametrize("kind", ["bert", pytest.param("bert tokens", marks=pytest.mark.slow)])
def test_a_fresh_head_computes_from_the_vectors_of_the_encoder(kind, head):
    encoder = checkpoints.make(kind)
    before = [np.array(x) for x in parameters(encoder)]
    model = FRESH[head](encoder)
    x = encoder.hidden(TOKENS, real=REAL)
    match head:
        case "classes":
            first = nnx.tanh(model.encoder.pooler(x[:, 0]))
            expected = model.classify(first)
            if kind == "bert":  # not a fresh pooler
                np.testing.assert_array_equal(first, encoder.pooled(x))
        case "mean":
            expected = model.classify(x[:, :2].mean(axis=1))
        case "tags":
            expected = model.classify(x)
        case "spans":
            expected = model.spans(x)
    got = model(TOKENS, real=REAL)
    got = np.stack(got, axis=-1) if head == "spans" else got
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, before, parameters(encoder))
    assert (model.encoder.pooler is not None) == (head == "classes")
    assert model.encoder.token_bias is None


@pytest.mark.parametrize("both", [True, False])
def test_dropout_in_front_of_the_pooler_too(both):
    config = models.Pooler(activation="relu", dropout=both)
    encoder = checkpoints.bert_model(pooler=True, pooler_config=config)
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    got = encoder.pooled(x, dropout=lambda y: 3 * y)
    expected = np.maximum(encoder.pooler((3 if both else 1) * x[:, 0]), 0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    model = models.classifier(encoder, ["a", "b"], dropout_rate=0.5, rngs=nnx.Rngs(0))
    assert model.config.encoder.pooler_config == config


def test_dropout_in_front_of_spans():
    model = models.reader(checkpoints.make("bert"), dropout_rate=0.5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(TOKENS).start, model(TOKENS).start)
    model.train()
    assert np.abs(model(TOKENS).start - model(TOKENS).start).max() > 1e-3


def test_a_fresh_head_does_not_share_arrays_with_the_encoder():
    encoder = checkpoints.make("bert")
    before = np.array(encoder.embed.tokens[...])
    model = FRESH["tags"](encoder)
    model.encoder.embed.tokens[...] += 1
    np.testing.assert_array_equal(encoder.embed.tokens[...], before)


@pytest.mark.parametrize("head", mostly_slow(("classes", "tags", "spans"), {"classes"}))
def test_a_fresh_head_is_saved_and_loaded(head, tmp_path):
    model = FRESH[head](checkpoints.make("bert tokens"))
    pretrained.save(model, tmp_path)
    again = pretrained.load(tmp_path)
    assert again.config == model.config
    assert_same(again, model)
    with pytest.warns(UserWarning, match=r"left out (classifier|qa_outputs)\.weight"):
        encoder = pretrained.load(tmp_path, config={"architectures": ["BertModel"]})
    assert_same(encoder, model.encoder)


def test_the_model_type_of_a_family_with_several_is_written_on_request(tmp_path):
    model = checkpoints.make("roberta")
    pretrained.save(model, tmp_path, config={"model_type": "xlm-roberta"})
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "xlm-roberta"
    assert pretrained.load(tmp_path).config == model.config
    with pytest.raises(ValueError, match=r"model_type must be one of .*'camembert'.*, got 'bert'"):
        pretrained.save(model, tmp_path, config={"model_type": "bert"})


FAMILIES = {  # each with a head that is unlike that of BERT
    "roberta": "classes",
    "distilbert": "spans",
    "electra": "classes",
    "mpnet": "classes",
    "modernbert": "tags",
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_fresh_head_of_another_family_is_saved(kind, tmp_path):
    model = FRESH[FAMILIES[kind]](checkpoints.make(kind))
    pretrained.save(model, tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries["model_type"] == kind
    again = pretrained.load(tmp_path)
    assert again.config == model.config
    assert_same(again, model)
    if kind == "modernbert":  # its pooler is applied to each token
        x = model.encoder.projected(model.encoder.hidden(TOKENS))
        np.testing.assert_allclose(model(TOKENS), model.classify(x), rtol=1e-5, atol=1e-6)


def test_the_mean_of_all_tokens_has_no_hugging_face_class(tmp_path):
    refusal = r"has a classifier of the mean of all tokens: .*pool='first'.*nnx\.state\(model\)"
    with pytest.raises(NotImplementedError, match=refusal):
        pretrained.save(FRESH["mean"](checkpoints.make("bert")), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "pool"), [("bert", "first"), ("modernbert", "mean")])
def test_a_classifier_without_the_pooler_of_its_family_is_refused_with_advice(kind, pool, tmp_path):
    make = functools.partial(models.classifier, checkpoints.make(kind), ["no", "yes"], pool=pool)
    with pytest.raises(NotImplementedError, match=r"have a pooler .* classifier\(\.\.\., pooler=T"):
        pretrained.save(make(pooler=False, rngs=nnx.Rngs(1)), tmp_path)
    pretrained.save(make(pooler=True, rngs=nnx.Rngs(1)), tmp_path)


def test_dropout_before_the_head():
    encoder = checkpoints.make("bert")
    model = models.classifier(encoder, ["a", "b"], dropout_rate=0.5, rngs=nnx.Rngs(1))
    steady = model(TOKENS)
    np.testing.assert_array_equal(model(TOKENS), steady)  # evaluation mode, like the loaded encoder
    model.train()
    assert not np.array_equal(model(TOKENS), steady)


@pytest.mark.parametrize("name", mostly_slow(("bert tags", "bert spans"), {"bert spans"}))
def test_an_encoder_without_a_head_is_not_read_as_one(name, saved):
    folder, _ = saved("bert")
    _, entries = checkpoints.checkpoint(name)
    maker = {"bert tags": r"models\.tagger", "bert spans": r"models\.reader"}[name]
    message = rf"is missing \(load with config={{'architectures': \['BertModel'\]}}.*{maker}"
    with pytest.raises(ValueError, match=message):
        pretrained.load(folder, config={"architectures": entries["architectures"]})


@pytest.mark.parametrize(
    ("head", "maker"),
    [("QuestionAnswering", "reader"), ("SequenceClassification", "classifier")],
)
def test_advice_on_a_missing_head_of_modernbert(head, maker, saved):
    """Its heads of all kinds are named ``classifier``."""
    folder, _ = saved("modernbert")
    with pytest.raises(ValueError, match=rf"classifier\.weight is missing \(.*models\.{maker}\)"):
        pretrained.load(folder, config={"architectures": [f"ModernBertFor{head}"]})


def test_names_of_labels_are_read_and_saved(saved):
    folder, expected = saved("bert tags")
    model = pretrained.load(folder)
    assert model.config.labels == expected.config.labels == ("O", "B", "I")
    entries = json.loads((folder / "config.json").read_text())
    assert entries["id2label"] == {"0": "O", "1": "B", "2": "I"}
    assert entries["label2id"] == {"O": 0, "B": 1, "I": 2}
    renamed = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": None}
    assert pretrained.load(folder, config=renamed).config.labels == ("x", "y", "z")


@pytest.mark.slow
def test_heads_in_bfloat16(saved, tmp_path, standard_promotion):
    folder, _ = saved("bert tags")
    model = pretrained.load(folder, param_dtype=jnp.bfloat16)
    layers = model.config.encoder.layers
    assert (layers.dtype, layers.param_dtype) == (None, jnp.bfloat16)
    assert {x.dtype for x in parameters(model)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(model, TOKENS).dtype == jnp.float32
    pretrained.save(model, tmp_path / "again")
    again = pretrained.load(tmp_path / "again")
    assert again.config == checkpoints.make("bert tags").config


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"id2label": {"0": "O", "1": "B"}, "label2id": None},
            r"expected \[2, 8\]: 2 labels in id",
        ),
        ({"id2label": {"0": "O", "2": "B"}}, r"id2label must name the labels 0, 1, \.\.\., got"),
        ({"id2label": ["O", "B", "I"]}, r"id2label must name the labels 0, 1, \.\.\., got"),
        ({"id2label": {"0": "O", "1": "O", "2": "I"}, "label2id": None}, "no name may occur twice"),
        (
            {"id2label": {"0": 1, "1": 2, "2": 3}, "label2id": None},
            r"id2label must name the labels 0, 1, \.\.\., got",
        ),
        ({"label2id": {"O": 0, "B": 2, "I": 1}}, "label2id = .* contradicts id2label"),
        ({"num_labels": 4}, "num_labels contradicts id2label, which has 3 labels"),
    ],
)
def test_labels_that_do_not_match_raise(entries, message, saved):
    folder, _ = saved("bert tags", **entries)
    with pytest.raises(ValueError, match=message):
        pretrained.load(folder)


def test_labels_that_the_model_does_not_have_raise():
    with pytest.raises(ValueError, match=r"must be labels of the model, 'no', 'yes'; got 'maybe'$"):
        models.label_ids(("no", "yes"), ["yes", "maybe", "no"])
