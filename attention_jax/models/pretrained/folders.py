"""The files of a checkpoint: which ones are read, and how a save replaces them atomically."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attention_jax.models.pretrained import tensor_files

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# An entry of the configuration: the file to read instead of the usual ones.
NAMED = "transformers_weights"
# Names of files during a save.
NEW = "model.new-{}.safetensors", "config.new-{}.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The entries of ``config.json``.

    Raises:
      FileNotFoundError: no such folder, or no configuration in it.
      ValueError: it is not a JSON object.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder must be a folder with {CONFIG} and {WEIGHTS}, or 'org/name' on the Hugging "
            f"Face hub, got {str(folder)!r}"
        )
    return read_json(folder / CONFIG)


def weights(folder: Path, entries: Mapping[str, Any]) -> list[tensor_files.File]:
    """The files with the tensors: the one that the configuration names, a single file, or shards.

    Raises:
      FileNotFoundError: there are none.
      ValueError: they are not in this folder, or are invalid.
    """
    name = entries.get(NAMED)
    if name is None:
        name = WEIGHTS if (folder / WEIGHTS).exists() else INDEX
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder} must have {WEIGHTS} or {INDEX}: other formats are not read"
            )
    names = [name]
    if str(name).endswith(".index.json"):
        if not is_plain(name):
            raise ValueError(f"{NAMED} must name a file of its own folder, got {name!r}")
        places = read_json(folder / name).get("weight_map")
        names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(map(is_plain, names)):
        raise ValueError(f"{name} must name files of its own folder, got {names}")
    for x in names:
        if not (folder / x).exists():
            raise FileNotFoundError(f"{folder} must have {x}, which its {CONFIG} or index names")
    return [tensor_files.File(folder / x) for x in sorted(set(names))]


def replace(
    folder: Path, entries: Mapping[str, Any], write_weights: Callable[[Path], None]
) -> None:
    """Replaces the checkpoint in a folder.

    A single rename switches from the old checkpoint to the new one: that of a ``config.json`` which
    names the new weights by a fresh name (``NAMED``, which ``weights`` and Hugging Face read). Each
    file is on disk before the next step::

        1  model.new-*.safetensors   is written
        2  config.json               that names it is renamed into place: this is the switch
        3  model.safetensors         becomes the same file
        4  shards and index          of the old checkpoint are removed
        5  config.json               without the name is renamed into place
        6  model.new-*.safetensors   is removed, with leftovers of killed saves

    Args:
      folder: created if it does not exist. Its other files stay as they are.
      entries: of ``config.json``.
      write_weights: writes the tensors to a path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = _parts(folder)
    weights, config = (folder / name.format(uuid.uuid4().hex[:8]) for name in NEW)

    with contextlib.ExitStack() as undo:  # a failure before the switch leaves nothing behind
        undo.callback(_remove, config)
        undo.callback(_remove, weights)
        write_weights(weights)
        _sync(weights)
        _write_json(config, {**entries, NAMED: weights.name})
        undo.pop_all()
    _rename(config, folder / CONFIG)

    _rename(_link(weights), folder / WEIGHTS)
    for path in old:
        _remove(path)
    _write_json(config, entries)
    _rename(config, folder / CONFIG)
    for name in NEW:
        for path in folder.glob(name.format("*")):
            _remove(path)


def _parts(folder: Path) -> list[Path]:
    """The files of the checkpoint in a folder, except those that a save writes."""
    names = [INDEX]
    with contextlib.suppress(FileNotFoundError, ValueError):
        names.append(read_json(folder / CONFIG).get(NAMED) or INDEX)
    shards: list[Any] = []
    for name in names:
        if str(name).endswith(".index.json") and is_plain(name):
            with contextlib.suppress(FileNotFoundError, ValueError):
                places = read_json(folder / name).get("weight_map")
                shards += places.values() if isinstance(places, dict) else []
    parts = [x for x in (*shards, *names) if is_plain(x) and x != WEIGHTS]
    kinds = ".safetensors", ".safetensors.index.json"
    return [folder / x for x in dict.fromkeys(parts) if x.endswith(kinds)]


def is_plain(name: Any) -> bool:
    """Whether it names a file directly in the folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _link(path: Path) -> Path:
    """The file under a second name: a hard link, or a copy if the file system has none."""
    other = path.with_name(NEW[0].format(uuid.uuid4().hex[:8]))
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
        _sync(other)
    return other


def _rename(path: Path, new: Path) -> None:
    os.replace(path, new)
    _sync(new.parent)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on disk."""
    if path.is_dir() and os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, x: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(x, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def read_json(path: Path) -> dict[str, Any]:
    """The entries of a JSON object.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not a JSON object.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} must have {path.name}")
    try:
        x = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path.name} is not JSON: {e}") from None
    if not isinstance(x, dict):
        raise ValueError(f"{path.name} must be an object, got {type(x).__name__}")
    return x
