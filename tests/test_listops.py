"""Expressions: their values, their lengths, and that a run can go on."""

import dataclasses
import random

import numpy as np
import pytest
from flax import nnx

from experiments.tasks import listops
from experiments.tasks.listops.expressions import WORDS, evaluated, value, values

CONFIG = dataclasses.replace(listops.PRESETS["smoke"], longest=64, nesting=6)


@pytest.fixture(scope="module")
def found():
    return listops.data(CONFIG)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [([3], [3, 3, 3, 3]), ([9, 1, 4], [1, 9, 4, 4]), ([8, 3], [3, 8, 5, 1])],
)
def test_operators(arguments, wanted):
    assert [value(i, arguments) for i in range(4)] == wanted


def test_made_expressions_are_what_they_say_and_of_the_lengths_asked_for(found):
    for rows, labels in found.splits.values():
        assert [evaluated(WORDS.decode(row).split()) for row in rows] == labels.tolist()
        assert CONFIG.shortest <= min(map(len, rows))
        assert CONFIG.shortest < max(map(len, rows)) <= CONFIG.longest
    (a, _), (b, _) = found.splits.values()
    assert a != b
    again = listops.data(dataclasses.replace(CONFIG, seed=5))
    assert again.splits["test"].rows == found.splits["test"].rows


def test_expressions_nest_as_deep_as_they_may():
    def depth(row):
        marks = [w[0] for w in WORDS.decode(row).split()]
        return int(np.cumsum([(m == "[") - (m == "]") for m in marks]).max())

    rows, _ = listops.examples(CONFIG, 200, random.Random(0))
    assert max(map(depth, rows)) == CONFIG.nesting
    flat, _ = listops.examples(dataclasses.replace(CONFIG, nesting=1), 20, random.Random(0))
    assert {depth(row) for row in flat} == {1}


def test_batches_are_new_each_time_and_the_same_from_any_step(found):
    whole, part = (listops.batches(CONFIG, found, step) for step in (0, 2))
    first, second, third = (next(whole) for _ in range(3))
    assert not np.array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(third.tokens, next(part).tokens)
    other = next(listops.batches(dataclasses.replace(CONFIG, seed=1), found, 0))
    assert not np.array_equal(first.labels, other.labels)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru", "transformer", "window", "linear"])
def test_padding_changes_no_prediction(found, model):
    config = dataclasses.replace(CONFIG, model=model)
    rung = listops.init(config, found, nnx.Rngs(0))
    rung.eval()
    row = found.splits["test"].rows[0]
    alone = rung(np.array([row], np.int32))
    longer = np.array([row + [0] * 9, [*row, *row][: len(row) + 9]], np.int32)
    np.testing.assert_allclose(alone[0], rung(longer)[0], rtol=1e-4, atol=1e-5)


def test_every_expression_is_scored_once(found):
    asked = []

    def model(tokens):
        asked.extend(tuple(x for x in row if x) for row in np.asarray(tokens).tolist())
        return np.eye(10)[np.zeros(len(tokens), int)]

    rows = found.splits["test"].rows
    listops_logits = listops.logits
    try:
        listops.logits = lambda m, tokens: m(tokens)
        scores = listops.evaluate(CONFIG, model, found, "test")
    finally:
        listops.logits = listops_logits
    assert set(asked) == set(map(tuple, rows))
    assert scores["accuracy"] == pytest.approx(np.mean(found.splits["test"].labels == 0))


@pytest.mark.parametrize(
    "written", ["", "MAX 1 2", "[MAX 1 2", "[MAX 1 2 ] ]", "[MAX ]", "[MAX 12 ]", "3 4"]
)
def test_what_is_no_expression_is_refused(written):
    with pytest.raises(ValueError, match="text must be"):
        evaluated(written.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arguments": 1}, "arguments must be at least 2"),
        ({"shortest": 600}, r"shortest must be in \[4, longest = 512\]"),
        ({"nesting": 0}, "nesting must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        listops.Config(**options)


def test_the_values_of_all_lists_are_those_of_their_parts(found):
    row = found.splits["test"].rows[3]
    words = WORDS.decode(row).split()
    worth = values(row)
    opened = []
    for i, word in enumerate(words):
        if word[0] == "[":
            opened.append(i)
        elif word == "]":
            start = opened.pop()
            assert worth[start] == worth[i] == evaluated(words[start : i + 1])
        else:
            assert worth[i] == 0


@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_what_is_asked_of_all_lists_counts_the_whole_twice(found, model):
    """By a model of known answers: sure of the whole and wrong of every other list."""
    row = WORDS.encode("[MAX 2 9 [MIN 4 7 ] 0 ]")
    rung = listops.init(dataclasses.replace(CONFIG, model=model), found, nnx.Rngs(0))
    rung.eval()
    tokens, worth = (np.array([x], np.int32) for x in (row, values(row)))
    batch = listops.Batch(tokens, np.array([9], np.int32), worth)
    said, lists = rung.each(tokens)
    log_p = np.asarray(said - np.logaddexp.reduce(np.asarray(said), axis=-1, keepdims=True))[0]
    at = (8, 6) if model == "gru" else (0, 3)
    assert np.nonzero(np.asarray(lists)[0])[0].tolist() == sorted(at)
    whole, inner = -log_p[at[0], 9], -log_p[at[1], 4]
    total = listops.loss(CONFIG, rung, batch).total
    np.testing.assert_allclose(total, whole + (whole + inner) / 2, rtol=1e-5)
    alone = listops.loss(dataclasses.replace(CONFIG, asked="outermost"), rung, batch).total
    np.testing.assert_allclose(alone, whole, rtol=1e-5)
