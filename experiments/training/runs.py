"""The folder of a run, the flags of the command that runs it, and its record.

::

    RUN/run.json        task, preset and every option
    RUN/log.jsonl       losses and scores, see ``progress``
    RUN/checkpoints/    see ``checkpoints``
    RUN/record.json     the result: one line of ``experiments/results/TASK.jsonl``
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx

import attention_jax
from experiments.options import nearest
from experiments.training import config as configs
from experiments.training import tuning
from experiments.training.checkpoints import BEST, Checkpoints
from experiments.training.config import TrainConfig
from experiments.training.layout import agreed
from experiments.training.progress import Progress
from experiments.training.task import Metrics, Record, Task

FILE = "run.json"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Where a run is written, whether it resumes, and what else it logs; the result is the same."""

    out: Path = Path("runs")
    """The folder for runs; each has its own, TASK/NAME."""
    name: str | None = None
    """Name of the run; default MODEL-PRESET-seedSEED."""
    resume: bool = False
    """Resume from the last checkpoint of the run of this name, if there is one."""
    overwrite: bool = False
    """Replace the run of this name."""
    record: Path | None = None
    """Also append the record to TASK.jsonl in this folder; experiments/results is ours."""
    save_every: int | None = None
    """Also save the state every so many steps; it is saved at each evaluation in any case."""
    tensorboard: bool = False
    """Also log losses and scores for TensorBoard (needs tensorboardX)."""
    profile: bool = False
    """Trace ten steps with JAX's profiler, into the folder of the run."""
    mesh: str | None = None
    """The devices, and what is split among them: the batch, heads and hidden units, the length of
    sequences; for example data=2,model=2,context=2."""
    fsdp: bool = False
    """Also shard parameters and optimizer state over data and context."""
    coordinator: str | None = None
    """HOST:PORT of process 0, to train with several processes; auto finds it in a cluster."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0. Process 0 prints and records."""

    def __post_init__(self) -> None:
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {self.save_every}")
        if self.record is not None and self.record.exists() and not self.record.is_dir():
            raise ValueError(f"record must be a folder, got the file {self.record}")
        if self.tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise ModuleNotFoundError("No module named 'tensorboardX'", name="tensorboardX")


def folder_of(task: Task[Any, Any], config: TrainConfig, *, preset: str, flags: Flags) -> Path:
    """The folder of a run."""
    model = getattr(config, "model", None)
    default = "-".join(filter(None, (model, preset, f"seed{config.seed}")))
    return flags.out / task.name / (flags.name or default)


def together(
    function: Callable[..., Path],
    task: Task[Any, Any],
    config: TrainConfig,
    *,
    preset: str,
    flags: Flags,
) -> Path:
    """``check`` or ``start`` in the first process, while the others wait.

    Raises:
      Exception: that of the first process; ValueError in the others.
    """
    problem: Exception | None = None
    if jax.process_index() == 0:
        try:
            function(task, config, preset=preset, flags=flags)
        except Exception as raised:  # noqa: BLE001 - the others wait in any case
            problem = raised
    failed = agreed(int(problem is not None))
    if problem is not None:
        raise problem
    if failed:
        raise ValueError("process 0 could not start the run: its message says why")
    return folder_of(task, config, preset=preset, flags=flags)


def check(task: Task[Any, Any], config: TrainConfig, *, preset: str, flags: Flags) -> Path:
    """Checks that a run can be started, resumed or replaced; returns its folder, writes nothing.

    Raises:
      ValueError: the run exists and the flags say neither resume nor overwrite; or it cannot be
        resumed, since its configuration differs.
    """
    folder = folder_of(task, config, preset=preset, flags=flags)
    file = folder / FILE
    if file.exists() and not flags.overwrite:
        if not flags.resume:
            raise ValueError(
                f"{folder} exists: --resume resumes it, --overwrite replaces it, --name NAME gives "
                f"this run another name"
            )
        before = _read(file)
        if before["task"] != task.name:
            raise ValueError(f"{folder} is a run of {before['task']}, not {task.name}")
        old = configs.from_json(type(config), before["config"], str(file))
        if changed := configs.differences(config, old):
            raise ValueError(
                f"{folder} cannot be resumed: it was started with another configuration: "
                f"{'; '.join(changed)}"
            )
    return folder


