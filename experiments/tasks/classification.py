"""Sentence classification: everything that its tasks share, which is all but the data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.datasets import text
from experiments.datasets.text import PAD
from experiments.models import finetuning, sentences
from experiments.models.inference import map_by_length, record_weights
from experiments.tasks.common import check_attends, check_length, random_indices, verdict
from experiments.training import config as configs
from experiments.training.config import at_least_1, below_1
from experiments.training.losses import cross_entropy, logits, scores
from experiments.training.search import Log, OneOf, Space
from experiments.training.task import (
    ALL,
    Array,
    AttentionView,
    Loss,
    Metrics,
    Model,
    Rows,
    Task,
    self_attention,
)
from experiments.training.text_config import PretrainedConfig

FINETUNED = ("pretrained", "pretrained_adapted")  # models that start from a checkpoint
NORMALIZED = ("text_cnn", "attention", "attention_cnn", "transformer")  # may normalize embeddings

RATES, DECAYS = Log(5e-4, 1e-2), OneOf((0.0, 0.05, 0.2))
SPACES: Mapping[str, Space] = {
    "text_cnn": {
        "learning_rate": RATES,
        "weight_decay": DECAYS,
        "feature_dropout": OneOf((0.3, 0.5, 0.7)),
        "word_dropout": OneOf((0.0, 0.1, 0.3)),
    },
    "attention": {
        "learning_rate": RATES,
        "weight_decay": DECAYS,
        "dropout": OneOf((0.1, 0.3, 0.5)),
        "word_dropout": OneOf((0.0, 0.1, 0.3)),
    },
    "attention_cnn": {
        "learning_rate": RATES,
        "weight_decay": DECAYS,
        "dropout": OneOf((0.1, 0.3, 0.5)),
        "word_dropout": OneOf((0.0, 0.1, 0.3)),
    },
    "pretrained": finetuning.SPACE,
}
Score = Callable[[np.ndarray, np.ndarray], Metrics]


@dataclasses.dataclass(frozen=True)
class Config(PretrainedConfig):
    """Options of a sentence classifier."""

    model: Literal["naive_bayes", "text_cnn", "attention", "attention_cnn", "pretrained"] = (
        "attention_cnn"
    )
    """The model to train."""
    dropout: float = 0.2
    """Dropout rate of the embeddings and of the output of each sublayer."""
    feature_dropout: float = 0.5
    """Dropout rate of the features that the classifier reads."""
    word_dropout: float = 0.1
    """Probability of replacing a word by the unknown word in training; not for pretrained, which
    has token_dropout."""
    token_dropout: float = 0.0
    """pretrained: probability of replacing a token by [MASK] in training."""
    pool: Literal["mean", "first"] = "mean"
    """pretrained: what is classified, the mean over all tokens, as in the training of
    all-MiniLM-L6-v2, or the first token by way of BERT's pooler."""
    word_width: int = 300
    """Width of the word embeddings of text_cnn."""
    filters: int = 100
    """Number of convolution filters of each of the widths 3, 4 and 5."""
    least: int = 2
    """Occurrences in the training split that a word needs to enter the vocabulary."""
    longest: int = 64
    """Words per sentence at most; pretrained reads what its checkpoint does."""
    normalize_embeddings: bool = False
    """Normalize word embeddings to mean 0 and variance 1 over the words of the training split, as
    in the paper on adversarial training of classifiers (Miyato 2017)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "word_width", "filters", "least", "longest")
        below_1(self, "feature_dropout", "word_dropout", "token_dropout")
        if self.model not in FINETUNED:
            for name, default in (("token_dropout", 0.0), ("pool", "mean")):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} needs the model pretrained, got model {self.model}")
        if self.normalize_embeddings and self.model not in NORMALIZED:
            raise ValueError(
                f"normalize_embeddings needs a model that learns its word embeddings from the task "
                f"({', '.join(NORMALIZED)}), got model {self.model}"
            )


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


class Labeled(NamedTuple):
    """Sentences of words separated by spaces, and their classes ``[n]``."""

    texts: list[str]
    labels: np.ndarray

    def take(self, index: np.ndarray) -> Labeled:
        """The sentences at these indices."""
        return Labeled([self.texts[i] for i in index], self.labels[index])


def labeled(lines: list[str]) -> Labeled:
    """Parses lines that start with the index of the class."""
    pairs = [line.split(" ", 1) for line in lines if line.strip()]
    return Labeled([t.lower() for _, t in pairs], np.array([int(x) for x, _ in pairs], np.int32))


class Split(NamedTuple):
    """Sentences as word indices."""

    rows: list[list[int]]
    lengths: np.ndarray
    labels: np.ndarray
    texts: list[str]


class Data(NamedTuple):
    """The vocabulary, the names of the classes, the splits, and the lengths to pad sentences to."""

    words: text.Words | finetuning.Subwords
    classes: tuple[str, ...]
    splits: dict[str, Split]
    sizes: Sequence[int] = text.BUCKETS


class Batch(NamedTuple):
    """Word indices ``[B T]`` and classes ``[B]``."""

    words: Array
    labels: Array


def synthetic(classes: int) -> dict[str, Labeled]:
    """Generated sentences whose first word gives the class away; needs no files."""
    rng = np.random.default_rng(0)

    def sentences_of(n: int) -> Labeled:
        labels = rng.integers(0, classes, n).astype(np.int32)
        words = rng.integers(0, 20, (n, 6))
        texts = [
            " ".join([f"class{label}", *(f"word{i}" for i in row)])
            for label, row in zip(labels, words, strict=True)
        ]
        return Labeled(texts, labels)

    return {"train": sentences_of(200), "validation": sentences_of(40), "test": sentences_of(40)}


def load(
    classes: tuple[str, ...],
    read: Callable[[], dict[str, Labeled]],
    config: Config,
    symbols: tuple[tuple[str, str], ...] = (),
    ordinary: Callable[[str], str] = str,
) -> Data:
    """The splits, encoded with the vocabulary of the training split or of the checkpoint."""
    raw = synthetic(len(classes)) if config.synthetic else read()
    words: text.Words | finetuning.Subwords
    if pretrained := config.model in FINETUNED:
        words = finetuning.Subwords(finetuning.tokenizer(config), symbols, ordinary)
    else:
        words = text.Words.of(raw["train"].texts, config.least)
    splits = {}
    for name, split in raw.items():
        rows = words.encode_all(split.texts)
        lengths = np.array([len(row) for row in rows])
        if not pretrained and lengths.max() > config.longest:
            raise ValueError(
                f"longest must be at least {lengths.max()}, the length of the longest sentence of "
                f"the {name} split, got {config.longest}"
            )
        splits[name] = Split(rows, lengths, split.labels, split.texts)
    if not pretrained:
        return Data(words, classes, splits)
    train, *others = (split.lengths for split in splits.values())
    return Data(words, classes, splits, finetuning.sizes(train, *others))


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Model:
    """A fresh model, or a fitted naive Bayes classifier."""
    if config.model == "naive_bayes":
        return sentences.NaiveBayes(data.splits["train"].rows, data.splits["train"].labels)
    if isinstance(data.words, finetuning.Subwords):
        return finetuning.build(
            config,
            data.classes,
            data.words.marks(),
            dropout_rate=config.feature_dropout,
            pool=config.pool,
            noise=data.words.noise(config.token_dropout, rngs=rngs),
            rngs=rngs,
        )
    vocabulary, frequencies = len(data.words), None
    if config.normalize_embeddings:
        words = np.concatenate([np.asarray(row, np.int32) for row in data.splits["train"].rows])
        frequencies = np.bincount(words, minlength=vocabulary) / words.size
    return sentences.build(config, vocabulary, len(data.classes), rngs, frequencies)


def batches(config: Config, data: Data, step: int, rows: Rows = ALL) -> Iterator[Batch]:
    """Batches of sentences of similar length."""
    split = data.splits["train"]
    order = text.bucketed if config.model in FINETUNED else text.alike
    size, seed = config.batch_size, config.seed
    for index, length in order(split.lengths, size, seed, step, data.sizes):
        mine = rows.of(index)
        yield Batch(text.padded([split.rows[i] for i in mine], length), split.labels[mine])


def real(batch: Batch) -> Array:
    """Which words are real, ``[B T]``."""
    return batch.words != PAD


def loss(config: Config, model: Model, batch: Batch) -> Loss:
    """Cross-entropy."""
    each = cross_entropy(model(batch.words), batch.labels, config.label_smoothing)
    return Loss(each.sum(), jnp.float32(each.size))


def predict(
    model: Model, rows: list[list[int]], size: int = 128, sizes: Sequence[int] = text.BUCKETS
) -> np.ndarray:
    """Log-probabilities ``[n C]`` of sentences, which are padded to ``sizes``."""

    def run(index: np.ndarray) -> np.ndarray:
        length = text.bucket(max(len(rows[i]) for i in index), sizes)
        words = text.padded([rows[i] for i in index], length, count=size)
        return np.asarray(logits(model, words) if isinstance(model, nnx.Module) else model(words))

    return np.asarray(
        jax.nn.log_softmax(np.stack(map_by_length(run, [len(row) for row in rows], size)))
    )


def evaluate(
    config: Config, model: Model, data: Data, split: str, score: Score = scores
) -> Metrics:
    """Scores of one split, accuracy and mean cross-entropy by default."""
    rows, _, labels, _ = data.splits[split]
    return score(predict(model, rows, sizes=data.sizes), labels)


def encode(config: Config, data: Data, sentence: str) -> list[int]:
    """Word indices of a user's text.

    Raises:
      ValueError: it is empty, or longer than the model reads.
    """
    row = data.words.encode(text.check(sentence).lower())
    if isinstance(data.words, text.Words):
        check_length(len(row), config.longest, "words", "longest")
    return row


def sample(config: Config, model: Model, data: Data, sentence: str | None) -> str:
    """The predicted class of a sentence, or of ten sentences of the test split."""
    if sentence is not None:
        rows, texts, labels = [encode(config, data, sentence)], [sentence], [None]
    else:
        split = data.splits["test"]
        chosen = random_indices(len(split.rows), 10, config.seed)
        rows, texts = [split.rows[i] for i in chosen], [split.texts[i] for i in chosen]
        labels = [data.classes[split.labels[i]] for i in chosen]
    lines = []
    sizes = [*data.sizes, max(map(len, rows))]
    predicted = predict(model, rows, size=len(rows), sizes=sizes)
    for log_p, shown, label in zip(predicted, texts, labels, strict=True):
        guess = data.classes[log_p.argmax()]
        suffix = "" if label is None else f" {verdict(guess, label)}"
        lines.append(f"{shown}\n    {guess} {np.exp(log_p.max()):.2f}{suffix}")
    return "\n".join(lines)


def look(config: Config, model: Model, data: Data, sentence: str | None) -> list[AttentionView]:
    """Attention weights of the encoder on one sentence, and its class."""
    ladder = configs.choices(type(config), "model")
    check_attends(config, *(x for x in ladder if x not in ("naive_bayes", "text_cnn")))
    test = data.splits["test"]
    known = data.classes[test.labels[0]] if sentence is None else None
    sentence = test.texts[0] if sentence is None else sentence
    row = encode(config, data, sentence)
    output, weights = record_weights(model, np.array([row], np.int32))
    words = data.words
    tokens = words.strings(row) if isinstance(words, finetuning.Subwords) else sentence.split()
    p = np.asarray(jax.nn.softmax(jnp.asarray(output)[0].astype(jnp.float32)))
    guess = data.classes[int(p.argmax())]
    note = f"The class: {guess}, with probability {p.max():.2f}"
    note += "" if known is None else f"; {verdict(guess, known)}"
    return [view._replace(note=note) for view in self_attention("encoder", tokens, weights)]


def task(
    name: str,
    classes: tuple[str, ...],
    read: Callable[[], dict[str, Labeled]],
    presets: Mapping[str, Config],
    *,
    score: Score = scores,
    metric: str = "accuracy",
    changes: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
    symbols: tuple[tuple[str, str], ...] = (),
    ordinary: Callable[[str], str] = str,
) -> Task[Config, Data]:
    """Builds a sentence classification task.

    Args:
      name: of the task.
      classes: their names.
      read: reads the sentences of each split.
      presets: named configurations.
      score: from logits ``[n C]`` and labels ``[n]`` to named scores.
      metric: the score that selects the best weights.
      changes: options that models have in a preset in place of its own.
      symbols: words of the data that pretrained reads as a symbol of its vocabulary, by which it
        then classifies; see ``finetuning.Marked``.
      ordinary: from a text of the data to what pretrained reads in its place.
    """
    return Task(
        name=name,
        presets=presets,
        changes=changes or {},
        spaces=SPACES,
        data=functools.partial(load, classes, read, symbols=symbols, ordinary=ordinary),
        init=init,
        batches=batches,
        loss=loss,
        evaluate=functools.partial(evaluate, score=score),
        metric=metric,
        larger=True,
        unit="sentences",
        untraced=("naive_bayes", "pretrained"),
        real=real,
        sample=sample,
        look=look,
    )
