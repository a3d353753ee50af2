"""The training loop, one for all tasks.

A task is a value, ``Task``: pure functions that read data, make a model, give batches, a loss and
scores. The loop knows nothing of what they are about. ``python -m experiments train TASK`` runs::

    for step, batch:  weights, state = AdamW(weights, state, gradient of sum(loss) / count)
    now and then:     score the validation split, save the state, keep the best weights
    at the end:       score the test split with the best weights, write the record

A step depends on the seed, its number and the state, on nothing else: a run that was killed and
goes on from its last checkpoint gives the same bits as one that was not, on the same machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from flax import nnx

from experiments.report.ladders import Shown
from experiments.training import runs
from experiments.training.checkpoints import BEST, LAST, Checkpoints
from experiments.training.config import Config
from experiments.training.progress import Metrics as Metrics
from experiments.training.progress import Progress, show
from experiments.training.steps import Batch, Model, State, steps
from experiments.training.steps import Loss as Loss

C = TypeVar("C", bound=Config)
D = TypeVar("D")


@dataclasses.dataclass(frozen=True)
class Task(Generic[C, D]):
    """What the loop needs to know, as functions. None of them keeps state."""

    name: str
    presets: Mapping[str, C]
    """Named configurations; the first is the default."""
    data: Callable[[C], D]
    """All the data, split."""
    init: Callable[[C, D, nnx.Rngs], Model]
    """A fresh model. One without parameters is fitted here, and is not trained."""
    batches: Callable[[C, D, int], Iterator[Batch]]
    """Training batches without end, from that of a step on: the same whenever asked for."""
    loss: Callable[[C, Model, Batch], Loss]
    """Of a batch; traced by jit."""
    evaluate: Callable[[C, Model, D, str], Metrics]
    """Scores on one split, ``"validation"`` or ``"test"``."""
    metric: str
    """By which of the scores the best weights are kept, and runs are compared."""
    larger: bool
    """Whether more of it is better."""
    unit: str
    """What a loss counts, for the speed."""
    signature: Callable[[], str] | None = None
    """How the metric is counted, where that has a name."""
    sample: Callable[[C, Model, D, str | None], str] | None = None
    """Examples of what the model makes of the test split, or of a text, to read."""
    look: Callable[[C, Model, D, str | None], Any] | None = None
    """Who attends to whom, for one example of the test split, or a text; see ``look``."""
    pictures: Callable[[C, Model, D, Path], list[Path]] | None = None
    """Draws what the model does into files whose names start as the path; returns the files."""
    shown: Shown | None = None
    """Its own table and plot of many runs, where those of most tasks do not fit; see ``report``."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """What a run leaves beside its results, and whether it goes on. No part of what it is."""

    out: Path = Path("runs")
    """The folder that runs go to, each in one of its own, TASK/NAME."""
    name: str | None = None
    """Of the run; default MODEL-PRESET-seedSEED."""
    resume: bool = False
    """Go on from the last checkpoint of the run of this name, where there is one."""
    overwrite: bool = False
    """Take the place of a run of this name."""
    record: Path | None = None
    """A folder whose TASK.jsonl the record is also appended to; experiments/results is ours."""
    save_every: int | None = None
    """Save the state after so many steps too; it is saved at each evaluation in any case."""
    tensorboard: bool = False
    """Also write loss and scores for TensorBoard (the package tensorboardX)."""
    profile: bool = False
    """Trace ten steps with JAX's profiler, into the folder of the run."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What ``train`` returns: the model with the best weights, ready to be evaluated."""

    model: Model
    state: State | None
    progress: Progress


def run(task: Task[C, D], config: C, *, preset: str, flags: Flags) -> dict[str, Any]:
    """Trains, scores on the test split, writes the record; returns it."""
    folder = runs.start(task, config, preset=preset, flags=flags)
    data = task.data(config)
    trained = train(task, config, data, folder, flags)
    test = task.evaluate(config, trained.model, data, "test")
    files = [] if task.pictures is None else task.pictures(config, trained.model, data, folder)
    record = runs.record(task, config, preset, trained, test, count_parameters(trained.model))
    written = runs.write_record(record, folder, flags.record)
    progress = trained.progress
    print(f"{task.name}: {progress.step} steps in {progress.seconds:.0f} s, seed {config.seed}")
    print(f"test: {show(test)}")
    for file in (*files, *written):
        print(f"wrote {file}")
    return record


def train(
    task: Task[C, D], config: C, data: D, folder: Path, flags: Flags | None = None
) -> Trained:
    """The loop.

    Raises:
      FloatingPointError: the loss became NaN or infinite; the message names the step and a file
        that holds the batch.
    """
    flags = Flags() if flags is None else flags
    model = task.init(config, data, nnx.Rngs(config.seed))
    progress = Progress(task.metric, task.larger)
    if not count_parameters(model):
        scores = task.evaluate(config, model, data, "validation")
        return Trained(model, None, progress.closed(scores))
    how = steps(task.loss, config, model)
    state, checkpoints = how.first, Checkpoints(folder / "checkpoints")
    if flags.resume and (saved := checkpoints.restore(LAST, state)) is not None:
        state, progress = saved.state, Progress.from_notes(progress, saved.notes)
        print(f"{folder}: goes on from step {saved.step}")
    state = how.put(state)
    limit = math.inf if config.minutes is None else 60 * config.minutes
    at = {round(x) for x in np.linspace(0, config.steps, config.evaluations + 1)[1:]}
    with progress.shown(task, config, folder, flags) as shown:
        done = progress.finished or progress.step >= config.steps
        batches = task.batches(config, data, progress.step)
        while not done:
            step, batch = progress.step, next(batches)
            with shown.profile(step):
                state, *said = how.update(state, batch, step)
                loss, number, norm = map(float, said)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"{task.name}: the loss is {loss} at step {step + 1}; its batch is in "
                    f"{_write_batch(batch, folder, step + 1)}"
                )
            progress = shown.step(progress, loss, number, norm)
            late = progress.seconds > limit
            if progress.step in at or late:
                scores = task.evaluate(config, how.model(state.weights), data, "validation")
                progress, better = shown.scores(progress, scores)
                if better:
                    checkpoints.save(BEST, progress.step, state.weights, progress.notes())
                done = progress.step == config.steps or late
                done |= config.patience is not None and progress.since_best >= config.patience
                progress = progress._replace(finished=done and not late)
                checkpoints.save(LAST, progress.step, state, progress.notes())
            elif flags.save_every is not None and progress.step % flags.save_every == 0:
                checkpoints.save(LAST, progress.step, state, progress.notes())
    best = checkpoints.restore(BEST, state.weights)
    weights = state.weights if best is None else best.state
    return Trained(how.model(weights), state, progress)


def _write_batch(batch: Batch, folder: Path, step: int) -> Path:
    file = folder / f"batch-{step}.npz"
    leaves, _ = jax.tree.flatten_with_path(batch)
    file.parent.mkdir(parents=True, exist_ok=True)
    named = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}
    arrays: dict[str, Any] = {name or "batch": np.asarray(x) for name, x in named.items()}
    np.savez(file, **arrays)
    return file


def count_parameters(model: Model) -> int:
    """How many numbers are trained; 0 for a model that is none of Flax's."""
    if not isinstance(model, nnx.Module):
        return 0
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
