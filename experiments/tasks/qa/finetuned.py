"""Answers by a pretrained encoder: question and window as tokens, and the reader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.models import reader
from attention_jax.models.pretrained import Tokenizer
from experiments.datasets import text
from experiments.datasets.text import PAD
from experiments.models import finetuning
from experiments.models.finetuning import NONE
from experiments.tasks.qa.answers import Split
from experiments.tasks.qa.config import Config
from experiments.tasks.qa.models import spans
from experiments.training.task import Array


class Encoded(NamedTuple):
    """A question and a window as tokens: their indices, their types, where its words start."""

    tokens: list[int]
    types: list[int]
    starts: list[int]


class TokenInputs(NamedTuple):
    """Tokens and types ``[B T]``, and the place of the first token of each word ``[B T]``."""

    tokens: Array
    types: Array
    starts: Array


def encode(tokenizer: Tokenizer, split: Split, windows: Sequence[Any]) -> list[Encoded]:
    """Windows as tokens; words past the end of what the encoder reads start at ``NONE``."""
    if not windows:
        return []
    questions = [split.questions[window.question] for window in windows]
    passages = [split.passages[question.passage].words for question in questions]
    cut = [words[x.start : x.stop] for words, x in zip(passages, windows, strict=True)]
    found = []
    for row, words in zip(tokenizer([q.words for q in questions], cut).rows, cut, strict=True):
        starts = finetuning.first_tokens(row, len(words), text=1)
        found.append(Encoded(row.tokens.tolist(), row.types.tolist(), starts))
    return found


def padded(rows: Sequence[Encoded], length: int, count: int | None = None) -> TokenInputs:
    """Rows as arrays, padded to ``length`` tokens and, if given, ``count`` rows."""
    tokens, types, starts = zip(*rows, strict=True)
    places = [[i + 1 for i in row] for row in starts]  # padding is 0, which becomes NONE
    return TokenInputs(
        text.padded(tokens, length, count),
        text.padded(types, length, count),
        text.padded(places, length, count) - 1,
    )


class PretrainedReader(nnx.Module):
    """Scores each span of words by the encoded first tokens of its first and last word::

    score_ij = start(h_i) + end(h_j) + length_{j - i}
    """

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.model = reader(finetuning.encoder(config), rngs=rngs)
        self.lengths = nnx.Param(jnp.zeros(config.longest))
        self.train()

    def __call__(self, inputs: Any) -> jax.Array:
        """Scores ``[B T longest]`` of spans by first word and number of words after it."""
        tokens, types, starts = (jnp.asarray(x) for x in inputs)
        logits = self.model(tokens, real=tokens != PAD, types=types)
        places = jnp.maximum(starts, 0)
        ends = [jnp.take_along_axis(x, places, axis=1) for x in logits]
        lengths = self.lengths[...].astype(jnp.float32)
        return spans(jnp.stack(ends, axis=-1), lengths, starts != NONE)
