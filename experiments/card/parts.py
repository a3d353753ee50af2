"""The parts of ``card``, in the order in which they run, and what an item of work is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Fields = dict[str, Any]  # the results of a measurement, as JSON values


class Part(NamedTuple):
    """A stage of the run.

    Attributes:
      name: as in the records.
      module: defines ``items(setting)``, the work in order.
      share: of the time that is left when the part starts, relative to the parts after it.
      lanes: how many processes share the work; only one where time is measured.
    """

    name: str
    module: str
    share: float
    lanes: int = 1


def lanes() -> int:
    """How many processes check correctness side by side: compiling takes most of the time."""
    return min(9, max(1, (os.cpu_count() or 1) // 2 // 3 * 3))


PARTS = (
    Part("environment", "experiments.card.environment", 1.0),
    Part("contract", "experiments.card.contract", 3.0, lanes()),
    Part("speed", "experiments.card.speed", 5.0),
    Part("tiles", "experiments.card.tiles", 2.0),
    Part("training", "experiments.card.training", 2.0),
    Part("presets", "experiments.card.presets", 6.0),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the items of a part depend on."""

    out: Path
    dry: bool
    lane: int
    lanes: int
    seconds: float
    """For the whole part."""


class Item(NamedTuple):
    """One piece of work: ``run`` yields results as they come.

    Attributes:
      name: unique in its part.
      run: yields the fields of each record.
      limit: seconds after which its process is killed.
    """

    name: str
    run: Callable[[], Iterator[Fields]]
    limit: float = 60.0


class Skipped(Exception):  # noqa: N818 - no error: the line of a record says why
    """The item cannot run here: a package or a data set is missing."""
