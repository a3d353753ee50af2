"""Checkpoints by their name on the Hugging Face hub: downloaded once, then read from its cache."""

from __future__ import annotations

import importlib
import re
from os import PathLike
from pathlib import Path

# Not the weights of other libraries, which some repositories store beside these.
FILES = ["*.json", "chat_template.jinja", "model.safetensors", "model-*.safetensors"]
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local(folder: str | PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a checkpoint.

    Args:
      folder: a local folder, or the name of a repository such as ``"org/name"``. An existing folder
        of that name comes first.
      revision: branch, tag or commit of the repository; default: its main branch.

    Raises:
      FileNotFoundError: no such folder, and no such repository, or no connection to the hub.
      ModuleNotFoundError: the package ``huggingface_hub`` is not installed.
      ValueError: a revision of a local folder.
    """
    path = Path(folder)
    if path.is_dir() or not (isinstance(folder, str) and NAME.fullmatch(folder)):
        if revision is not None:
            raise ValueError(
                f"revision is that of a repository of the hub, named as 'org/name': got "
                f"{revision!r} with the folder {str(folder)!r}"
            )
        return path
    try:
        library = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"there is no folder {folder!r}, and the package huggingface_hub, which would look for "
            f"it on the hub, is not installed: pip install -e '.[pretrained]'",
            name=error.name,
        ) from None
    try:
        return Path(library.snapshot_download(folder, revision=revision, allow_patterns=FILES))
    except (OSError, ValueError) as error:  # the base classes of the package's own errors
        at = "" if revision is None else f" at revision {revision!r}"
        raise FileNotFoundError(
            f"there is no folder {folder!r}, and the hub did not give a checkpoint of that "
            f"name{at}: {' '.join(str(error).split())}"
        ) from error
