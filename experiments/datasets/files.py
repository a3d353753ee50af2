"""The data files of tasks: found or downloaded, and checked.

``data.tsv`` lists them with name, size, SHA-256 and URL. ``path("multi30k/raw/val.en.gz")`` returns
one on this machine and checks it at every call::

    ATTENTION_JAX_DATA names a folder    the file is expected there under its name; nothing is
                                         downloaded, and nothing is written there
    ATTENTION_JAX_DATA is not set        the file is kept in the user's cache, by pooch; a missing
                                         one is downloaded, and a broken download is resumed
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from experiments.datasets.errors import DataError as DataError

VARIABLE = "ATTENTION_JAX_DATA"
TABLE = Path(__file__).with_name("data.tsv")
CHUNK = 2**14  # bytes; a broken connection loses at most one
PATIENCE = 30  # seconds to wait for an answer


class File(NamedTuple):
    """A line of ``data.tsv``."""

    name: str
    bytes: int
    sha256: str
    url: str


def files() -> dict[str, File]:
    """All known files, by name."""
    rows = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]]
    return {name: File(name, int(size), sha256, url) for name, size, sha256, url in rows}


def path(name: str) -> Path:
    """The path of a file with the right size and checksum, downloaded if need be.

    Args:
      name: as in ``data.tsv``.

    Raises:
      DataError: the file is missing or wrong, or the download failed.
      ValueError: the name is unknown.
    """
    known = files()
    if name not in known:
        parent = name.rpartition("/")[0]
        siblings = [x for x in known if x.rpartition("/")[0] == parent]
        raise ValueError(f"name must be one of {', '.join(siblings or known)}, got {name!r}")
    if folder := os.environ.get(VARIABLE):
        return _in_folder(known[name], Path(folder).expanduser())
    return _in_cache(known[name])


def lines(name: str, *, encoding: str = "utf-8") -> list[str]:
    r"""The lines of a text file, decompressed if its name ends in ``.gz``.

    Lines end only at ``\n``: ``str.splitlines`` would also end them at byte 0x85 of a Latin-1 text,
    and sentences would no longer line up with their labels or translations.

    Args:
      name: as in ``data.tsv``.
      encoding: of the text.

    Raises:
      DataError: see ``path``.
      ValueError: the name is unknown, or the text has another encoding.
    """
    raw = path(name).read_bytes()
    if name.endswith(".gz"):
        raw = gzip.decompress(raw)
    try:
        found = raw.decode(encoding).split("\n")
    except UnicodeDecodeError as problem:
        raise ValueError(f"encoding must be that of {name}, got {encoding!r}: {problem}") from None
    return found if found[-1] else found[:-1]


def _in_folder(file: File, folder: Path) -> Path:
    """The file in the folder that the environment variable names."""
    found = folder / file.name
    try:
        wrong = _wrong(found, file)
    except OSError as problem:
        wrong = f"is missing or cannot be read: {problem.strerror}"
        if not os.path.isdir(folder):
            wrong = f"is missing: {folder} is not a folder"
    if wrong:
        raise DataError(
            f"{found} {wrong}. The environment variable {VARIABLE} names the folder: put the file "
            f"of {file.url} there, or unset {VARIABLE} to download it"
        )
    return found


def _in_cache(file: File) -> Path:
    """The file in the user's cache, downloaded if it is missing or wrong."""
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)  # it logs each download
    folder = pooch.os_cache("attention_jax")
    cache = pooch.create(folder, "", registry={file.name: file.sha256}, urls={file.name: file.url})
    target = folder / file.name
    part = target.with_name(f"{target.name}.part")
    try:
        return Path(cache.fetch(file.name, downloader=functools.partial(_download, file, part)))
    except (OSError, ValueError) as problem:  # from requests and the disk; from pooch's check
        raise DataError(
            f"{file.name} could not be downloaded from {file.url} to {folder}: {problem}. Run this "
            f"again to resume the download; or put the file into a folder, as {file.name}, and "
            f"name that folder in the environment variable {VARIABLE}"
        ) from problem


def _download(file: File, part: Path, url: str, output: str, _: Any) -> None:
    """A downloader for pooch: ``part`` grows to the whole file, is checked and becomes ``output``.

    An interrupted ``part`` stays, to be resumed; a complete but wrong one is deleted.
    """
    if part.exists() and part.stat().st_size >= file.bytes and _wrong(part, file):
        part.unlink()
    have = part.stat().st_size if part.exists() else 0
    if have < file.bytes:
        _get_rest(file, part, url, have)
    if wrong := _wrong(part, file):
        part.unlink()
        raise DataError(f"the download {wrong}; it was deleted")
    part.replace(output)


def _get_rest(file: File, part: Path, url: str, have: int) -> None:
    """Appends the rest to ``part``; a server without ranges sends everything again."""
    import requests
    from tqdm import tqdm

    headers = {"Accept-Encoding": "identity"}  # ranges refer to the uncompressed file
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=PATIENCE) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            part.unlink(missing_ok=True)  # longer than the server's file: not ours
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            have = 0
        bar = tqdm(
            total=file.bytes,
            initial=have,
            desc=file.name,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
        )
        with part.open("ab" if have else "wb") as to, bar:
            for chunk in response.iter_content(CHUNK):
                bar.update(to.write(chunk))
                if to.tell() > file.bytes:
                    break


def _wrong(found: Path, file: File) -> str | None:
    """What is wrong with a file, as text; None if it is the expected one."""
    size = found.stat().st_size
    if size != file.bytes:
        return f"has the wrong size: expected {file.bytes} bytes, found {size}"
    with found.open("rb") as file_bytes:
        sha256 = hashlib.file_digest(file_bytes, "sha256").hexdigest()
    if sha256 != file.sha256:
        return f"has the wrong checksum: expected SHA-256 {file.sha256}, found {sha256}"
    return None
