"""Images, questions and answers: that they fit, and that neither image nor question suffices."""

import collections
import dataclasses
import random

import numpy as np
import pytest
from flax import nnx

from experiments.tasks import vqa
from experiments.tasks.vqa import COLORS, SHAPES, SIDE

CONFIG = vqa.PRESETS["smoke"]


def answer(scene, kind, question):
    """The answer, worked out independently from the scene and the words of the question."""
    words = question.split()
    things = [(color, shape, cell % SIDE) for cell, (color, shape) in scene.items()]
    if kind == "color":
        (found,) = [color for color, shape, _ in things if shape == words[4]]
        return found
    if kind == "shape":
        (found,) = [shape for color, shape, _ in things if color == words[3]]
        return found
    if kind == "count":
        return vqa.COUNTS[sum(shape == words[2] for _, shape, _ in things)]
    if kind == "there":
        return "yes" if any((c, s) == (words[3], words[4]) for c, s, _ in things) else "no"
    (one,) = [column for _, shape, column in things if shape == words[2]]
    (other,) = [column for _, shape, column in things if shape == words[6]]
    assert one != other
    return "yes" if one < other else "no"


def test_answers_follow_from_image_and_question():
    rng = random.Random(0)
    for _ in range(2000):
        scene, kind, question, expected = vqa.example(rng)
        assert answer(scene, kind, question) == expected
        assert len(vqa.encode(question)) <= vqa.LONGEST


def test_answers_to_each_question_are_equally_frequent():
    rng = random.Random(0)
    counts = collections.defaultdict(collections.Counter)
    for _ in range(20_000):
        _, kind, question, given = vqa.example(rng)
        counts[kind, question][given] += 1
    for (kind, question), count in counts.items():
        expected = {"color": 4, "shape": 3, "count": 4, "there": 2, "left": 2}[kind]
        assert len(count) == expected
        share = max(count.values()) / count.total()
        assert share < 1 / expected + 4 * (0.25 / count.total()) ** 0.5, question


def test_cells_show_their_shape_in_their_color():
    image = vqa.render({0: ("red", "square"), 5: ("yellow", "circle")})
    cells = np.asarray(vqa.patches(image[None]))[0].reshape(9, 8, 8, 3)
    assert cells[0][..., 0].sum() == 36
    assert not cells[0][..., 1:].any()
    assert cells[5][..., 0].sum() == cells[5][..., 1].sum() > 20
    assert not np.delete(cells, [0, 5], axis=0).any()
    looks = {shape: vqa.render({4: ("red", shape)})[..., 0].tobytes() for shape in SHAPES}
    assert len(set(looks.values())) == len(SHAPES)
    assert len({vqa.render({4: (c, "square")}).tobytes() for c in COLORS}) == len(COLORS)


def test_batches_are_resumable_from_any_step():
    data = vqa.load(CONFIG)
    whole, part = (vqa.batches(CONFIG, data, step) for step in (0, 1))
    next(whole)
    for a, b in zip(next(whole), next(part), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "blind"), [("question", 0), ("image", 1)])
def test_models_of_one_modality_ignore_the_other(model, blind):
    data = vqa.load(CONFIG)
    answerer = vqa.init(dataclasses.replace(CONFIG, model=model), data, nnx.Rngs(0))
    answerer.eval()
    test = data.splits["test"]
    inputs = [test.images[:4], test.questions[:4]]
    first = answerer(tuple(inputs))
    inputs[blind] = inputs[blind][::-1]
    np.testing.assert_array_equal(first, answerer(tuple(inputs)))


def test_each_question_is_scored_once(monkeypatch):
    test = vqa.load(CONFIG).splits["test"]
    monkeypatch.setattr(vqa, "logits", lambda _, given: np.eye(20)[given[1][:, 1]])
    predicted = vqa.predict(None, test, size=10)
    np.testing.assert_array_equal(predicted, np.eye(20)[test.questions[:, 1]])


@pytest.mark.parametrize(
    "question", ["is there a purple circle ?", "is there a red circle a a a a a ?"]
)
def test_invalid_questions_are_rejected(question):
    with pytest.raises(ValueError, match="text must be a question such as"):
        vqa.encode(question)
    with pytest.raises(ValueError, match="noise must be at least 0"):
        vqa.Config(noise=-1.0)
