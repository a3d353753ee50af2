"""What a nested expression of lists of digits comes to.

::

    python -m experiments train listops                           # a Transformer encoder
    python -m experiments train listops --model gru
    python -m experiments train listops --model window            # each token sees 32 to each side
    python -m experiments train listops --model linear            # elu + 1 features, no softmax

``[MAX 2 9 [MIN 4 7 ] 0 ]`` is 9. Operators are MIN, MAX, MED (the median, of an even number the
mean of the middle two, rounded down) and SM (the sum modulo 10). To tell the class of the whole,
information must travel along the tree; who knows only the outermost operator and how often each
digit occurs is right about a third of the time. Scored is the value of the whole; training asks for
that of each list in it too (``--asked outermost`` does not, as in the Long Range Arena): an encoder
tells it at the list's operator, a GRU at its end.

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
from experiments.datasets import text
from experiments.datasets.text import PAD
from experiments.models.recurrent import GRU, last_state
from experiments.tasks.listops.expressions import (
    CLOSE,
    OPERATOR,
    WORDS,
    evaluated,
    expression,
    values,
)
from experiments.training import text_config
from experiments.training.config import at_least_1
from experiments.training.losses import cross_entropy, logits, scores
from experiments.training.task import AttentionView, Loss, Metrics, Task, self_attention
from experiments.training.text_config import TextConfig


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
    asked: Literal["all", "outermost"] = "all"
    """The values of which lists training asks for."""

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
        steps=1800,
        batch_size=4,
        learning_rate=2e-3,
        width=64,
        heads=2,
        depth=3,
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
    """Tokens ``[B T]``, classes ``[B]``, and values of all lists, ``[B T]``; see ``values``."""

    tokens: Any
    labels: Any
    values: Any


# --- Data.


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

    def each(self, tokens: Any) -> tuple[jax.Array, jax.Array]:
        """Logits ``[B T 10]`` at every token, and the ends of lists, where they tell the value."""
        tokens = jnp.asarray(tokens)
        lengths = jnp.sum(tokens != PAD, axis=-1, dtype=jnp.int32)
        return self.classify(self.gru(self.embed(tokens), lengths)), tokens == CLOSE

    def __call__(self, tokens: Any) -> jax.Array:
        """Logits ``[B 10]``."""
        lengths = jnp.sum(jnp.asarray(tokens) != PAD, axis=-1, dtype=jnp.int32)
        return last_state(self.each(tokens)[0], lengths)


class Reader(nnx.Module):
    """An encoder, and the class from its first token, the outermost operator."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(
            EncoderConfig(
                len(WORDS),
                text_config.layers(config),
                positions=config.vectors,
                max_length=config.longest,
                embedding_scale=text_config.EMBEDDING_SCALE,
                head="classes",
                classes=10,
                dropout_rate=config.dropout,
            ),
            rngs=rngs,
        )

    def each(self, tokens: Any) -> tuple[jax.Array, jax.Array]:
        """Logits ``[B T 10]`` at every token, and operators, where they tell the list's value."""
        tokens = jnp.asarray(tokens)
        x = self.encoder.hidden(tokens, real=tokens != PAD)
        return self.encoder.class_logits(x), (tokens >= OPERATOR) & (tokens < CLOSE)

    def __call__(self, tokens: Any) -> jax.Array:
        """Logits ``[B 10]``."""
        return self.each(tokens)[0][:, 0]


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Any:
    """The rung: window and linear are the Transformer with another mask and other attention."""
    if config.model == "gru":
        return Recurrent(config, rngs=rngs)
    changes = {"window": {"mask": "window"}, "linear": {"attention": "linear"}}
    changed: Any = changes.get(config.model, {})
    return Reader(dataclasses.replace(config, **changed), rngs=rngs)


# --- The task.


def sizes(config: Config) -> list[int]:
    """Lengths to pad to: a few for all."""
    return sorted({config.longest, *(x for x in text.BUCKETS if 32 < x < config.longest)})


def bucket_of(config: Config, rows: list[list[int]]) -> int:
    """The length to pad to."""
    return text.bucket(max(map(len, rows)), sizes(config))


def batches(config: Config, data: Data, step: int) -> Iterator[Batch]:
    """New expressions each time, those of a batch no longer than one of ``sizes``, drawn evenly.

    There are ``batch_size`` of the longest and more of shorter ones, so that all batches have
    about as many tokens: most of what is learned is learned from short expressions.
    """
    *shorter, longest = sizes(config)
    fitting = [*(size for size in shorter if size >= 2 * config.shortest), longest]
    while True:
        rng = random.Random(f"train {config.seed} {step}")
        size = rng.choice(fitting)
        n = config.batch_size * (config.longest // size)
        found = examples(dataclasses.replace(config, longest=size), n, rng)
        worth = text.padded([values(row) for row in found.rows], size)
        yield Batch(text.padded(found.rows, size), found.labels, worth)
        step += 1


def loss(config: Config, model: Any, batch: Batch) -> Loss:
    """Cross-entropy of the whole; and the mean of that of all lists in it, where they are asked."""
    n = jnp.float32(len(batch.labels))
    if config.asked == "outermost":
        each = cross_entropy(model(batch.tokens), batch.labels, config.label_smoothing)
        return Loss(each.sum(), n)
    said, lists = model.each(batch.tokens)
    each = jnp.where(lists, cross_entropy(said, batch.values, config.label_smoothing), 0)
    number = lists.sum(axis=1, dtype=jnp.float32)
    # The outermost list is the first that an encoder sees begin, the last that a GRU sees end.
    at = lists.shape[1] - 1 - jnp.argmax(lists[:, ::-1], axis=1)
    at = at if isinstance(model, Recurrent) else jnp.argmax(lists, axis=1)
    whole = jnp.take_along_axis(each, at[:, None], axis=1)[:, 0]
    return Loss((whole + each.sum(axis=1) / number).sum(), n)


def predict(config: Config, model: Any, rows: list[list[int]], size: int = 32) -> np.ndarray:
    """Logits ``[n 10]``."""
    found: dict[int, np.ndarray] = {}
    for index in text.covering([len(row) for row in rows], size):
        some = [rows[i] for i in index]
        filled = some + some[:1] * (size - len(some))  # rows that fill the batch are not empty
        rows_of = logits(model, text.padded(filled, bucket_of(config, some)))
        found |= dict(zip(index.tolist(), np.asarray(rows_of), strict=False))
    return np.stack([found[i] for i in range(len(rows))])


def evaluate(config: Config, model: Any, data: Data, split: str) -> Metrics:
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


def look(config: Config, model: Any, data: Data, given: str | None) -> list[AttentionView]:
    """The encoder's attention over an expression, or over the shortest of the test split."""
    if config.model not in ("transformer", "window"):
        raise ValueError(
            f"model {config.model} has no attention to look at: take transformer or window"
        )
    row = shortest(data, 1).rows[0] if given is None else encode(config, given)
    _, weights = record_weights(model, np.array([row], np.int32))
    tokens = [WORDS.words[i] for i in row]
    return self_attention("encoder", tokens, weights)


TASK = Task(
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
