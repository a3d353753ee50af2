"""The files that tasks learn from: where each is, and that it is the one that is meant.

``data.tsv`` lists them: name, size, SHA-256 and address. ``path("multi30k/raw/val.en.gz")`` gives
one on this machine, checked at every call::

    ATTENTION_JAX_DATA names a folder    the file lies there under its name; nothing is downloaded,
                                         and nothing is written there
    it is not set                        pooch keeps the file in the user's cache; what is not there
                                         is downloaded, and goes on where a broken download ended
"""

from __future__ import annotations

import functools
import gzip
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import pooch
import requests
from tqdm import tqdm

VARIABLE = "ATTENTION_JAX_DATA"
TABLE = Path(__file__).with_name("data.tsv")
CHUNK = 2**14  # bytes; a connection that breaks loses less than one
PATIENCE = 30  # seconds without an answer


class DataError(OSError):
    """A file cannot be had as it should be.

    An OSError, since no argument is wrong: the disk or the network does not have what it should.
    """


class File(NamedTuple):
    """A line of ``data.tsv``."""

    name: str
    bytes: int
    sha256: str
    url: str


def files() -> dict[str, File]:
    """All that are known, by name."""
    rows = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]]
    return {name: File(name, int(size), sha256, url) for name, size, sha256, url in rows}


def path(name: str) -> Path:
    """A file on this machine, of the right size and checksum; downloaded first where need be.

    Args:
      name: as ``data.tsv`` has it.

    Raises:
      DataError: it is missing or another, or the download failed.
      ValueError: the name is not known.
    """
    known = files()
    if name not in known:
        beside = name.rpartition("/")[0]
        near = [x for x in known if x.rpartition("/")[0] == beside]
        raise ValueError(f"name must be one of {', '.join(near or known)}, got {name!r}")
    if folder := os.environ.get(VARIABLE):
        return _in_folder(known[name], Path(folder).expanduser())
    return _in_cache(known[name])


def lines(name: str, *, encoding: str = "utf-8") -> list[str]:
    r"""The lines of a text, unzipped where the name ends in ``.gz``.

    They end at ``\n`` alone: ``str.splitlines`` would end them at byte 0x85 of a Latin-1 text too,
    and sentences would no longer stand beside their labels or translations.

    Args:
      name: as ``data.tsv`` has it.
      encoding: of the text.

    Raises:
      DataError: see ``path``.
      ValueError: the name is not known, or the text is in another encoding.
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
    """In the folder that the variable names."""
    found = folder / file.name
    try:
        wrong = _wrong(found, file)
    except OSError as problem:
        wrong = f"is missing or cannot be read: {problem.strerror}"
        if not os.path.isdir(folder):
            wrong = f"is missing, since {folder} is no folder"
    if wrong:
        raise DataError(
            f"{found} {wrong}. The environment variable {VARIABLE} names the folder: put the file "
            f"of {file.url} there, or unset {VARIABLE} to have it downloaded"
        )
    return found


def _in_cache(file: File) -> Path:
    """In the user's cache, downloaded into it where it is not there or another."""
    pooch.get_logger().setLevel(logging.WARNING)  # it reports each download
    folder = pooch.os_cache("attention_jax")
    cache = pooch.create(folder, "", registry={file.name: file.sha256}, urls={file.name: file.url})
    target = folder / file.name
    part = target.with_name(f"{target.name}.part")
    try:
        return Path(cache.fetch(file.name, downloader=functools.partial(_download, file, part)))
    except (OSError, ValueError) as problem:  # of requests and the disk; of pooch's check
        raise DataError(
            f"{file.name} could not be downloaded from {file.url} to {folder}: {problem}. Run this "
            f"again to go on from what is kept; or put the file into a folder, as {file.name}, and "
            f"name that folder in the environment variable {VARIABLE}"
        ) from problem


def _download(file: File, part: Path, url: str, output: str, _: Any) -> None:
    """For pooch: ``part`` grows to the whole file, which is checked and becomes ``output``.

    What broke off stays, to go on from. What came to its end and is not the file is deleted.
    """
    if part.exists() and part.stat().st_size >= file.bytes and _wrong(part, file):
        part.unlink()
    have = part.stat().st_size if part.exists() else 0
    if have < file.bytes:
        _get_rest(file, part, url, have)
    if wrong := _wrong(part, file):
        part.unlink()
        raise DataError(f"what came {wrong}; it is deleted")
    part.replace(output)


def _get_rest(file: File, part: Path, url: str, have: int) -> None:
    """Appends to ``part`` what it lacks; a server that gives no ranges sends everything anew."""
    headers = {"Accept-Encoding": "identity"}  # ranges are of the file, not of it compressed
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=PATIENCE) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            part.unlink(missing_ok=True)  # the server has no more: this is no part of ours
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
    """What is wrong with a file, in words; None where it is the one that is meant."""
    size = found.stat().st_size
    if size != file.bytes:
        return f"has the wrong size: expected {file.bytes} bytes, found {size}"
    sha256 = pooch.file_hash(str(found))
    if sha256 != file.sha256:
        return f"has the wrong checksum: expected SHA-256 {file.sha256}, found {sha256}"
    return None
