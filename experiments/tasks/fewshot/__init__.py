"""How many labelled questions a model needs: TREC, of which few are told what they ask for.

::

    python -m experiments train fewshot --model adapted --examples 30 --learning-rate 6e-3
    python -m experiments fewshot                     # every model, number and seed, and a plot

The ladder: ``naive_bayes`` and ``text_cnn`` as for ``trec``; ``transformer``, an encoder and the
mean of its tokens; ``finetuned``, the same after it learned to guess words that were left out of
all the training questions, without their classes (Devlin et al. 2019, "BERT"); ``adapted``, which
learned that too, and of which then only low-rank changes of some projections are trained, beside
the classes' own (Hu et al. 2022, "LoRA").

The labelled questions are drawn by the seed, so five seeds are five draws. Each draw has one of
every class, then as many of each as the data has in proportion, and is part of every larger one of
its seed. No weights are chosen: those of the last step count, since the validation split has more
labelled questions than most draws. The words known are those of all training questions.

Data: that of ``trec``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models import Encoder
from attention_jax.nn import low_rank
from attention_jax.nn.linear import Linear
from experiments.datasets import text
from experiments.datasets.text import PAD, UNKNOWN
from experiments.tasks import classification, trec
from experiments.tasks.classification import Batch, Data, Split
from experiments.tasks.fewshot import curve
from experiments.tasks.fewshot.curve import ALL
from experiments.training.config import at_least_1
from experiments.training.losses import cross_entropy
from experiments.training.steps import trainer
from experiments.training.task import Loss, Task

PRETRAINED = ("finetuned", "adapted")
ADAPTED = ("query", "value")  # projections that adapted changes


@dataclasses.dataclass(frozen=True)
class Config(classification.Config):
    """The options of this task."""

    model: Literal["naive_bayes", "text_cnn", "transformer", "finetuned", "adapted"] = "adapted"  # type: ignore[assignment]
    """The rung of the ladder."""
    examples: int = 100
    """Labelled questions, drawn by the seed; 0 is all there are."""
    read: int = 24
    """Words of a question that training reads; of few questions does that leave words out."""
    rank: int = 8
    """Of the changes of adapted."""
    pretraining_steps: int = 500
    """Updates in which finetuned and adapted learn to guess words, before they see a class."""
    pretraining_batch_size: int = 64
    """Questions per update there."""
    pretraining_rate: float = 2e-3
    """The learning rate there."""
    hidden: int = 3
    """Words left out of a question there, at most; no more than every third."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "read", "rank", "pretraining_steps", "pretraining_batch_size", "hidden")
        if self.examples != ALL and self.examples < len(trec.CLASSES):
            raise ValueError(
                f"examples must be 0, all there are, or at least {len(trec.CLASSES)}, one of each "
                f"class, got {self.examples}"
            )
        if not self.pretraining_rate > 0:
            raise ValueError(f"pretraining_rate must be above 0, got {self.pretraining_rate}")


PRESETS = {
    "cpu": Config(
        steps=300,
        batch_size=32,
        learning_rate=2e-3,
        width=64,
        depth=2,
        dropout=0.1,
        word_dropout=0.1,
        evaluations=1,
        read=20,
        pretraining_steps=1500,
    ),
    "smoke": Config(
        steps=8,
        batch_size=16,
        evaluations=1,
        examples=50,
        width=16,
        heads=2,
        depth=1,
        filters=8,
        word_width=16,
        read=8,
        rank=2,
        pretraining_steps=8,
        pretraining_batch_size=16,
        synthetic=True,
    ),
    "accelerator": Config(
        steps=1000,
        batch_size=64,
        width=256,
        heads=8,
        dropout=0.2,
        evaluations=1,
        pretraining_steps=10_000,
        pretraining_batch_size=256,
        pretraining_rate=1e-3,
    ),
}


# --- Data.


def data(config: Config) -> Data:
    """That of ``trec``, with few of the training questions; all of them are ``"unlabelled"``.

    Raises:
      ValueError: there are fewer examples than asked for.
    """
    found = classification.data(trec.CLASSES, trec.read, config)
    whole = found.splits["train"]
    if config.examples > len(whole.labels):
        raise ValueError(
            f"examples must be at most {len(whole.labels)}, the training questions, got "
            f"{config.examples}"
        )
    index = draw(whole.labels, config.seed)[: config.examples or None]
    few = Split(
        [whole.rows[i] for i in index],
        whole.lengths[index],
        whole.labels[index],
        [whole.texts[i] for i in index],
    )
    unlabelled = whole._replace(labels=np.full_like(whole.labels, -1))
    return found._replace(splits=found.splits | {"train": few, "unlabelled": unlabelled})


