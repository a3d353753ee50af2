"""ListOps: evaluate a nested expression of lists of digits.

::

    python -m experiments train listops                           # a transformer encoder
    python -m experiments train listops --model gru
    python -m experiments train listops --model window            # attends to 32 tokens each side
    python -m experiments train listops --model linear            # linear attention, elu + 1

``[MAX 2 9 [MIN 4 7 ] 0 ]`` is 9. The operators are MIN, MAX, MED (the median; of an even number of
arguments the mean of the middle two, rounded down) and SM (the sum modulo 10). The value of the
whole depends on information from the entire tree; the outermost operator and the counts of the
digits alone are enough for about a third of the answers. The score is the accuracy on the whole
expression. Training also predicts the value of every list in it, an encoder at the operator of the
list, a GRU at its end; ``--asked outermost`` trains on the whole only, as in the Long Range Arena.

Models: ``gru``, ``transformer``, and the transformer with ``window`` or ``linear`` attention.

Data: generated from the seed, without end. N. Nangia and S. Bowman 2018, "ListOps: A Diagnostic
Dataset for Latent Tree Learning", with the lengths of Y. Tay et al. 2021, "Long Range Arena". The
validation and test splits have 1,000 expressions each, the same for every seed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.datasets import text
from experiments.models.inference import map_by_length, record_weights
from experiments.tasks.common import check_attends, check_length, verdict
from experiments.tasks.listops.config import PRESETS, SPACES, Config
from experiments.tasks.listops.data import Batch, Data, Examples, batches, buckets, load
from experiments.tasks.listops.expressions import WORDS, evaluate_words
from experiments.tasks.listops.models import Recurrent, Transformer
from experiments.training.losses import cross_entropy, logits, scores
from experiments.training.task import AttentionView, Loss, Metrics, Model, Task, self_attention


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Model:
    """A fresh model; window and linear are the transformer with another mask or attention."""
    if config.model == "gru":
        return Recurrent(config, rngs=rngs)
    changes = {"window": {"mask": "window"}, "linear": {"attention": "linear"}}
    changed: Any = changes.get(config.model, {})
    return Transformer(dataclasses.replace(config, **changed), rngs=rngs)


def loss(config: Config, model: Model, batch: Batch) -> Loss:
    """Cross-entropy of the whole, plus the mean over all lists unless only the whole is asked."""
    n = jnp.float32(len(batch.labels))
    if config.asked == "outermost":
        each = cross_entropy(model(batch.tokens), batch.labels, config.label_smoothing)
        return Loss(each.sum(), n)
    at_tokens, lists = model.each(batch.tokens)
    each = jnp.where(lists, cross_entropy(at_tokens, batch.values, config.label_smoothing), 0)
    number = lists.sum(axis=1, dtype=jnp.float32)
    # The outermost list is the first operator for the encoder, the last closing bracket for a GRU.
    at = lists.shape[1] - 1 - jnp.argmax(lists[:, ::-1], axis=1)
    at = at if isinstance(model, Recurrent) else jnp.argmax(lists, axis=1)
    whole = jnp.take_along_axis(each, at[:, None], axis=1)[:, 0]
    return Loss((whole + each.sum(axis=1) / number).sum(), n)


def predict(config: Config, model: Model, rows: list[list[int]], size: int = 32) -> np.ndarray:
    """Logits ``[n 10]`` of the values of expressions."""

    def run(index: np.ndarray) -> np.ndarray:
        batch = [rows[i] for i in index]
        length = text.bucket(max(map(len, batch)), buckets(config))
        batch += batch[:1] * (size - len(batch))  # fill up with a row that is not empty
        return np.asarray(logits(model, text.padded(batch, length)))

    return np.stack(map_by_length(run, [len(row) for row in rows], size))


def evaluate(config: Config, model: Model, data: Data, split: str) -> Metrics:
    """Accuracy and mean cross-entropy of one split."""
    rows, labels = data.splits[split]
    return scores(predict(config, model, rows), labels)


def encode(config: Config, given: str) -> list[int]:
    """Token indices of a user's expression.

    Raises:
      ValueError: it is not an expression, or longer than the model reads.
    """
    evaluate_words(text.check(given).split())
    row = WORDS.encode(given)
    check_length(len(row), config.longest, "tokens", "longest")
    return row


def shortest(data: Data, n: int) -> Examples:
    """The ``n`` shortest expressions of the test split."""
    split = data.splits["test"]
    chosen = np.argsort([len(row) for row in split.rows], kind="stable")[:n]
    return Examples([split.rows[i] for i in chosen], split.labels[chosen])


def sample(config: Config, model: Model, data: Data, given: str | None) -> str:
    """The predicted value of a user's expression, or of the five shortest of the test split."""
    if given is not None:
        rows = [encode(config, given)]
        labels = [evaluate_words(given.split())]
    else:
        rows, values = shortest(data, 5)
        labels = values.tolist()
    guesses = predict(config, model, rows).argmax(axis=1)
    return "\n".join(
        f"{WORDS.decode(row)}\n    {guess} {verdict(str(guess), str(label))}"
        for row, guess, label in zip(rows, guesses, labels, strict=True)
    )


def look(config: Config, model: Model, data: Data, given: str | None) -> list[AttentionView]:
    """Attention weights of the encoder on an expression; default the shortest test expression."""
    check_attends(config, "transformer", "window")
    row = shortest(data, 1).rows[0] if given is None else encode(config, given)
    _, weights = record_weights(model, np.array([row], np.int32))
    tokens = [WORDS.words[i] for i in row]
    return self_attention("encoder", tokens, weights)


TASK = Task(
    name="listops",
    presets=PRESETS,
    spaces=SPACES,
    data=load,
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
