"""Checkpoints of a run, with Orbax: the last two states to resume from, and the best weights.

::

    RUN/checkpoints/last/STEP    parameters, optimizer state, average, step, scores: the newest two
    RUN/checkpoints/best/STEP    the weights with the best validation score
    .../STEP/sums.json           a checksum of every file, to detect a damaged checkpoint

Orbax writes under a temporary name and renames when everything is on disk, so that a run killed at
any moment, or a full disk, leaves the previous checkpoint intact. The position in the data and the
random keys are functions of the seed and the step, which are saved.
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
DAMAGE = (OSError, ValueError, KeyError)  # what Orbax raises on damaged files

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that was restored."""

    step: int
    state: Any
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs each save
        self.folder = folder.resolve()

    def save(self, kind: str, step: int, state: Any, notes: dict[str, Any]) -> bool:
        """Saves a pytree of arrays, and notes as JSON, as ``LAST`` or ``BEST``.

        If that fails, on a full disk for example, warns and keeps the previous checkpoint.

        Returns:
          Whether the checkpoint was saved.
        """
        try:
            with self._manager(kind) as manager:
                if step in manager.all_steps():  # a damaged one, or that of an evaluation
                    manager.delete(step)
                manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(_named(state)),
                        notes=ocp.args.JsonSave(notes),
                    ),
                )
                manager.wait_until_finished()
            if jax.process_index() == 0:
                _write_sums(self.folder / kind / str(step))
        except DAMAGE as problem:
            self._clean(kind)
            warnings.warn(
                f"{self.folder / kind}: step {step} could not be saved; training continues and the "
                f"previous checkpoint is kept: {_first_line(problem)}",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True

    def latest(self, kind: str) -> int | None:
        """The step of the newest checkpoint; None if nothing was saved."""
        steps = [int(x.name) for x in (self.folder / kind).glob("*") if x.name.isdigit()]
        return max(steps, default=None)

    def restore(self, kind: str, like: T) -> Saved | None:
        """The newest intact checkpoint; warns of newer ones that are damaged.

        Args:
          kind: ``LAST`` or ``BEST``.
          like: a pytree of arrays of the same names and shapes.

        Returns:
          The checkpoint, its state with the structure and shardings of ``like``; None if nothing
          was saved.

        Raises:
          ValueError: all checkpoints are damaged, or the newest one holds another model.
        """
        if not (self.folder / kind).exists():
            return None
        damaged, expected = [], _named(like)
        with self._manager(kind) as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                at = self.folder / kind / str(step)
                try:
                    _check_sums(at)
                    different = _differing(at / "state", expected)
                    if not different:
                        found = manager.restore(
                            step,
                            args=ocp.args.Composite(
                                state=ocp.args.StandardRestore(expected),
                                notes=ocp.args.JsonRestore(),
                            ),
                        )
                except DAMAGE as problem:
                    damaged.append(f"step {step} is damaged: {_first_line(problem)}")
                    continue
                if different:
                    raise ValueError(
                        f"{self.folder} holds another model: {len(different)} arrays differ, the "
                        f"first is {different[0][0]} {different[0][1]}"
                    )
                if damaged:
                    warnings.warn(
                        f"{self.folder / kind}: {'; '.join(damaged)}; using step {step}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                restored = [found["state"][name] for name in expected]
                leaves = map(_placed, restored, jax.tree.leaves(like))
                state = jax.tree.unflatten(jax.tree.structure(like), leaves)
                return Saved(step, state, found["notes"])
        if damaged:
            raise ValueError(
                f"{self.folder / kind}: no checkpoint is intact ({'; '.join(damaged)}); remove the "
                f"folder to start from step 0"
            )
        return None

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
        """Removes what an unfinished save left."""
        for path in (self.folder / kind).glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(path, ignore_errors=True)


def _write_sums(folder: Path) -> None:
    """Written last and then renamed: a killed run leaves either no file or all of it."""
    sums = {
        str(file.relative_to(folder)): zlib.crc32(file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    unfinished = folder / f"{SUMS}.unfinished"
    unfinished.write_text(json.dumps(sums, indent=1) + "\n")
    os.replace(unfinished, folder / SUMS)


def _check_sums(folder: Path) -> None:
    """Raises ``ValueError`` for the first file that differs from what was saved."""
    if not (folder / SUMS).exists():
        return  # the run was killed after everything else was written
    try:
        sums = json.loads((folder / SUMS).read_text())
    except ValueError as problem:
        raise ValueError(f"{folder / SUMS} differs from what was saved") from problem
    for name, expected in sums.items():
        if zlib.crc32((folder / name).read_bytes()) != expected:
            raise ValueError(f"{folder / name} differs from what was saved")


def _named(state: Any) -> dict[str, Any]:
    """Every array under its path: as it is if it is sharded or shared by processes, else as NumPy.

    Orbax reads and writes shards where they are, so that no process holds the whole of them. It
    raises a bare ``Exception`` for a damaged JAX array, hence NumPy for the others.
    """

    def host(x: Any) -> Any:
        local = not isinstance(x, jax.Array) or (x.is_fully_addressable and x.is_fully_replicated)
        return jax.device_get(x) if local else x

    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): host(x) for path, x in leaves}


def _placed(x: Any, like: Any) -> jax.Array:
    """What was restored on the devices of ``like``."""
    if isinstance(x, jax.Array):  # Orbax restores shards where they belong
        return x
    if isinstance(like, jax.Array) and like.committed:
        return jax.device_put(x, like.sharding)
    return jax.numpy.asarray(x)


def _differing(folder: Path, expected: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and shapes that only a saved state or only ``expected`` has."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        raise ValueError(f"{folder} does not say which arrays it holds")
    there = {(name, tuple(x.shape)) for name, x in metadata.tree.items()}
    return sorted(there ^ {(name, np.shape(x)) for name, x in expected.items()})


def _first_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:300]}"
