"""What a nested expression of lists of digits comes to.

::

    python -m experiments train listops                           # a Transformer encoder
    python -m experiments train listops --model gru
    python -m experiments train listops --model window            # each token sees 32 to each side
    python -m experiments train listops --model linear            # elu + 1 features, no softmax

``[MAX 2 9 [MIN 4 7 ] 0 ]`` is 9. Operators are MIN, MAX, MED (the median, of an even number the
mean of the middle two, rounded down) and SM (the sum modulo 10). To tell the class of the whole,
information must travel along the tree; who knows only the outermost operator and how often each
digit occurs is right about a third of the time.

The ladder: ``gru``, ``transformer``, and the same with other attention, ``window`` and ``linear``.

Data: made here, without end, from the seed: N. Nangia and S. Bowman 2018, "ListOps: A Diagnostic
Dataset for Latent Tree Learning", with the lengths of Y. Tay et al. 2021, "Long Range Arena". The
validation and test splits are 1,000 expressions each, the same for every seed.
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

from attention_jax.models import Encoder, EncoderConfig
from attention_jax.nn import Embeddings, record_weights
from attention_jax.nn.linear import Linear
from experiments import attending, text, train
from experiments.attending import TextConfig
from experiments.config import at_least_1
from experiments.logits import cross_entropy, logits, scores
from experiments.look import View, self_attention
from experiments.recurrent import GRU, last_state
from experiments.text import PAD

OPERATORS = ("MIN", "MAX", "MED", "SM")
WORDS = text.Words((*text.SPECIAL, *map(str, range(10)), *(f"[{x}" for x in OPERATORS), "]"))
DIGIT, OPERATOR, CLOSE = (WORDS.words.index(x) for x in ("0", "[MIN", "]"))


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """The options of a reader of expressions."""

    model: Literal["gru", "transformer", "window", "linear"] = "transformer"
    """The rung of the ladder."""
    window: int = 32
    """Of the mask, and of the model window: tokens to each side, or in a block."""
    shortest: int = 32
    """Tokens that an expression has at least."""
    longest: int = 512
    """And at most."""
    nesting: int = 10
    """Lists within lists at most."""
    arguments: int = 10
    """Of an operator, at most; at least 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "nesting")
        if self.arguments < 2:
            raise ValueError(f"arguments must be at least 2, got {self.arguments}")
        if not 4 <= self.shortest <= self.longest:
            raise ValueError(
                f"shortest must be in [4, longest = {self.longest}], got {self.shortest}"
            )


PRESETS = {
    "cpu": Config(
        steps=1500,
        batch_size=16,
        learning_rate=1e-3,
        width=64,
        depth=2,
        positions="rotary",
        dropout=0.0,
        evaluations=3,
        ema=0.99,
        minutes=10,
    ),
    "smoke": Config(
        steps=4,
        batch_size=8,
        width=16,
        heads=2,
        depth=1,
        shortest=8,
        longest=32,
        nesting=3,
        evaluations=1,
        synthetic=True,
    ),
    "accelerator": Config(
        steps=20_000,
        batch_size=64,
        learning_rate=5e-4,
        width=256,
        heads=8,
        depth=6,
        shortest=500,
        longest=2000,
        positions="rotary",
        evaluations=10,
        ema=0.999,
        dtype="bfloat16",
    ),
}


class Examples(NamedTuple):
    """Expressions as numbers, and what each comes to."""

    rows: list[list[int]]
    labels: np.ndarray


class Data(NamedTuple):
    """The splits that score; training expressions are made as they are asked for."""

    splits: dict[str, Examples]


class Batch(NamedTuple):
    """Tokens ``[B T]`` and classes ``[B]``."""

    tokens: Any
    labels: Any


# --- Expressions.


def value(operator: int, arguments: list[int]) -> int:
    """What an operator, by its place in ``OPERATORS``, makes of digits.

    >>> [value(i, [7, 2, 9, 4]) for i in range(4)]
    [2, 9, 5, 2]
    """
    name = OPERATORS[operator]
    if name == "MIN":
        return min(arguments)
    if name == "MAX":
        return max(arguments)
    if name == "SM":
        return sum(arguments) % 10
    ordered, middle = sorted(arguments), len(arguments) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) // 2


