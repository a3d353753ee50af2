"""The folder of a run, and its record.

::

    RUN/run.json        task, preset and every option
    RUN/log.jsonl       losses and scores as they came
    RUN/checkpoints/    see ``checkpoints``
    RUN/record.json     the result: one line of ``experiments/results/TASK.jsonl``
"""

from __future__ import annotations

import datetime
import json
import platform
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx

import attention_jax
from experiments import tasks
from experiments.training import config as configs
from experiments.training.checkpoints import BEST, Checkpoints
from experiments.training.config import Config

FILE = "run.json"


def start(task: Any, config: Config, *, preset: str, flags: Any) -> Path:
    """The folder of a run, made or found.

    Raises:
      ValueError: there is such a run already, and it is not said what to do with it; or it is to be
        resumed and its configuration is another.
    """
    model = getattr(config, "model", None)
    default = "-".join(filter(None, (model, preset, f"seed{config.seed}")))
    folder: Path = flags.out / task.name / (flags.name or default)
    file = folder / FILE
    if file.exists() and not flags.overwrite:
        if not flags.resume:
            raise ValueError(
                f"{folder} exists: --resume goes on with it, --overwrite starts anew in its place, "
                f"--name NAME gives this one another name"
            )
        before = json.loads(file.read_text())
        if before["task"] != task.name:
            raise ValueError(f"{folder} is a run of {before['task']}, not of {task.name}")
        was = configs.from_json(type(config), before["config"], str(file))
        if found := configs.differences(config, was):
            raise ValueError(
                f"{folder} cannot be resumed, it was started with another configuration: "
                f"{'; '.join(found)}"
            )
    elif folder.exists():
        for name in ("checkpoints", "tensorboard", "profile"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "log.jsonl").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    said = {"task": task.name, "preset": preset, "config": configs.as_json(config)}
    file.write_text(json.dumps(said, indent=1) + "\n")
    return folder


class Run(NamedTuple):
    """A run that was trained, read again."""

    folder: Path
    task: Any
    preset: str
    config: Any
    data: Any
    model: Any
    step: int


def load(folder: Path) -> Run:
    """The best model of a run.

    Raises:
      ValueError: the folder holds no run, none that has been evaluated, or another version's.
    """
    file = folder / FILE
    if not file.exists():
        known = sorted(str(x.parent) for x in Path("runs").glob(f"*/*/{FILE}"))
        raise ValueError(
            f"{folder} is no run: it has no {FILE}; runs here: {', '.join(known) or 'none'}"
        )
    said = json.loads(file.read_text())
    task = tasks.load(said["task"])
    kind = type(next(iter(task.presets.values())))
    config = configs.from_json(kind, said["config"], str(file))
    data = task.data(config)
    model = task.init(config, data, nnx.Rngs(config.seed))
    step = 0
    if isinstance(model, nnx.Module):
        graph, weights, *others = nnx.split(model, nnx.Param, ...)
        if jax.tree.leaves(weights):
            best = Checkpoints(folder / "checkpoints").restore(BEST, weights)
            if best is None:
                raise ValueError(f"{folder} has no weights yet: it has not been evaluated once")
            weights, step = best.state, best.step
        model = nnx.merge(graph, weights, *others)
        model.eval()
    return Run(folder, task, said["preset"], config, data, model, step)


def record(
    task: Any, config: Config, preset: str, trained: Any, test: dict[str, float], parameters: int
) -> dict[str, Any]:
    """What is known of a run when it is over."""
    progress = trained.progress
    return {
        "task": task.name,
        "model": getattr(config, "model", None),
        "preset": preset,
        "seed": config.seed,
        "metric": task.metric,
        "larger": task.larger,
        "signature": None if task.signature is None else task.signature(),
        "test": test,
        "validation": progress.best,
        "steps": progress.step,
        "best_step": progress.best_step,
        "seconds": round(progress.seconds, 2),
        "parameters": parameters,
        "curve": [{name: round(x, 5) for name, x in point.items()} for point in progress.curve],
        "config": configs.as_json(config),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device(),
        "versions": versions(),
    }


def write_record(record: dict[str, Any], folder: Path, results: Path | None) -> list[Path]:
    """Beside the run, and as one more line of the results where asked for; returns the files."""
    line = json.dumps(record, default=str)
    files = [folder / "record.json"]
    files[0].write_text(line + "\n")
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        files.append(results / f"{record['task']}.jsonl")
        with files[1].open("a") as lines:
            lines.write(line + "\n")
    return files


def device() -> str:
    """What this runs on, in words."""
    first = jax.devices()[0]
    return f"{jax.device_count()} x {first.device_kind} ({first.platform})"


def versions() -> dict[str, str]:
    """Of everything that a result may depend on."""
    modules = (attention_jax, jax, flax, optax, np)
    return {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules}
