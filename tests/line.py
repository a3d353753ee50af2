"""A task that trains in an instant: the line ``y = 2 x - 1``. Also a program, to be killed.

``python tests/line.py FOLDER STEPS`` trains in ``FOLDER`` with a checkpoint after every step,
resuming from the last one, and writes the parameters to ``FOLDER/parameters.npz``. With
``HOST:PORT PROCESSES PROCESS PAUSE`` it is one of several processes, which pause before each step;
followed by ``plain``, there is no dropout.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.training.config import TrainConfig
from experiments.training.layout import connect
from experiments.training.runs import Flags
from experiments.training.task import Loss, Task
from experiments.training.train import train


class Line(nnx.Module):
    """With dropout, so that random keys matter."""

    def __init__(self, rngs, rate=0.1):
        self.linear = nnx.Linear(1, 1, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.linear(x))


def batches(config, data, step, rows):
    while True:
        x = np.random.default_rng([config.seed, step]).normal(size=(config.batch_size, 1))
        x = rows.of(x.astype(np.float32))
        yield x, data[0] * x + data[1]
        step += 1


def slowly(pause):
    """Batches with a pause before each."""

    def wait(config, data, step, rows):
        print(f"{rows}", flush=True)
        for batch in batches(config, data, step, rows):
            time.sleep(pause)
            yield batch

    return wait


def loss(config, model, batch):
    x, y = batch
    return Loss(((model(x) - y) ** 2).sum(), jnp.float32(y.size))


def evaluate(config, model, data, split):
    x = np.linspace(-1, 1, 11, dtype=np.float32)[:, None]
    return {"error": float(jnp.abs(model(x) - (data[0] * x + data[1])).mean())}


LINE = Task(
    name="line",
    presets={"only": TrainConfig(steps=300, batch_size=8, learning_rate=0.1, weight_decay=0.0)},
    data=lambda config: np.float32([2, -1]),
    init=lambda config, data, rngs: Line(rngs),
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="error",
    larger=False,
    unit="points",
)

PLAIN = dataclasses.replace(LINE, init=lambda config, data, rngs: Line(rngs, rate=0.0))


def train_line(folder, task=LINE, flags=None, **changes):
    """Trains with some options changed."""
    config = dataclasses.replace(LINE.presets["only"], **changes)
    return train(task, config, task.data(config), Path(folder), flags)


def parameters(trained):
    """The arrays of the last state, by name."""
    leaves, _ = jax.tree.flatten_with_path(trained.state)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def equal(one, other):
    """Whether arrays are equal bit for bit, by name."""
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    flags, task = Flags(resume=True, save_every=1), LINE
    if sys.argv[3:]:
        coordinator, processes, process, pause, *plain = sys.argv[3:]
        connect(coordinator, int(processes), int(process))
        task = dataclasses.replace(PLAIN if plain else LINE, batches=slowly(float(pause)))
    print("ready", flush=True)
    try:
        trained = train_line(folder, task, flags=flags, steps=steps, evaluations=4, ema=0.9)
    except jax.errors.JaxRuntimeError as problem:
        print(problem, flush=True)
        os._exit(3)  # as the command does: a clean shutdown would wait for the others
    if jax.process_index() == 0:
        np.savez(folder / "parameters.npz", **parameters(trained))
