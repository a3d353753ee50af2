"""Spans of BIO tags, and the data and predictions of the taggers."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from helpers import needs_files

from experiments.tasks import ner
from experiments.tasks.ner import bio
from experiments.tasks.ner.data import letters, load, parse
from experiments.tasks.ner.models import MostFrequent

CONFIG = ner.PRESETS["smoke"]


@pytest.fixture(scope="module")
def data():
    return load(CONFIG)


@pytest.mark.parametrize(
    ("tags", "expected", "repaired"),
    [
        ("O O", [], 0),
        ("B-x B-x I-x", [("x", 0, 1), ("x", 1, 3)], 0),
        ("I-x I-x O I-y", [("x", 0, 2), ("y", 3, 4)], 2),
        ("B-x I-y", [("x", 0, 1), ("y", 1, 2)], 1),
        ("B-x I-x", [("x", 0, 2)], 0),
    ],
)
def test_spans_and_repaired_tags(tags, expected, repaired):
    found, count = bio.spans(tags.split())
    assert [tuple(span) for span in found] == expected
    assert count == repaired


def random_tags(rng, n):
    return [
        [str(t) for t in rng.choice(["O", "B-x", "I-x", "B-y", "I-y"], size=9)] for _ in range(n)
    ]


def test_scores_match_seqeval():
    metrics = pytest.importorskip("seqeval.metrics")
    rng = np.random.default_rng(0)
    right, guessed = random_tags(rng, 200), random_tags(rng, 200)
    ours = bio.agreement(right, guessed)
    assert ours.f1 == pytest.approx(metrics.f1_score(right, guessed))
    assert ours.precision == pytest.approx(metrics.precision_score(right, guessed))
    assert ours.recall == pytest.approx(metrics.recall_score(right, guessed))


def test_scores_computed_by_hand():
    right = [["B-x", "I-x", "O", "B-y"], ["O", "B-x"]]
    guessed = [["B-x", "I-x", "B-y", "O"], ["O", "I-x"]]
    scores = bio.agreement(right, guessed)
    assert scores == (2 / 3, 2 / 3, pytest.approx(2 / 3), 1)
    assert bio.agreement([["O"]], [["O"]]).f1 == 0
    with pytest.raises(ValueError, match="predicted has 1 tags for a sentence of 2"):
        bio.agreement([["O", "O"]], [["O"]])


def test_parse_rejects_lines_without_a_tag():
    assert parse(["a\tO", "", "", "b\tB-x"]) == [(["a"], ["O"]), (["b"], ["B-x"])]
    with pytest.raises(ValueError, match="line 2 must be a word, a tab and a BIO tag, got 'b'"):
        parse(["a\tO", "b"])


def test_letters_are_bytes_and_keep_both_ends_of_long_words():
    array = letters([["ab", "x" * 30 + "yz"]], 3)
    assert array[0, 0].tolist() == [ord("a") + 1, ord("b") + 1, *[0] * 14]
    assert array[0, 1].tolist()[-2:] == [ord("y") + 1, ord("z") + 1]
    assert not array[0, 2].any()


def test_most_frequent_tag(data):
    model = MostFrequent(data.splits["train"])
    assert model.tag(["w3", "neverseen"]) == ["O", "O"]
    scores = ner.evaluate(CONFIG, model, data, "train")
    assert scores["f1"] > 0.9  # words of names occur only in names


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gru", "transformer"])
def test_each_word_gets_a_tag_independent_of_the_batch(data, model, monkeypatch):
    config = dataclasses.replace(CONFIG, model=model)
    tagger = ner.init(config, data, nnx.Rngs(0))
    tagger.eval()
    sentences = [["w1", "X5", "y7"], ["w2"], [f"w{i}" for i in range(20)]]
    tags = ner.tag(tagger, data, sentences, size=2)
    assert [len(row) for row in tags] == [3, 1, 20]
    assert tags[0] == ner.tag(tagger, data, sentences[:1], size=4)[0]
    monkeypatch.setattr(ner, "BUCKETS", (8,))  # longer sentences are cut into chunks
    assert [len(row) for row in ner.tag(tagger, data, sentences)] == [3, 1, 20]


@needs_files
@pytest.mark.parametrize(
    ("corpus", "sizes", "tags"), [("ncbi", (5424, 923, 940), 3), ("wnut17", (3394, 1009, 1287), 13)]
)
def test_corpora_have_their_published_sizes(corpus, sizes, tags):
    data = load(dataclasses.replace(ner.PRESETS["cpu"], corpus=corpus))
    assert tuple(len(s.sentences) for s in data.splits.values()) == sizes
    assert len(data.tags) == tags
    for split in data.splits.values():
        for sentence, words, numbers in zip(*split, strict=True):
            assert len(sentence.words) == len(words) == len(numbers)
