"""The training loop, one for all tasks.

A task is a value, ``Task``: pure functions that read data, make a model, give batches, a loss and
scores. The loop knows nothing of what they are about. ``python -m experiments train TASK`` runs::

    AdamW, learning rate up over a warm-up and down along a cosine, gradients clipped by norm

and appends one JSON line to ``OUT/TASK/PRESET.jsonl``: configuration, scores, seconds, versions.
The same seed on the same machine gives the same model, unless ``--minutes`` cut the run short.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx
from tqdm import tqdm

import attention_jax
from attention_jax.backends import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class Config:
    """The options that every task has. A task's own configuration extends it."""

    seed: int = 0
    """Of the initial weights, the order of the data, augmentation and dropout."""
    steps: int = 1000
    """Updates of the weights."""
    batch_size: int = 128
    """Examples per update."""
    learning_rate: float = 1e-3
    """At its highest, after the warm-up."""
    warmup: float = 0.1
    """Part of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.05
    """Of matrices; biases, norms and other vectors do not decay."""
    clip: float = 1.0
    """Largest norm of the gradient of all weights together."""
    evaluations: int = 5
    """How many times the validation score is taken, the last time at the end."""
    minutes: float | None = None
    """Stop after this much training even if steps are left; None is no limit."""
    attention: str | None = None
    """The implementation of attention, by name; None lets the library choose."""
    out: Path = Path("runs")
    """The folder that results go to."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "clip", "evaluations", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if self.attention is not None and self.attention not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"attention must be one of {known}, got {self.attention}")


C = TypeVar("C", bound=Config)
D = TypeVar("D")
Model = Any  # an nnx.Module of the task's own
Batch = Any  # a pytree of NumPy arrays: whatever the task's loss understands
Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Task(Generic[C, D]):
    """What the loop needs to know, as functions. None of them keeps state."""

    name: str
    presets: Mapping[str, C]
    """Named configurations; the first is the default."""
    data: Callable[[C], D]
    """All the data, split."""
    init: Callable[[C, nnx.Rngs], Model]
    """A fresh model."""
    batches: Callable[[C, D, np.random.Generator], Iterator[Batch]]
    """Training batches without end."""
    loss: Callable[[Model, Batch, jax.Array], jax.Array]
    """The number to make small, of a model, a batch and a random key; traced by jit."""
    evaluate: Callable[[Model, D, str], Metrics]
    """Scores on one split, ``"validation"`` or ``"test"``."""
    report: Callable[[Model, D, Path], list[Path]]
    """Writes pictures or texts, to files whose names start as the path; returns the files."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What ``train`` returns."""

    model: Model
    steps: int
    loss: float
    validation: Metrics
    seconds: float


def run(task: Task[C, D], config: C, *, preset: str) -> dict[str, Any]:
    """Trains, scores on the test split, writes the record and the report; returns the record."""
    data = task.data(config)
    trained = train(task, config, data)
    test = task.evaluate(trained.model, data, "test")

    folder = config.out / task.name
    folder.mkdir(parents=True, exist_ok=True)
    files = task.report(trained.model, data, folder / f"{preset}-seed{config.seed}")
    results = folder / f"{preset}.jsonl"
    record = {
        "task": task.name,
        "preset": preset,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "steps": trained.steps,
        "seconds": round(trained.seconds, 2),
        "parameters": count_parameters(trained.model),
        "metrics": {"loss": trained.loss, "validation": trained.validation, "test": test},
        "files": [str(file) for file in files],
        "config": dataclasses.asdict(config),
        "device": device(),
        "versions": versions(),
    }
    with results.open("a") as lines:
        lines.write(json.dumps(record, default=str) + "\n")

    print(f"{task.name}: {trained.steps} steps in {trained.seconds:.0f} s, seed {config.seed}")
    print(f"test: {show(test)}")
    for file in (*files, results):
        print(f"wrote {file}")
    return record


def train(task: Task[C, D], config: C, data: D) -> Trained:
    """The loop.

    Raises:
      FloatingPointError: the loss became NaN or infinite; the message names the step.
    """
    rng = np.random.default_rng(config.seed)
    dropout_key = jax.random.key(config.seed)
    model = task.init(config, nnx.Rngs(config.seed))
    structure, parameters, *rest = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(config)
    state = optimizer.init(parameters)

    @jax.jit
    def update(parameters: Any, state: Any, batch: Batch, step: int) -> tuple[Any, Any, jax.Array]:
        def loss_of(parameters: Any) -> jax.Array:
            model = nnx.merge(structure, parameters, *rest)
            return task.loss(model, batch, jax.random.fold_in(dropout_key, step))

        loss, gradients = jax.value_and_grad(loss_of)(parameters)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to the power of an int
            updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    batches = task.batches(config, data, rng)
    evaluate_at = set(np.linspace(0, config.steps, config.evaluations + 1, dtype=int)[1:].tolist())
    limit = math.inf if config.minutes is None else 60 * config.minutes
    start, step, loss, validation = time.perf_counter(), 0, math.nan, {}
    with tqdm(total=config.steps, desc=task.name, unit="step", dynamic_ncols=True) as bar:
        while step < config.steps:
            parameters, state, loss_array = update(parameters, state, next(batches), step)
            step, loss = step + 1, float(loss_array)
            if not math.isfinite(loss):
                raise FloatingPointError(f"{task.name}: the loss is {loss} at step {step}")
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            out_of_time = time.perf_counter() - start > limit
            if step in evaluate_at or out_of_time:
                model = nnx.merge(structure, parameters, *rest)
                validation = task.evaluate(model, data, "validation")
                bar.write(f"step {step}: loss {loss:.3f}, validation {show(validation)}")
            if out_of_time:
                break
    seconds = time.perf_counter() - start
    return Trained(nnx.merge(structure, parameters, *rest), step, loss, validation, seconds)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and cosine; the last step has a learning rate of nearly 0."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=int(config.warmup * config.steps),
        decay_steps=config.steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay, mask=decays),
    )


def decays(parameters: Any) -> Any:
    """Which weights decay: matrices. A decay of biases and norms only hurts."""
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, parameters)


def count_parameters(model: Model) -> int:
    """How many numbers are trained."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def device() -> str:
    """What this runs on, in words."""
    first = jax.devices()[0]
    return f"{jax.device_count()} x {first.device_kind} ({first.platform})"


def versions() -> dict[str, str]:
    """Of everything that a result may depend on."""
    modules = (attention_jax, jax, flax, optax, np)
    return {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules}


def show(metrics: Metrics) -> str:
    """The scores in one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
