"""A training task as a value: pure functions, and how its runs and its attention are displayed.

The loop (``train``) and the tables (``experiments.report``) know a task only as a ``Task``; a task
imports this module and neither of those.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

from experiments.training.config import TrainConfig
from experiments.training.search import Space

C = TypeVar("C", bound=TrainConfig)
D = TypeVar("D")

Array = jax.Array | np.ndarray  # NumPy outside of jit, JAX inside
Model = Any  # an nnx.Module, or any object for a model that is fitted by counting
Batch = Any  # a pytree of arrays with a leading axis of examples: what the task's loss takes
Metrics = dict[str, float]


class Rows(NamedTuple):
    """Which rows of every batch a process needs: parts ``start`` to ``stop`` of ``parts``.

    >>> Rows(1, 3, parts=4).of(np.arange(8))
    array([2, 3, 4, 5])
    """

    start: int = 0
    stop: int = 1
    parts: int = 1

    def slice(self, size: int) -> slice:
        """The rows of a batch of this size.

        Raises:
          ValueError: the batch cannot be split equally.
        """
        if size % self.parts:
            raise ValueError(
                f"a batch must be a multiple of the {self.parts} devices along data, got {size} "
                f"examples: use fewer devices, or another batch_size"
            )
        part = size // self.parts
        return slice(self.start * part, self.stop * part)

    def of(self, batch: np.ndarray) -> np.ndarray:
        """These rows of an array of the whole batch."""
        return batch[self.slice(len(batch))]

    def size_of_batch(self, size: int) -> int:
        """The size of a batch of which this process has ``size`` rows."""
        return size * self.parts // (self.stop - self.start)


ALL = Rows()


class Loss(NamedTuple):
    """What ``Task.loss`` returns: a sum, and the number of terms. Training minimizes the mean."""

    total: jax.Array
    number: jax.Array


# --- Attention, for `look`.


class AttentionView(NamedTuple):
    """The attention weights of one kind of attention in a model, for one example."""

    title: str
    """What attends to what: "encoder", "translation to source"."""
    queries: Sequence[str]
    """The tokens that attend, T of them."""
    keys: Sequence[str]
    """The tokens that are attended to, S of them."""
    weights: np.ndarray
    """Probabilities, ``[layers heads T S]``."""
    note: str = ""
    """What else a reader should know."""


def self_attention(
    title: str, tokens: Sequence[str], weights: Mapping[str, Any]
) -> list[AttentionView]:
    """Self-attention in all layers, from what ``record_weights`` recorded for one example."""
    stacked = np.stack([np.asarray(w[0]) for w in weights.values()])
    return [AttentionView(title, tokens, tokens, stacked)]


def encoder_and_decoder(
    source: str,
    sources: Sequence[str],
    target: str,
    targets: Sequence[str],
    weights: Mapping[str, Any],
) -> list[AttentionView]:
    """Cross-attention of an ``EncoderDecoder``, then the self-attention of encoder and decoder.

    Args:
      source, target: how the two texts are titled.
      sources, targets: their tokens.
      weights: what ``record_weights`` recorded for one example.
    """

    def select(prefix: str, part: str) -> np.ndarray:
        found = [w[0] for name, w in weights.items() if name.startswith(prefix) and part in name]
        return np.stack([np.asarray(w) for w in found])

    return [
        AttentionView(
            f"{target} to {source}", targets, sources, select("decoder", ".cross_attention")
        ),
        AttentionView(source, sources, sources, select("encoder", ".attention")),
        AttentionView(target, targets, targets, select("decoder", ".attention")),
    ]


# --- Many runs, for `report`.

Record = dict[str, Any]  # the result of a run: a line of TASK.jsonl, see `runs.record`

COLORS = ("#7a7a7a", "#1b9e77", "#d95f02", "#4a5fc1", "#b0307a", "#8a6d00", "#1f2d3d")


class Rung(NamedTuple):
    """All runs that differ only in their seed. The rungs on one data set are a ladder."""

    name: str
    runs: list[Record]

    @property
    def model(self) -> str:
        """The name without options."""
        return self.runs[0]["model"]

    def scores(self, metric: str) -> list[float]:
        """One per seed."""
        return [run["test"][metric] for run in self.runs]

    def mean(self, metric: str) -> float:
        """Over seeds."""
        return statistics.fmean(self.scores(metric))

    def spread(self, metric: str) -> float:
        """The sample standard deviation over seeds; 0 for a single seed."""
        scores = self.scores(metric)
        return statistics.stdev(scores) if len(scores) > 1 else 0.0


class LadderReport(NamedTuple):
    """How a ladder is reported: functions from its rungs to a table, a sentence and a plot."""

    table: Callable[[list[Rung]], list[str]]
    """The lines of a Markdown table."""
    comment: Callable[[list[Rung]], str]
    """A sentence or two below the table."""
    caption: Callable[[str], str]
    """What the plot shows, from the ladder's title."""
    draw: Callable[[list[Rung], Path], None]
    """Writes the plot."""


