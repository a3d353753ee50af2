"""Fine-tuning: a pretrained encoder, its tokens, the lengths of batches, and classifiers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.backends import IMPLEMENTATIONS
from attention_jax.models import Classifier, Encoder, classifier, pretrained
from attention_jax.models.pretrained import Row, Tokenizer
from attention_jax.models.pretrained.folders import read_config
from attention_jax.models.pretrained.hub import local
from attention_jax.nn.linear import Linear
from experiments.datasets import text
from experiments.datasets.text import PAD
from experiments.models.sentences import WordDropout
from experiments.training.search import Log, OneOf, Space
from experiments.training.task import Array
from experiments.training.text_config import PretrainedConfig

# What the model ``pretrained`` changes in the preset cpu of every task. With frozen embeddings the
# optimizer has no table of 12 million numbers to update, which is a sixth of a step on sentences.
OPTIONS: Mapping[str, Any] = {
    "batch_size": 32,
    "learning_rate": 2e-4,
    "layer_decay": 0.9,
    "freeze": 0,
    "schedule": "cosine",
    "warmup": 0.1,
    "beta2": 0.98,
    "weight_decay": 0.01,
    "label_smoothing": 0.0,
    "dropout": 0.1,
    "ema": 0.0,
    "minutes": 15.0,
}
SMOKE: Mapping[str, Any] = {**OPTIONS, "batch_size": 4, "steps": 3}
# For one GPU, where the embeddings cost little. Not yet run on one: only traced, in the tests.
ON_ACCELERATOR: Mapping[str, Any] = {"freeze": None, "dtype": "bfloat16", "minutes": None}
ACCELERATOR: Mapping[str, Any] = {**OPTIONS, "batch_size": 64, **ON_ACCELERATOR}

# The options that a sweep of ``pretrained`` searches.
SPACE: Space = {
    "learning_rate": Log(5e-5, 5e-4),
    "layer_decay": OneOf((0.8, 0.9, 1.0)),
    "weight_decay": OneOf((0.0, 0.01, 0.1)),
    "dropout": OneOf((0.0, 0.1, 0.2)),
}

NONE = -1  # the place of a word that the encoder does not read
PADDING = 0.08  # of the tokens of an epoch; batches between two lengths add a little


def folder(config: PretrainedConfig) -> Path:
    """The folder of the checkpoint.

    Raises:
      FileNotFoundError: a name that the hub does not know.
      ModuleNotFoundError: the package of the default checkpoint is not installed.
    """
    return pretrained.minilm() if config.checkpoint is None else local(config.checkpoint)


def tokenizer(config: PretrainedConfig) -> Tokenizer:
    """The tokenizer of the checkpoint.

    Raises:
      ValueError: its padding token is not ``PAD``, by which the models know padding.
    """
    found = pretrained.load_tokenizer(folder(config))
    if found.strings([PAD]) != ["[PAD]"]:
        raise ValueError(
            f"checkpoint must have the token [PAD] at {PAD}, as those of BERT, got "
            f"{found.strings([PAD])[0]}: {folder(config)}"
        )
    return found


def encoder(config: PretrainedConfig) -> Encoder:
    """The encoder of the checkpoint, with the dropout rate of the options.

    The attention probabilities have no dropout, which would need random numbers for every pair of
    tokens.

    Raises:
      ValueError: a checkpoint of another family; an ``attention`` that it cannot use.
    """
    if config.attention is not None and config.attention not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention must be one of {', '.join(IMPLEMENTATIONS)} for pretrained, got "
            f"{config.attention}"
        )
    family = read_config(folder(config)).get("model_type")
    if family != "bert":
        raise ValueError(f"checkpoint must be of the family bert, got {family}: {folder(config)}")
    rates = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": 0.0}
    model: Encoder = pretrained.load(
        folder(config),
        config={"architectures": ["BertModel"], **rates},
        implementation=config.attention,
        seed=config.seed,
    )
    return model


def first_tokens(row: Row, words: int, text: int = 0) -> list[int]:
    """The index of the first token of each word of a text of the row; ``NONE`` if it has none.

    Args:
      row: of a text, or a pair, that was given as words.
      words: how many words the text has; those that were cut have no tokens.
      text: 0 for the first text, 1 for the second.
    """
    starts = [NONE] * words
    for i in reversed(np.flatnonzero(row.text == text).tolist()):
        starts[row.words[i]] = i
    return starts


def sizes(train: np.ndarray, *others: np.ndarray) -> tuple[int, ...]:
    """The fewest lengths that leave about ``PADDING`` of the training tokens as padding.

    Args:
      train: lengths of the training examples.
      *others: those of other splits; if one is longer, its length is the last.
    """
    few = text.few_edges(train, PADDING)
    longest = max((int(x.max()) for x in others), default=0)
    return few if longest <= few[-1] else (*few, longest)


@dataclasses.dataclass(frozen=True)
class Subwords:
    """The tokens of a checkpoint, with the methods of ``text.Words``.

    A text longer than the encoder reads loses its end; the tokenizer warns and counts.
    """

    tokenizer: Tokenizer
    symbols: tuple[tuple[str, str], ...] = ()
    """Words that are written as a symbol of the vocabulary: those that mark the nouns of a
    relation."""
    ordinary: Callable[[str], str] = str
    """Maps a text to the one that is tokenized, where the data are not ordinary text."""

    def __len__(self) -> int:
        return self.tokenizer.vocabulary

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, special ones included."""
        return [
            row.tokens.tolist() for row in self.tokenizer([self._written(x) for x in texts]).rows
        ]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.encode_all([text])[0]

    def strings(self, row: Sequence[int]) -> list[str]:
        """The tokens as they are written in the vocabulary."""
        return self.tokenizer.strings(row)

    def _written(self, text: str) -> str:
        text = self.ordinary(text)
        for word, symbol in self.symbols:
            text = text.replace(word, symbol)
        return text

    def marks(self) -> tuple[int, ...]:
        """The tokens of the symbols, each once.

        Raises:
          ValueError: the vocabulary lacks one.
        """
        found = []
        for symbol in dict.fromkeys(symbol for _, symbol in self.symbols):
            (row,) = self.tokenizer([symbol]).rows
            inside = row.tokens[row.text == 0]
            if len(inside) != 1 or self.tokenizer.strings(inside) != [symbol]:
                raise ValueError(
                    f"checkpoint must have the token {symbol!r} in its vocabulary, which marks a "
                    f"noun of the relation"
                )
            found.append(int(inside[0]))
        return tuple(found)

    def noise(self, rate: float, *, rngs: nnx.Rngs) -> WordDropout | None:
        """Replaces random tokens by ``[MASK]`` in training, but neither special ones nor marks.

        Args:
          rate: probability of each token; None is returned for 0.
          rngs: for dropout.

        Raises:
          ValueError: the vocabulary lacks ``[MASK]``.
        """
        if not rate:
            return None
        mask = self.tokenizer.backend.token_to_id("[MASK]")
        if mask is None:
            raise ValueError(
                "token_dropout needs a checkpoint with the token [MASK] in its vocabulary"
            )
        (empty,) = self.tokenizer([""]).rows
        kept = (PAD, *empty.tokens.tolist(), *self.marks())
        return WordDropout(rate, unknown=mask, kept=kept, rngs=rngs)