def draw(labels: np.ndarray, seed: int) -> np.ndarray:
    """An order of examples, every beginning of which is a stratified draw.

    One of each class comes first. After that the ``i``-th of a class with ``n`` comes at ``i / n``
    of the way, so that every class has its share at any time.

    >>> labels = np.array([0] * 6 + [1] * 3)
    >>> [labels[draw(labels, seed=0)[:n]].tolist().count(0) for n in (2, 3, 6)]
    [1, 2, 4]
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    at = np.empty(len(labels))
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        at[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
        at[mine[0]] = -1
    return order[np.argsort(at[order], kind="stable")]


def endless(n: int, size: int, seed: int, step: int) -> Iterator[np.ndarray]:
    """Indices of exactly ``size`` of ``n`` examples a batch, which go over into the next pass.

    >>> np.concatenate(list(itertools.islice(endless(3, 4, seed=0, step=0), 3))).tolist()
    [2, 0, 1, 2, 0, 1, 2, 1, 0, 2, 1, 0]
    """
    for number in itertools.count(step):
        passes, places = np.divmod(np.arange(number * size, (number + 1) * size), n)
        orders = {p: np.random.default_rng([seed, p]).permutation(n) for p in set(passes.tolist())}
        yield np.array([orders[p][i] for p, i in zip(passes.tolist(), places, strict=True)])


def batches(config: Config, data: Data, step: int) -> Iterator[Batch]:
    """All of one shape, however few examples there are."""
    split = data.splits["train"]
    for index in endless(len(split.rows), config.batch_size, config.seed, step):
        yield Batch(_words(config, split, index), split.labels[index])


def _words(config: Config, split: Split, index: np.ndarray) -> np.ndarray:
    return text.padded([split.rows[i][: config.read] for i in index], length=config.read)


# --- Guessing words, before any class is seen.


class Hidden(NamedTuple):
    """Words ``[B T]``, some of them hidden; where, and which they were, both ``[B M]``."""

    words: Any
    places: Any
    targets: Any


class WordModel(nnx.Module):
    """An encoder, and a head that guesses words; a hidden word is an unknown one.

    Source: Devlin et al. 2019, "BERT", section 3.1.
    """

    def __init__(self, encoder: Encoder, *, rngs: nnx.Rngs) -> None:
        E = encoder.config.layers.features
        self.encoder = encoder
        self.transform = Linear(E, E, rngs=rngs)
        self.norm = nnx.LayerNorm(E, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(encoder.config.vocabulary))

    def __call__(self, words: Any, places: Any) -> jax.Array:
        """Logits ``[B M V]`` of the words at ``places [B M]``."""
        words = jnp.asarray(words)
        x = self.encoder.hidden(words, real=words != PAD)
        x = jnp.take_along_axis(x, jnp.asarray(places)[..., None], axis=1)
        x = self.norm(jax.nn.gelu(self.transform(x)))
        # The table with the scale that it has below: else it grows until layers add little to it.
        scale = self.encoder.embed.scale / x.shape[-1] ** 0.5
        return scale * self.encoder.embed.logits(x) + self.bias[...]


def hidden(config: Config, data: Data) -> Iterator[Hidden]:
    """Batches of all training questions, each time with other words hidden."""
    split, M = data.splits["unlabelled"], config.hidden
    indices = endless(len(split.rows), config.pretraining_batch_size, config.seed, 0)
    for step, index in enumerate(indices):
        rng = np.random.default_rng([config.seed, step, M])
        words = _words(config, split, index)
        known = words > UNKNOWN
        places = np.argsort(np.where(known, rng.random(words.shape), 2.0), axis=1)[:, :M]
        were = np.take_along_axis(words, places, 1)
        number = np.minimum(np.maximum(known.sum(1) // 3, 1), known.sum(1))
        chosen = np.arange(places.shape[1]) < number[:, None]
        left = words.copy()
        np.put_along_axis(left, places, np.where(chosen, UNKNOWN, were), 1)
        yield Hidden(left, places.astype(np.int32), np.where(chosen, were, PAD))


def guessing_loss(config: Any, model: WordModel, batch: Hidden) -> Loss:
    """Cross-entropy of the hidden words."""
    each = cross_entropy(model(batch.words, batch.places), batch.targets)
    chosen = batch.targets != PAD
    return Loss(jnp.where(chosen, each, 0).sum(), chosen.sum())


class Pretrained(NamedTuple):
    """What guessing words leaves."""

    weights: Any
    """Of the encoder, in the memory of the host: training uses arrays up."""
    losses: list[float]


def pretrain(config: Config, data: Data) -> Pretrained:
    """Trains a fresh encoder to guess words; a function of the seed, whatever the examples."""
    fresh: Any = classification.init(config, data, nnx.Rngs(config.seed))
    options = dataclasses.replace(
        config,
        steps=config.pretraining_steps,
        batch_size=config.pretraining_batch_size,
        learning_rate=config.pretraining_rate,
        ema=0.0,
    )
    training = trainer(guessing_loss, options, WordModel(fresh.encoder, rngs=nnx.Rngs(config.seed)))
    state, losses = training.put(training.initial), []
    for step, batch in enumerate(itertools.islice(hidden(config, data), options.steps)):
        state, loss, *_ = training.update(state, batch, step)
        losses.append(loss)
    encoder = training.model(state.weights).encoder
    return Pretrained(jax.device_get(nnx.state(encoder, nnx.Param)), list(map(float, losses)))


# --- The task.


def init(
    config: Config,
    data: Data,
    rngs: nnx.Rngs,
    pretrain: Callable[[Config, Data], Pretrained] = pretrain,
) -> Any:
    """The rung; what is pretrained is pretrained here."""
    model = classification.init(config, data, rngs)
    if config.model not in PRETRAINED:
        return model
    before = pretrain(config, data)
    tenth = max(1, len(before.losses) // 10)
    first, last = (np.mean(some) for some in (before.losses[:tenth], before.losses[-tenth:]))
    print(f"guessed words in {len(before.losses)} steps, loss {first:.2f} to {last:.2f}")
    nnx.update(model.encoder, jax.tree.map(jnp.array, before.weights))
    if config.model == "finetuned":
        return model
    return low_rank(model, rank=config.rank, where=ADAPTED, train=("classify",), rngs=rngs)


TASK = Task(
    name="fewshot",
    presets=PRESETS,
    data=data,
    init=init,
    batches=batches,
    loss=classification.loss,
    evaluate=classification.evaluate,
    metric="accuracy",
    larger=True,
    unit="sentences",
    sample=classification.sample,
    look=classification.look,
    report=curve.REPORT,
)
