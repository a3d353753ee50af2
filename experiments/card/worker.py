"""One process of a part: works through its items and writes a record for each result.

``processes`` starts it as ``python -m experiments.card.worker`` with an ``Order`` on its standard
input, and reads from its standard output when an item begins and ends.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.card.parts import Fields, Item, Setting, Skipped
from experiments.datasets.errors import DataError

RECORDS = "records.jsonl"
# After one of these, CUDA refuses everything in the process.
FATAL = (
    "ILLEGAL_ADDRESS",
    "illegal memory access",
    "LAUNCH_FAILED",
    "launch failure",
    "MISALIGNED",
)
LOST = 75  # exit code: what is left needs a new process


# The last record of a part that did not get to its end.
LATE: Fields = {"skipped": "no time left for this and what comes after it", "late": True}


@dataclasses.dataclass(frozen=True)
class Order:
    """What a worker is told to do."""

    part: str
    module: str
    out: str
    dry: bool
    lane: int
    lanes: int
    seconds: float
    done: list[str]
    """The items that a worker before this one began."""
    run: Fields
    """Card, versions and date: in every record."""


def append(out: Path, record: Fields) -> None:
    """Adds a line to the records, at once."""
    line = json.dumps(record, default=str) + "\n"
    with (out / RECORDS).open("ab", buffering=0) as file:
        file.write(line.encode())


def record(order: Order, item: str, fields: Fields) -> Fields:
    """A record: where it comes from, then its results."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"part": order.part, "item": item, "time": now, **order.run, **fields}


def work(order: Order, say: Any = None) -> int:
    """Runs the items of an order; returns the exit code."""
    say = say or (lambda line: print(line, flush=True))
    end = time.monotonic() + order.seconds
    setting = Setting(Path(order.out), order.dry, order.lane, order.lanes, order.seconds)
    for item in planned(order.module, setting):
        if item.name in order.done:
            continue
        left = end - time.monotonic()
        if left <= 0:
            append(setting.out, record(order, item.name, LATE))
            return 0
        say(f"begin {min(item.limit, left):.1f} {item.name}")
        lost = False
        for fields in results(item):
            append(setting.out, record(order, item.name, fields))
            lost |= fatal(fields)
            if "platform" in fields:  # what the machine is goes into every later record
                known = {name: fields[name] for name in ("card", "versions", "platform")}
                order = dataclasses.replace(order, run={**order.run, **known})
        say(f"end {item.name}")
        if lost:
            return LOST
    return 0


def planned(module: str, setting: Setting) -> Iterator[Item]:
    """The items of a part; one that reports the problem if they cannot be listed."""
    try:
        yield from importlib.import_module(module).items(setting)
    except Exception as problem:  # noqa: BLE001 - recorded, and the next part runs
        yield Item("items", functools.partial(_raise, problem))


def _raise(problem: Exception) -> Iterator[Fields]:
    raise problem
    yield {}


def fatal(fields: Fields) -> bool:
    """Whether CUDA refuses everything in this process from here on."""
    text = json.dumps(fields, default=str)
    return any(words in text for words in FATAL)


def results(item: Item) -> Iterator[Fields]:
    """The results of an item; its failure is one too."""
    try:
        yield from item.run()
    except Skipped as reason:
        yield {"skipped": str(reason)}
    except DataError as reason:
        yield {"skipped": str(reason)}
    except ModuleNotFoundError as missing:
        if (missing.name or "").split(".")[0] in ("attention_jax", "experiments"):
            yield failure(missing)
        else:
            yield {"skipped": f"{missing.name} is not installed"}
    except Exception as problem:  # noqa: BLE001 - recorded, and the next item runs
        yield failure(problem)


def failure(problem: Exception) -> Fields:
    """The record of an exception."""
    text = "".join(traceback.format_exception(problem))
    return {"error": f"{type(problem).__name__}: {problem}"[:2000], "traceback": text[-8000:]}


if __name__ == "__main__":
    code = work(Order(**json.loads(sys.stdin.readline())))
    sys.stdout.flush()
    os._exit(code)  # no waiting for a thread that hangs in a compiler
