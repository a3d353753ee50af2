"""What the tasks that classify sentences share: everything but the data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.nn import record_weights
from experiments.datasets import text
from experiments.models import sentences
from experiments.training.config import at_least_1, below_1
from experiments.training.losses import cross_entropy, logits, scores
from experiments.training.task import AttentionView, Loss, Metrics, Task, self_attention
from experiments.training.text_config import TextConfig

Score = Callable[[np.ndarray, np.ndarray], Metrics]


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """The options of a classifier of sentences."""

    model: Literal["naive_bayes", "text_cnn", "attention", "attention_cnn"] = "attention_cnn"
    """The rung of the ladder."""
    dropout: float = 0.2
    """Probability of dropping a number of the embeddings and of what each sublayer gives."""
    feature_dropout: float = 0.5
    """Of what the classes are read from."""
    word_dropout: float = 0.1
    """Probability that a word is made unknown in training."""
    word_width: int = 300
    """Numbers per word of text_cnn, whose vectors are not those of the encoder."""
    filters: int = 100
    """Convolutions of each of the widths 3, 4 and 5."""
    least: int = 2
    """Words that training has less often are unknown."""
    longest: int = 64
    """Words that a sentence may have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "word_width", "filters", "least", "longest")
        below_1(self, "feature_dropout", "word_dropout")


SMOKE = Config(
    steps=8,
    batch_size=16,
    evaluations=1,
    width=16,
    heads=2,
    depth=1,
    filters=8,
    word_width=16,
    synthetic=True,
)

ACCELERATOR = Config(
    steps=3000,
    batch_size=256,
    learning_rate=1e-3,
    width=256,
    heads=8,
    dropout=0.5,
    ema=0.999,
)


class Labelled(NamedTuple):
    """Sentences, words between spaces, and their classes ``[n]``."""

    texts: list[str]
    labels: np.ndarray

    def take(self, index: np.ndarray) -> Labelled:
        """Some of them."""
        return Labelled([self.texts[i] for i in index], self.labels[index])


def labelled(lines: list[str]) -> Labelled:
    """Of lines that begin with the number of the class."""
    pairs = [line.split(" ", 1) for line in lines if line.strip()]
    return Labelled([t.lower() for _, t in pairs], np.array([int(x) for x, _ in pairs], np.int32))


class Split(NamedTuple):
    """Sentences as numbers."""

    rows: list[list[int]]
    lengths: np.ndarray
    labels: np.ndarray
    texts: list[str]


class Data(NamedTuple):
    """What the functions below are given."""

    words: text.Words
    classes: tuple[str, ...]
    splits: dict[str, Split]


class Batch(NamedTuple):
    """Words ``[B T]`` and classes ``[B]``."""

    words: Any
    labels: Any


def made_up(classes: int) -> dict[str, Labelled]:
    """Sentences of made-up words, some of which tell the class: for ``smoke``, without any file."""
    rng = np.random.default_rng(0)

    def some(n: int) -> Labelled:
        labels = rng.integers(0, classes, n).astype(np.int32)
        told = [f"class{label}" for label in labels]
        rest = rng.integers(0, 20, (n, 6))
        return Labelled(
            [" ".join([t, *(f"word{i}" for i in row)]) for t, row in zip(told, rest, strict=True)],
            labels,
        )

    return {"train": some(200), "validation": some(40), "test": some(40)}


def data(classes: tuple[str, ...], read: Callable[[], dict[str, Labelled]], config: Config) -> Data:
    """The splits, with the words of the training split."""
    found = made_up(len(classes)) if config.synthetic else read()
    words = text.Words.of(found["train"].texts, config.least)
    splits = {}
    for name, split in found.items():
        rows = words.encode_all(split.texts)
        lengths = np.array([len(row) for row in rows])
        if lengths.max() > config.longest:
            raise ValueError(
                f"longest must be at least {lengths.max()}, the words of a sentence of the {name} "
                f"split, got {config.longest}"
            )
        splits[name] = Split(rows, lengths, split.labels, split.texts)
    return Data(words, classes, splits)


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Any:
    """The rung."""
    if config.model == "naive_bayes":
        return sentences.NaiveBayes(data.splits["train"].rows, data.splits["train"].labels)
    return sentences.build(config, len(data.words), len(data.classes), rngs)