# --- The task.


@dataclasses.dataclass(frozen=True)
class Task(Generic[C, D]):
    """What the loop needs, as pure functions."""

    name: str
    presets: Mapping[str, C]
    """Named configurations; the first is the default."""
    data: Callable[[C], D]
    """Reads all the data, split."""
    init: Callable[[C, D, nnx.Rngs], Model]
    """Makes a fresh model; traced over several devices, so that each only creates its shards. A
    model without parameters is fitted here and not trained."""
    batches: Callable[[C, D, int, Rows], Iterator[Batch]]
    """An endless iterator of training batches from a given step on, of each only the given rows. It
    must be a function of its arguments: a resumed run then gets the batches that it would have had,
    and the rows of all processes together are the batch of one."""
    loss: Callable[[C, Model, Batch], Loss]
    """The loss of a batch; traced by jit."""
    evaluate: Callable[[C, Model, D, str], Metrics]
    """Scores on one split, ``"validation"`` or ``"test"``."""
    metric: str
    """The score that selects the best weights and that runs are compared by."""
    larger: bool
    """Whether larger is better."""
    unit: str
    """What the loss counts, for the speed."""
    untraced: Sequence[str] = ()
    """Values of the option ``model`` for which ``init`` is not traced: it computes with data, or
    reads a checkpoint."""
    signature: Callable[[], str] | None = None
    """How the metric was computed, where a standard has a name for that (sacreBLEU's signature)."""
    changes: Mapping[tuple[str, str], Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Options that a model has in a preset in place of the preset's own, by preset and model."""
    spaces: Mapping[str, Space] = dataclasses.field(default_factory=dict)
    """The options of each trained model that ``sweep`` searches, by model."""
    real: Callable[[Batch], Array] | None = None
    """Which tokens of a batch are real, False for padding: the run reports how much padding it
    had."""
    sample: Callable[[C, Model, D, str | None], str] | None = None
    """Outputs to read, for examples of the test split or for a given text."""
    look: Callable[[C, Model, D, str | None], list[AttentionView]] | None = None
    """Attention weights, for one example of the test split or for a given text."""
    pictures: Callable[[C, Model, D, Path], list[Path]] | None = None
    """Draws pictures into the folder of the run; returns the files."""
    report: LadderReport | None = None
    """A table and plot of its own, for a task whose runs the usual ones do not fit."""

    def configured(self, preset: str, **options: Any) -> C:
        """The configuration of a preset for the model among the options, with these on top.

        Raises:
          ValueError: the model has options of its own, but not in this preset.
        """
        config = self.presets[preset]
        model = options.get("model", getattr(config, "model", ""))
        known = [other for other, name in self.changes if name == model]
        if known and preset not in known:
            raise ValueError(
                f"preset must be {' or '.join(known)} for the model {model}, got {preset}: its "
                f"options have not been chosen for others"
            )
        return dataclasses.replace(config, **{**self.changes.get((preset, model), {}), **options})
