"""The training loop, shared by all tasks.

A task is a value, ``Task``: pure functions that read data, make a model, and give batches, a loss
and scores. ``python -m experiments train TASK`` runs::

    for step, batch:  weights, state = AdamW(weights, state, gradient of sum(loss) / count)
    now and then:     score the validation split, save the state, keep the best weights
    at the end:       score the test split with the best weights, write the record

A step is a function of the seed, its number and the state alone. A killed run that is resumed from
its last checkpoint therefore gives the same bits as an uninterrupted one, on the same machine.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments.training import runs
from experiments.training.checkpoints import BEST, LAST, Checkpoints
from experiments.training.layout import agreed, connect, layout
from experiments.training.progress import Progress, one_line
from experiments.training.runs import Flags
from experiments.training.steps import State, Trainer, trainer
from experiments.training.task import Batch, C, D, Model, Record, Task

# Steps after which several processes agree on whether the time is up.
CLOCK = 10


class Prepared(NamedTuple):
    """What a run needs for its first step."""

    model: Model
    training: Trainer | None
    """None for a model without parameters."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What ``train`` returns."""

    model: Model
    """With the best weights, in evaluation mode."""
    state: State | None
    """After the last step; None for a model without parameters."""
    progress: Progress


def run(task: Task[C, D], config: C, *, preset: str, flags: Flags) -> Record:
    """Trains, scores the test split and writes the record; returns it (in process 0).

    A run that is replaced stays as it is until the first step of the new one can be taken.
    """
    connect(flags.coordinator, flags.processes, flags.process)
    layout(flags.mesh, fsdp=flags.fsdp, devices=config.devices)  # raises before data are read
    runs.together(runs.check, task, config, preset=preset, flags=flags)
    data = task.data(config)
    prepared = prepare(task, config, data, flags)
    folder = runs.together(runs.start, task, config, preset=preset, flags=flags)
    trained = train(task, config, data, folder, flags, prepared)
    progress = trained.progress
    test = task.evaluate(config, trained.model, data, "test")
    if jax.process_index() > 0:
        return {}
    files = [] if task.pictures is None else task.pictures(config, trained.model, data, folder)
    record = runs.record(
        task,
        config,
        preset=preset,
        progress=progress,
        test=test,
        parameters=count_parameters(trained.model),
    )
    written = runs.write_record(record, folder, flags.record)
    print(f"{task.name}: {progress.step} steps in {progress.seconds:.0f} s, seed {config.seed}")
    if progress.tokens:
        share = 100 * progress.padding / progress.tokens
        number = len(progress.lengths)
        print(
            f"padding: {share:.1f} % of the tokens, in batches of {number} "
            f"{'length' if number == 1 else 'lengths'}"
        )
    print(f"test: {one_line(test)}")
    for file in (*files, *written):
        print(f"wrote {file}")
    return record


def prepare(task: Task[C, D], config: C, data: D, flags: Flags | None = None) -> Prepared:
    """Builds the model and traces its first step, so that a wrong option raises here."""
    flags = Flags() if flags is None else flags
    split = layout(flags.mesh, fsdp=flags.fsdp, devices=config.devices)
    model = split.create(
        lambda: runs.initial(task, config, data),
        traced=getattr(config, "model", None) not in task.untraced,
    )
    if not count_parameters(model):
        return Prepared(model, None)
    training = trainer(task.loss, config, model, split)
    training.check(training.initial, next(task.batches(config, data, 0, training.rows)))
    return Prepared(model, training)


def train(
    task: Task[C, D],
    config: C,
    data: D,
    folder: Path,
    flags: Flags | None = None,
    prepared: Prepared | None = None,
) -> Trained:
    """Runs the loop.

    Args:
      task, config, data: what is trained.
      folder: of the run.
      flags: of the command.
      prepared: what ``prepare`` returned for them; default: it is called here.

    Raises:
      FloatingPointError: the loss became NaN or infinite; the message names the step and a file
        that holds the batch.
    """
    flags = Flags() if flags is None else flags
    prepared = prepare(task, config, data, flags) if prepared is None else prepared
    model, training = prepared
    progress = Progress(task.metric, task.larger)
    if training is None:
        scores = task.evaluate(config, model, data, "validation")
        return Trained(model, None, progress.closed(scores))
    state, checkpoints = training.put(training.initial), Checkpoints(folder / "checkpoints")
    if flags.resume and (saved := checkpoints.restore(LAST, state)) is not None:
        state, progress = saved.state, Progress.from_notes(progress, saved.notes)
        if jax.process_index() == 0:
            print(f"{folder}: resumed from step {saved.step}")
    limit = math.inf if config.minutes is None else 60 * config.minutes
    evaluate_at = {round(x) for x in np.linspace(0, config.steps, config.evaluations + 1)[1:]}
    with progress.logged(
        folder,
        name=task.name,
        unit=task.unit,
        steps=config.steps,
        tensorboard=flags.tensorboard,
        profile=flags.profile,
    ) as log:
        done = progress.finished or progress.step >= config.steps
        batches = task.batches(config, data, progress.step, training.rows)
        following = None if done else next(batches)
        while not done:
            step, batch = progress.step, following
            if task.real is not None:
                progress = progress.fed(np.asarray(task.real(batch)))
            with log.profile(step):
                state, *scalars = training.update(state, batch, step)
                following = next(batches)  # while the devices compute
                loss, number, norm = map(float, jax.device_get(scalars))
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"{task.name}: the loss is {loss} at step {step + 1}; its batch is in "
                    f"{_write_batch(batch, folder, step + 1)}"
                )
            progress = log.step(progress, loss, number, norm)
            late = progress.seconds > limit
            if jax.process_count() > 1 and limit < math.inf:  # they have clocks of their own
                late = progress.step % CLOCK == 0 and bool(agreed(int(late)))
            if progress.step in evaluate_at or late:
                model = training.model(state.weights)
                scores = agreed(task.evaluate(config, model, data, "validation"))
                progress, better = log.scores(progress, scores)
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
    return Trained(training.model(weights), state, progress)


def _write_batch(batch: Batch, folder: Path, step: int) -> Path:
    part = f"-process-{jax.process_index()}" if jax.process_count() > 1 else ""
    file = folder / f"batch-{step}{part}.npz"
    leaves, _ = jax.tree.flatten_with_path(batch)
    file.parent.mkdir(parents=True, exist_ok=True)
    named = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}
    arrays: dict[str, Any] = {name or "batch": np.asarray(x) for name, x in named.items()}
    np.savez(file, **arrays)
    return file


def count_parameters(model: Model) -> int:
    """Number of trained parameters; 0 for a model that is not a Flax module."""
    if not isinstance(model, nnx.Module):
        return 0
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
