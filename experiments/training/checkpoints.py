"""What a run saves, with Orbax: the last states to go on from, and the best weights.

::

    RUN/checkpoints/last/STEP    parameters, optimiser, average, step, scores: the two newest
    RUN/checkpoints/best/STEP    the weights with the best validation score
    .../STEP/sums.json           a checksum of every file, to tell a damaged checkpoint by

Orbax writes to another name and renames when all is on disk, so that a run killed at any moment,
or a full disk, leaves what was there before. The position in the data and the random keys are
functions of the seed and the step, which are saved.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

LAST, BEST = "last", "best"
KEPT = {LAST: 2, BEST: 1}
SUMS = "sums.json"
DAMAGE = (OSError, ValueError, KeyError)  # what Orbax raises on files that are not what it wrote

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Saved:
    """What was found."""

    step: int
    state: Any
    notes: dict[str, Any]


class Checkpoints:
    """Those of one run."""

    def __init__(self, folder: Path) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each save
        self.folder = folder.resolve()

    def save(self, kind: str, step: int, state: Any, notes: dict[str, Any]) -> bool:
        """Saves a pytree of arrays, and notes for JSON, as ``LAST`` or ``BEST``.

        Where that fails, on a full disk say, it warns, and what was saved before stays.

        Returns:
          Whether it was saved.
        """
        try:
            with self._manager(kind) as manager:
                if step in manager.all_steps():  # damaged, or of the evaluation that ended here
                    manager.delete(step)
                manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(_named(state)),
                        notes=ocp.args.JsonSave(notes),
                    ),
                )
                manager.wait_until_finished()
            _write_sums(self.folder / kind / str(step))
        except DAMAGE as problem:
            self._clean(kind)
            warnings.warn(
                f"{self.folder / kind}: step {step} could not be saved, training goes on from what "
                f"is in memory; the checkpoint before stays: {_first_line(problem)}",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True

    def restore(self, kind: str, like: T) -> Saved | None:
        """The newest that is whole; warns of newer ones that are not.

        Args:
          kind: ``LAST`` or ``BEST``.
          like: a pytree of the same arrays.

        Returns:
          What was saved, with the structure of ``like``; None where nothing was.

        Raises:
          ValueError: all are damaged; or the newest has other arrays: it is of another model.
        """
        if not (self.folder / kind).exists():
            return None
        damaged = []
        with self._manager(kind) as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                try:
                    _check_sums(self.folder / kind / str(step))
                    found = manager.restore(
                        step,
                        args=ocp.args.Composite(
                            state=ocp.args.StandardRestore(), notes=ocp.args.JsonRestore()
                        ),
                    )
                    arrays, notes = found["state"], found["notes"]
                except DAMAGE as problem:
                    damaged.append(f"step {step} is damaged: {_first_line(problem)}")
                    continue
                if damaged:
                    warnings.warn(
                        f"{self.folder / kind}: {'; '.join(damaged)}; step {step} is taken",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                return Saved(step, self._like(like, arrays), notes)
        if damaged:
            raise ValueError(
                f"{self.folder / kind}: no checkpoint is whole ({'; '.join(damaged)}); remove the "
                f"folder to start from step 0"
            )
        return None

    def _like(self, like: T, arrays: dict[str, Any]) -> T:
        expected = _named(like)
        shapes = {name: np.shape(x) for name, x in expected.items()}
        if (found := {name: np.shape(x) for name, x in arrays.items()}) != shapes:
            odd = sorted(set(found.items()) ^ set(shapes.items()))
            raise ValueError(
                f"{self.folder} holds another model: {len(odd)} arrays differ, the first is "
                f"{odd[0][0]} {odd[0][1]}"
            )
        leaves = [jax.numpy.asarray(arrays[name]) for name in expected]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _manager(self, kind: str) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder / kind,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT[kind],
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
            ),
        )

    def _clean(self, kind: str) -> None:
        """Takes away what a save left half written."""
        for path in (self.folder / kind).glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(path, ignore_errors=True)


def _write_sums(folder: Path) -> None:
    """Last of all, under another name first: a run killed before leaves none, or the whole file."""
    sums = {
        str(file.relative_to(folder)): zlib.crc32(file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    unfinished = folder / f"{SUMS}.unfinished"
    unfinished.write_text(json.dumps(sums, indent=1) + "\n")
    os.replace(unfinished, folder / SUMS)


def _check_sums(folder: Path) -> None:
    """Raises for the first file that is not what was written."""
    if not (folder / SUMS).exists():
        return  # the run was killed before they were written, and all else was
    try:
        sums = json.loads((folder / SUMS).read_text())
    except ValueError as problem:
        raise ValueError(f"{folder / SUMS} is not what was saved") from problem
    for name, expected in sums.items():
        if zlib.crc32((folder / name).read_bytes()) != expected:
            raise ValueError(f"{folder / name} is not what was saved")


def _named(state: Any) -> dict[str, Any]:
    """Every array under the path to it.

    In NumPy's form: reading a damaged array of JAX's, Orbax raises a bare ``Exception``.
    """
    leaves, _ = jax.tree.flatten_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _first_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:300]}"
