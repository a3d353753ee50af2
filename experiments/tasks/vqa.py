"""Visual question answering on grids of colored shapes: patches and words as tokens.

::

    python -m experiments train vqa                               # joint self-attention
    python -m experiments train vqa --model cross                 # cross-attention to the image
    python -m experiments train vqa --model question              # without the image
    python -m experiments look runs/vqa/joint-cpu-seed0

An image has nine cells, some with a square, a circle or a triangle in one of four colors. There
are five kinds of question: what color is the circle, what shape is red, how many squares are
there, is there a red circle, is the circle left of the square. The answers to each question are
equally frequent, so a model that reads only the question, or only the image, can only guess.

Models: ``question`` only, ``image`` only, ``joint`` self-attention over both, ``cross``
(self-attention over the question, cross-attention to the image). The records of ``question`` and
``image`` use ``--steps 1500``; they do not improve after that.

Data: generated from the seed, without end, in the style of J. Johnson et al. 2017, "CLEVR". The
validation and test splits have 2,000 questions each, the same for every seed.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models.stack import Stack
from attention_jax.nn.embeddings import Embeddings
from attention_jax.nn.linear import Linear
from experiments.datasets import text
from experiments.datasets.text import PAD, START
from experiments.models.inference import full_batches, record_weights
from experiments.tasks.common import verdict
from experiments.training import search, text_config
from experiments.training.losses import cross_entropy, logits, scores
from experiments.training.task import (
    ALL,
    AttentionView,
    Loss,
    Metrics,
    Model,
    Rows,
    Task,
    self_attention,
)
from experiments.training.text_config import TextConfig

SHAPES = ("square", "circle", "triangle")
COLORS = ("red", "green", "blue", "yellow")
COUNTS = ("zero", "one", "two", "three")
ANSWERS = (*SHAPES, *COLORS, *COUNTS, "yes", "no")
SIDE, CELL = 3, 8  # cells per row, pixels per side of a cell
KINDS = ("color", "shape", "count", "there", "left")
WORDS = text.Words(
    (
        *text.SPECIAL,
        *SHAPES,
        *COLORS,
        *["what", "color", "is", "the", "shape", "how", "many", "a", "there", "left", "of", "?"],
    )
)
LONGEST = 10  # tokens of a question, the start token included


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """Options of a question answerer."""

    model: Literal["question", "image", "joint", "cross"] = "joint"
    """The model to train."""
    noise: float = 0.1
    """Standard deviation of the noise added to pixels, whose values are 0 or 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise < 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")


PRESETS = {
    "cpu": Config(
        steps=5000,
        batch_size=64,
        learning_rate=1e-3,
        width=96,
        depth=4,
        dropout=0.0,
        evaluations=5,
        ema=0.99,
        minutes=10,
    ),
    "smoke": Config(
        steps=4, batch_size=8, evaluations=1, width=16, heads=2, depth=1, synthetic=True
    ),
    "accelerator": Config(
        steps=10_000,
        batch_size=256,
        width=192,
        heads=6,
        depth=6,
        dropout=0.0,
        evaluations=10,
        ema=0.999,
        dtype="bfloat16",
    ),
}

SPACES = dict.fromkeys(("question", "image", "joint", "cross"), search.USUAL)


class Examples(NamedTuple):
    """Images ``[n 24 24 3]``, questions ``[n LONGEST]``, answers ``[n]`` and kinds ``[n]``."""

    images: np.ndarray
    questions: np.ndarray
    answers: np.ndarray
    kinds: np.ndarray


class Data(NamedTuple):
    """The validation and test splits; training questions are generated on the fly."""

    splits: dict[str, Examples]


# --- Images and questions.

Scene = dict[int, tuple[str, str]]  # color and shape by cell


