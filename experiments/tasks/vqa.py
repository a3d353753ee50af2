"""Questions about pictures of coloured shapes: picture and question as tokens of one encoder.

::

    python -m experiments train vqa                               # all tokens see each other
    python -m experiments train vqa --model cross                 # the question looks at it
    python -m experiments train vqa --model question              # blind
    python -m experiments look runs/vqa/joint-cpu-seed0

A picture has nine cells, some with a square, a circle or a triangle in one of four colours. Five
kinds of question are asked: what colour is the circle, what shape is red, how many squares are
there, is there a red circle, is the circle left of the square. Answers of a kind are equally
frequent, so that who sees only the question, or only the picture, can do no more than guess.

The ladder: ``question`` only, ``image`` only, ``joint`` self-attention over both, ``cross``:
self-attention of the question, which attends to the picture. The records of ``question`` and
``image`` are with ``--steps 1500``: they have nothing more to learn.

Data: made here, without end, from the seed; in the manner of J. Johnson et al. 2017, "CLEVR". The
validation and test splits are 2,000 questions each, the same for every seed.
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

from attention_jax.models.layers import Stack
from attention_jax.nn import record_weights
from attention_jax.nn.embeddings import Embeddings
from attention_jax.nn.linear import Linear
from experiments.datasets import text
from experiments.datasets.text import PAD, START
from experiments.training import text_config
from experiments.training.losses import cross_entropy, logits, scores
from experiments.training.task import AttentionView, Loss, Metrics, Task, self_attention
from experiments.training.text_config import TextConfig

SHAPES = ("square", "circle", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
COUNTS = ("zero", "one", "two", "three")
ANSWERS = (*SHAPES, *COLOURS, *COUNTS, "yes", "no")
SIDE, CELL = 3, 8  # cells in a row, pixels along a cell
KINDS = ("colour", "shape", "count", "there", "left")
WORDS = text.Words(
    (
        *text.SPECIAL,
        *SHAPES,
        *COLOURS,
        *["what", "colour", "is", "the", "shape", "how", "many", "a", "there", "left", "of", "?"],
    )
)
LONGEST = 10  # words of a question, with the start


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """The options of who answers."""

    model: Literal["question", "image", "joint", "cross"] = "joint"
    """The rung of the ladder."""
    noise: float = 0.1
    """Standard deviation of what is added to each pixel, whose colours are 0 or 1."""

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


class Examples(NamedTuple):
    """Pictures ``[n 24 24 3]``, questions ``[n LONGEST]``, answers ``[n]`` and kinds ``[n]``."""

    images: Any
    questions: Any
    answers: Any
    kinds: Any


class Data(NamedTuple):
    """The splits that score; training questions are made as they are asked for."""

    splits: dict[str, Examples]


# --- Pictures and questions.

Scene = dict[int, tuple[str, str]]  # colour and shape by cell


def example(rng: random.Random) -> tuple[Scene, str, str, str]:
    """A scene, a kind of question, the question and its answer.

    Kind and answer are drawn first, and a scene that has it is made.
    """
    kind = rng.choice(KINDS)
    cells = rng.sample(range(SIDE * SIDE), 6)
    shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
    other_shapes = [x for x in SHAPES if x != shape]
    other_colours = [x for x in COLOURS if x != colour]

    def thing(colours: Any = COLOURS, shapes: Any = SHAPES) -> tuple[str, str]:
        return rng.choice(colours), rng.choice(shapes)

    if kind == "colour":
        rest = [thing(shapes=other_shapes) for _ in range(rng.randint(1, 4))]
        things, question = [(colour, shape), *rest], f"what colour is the {shape} ?"
        answer = colour
    elif kind == "shape":
        rest = [thing(colours=other_colours) for _ in range(rng.randint(1, 4))]
        things, question, answer = [(colour, shape), *rest], f"what shape is {colour} ?", shape
    elif kind == "count":
        n = rng.randrange(len(COUNTS))
        some = [thing(shapes=[shape]) for _ in range(n)]
        rest = [thing(shapes=other_shapes) for _ in range(rng.randint(1, 6 - n))]
        things, question, answer = [*some, *rest], f"how many {shape} ?", COUNTS[n]
    elif kind == "there":
        # Without it, both its colour and its shape are there, apart.
        rest = [thing(other_colours, other_shapes) for _ in range(rng.randint(0, 2))]
        apart = [(colour, rng.choice(other_shapes)), (rng.choice(other_colours), shape)]
        answer = rng.choice(("yes", "no"))
        things = (
            [(colour, shape), *apart[: rng.randint(0, 2)], *rest]
            if answer == "yes"
            else [*apart, *rest]
        )
        question = f"is there a {colour} {shape} ?"
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


def drawn(scene: Scene) -> np.ndarray:
    """The picture, ``[24 24 3]``, black where nothing is."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    inside = {
        "square": (abs(x) < 3) & (abs(y) < 3),
        "circle": x**2 + y**2 < 10,
        "triangle": (y < 3) & (abs(x) < (y + 4) / 2),
    }
    paint = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
    image = np.zeros((SIDE * CELL, SIDE * CELL, 3), np.float32)
    for cell, (colour, shape) in scene.items():
        row, column = CELL * (cell // SIDE), CELL * (cell % SIDE)
        place = image[row : row + CELL, column : column + CELL]
        place[inside[shape]] = paint[colour]
    return image


def encode(question: str) -> list[int]:
    """A question's words as numbers.

    Raises:
      ValueError: it is empty, too long, or has words that no question here has.
    """
    words = text.check(question).lower().replace("?", " ?").split()
    row = [START, *WORDS.encode(" ".join(words))]
    if text.UNKNOWN in row or len(row) > LONGEST:
        raise ValueError(
            f"text must be a question such as 'is there a red circle ?', of up to {LONGEST - 1} "
            f"words among {', '.join(WORDS.words[len(text.SPECIAL) :])}; got {question!r}"
        )
    return row


def examples(n: int, rng: random.Random, noise: float) -> Examples:
    """So many."""
    found = [example(rng) for _ in range(n)]
    images = np.stack([drawn(scene) for scene, *_ in found])
    grain = np.random.default_rng(rng.getrandbits(32)).normal(size=images.shape)
    return Examples(
        images + noise * grain.astype(np.float32),
        text.padded([encode(question) for *_, question, _ in found], LONGEST),
        np.array([ANSWERS.index(answer) for *_, answer in found], np.int32),
        np.array([KINDS.index(kind) for _, kind, *_ in found], np.int32),
    )


def data(config: Config) -> Data:
    """The splits that score."""
    n = 64 if config.synthetic else 2000
    names = ("validation", "test")
    return Data({name: examples(n, random.Random(name), config.noise) for name in names})


# --- The model.


class Answerer(nnx.Module):
    """An encoder over words, over patches, or over both, and the answer from its first token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        E = config.width
        self.sees = config.model
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
        """Logits ``[B answers]`` of pictures and questions."""
        images, questions = (jnp.asarray(x) for x in inputs)
        if self.sees == "image":  # of the question, the start alone
            questions = questions[:, :1]
        real = questions != PAD
        x = self.words(questions)
        places = (self.rows[...][:, None] + self.columns[...]).reshape(SIDE * SIDE, -1)
        seen = self.patches(patches(images).astype(x.dtype)) + places.astype(x.dtype)
        if self.sees == "cross":
            x = self.stack(x, self.stack.contexts(seen), real=real)
        elif self.sees == "question":
            x = self.stack(x, real=real)
        else:
            real = jnp.concatenate([real, jnp.ones(seen.shape[:2], bool)], axis=1)
            x = self.stack(jnp.concatenate([x, seen], axis=1), real=real)
        return self.classify(x[:, 0])


def patches(images: jax.Array) -> jax.Array:
    """Cells of pictures, ``[B 24 24 3]`` to ``[B 9 192]``, row by row."""
    B = images.shape[0]
    cells = images.reshape(B, SIDE, CELL, SIDE, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(B, SIDE * SIDE, CELL * CELL * 3)


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Any:
    """The rung."""
    return Answerer(config, rngs=rngs)


# --- The task.


def batches(config: Config, data: Data, step: int) -> Iterator[Examples]:
    """New pictures and questions each time."""
    while True:
        rng = random.Random(f"train {config.seed} {step}")
        yield examples(config.batch_size, rng, config.noise)
        step += 1


def loss(config: Config, model: Any, batch: Examples) -> Loss:
    """Cross-entropy of the answers."""
    said = model((batch.images, batch.questions))
    each = cross_entropy(said, batch.answers, config.label_smoothing)
    return Loss(each.sum(), jnp.float32(each.size))


def predict(model: Any, found: Examples, size: int = 200) -> np.ndarray:
    """Logits ``[n answers]``."""
    n = len(found.answers)
    rows = []
    for start in range(0, n, size):
        index = np.minimum(np.arange(start, start + size), n - 1)  # the last fills the batch
        rows.append(np.asarray(logits(model, (found.images[index], found.questions[index]))))
    return np.concatenate(rows)[:n]


def evaluate(config: Config, model: Any, data: Data, split: str) -> Metrics:
    """Accuracy, that of each kind of question, and mean cross-entropy."""
    found = data.splits[split]
    said = predict(model, found)
    right = said.argmax(axis=-1) == found.answers
    kinds = {
        f"{name}_accuracy": float(right[found.kinds == i].mean()) for i, name in enumerate(KINDS)
    }
    return {**scores(said, found.answers), **kinds}


def sample(config: Config, model: Any, data: Data, given: str | None) -> str:
    """Five pictures of the test split in letters, their questions, and what the model answers.

    A question of one's own is asked of all five.
    """
    found = Examples(*(x[:5] for x in data.splits["test"]))
    if given is not None:
        row = text.padded([encode(given)], LONGEST)
        found = found._replace(questions=np.repeat(row, 5, axis=0))
    scenes = _scenes(5)
    said = []
    for i, row in enumerate(predict(model, found, size=5)):
        question = WORDS.decode(x for x in found.questions[i] if x not in (PAD, START))
        guess = ANSWERS[row.argmax()]
        verdict = ""
        if given is None:
            answer = ANSWERS[found.answers[i]]
            verdict = " right" if guess == answer else f" wrong, it is {answer}"
        said.append(f"{_in_words(scenes[i])}\n    {question} {guess}{verdict}")
    return "\n".join(said)


def _scenes(n: int) -> list[Scene]:
    """Those of the first pictures of the test split."""
    rng = random.Random("test")
    return [example(rng)[0] for _ in range(n)]


def _in_words(scene: Scene) -> str:
    rows = []
    for row in range(SIDE):
        cells = [scene.get(SIDE * row + column) for column in range(SIDE)]
        rows.append("  ".join(f"{' '.join(x) if x else '.':15}" for x in cells).rstrip())
    return "\n".join(rows)


def look(config: Config, model: Any, data: Data, given: str | None) -> list[AttentionView]:
    """Attention over words and patches, for the first picture of the test split."""
    found = data.splits["test"]
    row = found.questions[0] if given is None else np.array(encode(given))
    row = row[row != PAD][None]
    _, weights = record_weights(model, (found.images[:1], row))
    words = [WORDS.words[i] for i in row[0]]
    scene = _scenes(1)[0]
    cells = [" ".join(scene.get(i, ("empty",))) for i in range(SIDE * SIDE)]
    if config.model == "cross":
        own = {name: w for name, w in weights.items() if ".cross_attention" not in name}
        across = [w for name, w in weights.items() if ".cross_attention" in name]
        stacked = np.stack([np.asarray(w[0]) for w in across])
        return [
            AttentionView("question to picture", words, cells, stacked),
            *self_attention("question", words, own),
        ]
    tokens = {"question": words, "image": [words[0], *cells], "joint": [*words, *cells]}
    return self_attention("encoder", tokens[config.model], weights)


TASK = Task(
    name="vqa",
    presets=PRESETS,
    data=data,
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
