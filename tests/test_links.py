"""Facts in both directions, filtered ranks, and the two ways to score."""

import dataclasses
import os

import numpy as np
import pytest
from flax import nnx

from experiments.datasets import files
from experiments.tasks import links

CONFIG = links.PRESETS["smoke"]


@pytest.fixture(scope="module")
def found():
    return links.data(CONFIG)


def test_known_facts_are_those_of_all_splits_in_both_directions(found):
    n = len(found.relations)
    for split in found.splits.values():
        for head, relation, tail in split.tolist():
            assert tail in found.known[head, relation]
            assert head in found.known[tail, relation + n]
    assert sum(map(len, found.known.values())) == 2 * 90


def test_ranks_are_filtered_and_of_equal_scores_half_come_before(found, monkeypatch):
    """By hand: true tails 0 and 3; scores 5 5 9 7 1 of five entities."""
    known = {(0, 0): np.array([0, 3])}
    some = found._replace(known=known)
    scores = np.array([5.0, 5.0, 9.0, 7.0, 1.0])
    monkeypatch.setattr(links, "logits", lambda model, given: np.tile(scores, (len(given), 1)))
    asked = links.Batch(np.array([[0, 0], [0, 0]]), np.array([0, 3]))
    assert links.ranks(None, some, asked, size=3).tolist() == [2.5, 2.0]


def test_a_model_that_knows_all_has_rank_1(found):
    class Knows:
        def __call__(self, given):
            rows = np.zeros((len(given), len(found.entities)), np.float32)
            for row, (head, relation) in zip(rows, np.asarray(given).tolist(), strict=True):
                row[found.known[head, relation]] = 1
            return rows

    asked = links.both_ways(found.splits["test"], len(found.relations))
    scores = Knows()
    original = links.logits
    try:
        links.logits = lambda model, given: model(given)
        assert (links.ranks(scores, found, asked) == 1).all()
        assert links.evaluate(CONFIG, scores, found, "test") == {
            "mrr": 1.0, "hits_1": 1.0, "hits_3": 1.0, "hits_10": 1.0,
        }  # fmt: skip
    finally:
        links.logits = original


def test_distmult_is_its_formula(found):
    config = dataclasses.replace(CONFIG, model="distmult")
    model = links.init(config, found, nnx.Rngs(0))
    model.eval()
    e, r = np.asarray(model.entities[...]), np.asarray(model.relations[...])
    given = np.array([[3, 1], [4, 5]])
    exact = np.einsum("be,be,ne->bn", e[given[:, 0]], r[given[:, 1]], e) * 4
    np.testing.assert_allclose(model(given), exact, rtol=1e-4, atol=1e-5)


def test_questions_of_ones_own(found):
    n = len(found.relations)
    i, j = found.entities.index("n7"), found.relations.index("plus2")
    assert links.question(found, "n7 plus2").tolist() == [[i, j]]
    assert links.question(found, "n7 ~plus2").tolist() == [[i, j + n]]
    for wrong in ("n7", "n7 plus9", "x plus2", "n7 plus2 n9"):
        with pytest.raises(ValueError, match="text must be an entity and a relation"):
            links.question(found, wrong)


@pytest.mark.skipif(files.VARIABLE not in os.environ, reason=f"{files.VARIABLE} names no folder")
@pytest.mark.parametrize(
    ("graph", "sizes", "entities", "relations"),
    [
        ("fb15k237", (272_115, 17_535, 20_466), 14_541, 237),
        ("wn18rr", (86_835, 3034, 3134), 40_943, 11),
    ],
)
@pytest.mark.slow
def test_graphs_are_all_read(graph, sizes, entities, relations):
    found = links.data(dataclasses.replace(links.PRESETS["cpu"], graph=graph))
    assert tuple(map(len, found.splits.values())) == sizes
    assert (len(found.entities), len(found.relations)) == (entities, relations)
