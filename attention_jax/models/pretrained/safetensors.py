"""The safetensors format: named arrays, as a JSON header and their bytes. No code is executed.

::

    8 bytes    length of the header, little-endian
    header     {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    data       the arrays one after the other, rows first, little-endian

Arrays are read one at a time, on access. The header is validated against the size of the file.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MOST_HEADER = 100_000_000  # bytes; the format's own limit
CHUNK = 1 << 24  # bytes


class Entry(NamedTuple):
    """One array of a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """In bytes from the beginning of the file."""
    end: int


class File(Mapping[str, np.ndarray]):
    """The arrays of a file by name, each read on access."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
          ValueError: the file is cut short, or its header is not one.
        """
        self.path = path
        self.entries = read_header(path)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{self.path.name}: {name} has dtype {entry.dtype}, expected one of {list(DTYPES)}"
            )
        dtype = DTYPES[entry.dtype]
        count = math.prod(entry.shape)
        flat = np.fromfile(self.path, dtype, count, offset=entry.start)
        return flat.reshape(entry.shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of an array, in chunks."""
        entry = self.entries[name]
        left = entry.end - entry.start
        with self.path.open("rb") as file:
            file.seek(entry.start)
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                left -= len(chunk)
                yield chunk

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_header(path: Path) -> dict[str, Entry]:
    """The entries of a file, validated against its size.

    Raises:
      ValueError: the file is cut short, or its header is not one.
    """

    def refuse(why: str) -> ValueError:
        return ValueError(f"{path.name} is not a valid safetensors file: {why}")

    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(MOST_HEADER, size - 8):
            raise refuse(f"a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise refuse(f"its header cannot be read: {e}") from None
    if not isinstance(header, dict):
        raise refuse("its header is not an object")
    header.pop("__metadata__", None)
    data = size - 8 - length
    entries, places = {}, []
    for name, x in header.items():
        entry = _entry(x, 8 + length)
        if entry is None or entry.end - 8 - length > data:
            raise refuse(f"{name!r} is described as {x}, in {data} bytes of data")
        entries[name] = entry
        places.append((entry.start, entry.end))
    at = 8 + length
    for start, end in sorted(places):
        if start != at:
            raise refuse("its arrays overlap or leave a gap")
        at = end
    if at != size:
        raise refuse(f"its arrays end at byte {at} of {size}")
    return entries


def _entry(x: Any, data: int) -> Entry | None:
    """The entry; None if it is invalid."""
    if not isinstance(x, dict) or x.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = x["dtype"], x["shape"], x["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        return None
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        return None
    start, end = offsets
    bits_fit = dtype not in DTYPES or end - start == math.prod(shape) * DTYPES[dtype].itemsize
    if start > end or not bits_fit:
        return None
    return Entry(dtype, tuple(shape), data + start, data + end)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def write(path: Path, shapes: Mapping[str, Any], arrays: Iterable[Any]) -> None:
    """Writes arrays one at a time.

    Args:
      path: the file.
      shapes: for each name what has the ``shape`` and ``dtype`` of its array.
      arrays: in the same order.

    Raises:
      ValueError: a dtype that has no name in the format; an array that is not as it was described.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from attention_jax.models.pretrained.safetensors import File, write
    >>> path = Path(tempfile.mkdtemp()) / "two.safetensors"
    >>> arrays = {"a": np.zeros(2, np.float32), "b": np.ones((1, 3), np.float32)}
    >>> write(path, arrays, arrays.values())
    >>> File(path)["b"].tolist()
    [[1.0, 1.0, 1.0]]
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, x in shapes.items():
        dtype = np.dtype(x.dtype)
        if dtype not in NAMES:
            raise ValueError(f"{name} has dtype {dtype}, expected one of {list(map(str, NAMES))}")
        end = at + math.prod(x.shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(x.shape),
            "data_offsets": [at, end],
        }
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for (name, expected), x in zip(shapes.items(), arrays, strict=True):
            array = np.asarray(x, order="C")
            if array.shape != tuple(expected.shape) or array.dtype != expected.dtype:
                raise ValueError(
                    f"{name} must be {expected.dtype}{list(expected.shape)}, got "
                    f"{array.dtype}{list(array.shape)}"
                )
            file.write(array.tobytes())
