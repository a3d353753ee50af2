"""The progress of a run, and where it is logged: a bar, JSON lines, TensorBoard, a profile.

``RUN/log.jsonl`` has a line every few steps (loss, norm of the gradient, speed) and one for each
evaluation. ``Progress`` is the part that is saved in a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
from tqdm import tqdm

from experiments.training.task import Metrics

LINES = 100  # lines with a loss in the log of a whole run
PROFILED = range(10, 20)  # steps; the first ones compile


class Progress(NamedTuple):
    """The state of a run after a number of steps."""

    metric: str
    larger: bool
    step: int = 0
    seconds: float = 0.0
    """Time spent in training and evaluation, over all parts of a resumed run."""
    loss: float = math.nan
    """Mean over the steps since the last evaluation."""
    losses: int = 0
    """Number of those steps."""
    best: Metrics | None = None
    """The validation scores of the best evaluation, by the metric."""
    best_step: int = 0
    since_best: int = 0
    """Number of evaluations since the best one."""
    curve: tuple[dict[str, float], ...] = ()
    """Step, seconds, loss and scores of each evaluation."""
    finished: bool = False
    """Whether all steps are done or patience ran out."""
    tokens: int = 0
    """Tokens of this process's rows of all batches, padding included; 0 if the task does not say
    which are real."""
    padding: int = 0
    """How many of them are padding."""
    lengths: tuple[int, ...] = ()
    """The lengths that batches were padded to."""

    def closed(self, scores: Metrics) -> Progress:
        """Finished with these scores, for a model that needs no training."""
        return self._replace(best=scores, finished=True)

    def notes(self) -> dict[str, Any]:
        """As JSON values."""
        return self._asdict() | {"loss": None if math.isnan(self.loss) else self.loss}

    @staticmethod
    def from_notes(like: Progress, notes: dict[str, Any]) -> Progress:
        """The inverse of ``notes``."""
        loss = math.nan if notes["loss"] is None else notes["loss"]
        same = {"metric": like.metric, "larger": like.larger}
        rows = {name: tuple(notes[name]) for name in ("curve", "lengths")}
        return Progress(**notes | same | {"loss": loss} | rows)

    def fed(self, real: np.ndarray) -> Progress:
        """With one more batch, of which these tokens ``[B T]`` are real."""
        return self._replace(
            tokens=self.tokens + real.size,
            padding=self.padding + real.size - int(real.sum()),
            lengths=tuple(sorted({*self.lengths, real.shape[1]})),
        )

    def after(self, loss: float, seconds: float) -> Progress:
        """After one more step."""
        n = self.losses + 1
        mean = loss if n == 1 else self.loss + (loss - self.loss) / n
        return self._replace(step=self.step + 1, seconds=seconds, loss=mean, losses=n)

    def scored(self, scores: Metrics, seconds: float) -> tuple[Progress, bool]:
        """After an evaluation; and whether its scores are the best so far."""
        new = scores[self.metric]
        better = self.best is None or math.isnan(self.best[self.metric])
        if self.best is not None:
            old = self.best[self.metric]
            better |= new > old if self.larger else new < old
        point = {"step": self.step, "seconds": round(seconds, 2), "loss": self.loss, **scores}
        after = self._replace(
            seconds=seconds,
            losses=0,
            curve=(*self.curve, point),
            since_best=0 if better else self.since_best + 1,
        )
        return (
            (after._replace(best=scores, best_step=self.step), True) if better else (after, False)
        )

    @contextlib.contextmanager
    def logged(
        self,
        folder: Path,
        *,
        name: str,
        unit: str,
        steps: int,
        tensorboard: bool = False,
        profile: bool = False,
    ) -> Iterator[RunLog]:
        """A log to write to while the loop runs.

        Args:
          folder: that of the run.
          name: the task, for the bar.
          unit: what the loss counts.
          steps: of the whole run.
          tensorboard: also write for TensorBoard.
          profile: trace the steps of ``PROFILED``.
        """
        first = jax.process_index() == 0
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.jsonl" if first else Path(os.devnull)
        if first:
            _drop_after(log, self.step)
        with contextlib.ExitStack() as stack:
            lines = stack.enter_context(log.open("a"))
            board = None
            if tensorboard and first:
                from tensorboardX import SummaryWriter

                board = stack.enter_context(SummaryWriter(str(folder / "tensorboard")))
            bar = stack.enter_context(
                tqdm(
                    total=steps,
                    initial=self.step,
                    desc=name,
                    unit="step",
                    dynamic_ncols=True,
                    disable=not first,
                )
            )
            opened = RunLog(
                bar,
                lines,
                board,
                unit=unit,
                every=max(1, steps // LINES),
                start=time.perf_counter() - self.seconds,
                profile=folder / "profile" if profile and first else None,
            )
            yield opened
            opened.stop_profile()


class RunLog:
    """The bar and the files that a running loop writes to."""

    def __init__(
        self,
        bar: tqdm[Any],
        lines: TextIO,
        board: Any,
        *,
        unit: str,
        every: int,
        start: float,
        profile: Path | None,
    ) -> None:
        """``start`` is when the run began, on the clock of ``time.perf_counter``."""
        self.bar, self.lines, self.board = bar, lines, board
        self.unit, self.every, self.start = unit, every, start
        self._profile, self._tracing = profile, False
        self._since, self._count, self._scores = time.perf_counter(), 0.0, ""

    def step(self, progress: Progress, loss: float, count: float, norm: float) -> Progress:
        """Logs a step."""
        now = time.perf_counter()
        progress = progress.after(loss, now - self.start)
        self._count += count
        self.bar.update()
        if progress.step % self.every == 0:
            speed = self._count / (now - self._since)
            self._since, self._count = now, 0.0
            self._write(
                progress,
                {"loss": loss, "gradient_norm": norm, f"{self.unit}_per_second": round(speed, 1)},
            )
            self.bar.set_postfix_str(f"loss {loss:.3f}{self._scores}, {speed:,.0f} {self.unit}/s")
        return progress

    def scores(self, progress: Progress, scores: Metrics) -> tuple[Progress, bool]:
        """Logs an evaluation."""
        now = time.perf_counter()
        progress, better = progress.scored(scores, now - self.start)
        self._write(progress, {f"validation_{name}": x for name, x in scores.items()})
        self._scores = f", {progress.metric} {scores[progress.metric]:.3f}"
        mark = " (best)" if better else ""
        if not self.bar.disable:
            said = f"loss {progress.loss:.3f}, validation {one_line(scores)}{mark}"
            self.bar.write(f"step {progress.step}: {said}")
        self._since += time.perf_counter() - now
        return progress, better

    def _write(self, progress: Progress, values: dict[str, float]) -> None:
        line = {"step": progress.step, "seconds": round(progress.seconds, 2), **values}
        self.lines.write(json.dumps(line) + "\n")
        self.lines.flush()
        if self.board is not None:
            for name, x in values.items():
                self.board.add_scalar(name, x, progress.step)

    @contextlib.contextmanager
    def profile(self, step: int) -> Iterator[None]:
        """Wraps a step; traces those of ``PROFILED`` if a profile was asked for."""
        if self._profile is not None and step == PROFILED.start:
            jax.profiler.start_trace(str(self._profile))
            self._tracing = True
        yield
        if step == PROFILED.stop - 1:
            self.stop_profile()

    def stop_profile(self) -> None:
        """Ends the trace, also in a run that has fewer steps."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def _drop_after(log: Path, step: int) -> None:
    """Removes the lines of steps that a resumed run repeats."""
    if not log.exists():
        return
    kept = [line for line in log.read_text().splitlines() if _step(line) <= step]
    log.write_text("".join(line + "\n" for line in kept))


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:  # half a line of a run that was killed
        return math.inf


def one_line(metrics: Metrics) -> str:
    """The scores in one line of text."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