def start(task: Task[Any, Any], config: TrainConfig, *, preset: str, flags: Flags) -> Path:
    """Creates the folder of a run, or finds it to resume; removes the files of a replaced run.

    Raises:
      ValueError: see ``check``.
    """
    folder = check(task, config, preset=preset, flags=flags)
    file = folder / FILE
    if flags.overwrite or not file.exists():
        for name in ("checkpoints", "tensorboard", "profile"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("log.jsonl", "record.json"):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"task": task.name, "preset": preset, "config": configs.as_json(config)}
    unfinished = folder / f"{FILE}.unfinished"  # renamed once it is whole
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, file)
    return folder


def identity(folder: Path) -> tuple[int, int] | None:
    """Identifies the run in a folder, so that a replacement is noticed; None if there is none."""
    file = folder / FILE
    return (file.stat().st_ino, file.stat().st_mtime_ns) if file.exists() else None


def _read(file: Path) -> dict[str, Any]:
    """The content of a ``run.json``.

    Raises:
      ValueError: it is damaged.
    """
    try:
        content = json.loads(file.read_text())
        if isinstance(content, dict) and {"task", "preset", "config"} <= content.keys():
            return content
    except ValueError:
        pass
    raise ValueError(f"{file} is damaged: remove the folder, or train again with --overwrite")


class Run(NamedTuple):
    """A trained run, loaded from its folder."""

    folder: Path
    task: Task[Any, Any]
    preset: str
    config: Any
    data: Any
    model: Any
    step: int


def load(folder: Path, load_task: Callable[[str], Task[Any, Any]]) -> Run:
    """The run of a folder, with its best weights.

    Args:
      folder: that of the run.
      load_task: from the name of a task to the task.

    Raises:
      ValueError: the folder holds no run, one that was never evaluated, or one of another version.
    """
    file = folder / FILE
    if not file.exists():
        known = sorted(str(x.parent) for x in Path("runs").glob(f"*/*/{FILE}"))
        raise ValueError(
            f"{folder} is not a run: it has no {FILE}{nearest(str(folder), known) or '.'} "
            f"Runs here: {', '.join(known) or 'none'}"
        )
    content = _read(file)
    task = load_task(content["task"])
    kind = type(next(iter(task.presets.values())))
    config = configs.from_json(kind, content["config"], str(file))
    data = task.data(config)
    model, step = initial(task, config, data), 0
    if isinstance(model, nnx.Module):
        graph, weights, *others = nnx.split(model, nnx.Param, ...)
        if jax.tree.leaves(weights):
            best = Checkpoints(folder / "checkpoints").restore(BEST, weights)
            if best is None:
                raise ValueError(f"{folder} has no weights yet: it was never evaluated")
            weights, step = best.state, best.step
        # Where `train` has them: in the same process, nothing is compiled again.
        placed = jax.device_put((weights, *others), jax.devices()[0])
        model = nnx.merge(graph, *placed)
        model.eval()
    return Run(folder, task, content["preset"], config, data, model, step)


def initial(task: Task[Any, Any], config: Any, data: Any) -> Any:
    """The model before its first step."""
    return tuning.prepared(task.init(config, data, nnx.Rngs(config.seed)), config)


def untrained(run: Run) -> Any:
    """The model of a run as it was before its first step, in evaluation mode."""
    model = initial(run.task, run.config, run.data)
    if isinstance(model, nnx.Module):
        model.eval()
    return model


def record(
    task: Task[Any, Any],
    config: TrainConfig,
    *,
    preset: str,
    progress: Progress,
    test: Metrics,
    parameters: int,
) -> Record:
    """The record of a finished run.

    Args:
      task, config, preset: what was run.
      progress: at its end.
      test: scores on the test split.
      parameters: number of trained parameters.
    """
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
        "padding": round(progress.padding / progress.tokens, 4) if progress.tokens else None,
        "lengths": list(progress.lengths),
        "curve": [{name: round(x, 5) for name, x in point.items()} for point in progress.curve],
        "config": configs.as_json(config),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device(),
        "versions": versions(),
    }


def write_record(record: Record, folder: Path, results: Path | None) -> list[Path]:
    """Writes ``RUN/record.json``, and a line of ``results/TASK.jsonl``; returns the files."""
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
    """The devices of this process, as text."""
    first = jax.devices()[0]
    return f"{jax.device_count()} x {first.device_kind} ({first.platform})"


def versions() -> dict[str, str]:
    """Versions of the packages that a result may depend on."""
    modules = (attention_jax, jax, flax, optax, np)
    return {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules}