def example(rng: random.Random) -> tuple[Scene, str, str, str]:
    """A scene, the kind of its question, the question and the answer.

    Kind and answer are drawn first, then a scene that fits them.
    """
    kind = rng.choice(KINDS)
    cells = rng.sample(range(SIDE * SIDE), 6)
    shape, color = rng.choice(SHAPES), rng.choice(COLORS)
    other_shapes = [x for x in SHAPES if x != shape]
    other_colors = [x for x in COLORS if x != color]

    def thing(colors: Any = COLORS, shapes: Any = SHAPES) -> tuple[str, str]:
        return rng.choice(colors), rng.choice(shapes)

    if kind == "color":
        rest = [thing(shapes=other_shapes) for _ in range(rng.randint(1, 4))]
        things, question = [(color, shape), *rest], f"what color is the {shape} ?"
        answer = color
    elif kind == "shape":
        rest = [thing(colors=other_colors) for _ in range(rng.randint(1, 4))]
        things, question, answer = [(color, shape), *rest], f"what shape is {color} ?", shape
    elif kind == "count":
        n = rng.randrange(len(COUNTS))
        counted = [thing(shapes=[shape]) for _ in range(n)]
        rest = [thing(shapes=other_shapes) for _ in range(rng.randint(1, 6 - n))]
        things, question, answer = [*counted, *rest], f"how many {shape} ?", COUNTS[n]
    elif kind == "there":
        # If the answer is no, its color and its shape occur on different things.
        rest = [thing(other_colors, other_shapes) for _ in range(rng.randint(0, 2))]
        apart = [(color, rng.choice(other_shapes)), (rng.choice(other_colors), shape)]
        answer = rng.choice(("yes", "no"))
        things = (
            [(color, shape), *apart[: rng.randint(0, 2)], *rest]
            if answer == "yes"
            else [*apart, *rest]
        )
        question = f"is there a {color} {shape} ?"
    else:
        other = rng.choice(other_shapes)
        third = [x for x in other_shapes if x != other]
        answer = rng.choice(("yes", "no"))
        things = [thing(shapes=[shape]), thing(shapes=[other])]
        things += [thing(shapes=third) for _ in range(rng.randint(0, 3))]
        question = f"is the {shape} left of the {other} ?"
        while cells[0] % SIDE == cells[1] % SIDE:
            rng.shuffle(cells)
        if (cells[0] % SIDE < cells[1] % SIDE) != (answer == "yes"):
            cells[0], cells[1] = cells[1], cells[0]
    return dict(zip(cells, things, strict=False)), kind, question, answer


def render(scene: Scene) -> np.ndarray:
    """The image of a scene, ``[24 24 3]``, on black."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    inside = {
        "square": (abs(x) < 3) & (abs(y) < 3),
        "circle": x**2 + y**2 < 10,
        "triangle": (y < 3) & (abs(x) < (y + 4) / 2),
    }
    rgb = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
    image = np.zeros((SIDE * CELL, SIDE * CELL, 3), np.float32)
    for cell, (color, shape) in scene.items():
        row, column = CELL * (cell // SIDE), CELL * (cell % SIDE)
        place = image[row : row + CELL, column : column + CELL]
        place[inside[shape]] = rgb[color]
    return image


def encode(question: str) -> list[int]:
    """Word indices of a question.

    Raises:
      ValueError: it is empty, too long, or has words outside the vocabulary.
    """
    words = text.check(question).lower().replace("?", " ?").split()
    row = [START, *WORDS.encode(" ".join(words))]
    if text.UNKNOWN in row or len(row) > LONGEST:
        raise ValueError(
            f"text must be a question such as 'is there a red circle ?', of up to {LONGEST - 1} of "
            f"the words {', '.join(WORDS.words[len(text.SPECIAL) :])}, got {question!r}"
        )
    return row


def examples(n: int, rng: random.Random, noise: float, rows: Rows = ALL) -> Examples:
    """``n`` random examples with noisy images; of these, the given rows."""
    mine = rows.slice(n)  # each example depends on those before it
    samples = [example(rng) for _ in range(n)][mine]
    images = np.stack([render(scene) for scene, *_ in samples])
    seed = rng.getrandbits(32)
    grain = np.random.default_rng(seed).normal(size=(mine.stop, *images.shape[1:]))[mine]
    return Examples(
        images + noise * grain.astype(np.float32),
        text.padded([encode(question) for *_, question, _ in samples], LONGEST),
        np.array([ANSWERS.index(answer) for *_, answer in samples], np.int32),
        np.array([KINDS.index(kind) for _, kind, *_ in samples], np.int32),
    )


def load(config: Config) -> Data:
    """The validation and test splits, the same for every seed."""
    n = 64 if config.synthetic else 2000
    names = ("validation", "test")
    return Data({name: examples(n, random.Random(name), config.noise) for name in names})


# --- The model.


class Answerer(nnx.Module):
    """An encoder over words, patches or both, which classifies its first token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        E = config.width
        self.model = config.model
        self.words = Embeddings(
            len(WORDS),
            E,
            positions=config.vectors,
            max_length=LONGEST,
            scale=text_config.EMBEDDING_SCALE,
            rngs=rngs,
        )
        self.patches = Linear(CELL * CELL * 3, E, rngs=rngs)
        init = nnx.initializers.normal(0.5)
        self.rows, self.columns = (nnx.Param(init(rngs.params(), (SIDE, E))) for _ in range(2))
        context = E if config.model == "cross" else None
        layers = text_config.layers(config)
        self.stack = Stack(layers, causal=False, context_features=context, rngs=rngs)
        self.classify = Linear(E, len(ANSWERS), rngs=rngs)

    def __call__(self, inputs: Any) -> jax.Array:
        """Logits ``[B answers]`` of images ``[B 24 24 3]`` and questions ``[B T]``."""
        images, questions = (jnp.asarray(x) for x in inputs)
        if self.model == "image":  # keep only the start token of the question
            questions = questions[:, :1]
        real = questions != PAD
        x = self.words(questions)
        positions = (self.rows[...][:, None] + self.columns[...]).reshape(SIDE * SIDE, -1)
        cells = self.patches(patches(images).astype(x.dtype)) + positions.astype(x.dtype)
        if self.model == "cross":
            x = self.stack(x, self.stack.contexts(cells), real=real)
        elif self.model == "question":
            x = self.stack(x, real=real)
        else:
            real = jnp.concatenate([real, jnp.ones(cells.shape[:2], bool)], axis=1)
            x = self.stack(jnp.concatenate([x, cells], axis=1), real=real)
        return self.classify(x[:, 0])