class Sentences(nnx.Module):
    """A head of classes on a pretrained encoder, from tokens padded with ``PAD``."""

    def __init__(self, model: Classifier, noise: WordDropout | None = None) -> None:
        self.model, self.noise = model, noise

    def __call__(self, tokens: Array) -> jax.Array:
        """Tokens ``[B T]`` to logits ``[B C]``."""
        read = tokens if self.noise is None else self.noise(tokens)
        return self.model(read, real=jnp.asarray(tokens) != PAD)


class Marked(nnx.Module):
    """Classifies a sentence by its encoded marks: the first token of each kind in ``marks``.

    Source: Baldini Soares et al. 2019, "Matching the Blanks: Distributional Similarity for Relation
    Learning", section 3.3 ("entity markers - entity start").
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        marks: tuple[int, ...],
        *,
        dropout_rate: float,
        noise: WordDropout | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.encoder, self.marks, self.noise = encoder, marks, noise
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        E = encoder.config.layers.features
        self.classify = Linear(len(marks) * E, classes, rngs=rngs)

    def __call__(self, tokens: Array) -> jax.Array:
        """Tokens ``[B T]`` to logits ``[B C]``; without a mark its first token is read."""
        tokens = jnp.asarray(tokens)
        read = tokens if self.noise is None else self.noise(tokens)
        x = self.encoder.hidden(read, real=tokens != PAD)
        places = jnp.stack([jnp.argmax(tokens == mark, axis=1) for mark in self.marks], axis=1)
        x = jnp.take_along_axis(x, places[..., None], axis=1)
        return self.classify(self.dropout(x.reshape(len(x), -1)))


def build(
    config: PretrainedConfig,
    labels: Sequence[str],
    marks: tuple[int, ...],
    *,
    dropout_rate: float,
    pool: str = "mean",
    noise: WordDropout | None = None,
    rngs: nnx.Rngs,
) -> Any:
    """The classifier of the model ``pretrained``: of marks if there are any, else of one vector.

    Args:
      config: the options.
      labels: names of the classes.
      marks: tokens whose vectors are classified; if there are none, ``pool`` makes the vector.
      dropout_rate: of what is classified.
      pool: ``"mean"`` of all tokens, or ``"first"``, the first token by way of BERT's pooler.
      noise: replaces tokens in training.
      rngs: for the head and dropout.

    Raises:
      ValueError: another ``pool`` than the mean beside marks.
    """
    if marks and pool != "mean":
        raise ValueError(
            f"pool must be mean where marked words are classified in place of a pooled vector, got "
            f"{pool}"
        )
    body = encoder(config)
    if marks:
        model: Any = Marked(
            body, len(labels), marks, dropout_rate=dropout_rate, noise=noise, rngs=rngs
        )
    else:
        head = classifier(body, labels, pool=pool, dropout_rate=dropout_rate, rngs=rngs)
        model = Sentences(head, noise)
    model.train()
    return model