def expression(config: Config, rng: random.Random) -> tuple[list[int], int]:
    """A random expression and what it comes to: an argument is a list a quarter of the time.

    One that grows longer than ``config.longest`` is left where it is.
    """
    row: list[int] = []

    def grow(nesting: int) -> int:
        operator = rng.randrange(len(OPERATORS))
        row.append(OPERATOR + operator)
        found = []
        for _ in range(rng.randint(2, config.arguments)):
            if len(row) > config.longest:
                break
            if nesting > 1 and rng.random() < 0.25:
                found.append(grow(nesting - 1))
            else:
                found.append(rng.randrange(10))
                row.append(DIGIT + found[-1])
        row.append(CLOSE)
        return value(operator, found or [0])

    return row, grow(config.nesting)


def examples(config: Config, n: int, rng: random.Random) -> Examples:
    """So many, of the lengths asked for."""
    rows: list[list[int]] = []
    labels = []
    while len(rows) < n:
        row, label = expression(config, rng)
        if config.shortest <= len(row) <= config.longest:
            rows.append(row)
            labels.append(label)
    return Examples(rows, np.array(labels, np.int32))


def evaluated(words: list[str]) -> int:
    """What a written expression comes to.

    Raises:
      ValueError: it is no expression.

    >>> evaluated("[MAX 2 9 [MIN 4 7 ] 0 ]".split())
    9
    """
    stack: list[list[Any]] = [["", []]]
    for word in words:
        if word[:1] == "[" and word[1:] in OPERATORS:
            stack.append([word[1:], []])
        elif word == "]" and len(stack) > 1 and stack[-1][1]:
            operator, arguments = stack.pop()
            stack[-1][1].append(value(OPERATORS.index(operator), arguments))
        elif word.isdigit() and len(word) == 1:
            stack[-1][1].append(int(word))
        else:
            raise ValueError(
                f"text must be an expression such as '[MAX 2 9 [MIN 4 7 ] 0 ]', got {word!r} in it"
            )
    if len(stack) > 1 or len(stack[0][1]) != 1:
        raise ValueError("text must be one expression, with as many ] as [")
    return int(stack[0][1][0])


def data(config: Config) -> Data:
    """The splits that score."""
    n = 64 if config.synthetic else 1000
    names = ("validation", "test")
    return Data({name: examples(config, n, random.Random(name)) for name in names})


# --- Models.


class Recurrent(nnx.Module):
    """Embeddings, a GRU, and the class from its last state."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        E = config.width
        init = nnx.initializers.normal(E**-0.5)
        self.embed = Embeddings(len(WORDS), E, embedding_init=init, rngs=rngs)
        self.gru = GRU(E, E, config.depth, dropout_rate=config.dropout, rngs=rngs)
        self.classify = Linear(E, 10, rngs=rngs)

    def __call__(self, tokens: Any) -> jax.Array:
        """Logits ``[B 10]``."""
        lengths = jnp.sum(jnp.asarray(tokens) != PAD, axis=-1, dtype=jnp.int32)
        return self.classify(last_state(self.gru(self.embed(tokens), lengths), lengths))


class Reader(nnx.Module):
    """An encoder, and the class from its first token, the outermost operator."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(
            EncoderConfig(
                len(WORDS),
                attending.layers(config),
                positions=config.vectors,
                max_length=config.longest,
                embedding_scale=attending.EMBEDDING_SCALE,
                head="classes",
                classes=10,
                dropout_rate=config.dropout,
            ),
            rngs=rngs,
        )

    def __call__(self, tokens: Any) -> jax.Array:
        """Logits ``[B 10]``."""
        return self.encoder(tokens, real=jnp.asarray(tokens) != PAD)


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Any:
    """The rung: window and linear are the Transformer with another mask and other attention."""
    if config.model == "gru":
        return Recurrent(config, rngs=rngs)
    changes = {"window": {"mask": "window"}, "linear": {"attention": "linear"}}
    changed: Any = changes.get(config.model, {})
    return Reader(dataclasses.replace(config, **changed), rngs=rngs)


