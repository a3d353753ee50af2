"""The table of training tasks. A new task is one file here and one row below."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from experiments.train import Task


class Row(NamedTuple):
    """What is said of a task before its file, with all that it imports, is loaded."""

    data: str
    time: str
    score: str


# The name is also the file: experiments/tasks/<name>.py, which holds TASK.
TASKS: dict[str, Row] = {
    "digits": Row(
        data="1797 handwritten digits of 8 x 8 pixels, part of scikit-learn",
        time="1 minute on 2 CPU cores",
        score="test accuracy 98 %",
    ),
}


def load(name: str) -> Task[Any, Any]:
    """The task called ``name``, one of ``TASKS``."""
    return importlib.import_module(f"experiments.tasks.{name}").TASK
