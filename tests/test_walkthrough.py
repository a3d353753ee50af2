"""The numbers of the walkthrough, computed here without the oracle."""

import math

import numpy as np
import pytest

from experiments import walkthrough
from experiments.walkthrough import FIRST, SECOND, by_hand, variants


def softmax(row):
    e = [math.exp(s - max(row)) for s in row]
    return [x / sum(e) for x in e]


def test_three_positions_of_width_1():
    steps = by_hand(*FIRST)
    assert steps.scores.tolist() == [[1, 2, 3], [2, 4, 6], [3, 6, 9]]
    rows = [softmax(row) for row in ([1, 2, 3], [2, 4, 6], [3, 6, 9])]
    np.testing.assert_allclose(steps.weights, rows, rtol=1e-12)
    means = [sum(p * v for p, v in zip(row, (1, 2, 3), strict=True)) for row in rows]
    np.testing.assert_allclose(steps.heads[:, 0], means, rtol=1e-12)
    np.testing.assert_allclose(steps.heads[:, 0], [2.5752, 2.8509, 2.9480], atol=5e-5)
    np.testing.assert_allclose(steps.residual[:, 0], np.add(means, (1, 2, 3)), rtol=1e-12)


def test_three_tokens_of_width_2():
    steps = by_hand(*SECOND)
    assert steps.query.tolist() == [[3, 3], [7, 7], [11, 11]]
    scores = [[9, 21, 33], [21, 49, 77], [33, 77, 121]]
    assert steps.scores.tolist() == scores
    rows = [softmax([s / math.sqrt(2) for s in row]) for row in scores]
    np.testing.assert_allclose(steps.weights, rows, rtol=1e-12)
    heads = np.array(rows) @ SECOND[0]
    np.testing.assert_allclose(steps.projected, heads.sum(1, keepdims=True) * [1, 1], rtol=1e-12)
    np.testing.assert_allclose(steps.residual, SECOND[0] + steps.projected, rtol=1e-12)


def test_rows_of_every_variant_sum_to_1_and_masked_weights_are_0():
    found = variants()
    for weights in (by_hand(*FIRST).weights, by_hand(*SECOND).weights, *found.values()):
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(found["head 1 of 2"][0], softmax([1, 3, 5]), rtol=1e-12)
    np.testing.assert_allclose(found["head 2 of 2"][0], softmax([4, 8, 12]), rtol=1e-12)
    assert (found["causal"] > 0).tolist() == np.tri(3, dtype=bool).tolist()
    assert found["local"][0, 2] == found["local"][2, 0] == 0
    expected = softmax([s / math.sqrt(2) for s in (1, 3, 5)])
    np.testing.assert_allclose(found["cross"][0], expected, rtol=1e-12)
    np.testing.assert_allclose(
        found["cross"][1], softmax([-s / math.sqrt(2) for s in (2, 4, 6)]), rtol=1e-12
    )


def test_text_has_the_numbers():
    text = walkthrough.text()
    for number in ("0.0900", "0.2447", "0.6652", "121.0000", "11.9992"):
        assert number in text
    assert text.count("sum 1.0000") == 3 + 3 + 3 * 4 + 2
    assert "Every row sums to 1" in text


def test_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    file = tmp_path / "somewhere" / "walk.png"
    walkthrough.draw(file)
    assert len(np.unique(imread(file)[..., :3].reshape(-1, 3), axis=0)) > 20
