"""Expressions, their values and lengths, and models that evaluate them."""

import dataclasses
import random

import numpy as np
import pytest
from flax import nnx
from helpers import slow

from experiments.tasks import listops
from experiments.tasks.listops.data import examples, load
from experiments.tasks.listops.expressions import WORDS, apply, evaluate_words, values
from experiments.training.losses import logits

CONFIG = dataclasses.replace(listops.PRESETS["smoke"], longest=64, nesting=6)


@pytest.fixture(scope="module")
def data():
    return load(CONFIG)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([3], [3, 3, 3, 3]), ([9, 1, 4], [1, 9, 4, 4]), ([8, 3], [3, 8, 5, 1])],
)
def test_operators(arguments, expected):
    assert [apply(i, arguments) for i in range(4)] == expected


def test_generated_expressions_have_their_values_and_lengths(data):
    for rows, labels in data.splits.values():
        assert [evaluate_words(WORDS.decode(row).split()) for row in rows] == labels.tolist()
        assert CONFIG.shortest <= min(map(len, rows))
        assert CONFIG.shortest < max(map(len, rows)) <= CONFIG.longest
    (a, _), (b, _) = data.splits.values()
    assert a != b
    again = load(dataclasses.replace(CONFIG, seed=5))
    assert again.splits["test"].rows == data.splits["test"].rows


def test_expressions_nest_up_to_the_limit():
    def depth(row):
        marks = [w[0] for w in WORDS.decode(row).split()]
        return int(np.cumsum([(m == "[") - (m == "]") for m in marks]).max())

    rows, _ = examples(CONFIG, 200, random.Random(0))
    assert max(map(depth, rows)) == CONFIG.nesting
    flat, _ = examples(dataclasses.replace(CONFIG, nesting=1), 20, random.Random(0))
    assert {depth(row) for row in flat} == {1}


def test_batches_are_new_at_each_step_and_resumable_from_any(data):
    whole, part = (listops.batches(CONFIG, data, step) for step in (0, 2))
    first, second, third = (next(whole) for _ in range(3))
    assert not np.array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(third.tokens, next(part).tokens)
    other = next(listops.batches(dataclasses.replace(CONFIG, seed=1), data, 0))
    assert not np.array_equal(first.labels, other.labels)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru", "transformer", "window", "linear"])
def test_padding_does_not_change_predictions(data, model):
    config = dataclasses.replace(CONFIG, model=model)
    classifier = listops.init(config, data, nnx.Rngs(0))
    classifier.eval()
    row = data.splits["test"].rows[0]
    alone = logits(classifier, np.array([row], np.int32))
    longer = np.array([row + [0] * 9, [*row, *row][: len(row) + 9]], np.int32)
    np.testing.assert_allclose(alone[0], logits(classifier, longer)[0], rtol=1e-4, atol=1e-5)


def test_each_expression_is_scored_once(data, monkeypatch):
    scored = []

    def model(tokens):
        scored.extend(tuple(x for x in row if x) for row in np.asarray(tokens).tolist())
        return np.eye(10)[np.zeros(len(tokens), int)]

    rows = data.splits["test"].rows
    monkeypatch.setattr(listops, "logits", lambda model, tokens: model(tokens))
    scores = listops.evaluate(CONFIG, model, data, "test")
    assert set(scored) == set(map(tuple, rows))
    assert scores["accuracy"] == pytest.approx(np.mean(data.splits["test"].labels == 0))


@pytest.mark.parametrize(
    "written", ["", "MAX 1 2", "[MAX 1 2", "[MAX 1 2 ] ]", "[MAX ]", "[MAX 12 ]", "3 4"]
)
def test_invalid_expressions_are_rejected(written):
    with pytest.raises(ValueError, match="text must be"):
        evaluate_words(written.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments": 1}, "arguments must be at least 2"),
        ({"shortest": 600}, r"shortest must be in \[4, longest = 512\]"),
        ({"nesting": 0}, "nesting must be at least 1"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        listops.Config(**options)


def test_the_values_of_all_lists_match_evaluation_of_their_words(data):
    row = data.splits["test"].rows[3]
    words = WORDS.decode(row).split()
    of_lists = values(row)
    opened = []
    for i, word in enumerate(words):
        if word[0] == "[":
            opened.append(i)
        elif word == "]":
            start = opened.pop()
            assert of_lists[start] == of_lists[i] == evaluate_words(words[start : i + 1])
        else:
            assert of_lists[i] == 0


@pytest.mark.parametrize("model", [slow("gru"), "transformer"])
def test_loss_is_that_of_the_whole_plus_the_mean_over_lists(data, model):
    row = WORDS.encode("[MAX 2 9 [MIN 4 7 ] 0 ]")
    classifier = listops.init(dataclasses.replace(CONFIG, model=model), data, nnx.Rngs(0))
    classifier.eval()
    tokens, of_lists = (np.array([x], np.int32) for x in (row, values(row)))
    batch = listops.Batch(tokens, np.array([9], np.int32), of_lists)
    outermost = dataclasses.replace(CONFIG, asked="outermost")

    @nnx.jit
    def compute(classifier):
        losses = [listops.loss(config, classifier, batch) for config in (CONFIG, outermost)]
        return classifier.each(tokens), [loss.total for loss in losses]

    each, (total, alone) = compute(classifier)
    x, lists = map(np.asarray, each)
    log_p = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True))[0]
    at = (8, 6) if model == "gru" else (0, 3)
    assert np.nonzero(lists[0])[0].tolist() == sorted(at)
    whole, inner = -log_p[at[0], 9], -log_p[at[1], 4]
    np.testing.assert_allclose(total, whole + (whole + inner) / 2, rtol=1e-5)
    np.testing.assert_allclose(alone, whole, rtol=1e-5)