# --- The task.


def bucket_of(config: Config, rows: list[list[int]]) -> int:
    """A length to pad to: a few for all."""
    longest = max(map(len, rows))
    sizes = sorted({config.longest, *(x for x in text.BUCKETS if x < config.longest)})
    return text.bucket(longest, sizes)


def batches(config: Config, data: Data, step: int) -> Iterator[Batch]:
    """New expressions each time, those of one batch of about one length.

    Four times as many are made, and by the step one of the four quarters, sorted by length, taken.
    """
    while True:
        rng = random.Random(f"train {config.seed} {step}")
        found = examples(config, 4 * config.batch_size, rng)
        order = np.argsort([len(row) for row in found.rows], kind="stable")
        part = rng.randrange(4)
        some = order[part * config.batch_size : (part + 1) * config.batch_size]
        rows = [found.rows[i] for i in some]
        yield Batch(text.padded(rows, bucket_of(config, rows)), found.labels[some])
        step += 1


def loss(config: Config, model: Any, batch: Batch) -> train.Loss:
    """Cross-entropy."""
    each = cross_entropy(model(batch.tokens), batch.labels, config.label_smoothing)
    return train.Loss(each.sum(), jnp.float32(each.size))


def predict(config: Config, model: Any, rows: list[list[int]], size: int = 32) -> np.ndarray:
    """Logits ``[n 10]``."""
    found: dict[int, np.ndarray] = {}
    for index in text.covering([len(row) for row in rows], size):
        some = [rows[i] for i in index]
        filled = some + some[:1] * (size - len(some))  # rows that fill the batch are not empty
        rows_of = logits(model, text.padded(filled, bucket_of(config, some)))
        found |= dict(zip(index.tolist(), np.asarray(rows_of), strict=False))
    return np.stack([found[i] for i in range(len(rows))])


def evaluate(config: Config, model: Any, data: Data, split: str) -> train.Metrics:
    """Accuracy and mean cross-entropy, over every expression once."""
    rows, labels = data.splits[split]
    return scores(predict(config, model, rows), labels)


def encode(config: Config, given: str) -> list[int]:
    """An expression as numbers.

    Raises:
      ValueError: it is none, or longer than the model reads.
    """
    evaluated(text.check(given).split())
    row = WORDS.encode(given)
    if len(row) > config.longest:
        raise ValueError(
            f"text has {len(row)} tokens, the model reads {config.longest} (longest): give less"
        )
    return row


def shortest(data: Data, n: int) -> Examples:
    """The shortest expressions of the test split."""
    split = data.splits["test"]
    chosen = np.argsort([len(row) for row in split.rows], kind="stable")[:n]
    return Examples([split.rows[i] for i in chosen], split.labels[chosen])


def sample(config: Config, model: Any, data: Data, given: str | None) -> str:
    """What the model takes an expression for; without one, five short ones of the test split."""
    if given is not None:
        rows = [encode(config, given)]
        right = [evaluated(given.split())]
    else:
        rows, labels = shortest(data, 5)
        right = labels.tolist()
    guesses = predict(config, model, rows).argmax(axis=1)
    return "\n".join(
        f"{WORDS.decode(row)}\n    {guess} {'right' if guess == label else f'wrong, it is {label}'}"
        for row, guess, label in zip(rows, guesses, right, strict=True)
    )


def look(config: Config, model: Any, data: Data, given: str | None) -> list[View]:
    """The encoder's attention over an expression, or over the shortest of the test split."""
    if config.model not in ("transformer", "window"):
        raise ValueError(
            f"model {config.model} has no attention to look at: take transformer or window"
        )
    attending.check_weights(config)
    row = shortest(data, 1).rows[0] if given is None else encode(config, given)
    _, weights = record_weights(model, np.array([row], np.int32))
    tokens = [WORDS.words[i] for i in row]
    return self_attention("encoder", tokens, weights)


TASK = train.Task(
    name="listops",
    presets=PRESETS,
    data=data,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="accuracy",
    larger=True,
    unit="expressions",
    sample=sample,
    look=look,
)
