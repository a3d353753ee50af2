"""Masked language modeling on all training questions, without their labels.

Source: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", section 3.1.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models import Encoder
from attention_jax.nn.linear import Linear
from experiments.datasets.text import PAD, UNKNOWN
from experiments.tasks import classification
from experiments.tasks.classification import Data
from experiments.tasks.fewshot.config import Config
from experiments.tasks.fewshot.data import cycle, words_of
from experiments.training.losses import cross_entropy
from experiments.training.steps import trainer
from experiments.training.task import ALL, Array, Loss, Rows


class MaskedBatch(NamedTuple):
    """Words ``[B T]``, some of them masked; their positions and the original words, ``[B M]``.

    Unused entries have the target ``PAD``.
    """

    words: Array
    positions: Array
    targets: Array


class WordModel(nnx.Module):
    """An encoder with a head that predicts masked words; a masked word is an unknown one."""

    def __init__(self, encoder: Encoder, *, rngs: nnx.Rngs) -> None:
        E = encoder.config.layers.features
        self.encoder = encoder
        self.transform = Linear(E, E, rngs=rngs)
        self.norm = nnx.LayerNorm(E, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(encoder.config.vocabulary))

    def __call__(self, words: Array, positions: Array) -> jax.Array:
        """Logits ``[B M V]`` of the words at ``positions [B M]``."""
        words = jnp.asarray(words)
        x = self.encoder.hidden(words, real=words != PAD)
        x = jnp.take_along_axis(x, jnp.asarray(positions)[..., None], axis=1)
        x = self.norm(jax.nn.gelu(self.transform(x)))
        # The embedding table has the same scale here as at the input. Without it the table grows
        # until the layers add little to it.
        scale = self.encoder.embed.scale / x.shape[-1] ** 0.5
        return scale * self.encoder.embed.logits(x) + self.bias[...]


def masked_batches(config: Config, data: Data, rows: Rows = ALL) -> Iterator[MaskedBatch]:
    """Batches of all training questions, with other words masked each time; the given rows."""
    split, M = data.splits["unlabeled"], config.hidden
    indices = cycle(len(split.rows), config.pretraining_batch_size, config.seed, 0)
    for step, index in enumerate(indices):
        rng = np.random.default_rng([config.seed, step, M])
        order = rows.of(rng.random((len(index), config.read)))
        words = words_of(config, split, rows.of(index))
        known = words > UNKNOWN
        positions = np.argsort(np.where(known, order, 2.0), axis=1)[:, :M]
        original = np.take_along_axis(words, positions, 1)
        count = np.minimum(np.maximum(known.sum(1) // 3, 1), known.sum(1))
        chosen = np.arange(positions.shape[1]) < count[:, None]
        masked = words.copy()
        np.put_along_axis(masked, positions, np.where(chosen, UNKNOWN, original), 1)
        yield MaskedBatch(masked, positions.astype(np.int32), np.where(chosen, original, PAD))


def masked_loss(config: Any, model: WordModel, batch: MaskedBatch) -> Loss:
    """Cross-entropy of the masked words."""
    each = cross_entropy(model(batch.words, batch.positions), batch.targets)
    chosen = batch.targets != PAD
    return Loss(jnp.where(chosen, each, 0).sum(), chosen.sum())


class Pretrained(NamedTuple):
    """The result of pretraining."""

    weights: Any
    """Of the encoder, in host memory, since training donates device arrays."""
    losses: list[float]
    """Of each step."""


def pretrain(config: Config, data: Data) -> Pretrained:
    """Pretrains a fresh encoder; depends on the seed but not on which questions are labeled."""
    fresh: Any = classification.init(config, data, nnx.Rngs(config.seed))
    options = dataclasses.replace(
        config,
        steps=config.pretraining_steps,
        batch_size=config.pretraining_batch_size,
        learning_rate=config.pretraining_rate,
        ema=0.0,
    )
    model = WordModel(fresh.encoder, rngs=nnx.Rngs(config.seed))
    loop = trainer(masked_loss, options, model)
    state, losses = loop.put(loop.initial), []
    batches = itertools.islice(masked_batches(config, data, loop.rows), options.steps)
    for step, batch in enumerate(batches):
        state, loss, *_ = loop.update(state, batch, step)
        losses.append(loss)
    encoder = loop.model(state.weights).encoder
    return Pretrained(jax.device_get(nnx.state(encoder, nnx.Param)), list(map(float, losses)))