def patches(images: jax.Array) -> jax.Array:
    """The cells of images as patches, row by row: ``[B 24 24 3]`` to ``[B 9 192]``."""
    B = images.shape[0]
    cells = images.reshape(B, SIDE, CELL, SIDE, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(B, SIDE * SIDE, CELL * CELL * 3)


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Model:
    """A fresh model."""
    return Answerer(config, rngs=rngs)


# --- The task.


def batches(config: Config, data: Data, step: int, rows: Rows = ALL) -> Iterator[Examples]:
    """New images and questions at every step."""
    while True:
        rng = random.Random(f"train {config.seed} {step}")
        yield examples(config.batch_size, rng, config.noise, rows)
        step += 1


def loss(config: Config, model: Model, batch: Examples) -> Loss:
    """Cross-entropy of the answers."""
    answers = model((batch.images, batch.questions))
    each = cross_entropy(answers, batch.answers, config.label_smoothing)
    return Loss(each.sum(), jnp.float32(each.size))


def predict(model: Model, asked: Examples, size: int = 200) -> np.ndarray:
    """Logits ``[n answers]``."""
    n = len(asked.answers)
    rows = [
        np.asarray(logits(model, (asked.images[index], asked.questions[index])))
        for index in full_batches(n, size)
    ]
    return np.concatenate(rows)[:n]


def evaluate(config: Config, model: Model, data: Data, split: str) -> Metrics:
    """Accuracy, also for each kind of question, and mean cross-entropy."""
    asked = data.splits[split]
    predicted = predict(model, asked)
    right = predicted.argmax(axis=-1) == asked.answers
    kinds = {
        f"{name}_accuracy": float(right[asked.kinds == i].mean()) for i, name in enumerate(KINDS)
    }
    return {**scores(predicted, asked.answers), **kinds}


def sample(config: Config, model: Model, data: Data, given: str | None) -> str:
    """Five images of the test split in words, each with its question and the predicted answer.

    A user's question is asked about all five.
    """
    asked = Examples(*(x[:5] for x in data.splits["test"]))
    if given is not None:
        row = text.padded([encode(given)], LONGEST)
        asked = asked._replace(questions=np.repeat(row, 5, axis=0))
    scenes = _scenes(5)
    lines = []
    for i, row in enumerate(predict(model, asked, size=5)):
        question = WORDS.decode(x for x in asked.questions[i] if x not in (PAD, START))
        guess = ANSWERS[row.argmax()]
        suffix = "" if given is not None else f" {verdict(guess, ANSWERS[asked.answers[i]])}"
        lines.append(f"{_in_words(scenes[i])}\n    {question} {guess}{suffix}")
    return "\n".join(lines)


def _scenes(n: int) -> list[Scene]:
    """The scenes of the first images of the test split."""
    rng = random.Random("test")
    return [example(rng)[0] for _ in range(n)]


def _in_words(scene: Scene) -> str:
    rows = []
    for row in range(SIDE):
        cells = [scene.get(SIDE * row + column) for column in range(SIDE)]
        rows.append("  ".join(f"{' '.join(x) if x else '.':15}" for x in cells).rstrip())
    return "\n".join(rows)


def look(config: Config, model: Model, data: Data, given: str | None) -> list[AttentionView]:
    """Attention weights over words and patches, for the first image of the test split."""
    test = data.splits["test"]
    row = test.questions[0] if given is None else np.array(encode(given))
    row = row[row != PAD][None]
    _, weights = record_weights(model, (test.images[:1], row))
    words = [WORDS.words[i] for i in row[0]]
    scene = _scenes(1)[0]
    cells = [" ".join(scene.get(i, ("empty",))) for i in range(SIDE * SIDE)]
    if config.model == "cross":
        own = {name: w for name, w in weights.items() if ".cross_attention" not in name}
        across = [w for name, w in weights.items() if ".cross_attention" in name]
        stacked = np.stack([np.asarray(w[0]) for w in across])
        return [
            AttentionView("question to image", words, cells, stacked),
            *self_attention("question", words, own),
        ]
    tokens = {"question": words, "image": [words[0], *cells], "joint": [*words, *cells]}
    return self_attention("encoder", tokens[config.model], weights)


TASK = Task(
    name="vqa",
    presets=PRESETS,
    spaces=SPACES,
    data=load,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="accuracy",
    larger=True,
    unit="questions",
    sample=sample,
    look=look,
)
