"""Runs the parts of ``card`` in processes, within their time, whatever happens in them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.card.parts import Fields, Part
from experiments.card.worker import LATE, LOST, Order, append, record

# Without these JAX would take most of the card's memory for itself, and print warnings.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONUNBUFFERED": "1",
}
# A worker imports JAX and starts the card before its first item.
START = 60.0
# A part that loses its process this often has its other items left out.
RESTARTS = 12


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of ``card``."""

    out: Path
    dry: bool
    seconds: float
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run_parts(
    run: Run,
    parts: Sequence[Part],
    identify: Callable[[], Fields],
    usable: Callable[[], bool] = lambda: True,
) -> None:
    """Runs the parts in order until they are done or the time is up.

    Args:
      run: where to, how long.
      parts: in order.
      identify: card, versions and date, asked before each part: the first part finds them.
      usable: asked after each part; False ends the run.
    """
    end = time.monotonic() + run.seconds
    for number, part in enumerate(parts):
        left = end - time.monotonic()
        if left <= 1:
            order = _order(run, part, 0, 0.0, identify())
            append(run.out, record(order, "all", LATE))
            print(f"{part.name}: no time left", flush=True)
            continue
        allotted = left * part.share / sum(other.share for other in parts[number:])
        started = time.monotonic()
        lanes = 1 if run.dry else part.lanes
        threads = [
            threading.Thread(target=_run_lane, args=(run, part, lane, lanes, allotted, identify()))
            for lane in range(lanes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f"{part.name}: {time.monotonic() - started:.0f} s", flush=True)
        if not usable():
            return


def _order(
    run: Run, part: Part, lane: int, seconds: float, identity: Fields, lanes: int = 1
) -> Order:
    return Order(
        part=part.name,
        module=part.module,
        out=str(run.out),
        dry=run.dry,
        lane=lane,
        lanes=lanes,
        seconds=seconds,
        done=[],
        run=identity,
    )


def _run_lane(
    run: Run, part: Part, lane: int, lanes: int, seconds: float, identity: Fields
) -> None:
    """Workers one after the other, until one has finished or the time is up."""
    end = time.monotonic() + seconds
    order = _order(run, part, lane, seconds, identity, lanes)
    for _ in range(RESTARTS):
        left = end - time.monotonic()
        if left <= 1:
            return
        order = dataclasses.replace(order, seconds=left)
        began, problem = _run_worker(run, order, end)
        order = dataclasses.replace(order, done=[*order.done, *began])
        if problem is None:
            return
        if problem:
            log = _log(run, order).read_text(errors="replace")[-2000:]
            fields = problem if "late" in problem else {**problem, "log": log}
            append(run.out, record(order, began[-1] if began else "start", fields))
        if not began:
            return
    append(run.out, record(order, "all", {"error": f"gave up after {RESTARTS} processes"}))


def _run_worker(run: Run, order: Order, end: float) -> tuple[list[str], Fields | None]:
    """One worker: the items that it began, and what to record of its end.

    None if it is done, and no fields if it has recorded what happened itself.
    """
    with _log(run, order).open("ab") as errors:
        worker = subprocess.Popen(
            [sys.executable, "-m", "experiments.card.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **ENVIRONMENT, **run.environment},
            start_new_session=True,  # so that what it starts ends with it
        )
    lines: queue.Queue[str | None] = queue.Queue()
    stdin, stdout = worker.stdin, worker.stdout
    if stdin is None or stdout is None:
        raise RuntimeError("the worker has no pipes")

    def read() -> None:
        for line in stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it ended already: its exit code says how
            stdin.write(json.dumps(dataclasses.asdict(order)) + "\n")
            stdin.close()
        return _watch(worker, lines, end)
    finally:
        _kill(worker)
        stdout.close()


def _log(run: Run, order: Order) -> Path:
    """What the workers of a lane print for people."""
    return run.out / f"{order.part}-{order.lane}.log"


def _watch(
    worker: subprocess.Popen[str], lines: queue.Queue[str | None], end: float
) -> tuple[list[str], Fields | None]:
    began: list[str] = []
    limit = START
    deadline = min(end, time.monotonic() + START)
    inside = False
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            if time.monotonic() >= end - 0.5:
                return began, LATE
            what = "took longer than" if inside else "its process did not begin an item within"
            return began, {"error": f"{what} {limit:.0f} s"}
        if line is None:
            code = worker.wait()
            if code == 0:
                return began, None
            return began, {} if code == LOST else {"error": f"its process ended: {_cause(code)}"}
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "begin":
            seconds, _, name = rest.partition(" ")
            began.append(name)
            inside, limit = True, float(seconds)
        elif word == "end":
            inside, limit = False, START
        else:
            continue  # printed by a library
        deadline = min(end, time.monotonic() + limit)


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _kill(worker: subprocess.Popen[str]) -> None:
    """Ends a worker and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
