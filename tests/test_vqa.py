"""Pictures, questions, answers: that they belong together, and that nothing gives one away."""

import collections
import dataclasses
import random

import numpy as np
import pytest
from flax import nnx

from experiments.tasks import vqa
from experiments.tasks.vqa import COLOURS, SHAPES, SIDE

CONFIG = vqa.PRESETS["smoke"]


def answer(scene, kind, question):
    """Worked out from the scene and the words of the question alone."""
    words = question.split()
    things = [(colour, shape, cell % SIDE) for cell, (colour, shape) in scene.items()]
    if kind == "colour":
        (found,) = [colour for colour, shape, _ in things if shape == words[4]]
        return found
    if kind == "shape":
        (found,) = [shape for colour, shape, _ in things if colour == words[3]]
        return found
    if kind == "count":
        return vqa.COUNTS[sum(shape == words[2] for _, shape, _ in things)]
    if kind == "there":
        return "yes" if any((c, s) == (words[3], words[4]) for c, s, _ in things) else "no"
    (one,) = [column for _, shape, column in things if shape == words[2]]
    (other,) = [column for _, shape, column in things if shape == words[5 + 1]]
    assert one != other
    return "yes" if one < other else "no"


def test_every_answer_follows_from_picture_and_question():
    rng = random.Random(0)
    for _ in range(2000):
        scene, kind, question, said = vqa.example(rng)
        assert answer(scene, kind, question) == said
        assert len(vqa.encode(question)) <= vqa.LONGEST


def test_answers_of_a_kind_are_equally_frequent_whatever_is_asked():
    rng = random.Random(0)
    counts = collections.defaultdict(collections.Counter)
    for _ in range(20_000):
        _, kind, question, said = vqa.example(rng)
        counts[kind, question][said] += 1
    for (kind, question), of in counts.items():
        expected = {"colour": 4, "shape": 3, "count": 4, "there": 2, "left": 2}[kind]
        assert len(of) == expected
        share = max(of.values()) / of.total()
        assert share < 1 / expected + 4 * (0.25 / of.total()) ** 0.5, question


def test_a_cell_shows_its_shape_in_its_colour():
    image = vqa.drawn({0: ("red", "square"), 5: ("yellow", "circle")})
    cells = np.asarray(vqa.patches(image[None]))[0].reshape(9, 8, 8, 3)
    assert cells[0][..., 0].sum() == 36
    assert not cells[0][..., 1:].any()
    assert cells[5][..., 0].sum() == cells[5][..., 1].sum() > 20
    assert not np.delete(cells, [0, 5], axis=0).any()
    looks = {shape: vqa.drawn({4: ("red", shape)})[..., 0].tobytes() for shape in SHAPES}
    assert len(set(looks.values())) == len(SHAPES)
    assert len({vqa.drawn({4: (c, "square")}).tobytes() for c in COLOURS}) == len(COLOURS)


def test_batches_are_the_same_from_any_step():
    found = vqa.data(CONFIG)
    whole, part = (vqa.batches(CONFIG, found, step) for step in (0, 1))
    next(whole)
    for a, b in zip(next(whole), next(part), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "blind"), [("question", 0), ("image", 1)])
def test_one_modality_does_not_see_the_other(model, blind):
    found = vqa.data(CONFIG)
    rung = vqa.init(dataclasses.replace(CONFIG, model=model), found, nnx.Rngs(0))
    rung.eval()
    some = found.splits["test"]
    given = [some.images[:4], some.questions[:4]]
    first = rung(tuple(given))
    given[blind] = given[blind][::-1]
    np.testing.assert_array_equal(first, rung(tuple(given)))


def test_every_question_is_scored_once(monkeypatch):
    some = vqa.data(CONFIG).splits["test"]
    monkeypatch.setattr(vqa, "logits", lambda _, given: np.eye(20)[given[1][:, 1]])
    said = vqa.predict(None, some, size=10)
    np.testing.assert_array_equal(said, np.eye(20)[some.questions[:, 1]])


@pytest.mark.parametrize(
    "question", ["is there a purple circle ?", "is there a red circle a a a a a ?"]
)
def test_questions_that_no_picture_answers_are_refused(question):
    with pytest.raises(ValueError, match="text must be a question such as"):
        vqa.encode(question)
    with pytest.raises(ValueError, match="noise must be at least 0"):
        vqa.Config(noise=-1.0)