def batches(config: Config, data: Data, step: int) -> Iterator[Batch]:
    """Sentences of about one length together."""
    split = data.splits["train"]
    for index in text.alike(split.lengths, config.batch_size, config.seed, step):
        yield Batch(text.padded([split.rows[i] for i in index]), split.labels[index])


def loss(config: Config, model: Any, batch: Batch) -> Loss:
    """Cross-entropy."""
    each = cross_entropy(model(batch.words), batch.labels, config.label_smoothing)
    return Loss(each.sum(), jnp.float32(each.size))


def predict(model: Any, rows: list[list[int]], size: int = 128) -> np.ndarray:
    """Log-probabilities ``[n C]``."""
    found: dict[int, np.ndarray] = {}
    for index in text.covering([len(row) for row in rows], size):
        words = text.padded([rows[i] for i in index], count=size)
        rows_of = logits(model, words) if isinstance(model, nnx.Module) else model(words)
        found |= dict(zip(index.tolist(), np.asarray(rows_of), strict=False))
    return np.asarray(jax.nn.log_softmax(np.stack([found[i] for i in range(len(rows))])))


def evaluate(config: Config, model: Any, data: Data, split: str, score: Score = scores) -> Metrics:
    """Accuracy and mean cross-entropy, or another score, over every sentence once."""
    rows, _, labels, _ = data.splits[split]
    return score(predict(model, rows), labels)


def encode(config: Config, data: Data, sentence: str) -> list[int]:
    """A text's words as numbers.

    Raises:
      ValueError: it is empty, or longer than the model reads.
    """
    row = data.words.encode(text.check(sentence).lower())
    if len(row) > config.longest:
        raise ValueError(
            f"text has {len(row)} words, the model reads {config.longest} (longest): give less"
        )
    return row


def sample(config: Config, model: Any, data: Data, sentence: str | None) -> str:
    """What the model takes a sentence for; without one, ten of the test split."""
    if sentence is not None:
        rows, texts, labels = [encode(config, data, sentence)], [sentence], [None]
    else:
        split = data.splits["test"]
        chosen = np.random.default_rng(config.seed).permutation(len(split.rows))[:10]
        rows, texts = [split.rows[i] for i in chosen], [split.texts[i] for i in chosen]
        labels = [data.classes[split.labels[i]] for i in chosen]
    said = []
    for log_p, written, label in zip(predict(model, rows), texts, labels, strict=True):
        guess = data.classes[log_p.argmax()]
        verdict = "" if label is None else " right" if guess == label else f" wrong, it is {label}"
        said.append(f"{written}\n    {guess} {np.exp(log_p.max()):.2f}{verdict}")
    return "\n".join(said)


def look(config: Config, model: Any, data: Data, sentence: str | None) -> list[AttentionView]:
    """The encoder's attention in one sentence."""
    if not isinstance(model, sentences.SelfAttention):
        raise ValueError(f"model {config.model} has no attention to look at: take attention")
    sentence = data.splits["test"].texts[0] if sentence is None else sentence
    row = encode(config, data, sentence)
    _, weights = record_weights(model, np.array([row], np.int32))
    tokens = sentence.split()
    return self_attention("encoder", tokens, weights)


def task(
    name: str,
    classes: tuple[str, ...],
    read: Callable[[], dict[str, Labelled]],
    presets: Mapping[str, Config],
    *,
    score: Score = scores,
    metric: str = "accuracy",
) -> Task[Config, Data]:
    """The task of this name; ``score`` is of logits ``[n C]`` and labels, ``metric`` one of its."""
    return Task(
        name=name,
        presets=presets,
        data=functools.partial(data, classes, read),
        init=init,
        batches=batches,
        loss=loss,
        evaluate=functools.partial(evaluate, score=score),
        metric=metric,
        larger=True,
        unit="sentences",
        sample=sample,
        look=look,
    )
