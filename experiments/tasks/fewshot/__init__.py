"""Few-shot question classification: TREC with labels for only some of the training questions.

::

    python -m experiments train fewshot --model adapted --examples 30 --learning-rate 6e-3
    python -m experiments fewshot                     # every model, size and seed, and a plot

Models: ``naive_bayes`` and ``text_cnn`` as for ``trec``; ``transformer``, an encoder with mean
pooling; ``finetuned``, the same after masked language modeling on all training questions without
their labels (Devlin et al. 2019, "BERT"); ``adapted``, pretrained likewise, of which training only
updates the classifier and low-rank changes of some projections (Hu et al. 2022, "LoRA");
``pretrained``, a published encoder of 22 million parameters, as for ``trec``;
``pretrained_adapted``, the same of which training only updates the classifier and low-rank changes.

The labeled questions are drawn with the seed, so five seeds are five draws. A draw has at least
one question of every class, then the class proportions of the data, and is a subset of every larger
draw with the same seed. The weights of the last step are scored: choosing by the validation split
would use more labels than most draws have. The vocabulary is that of all training questions.

Data: that of ``trec``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.nn import low_rank
from experiments.tasks import classification
from experiments.tasks.classification import Data
from experiments.tasks.fewshot import curve
from experiments.tasks.fewshot.config import CHANGES, PRESETS, Config
from experiments.tasks.fewshot.data import batches, load
from experiments.tasks.fewshot.pretraining import Pretrained, pretrain
from experiments.training.task import Model, Task
from experiments.training.tuning import ADAPTED

PRETRAINED = ("finetuned", "adapted")


def init(
    config: Config,
    data: Data,
    rngs: nnx.Rngs,
    pretrain: Callable[[Config, Data], Pretrained] = pretrain,
) -> Model:
    """A model ready for training on labels; runs the pretraining of models that have one."""
    model = classification.init(config, data, rngs)
    if config.model == "pretrained_adapted":
        return _adapted(config, model, rngs)
    if config.model not in PRETRAINED:
        return model
    pretrained = pretrain(config, data)
    n = len(pretrained.losses)
    tenth = max(1, n // 10)
    first, last = (np.mean(x) for x in (pretrained.losses[:tenth], pretrained.losses[-tenth:]))
    print(f"pretrained for {n} steps: masked word loss {first:.2f} to {last:.2f}")
    nnx.update(model.encoder, jax.tree.map(jnp.array, pretrained.weights))
    if config.model == "finetuned":
        return model
    return _adapted(config, model, rngs)


def _adapted(config: Config, model: Model, rngs: nnx.Rngs) -> Model:
    return low_rank(model, rank=config.rank, where=ADAPTED, train=("classify",), rngs=rngs)


TASK = Task(
    name="fewshot",
    presets=PRESETS,
    data=load,
    init=init,
    batches=batches,
    loss=classification.loss,
    evaluate=classification.evaluate,
    metric="accuracy",
    larger=True,
    unit="sentences",
    untraced=("naive_bayes", *PRETRAINED, *classification.FINETUNED),
    changes=CHANGES,
    real=classification.real,
    sample=classification.sample,
    look=classification.look,
    report=curve.REPORT,
)
