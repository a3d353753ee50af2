"""Facts in both directions, filtered ranks, and the models."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from helpers import needs_files

from experiments.tasks import links

CONFIG = links.PRESETS["smoke"]


@pytest.fixture(scope="module")
def data():
    return links.load(CONFIG)


def test_known_facts_cover_all_splits_in_both_directions(data):
    n = len(data.relations)
    for split in data.splits.values():
        for head, relation, tail in split.tolist():
            assert tail in data.known[head, relation]
            assert head in data.known[tail, relation + n]
    assert sum(map(len, data.known.values())) == 2 * 90


def test_ranks_are_filtered_and_ties_share_the_mean_rank(data, monkeypatch):
    """Computed by hand: known tails 0 and 3 of five entities."""
    known = {(0, 0): np.array([0, 3])}
    data = data._replace(known=known)
    scores = np.array([5.0, 5.0, 9.0, 7.0, 1.0])
    monkeypatch.setattr(links, "logits", lambda model, given: np.tile(scores, (len(given), 1)))
    queries = links.Batch(np.array([[0, 0], [0, 0]]), np.array([0, 3]))
    assert links.ranks(None, data, queries, size=3).tolist() == [2.5, 2.0]


def test_an_oracle_has_rank_1(data, monkeypatch):
    def oracle(given):
        rows = np.zeros((len(given), len(data.entities)), np.float32)
        for row, (head, relation) in zip(rows, np.asarray(given).tolist(), strict=True):
            row[data.known[head, relation]] = 1
        return rows

    monkeypatch.setattr(links, "logits", lambda model, given: model(given))
    queries = links.both_ways(data.splits["test"], len(data.relations))
    assert (links.ranks(oracle, data, queries) == 1).all()
    scores = links.evaluate(CONFIG, oracle, data, "test")
    assert scores == {"mrr": 1.0, "hits_1": 1.0, "hits_3": 1.0, "hits_10": 1.0}


def test_distmult_matches_its_formula(data):
    config = dataclasses.replace(CONFIG, model="distmult")
    model = links.init(config, data, nnx.Rngs(0))
    model.eval()
    e, r = np.asarray(model.entities[...]), np.asarray(model.relations[...])
    given = np.array([[3, 1], [4, 5]])
    expected = np.einsum("be,be,ne->bn", e[given[:, 0]], r[given[:, 1]], e) * 4
    np.testing.assert_allclose(model(given), expected, rtol=1e-4, atol=1e-5)


def test_queries_given_as_text(data):
    n = len(data.relations)
    i, j = data.entities.index("n7"), data.relations.index("plus2")
    assert links.query_of(data, "n7 plus2").tolist() == [[i, j]]
    assert links.query_of(data, "n7 ~plus2").tolist() == [[i, j + n]]
    for wrong in ("n7", "n7 plus9", "x plus2", "n7 plus2 n9"):
        with pytest.raises(ValueError, match="text must be an entity and a relation"):
            links.query_of(data, wrong)


@needs_files
@pytest.mark.parametrize(
    ("graph", "sizes", "entities", "relations"),
    [
        ("fb15k237", (272_115, 17_535, 20_466), 14_541, 237),
        ("wn18rr", (86_835, 3034, 3134), 40_943, 11),
    ],
)
@pytest.mark.slow
def test_graphs_have_their_published_sizes(graph, sizes, entities, relations):
    data = links.load(dataclasses.replace(links.PRESETS["cpu"], graph=graph))
    assert tuple(map(len, data.splits.values())) == sizes
    assert (len(data.entities), len(data.relations)) == (entities, relations)
