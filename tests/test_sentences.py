"""Sentence and relation classification: data, models and scores."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from helpers import needs_files

from experiments.datasets import text
from experiments.models import sentences
from experiments.tasks import (
    classification,
    load,
    relations,
)

# --- Sentences.


@needs_files
@pytest.mark.parametrize(
    ("name", "sizes"), [("trec", (4907, 545, 500)), ("sst2", (6920, 872, 1821))]
)
def test_sentence_data_has_its_published_sizes(name, sizes):
    task = load(name)
    config = task.presets["cpu"]
    data = task.data(config)
    assert tuple(len(data.splits[x].labels) for x in ("train", "validation", "test")) == sizes
    for split in data.splits.values():
        assert set(split.labels) == set(range(len(data.classes)))


@needs_files
def test_letters_with_accents_are_read():
    texts = load("sst2").data(load("sst2").presets["cpu"]).splits["train"].texts
    assert any(text.startswith("béart and berling are both superb") for text in texts)


def test_naive_bayes_matches_its_formula():
    rows, labels = [[4, 5], [4, 6], [7, 5, 5]], np.array([0, 0, 1])
    model = sentences.NaiveBayes(rows, labels)
    # Words and bigrams in training: 4, 5, 6, 7, "4 5", "4 6", "7 5", "5 5".
    counts = {
        0: {"4": 2, "5": 1, "6": 1, "4 5": 1, "4 6": 1},
        1: {"7": 1, "5": 2, "7 5": 1, "5 5": 1},
    }
    scores = []
    for label, prior in ((0, 2 / 3), (1, 1 / 3)):
        total = sum(counts[label].values())
        p = [(counts[label].get(x, 0) + 1) / (total + 8) for x in ("4", "5", "4 5")]
        scores.append(prior * np.prod(p))
    expected = np.log(np.array(scores) / sum(scores))
    np.testing.assert_allclose(model(np.array([[4, 5, 0, 0]]))[0], expected, rtol=1e-5)
    unknown = model(np.array([[text.UNKNOWN, 99]]))[0]  # ignored: the prior
    np.testing.assert_allclose(np.exp(unknown), [2 / 3, 1 / 3], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["text_cnn", "attention", "attention_cnn"])
def test_padding_and_the_batch_do_not_change_predictions(model):
    task = load("trec")
    config = dataclasses.replace(task.presets["smoke"], model=model)
    data = task.data(config)
    classifier = task.init(config, data, nnx.Rngs(0))
    classifier.eval()
    row = data.splits["test"].rows[0]
    alone = classifier(np.array([row], np.int32))
    batched = classifier(text.padded([row, [5, 6, 7] * 9], length=32))
    np.testing.assert_allclose(alone[0], batched[0], rtol=1e-4, atol=1e-5)


def test_each_sentence_is_scored_once():
    task = load("sst2")
    config = task.presets["smoke"]
    data = task.data(config)
    scored = []

    def model(words):
        real = [tuple(x for x in row if x) for row in np.asarray(words).tolist()]
        scored.extend(row for row in real if row)
        return np.tile([1.0, 0.0], (len(words), 1))

    scores = classification.evaluate(config, model, data, "test")
    split = data.splits["test"]
    assert sorted(scored) == sorted(map(tuple, split.rows))
    assert scores["accuracy"] == pytest.approx(np.mean(split.labels == 0))


# --- Relations.


def test_parses_marked_nouns_and_relations():
    content = (
        '1\t"The <e1>fire</e1>, so they say, was no <e2>spark</e2>."\r\n'
        "Cause-Effect(e2,e1)\r\nComment: none\r\n\r\n"
        '2\t"A <e1>b</e1> <e2>c</e2>"\r\nOther\r\nComment:\r\n'
    )
    labeled = relations.parse(content)
    assert labeled.texts == [
        "the <e1> fire </e1> , so they say , was no <e2> spark </e2> .",
        "a <e1> b </e1> <e2> c </e2>",
    ]
    assert [relations.CLASSES[i] for i in labeled.labels] == ["Cause-Effect(e2,e1)", "Other"]


def test_macro_f1_needs_the_direction_and_leaves_other_out():
    cause, back, topic = "Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Message-Topic(e1,e2)"
    names = [cause, cause, cause, topic, "Other", "Other"]
    guessed = [cause, back, "Other", topic, cause, "Other"]
    labels, guesses = (
        np.array([relations.CLASSES.index(x) for x in column]) for column in (names, guessed)
    )
    # Cause-Effect: 1 right of 3 predicted and 3 actual; Message-Topic: all; the other seven: none.
    assert relations.macro_f1(guesses, labels) == pytest.approx((1 / 3 + 1) / 9)


@needs_files
def test_relations_have_their_published_sizes():
    data = relations.read()
    assert {name: len(split.labels) for name, split in data.items()} == {
        "train": 7200,
        "validation": 800,
        "test": 2717,
    }
    for split in data.values():
        assert all(mark in t for t in split.texts for mark in ("<e1>", "</e1>", "<e2>", "</e2>"))
