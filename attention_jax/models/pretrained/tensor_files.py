"""Files of tensors in the safetensors format: read one at a time, written one at a time.

The package ``safetensors`` reads and validates them; no code in a file is ever executed. It writes
only what is in memory all at once, so ``write`` is our own: a model that is sharded over many
hosts is gathered and written one tensor at a time.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import importlib
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

CHUNK = 1 << 22  # numbers


class Entry(NamedTuple):
    """What a file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class File(Mapping[str, np.ndarray]):
    """The tensors of a file by name, each read on access."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
          ModuleNotFoundError: the package ``safetensors`` is not installed.
          ValueError: the file is cut short, or its header is invalid.
        """
        self.path = path
        library = _library()
        try:
            # Not mapped into memory: pages of the file would count beside the tensors.
            self._file = library.safe_open(path, framework="numpy", backend="pread")
        except library.SafetensorError as e:
            raise ValueError(f"{path.name} is not a valid safetensors file: {e}") from None
        self.entries = {name: self._entry(name) for name in self._file.offset_keys()}

    def _entry(self, name: str) -> Entry:
        x = self._file.get_slice(name)
        return Entry(x.get_dtype(), tuple(x.get_shape()))

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{self.path.name}: {name} has dtype {entry.dtype}, expected one of {list(DTYPES)}"
            )
        return self._file.get_tensor(name)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, in chunks of whole rows."""
        shape = self.entries[name].shape
        if not shape:
            yield self[name].tobytes()
            return
        part = self._file.get_slice(name)
        rows = max(1, CHUNK // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], rows):
            yield part[start : min(start + rows, shape[0])].tobytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _library() -> Any:
    try:
        return importlib.import_module("safetensors")
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            "the package safetensors is not installed: pip install -e '.[pretrained]'", name=e.name
        ) from None


def write(path: Path, shapes: Mapping[str, Any], arrays: Iterable[Any]) -> None:
    """Writes tensors one at a time.

    ::

        8 bytes    length of the header, little-endian
        header     {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
        data       the tensors one after the other, rows first, little-endian

    Args:
      path: the file.
      shapes: for each name what has the ``shape`` and ``dtype`` of its tensor.
      arrays: in the same order.

    Raises:
      ValueError: a dtype that has no name in the format; an array that is not as it was described.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from attention_jax.models.pretrained.tensor_files import File, write
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
