"""Loads the compiled kernels and registers them with XLA on first use.

They are an optional extension of the package, which also installs without a compiler; ``load`` then
says why there are none. ``ctypes`` loads them, so the build does not need Python's headers.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import sysconfig
from typing import Any, NamedTuple

import jax

# In the order of ``kernels`` in ffi.cpp, from 1.
INSTRUCTIONS = ("avx512bf16", "avx512", "avx2", "neon")
# Those that have passed the contract suite; the others run only if asked for by name.
TESTED = ("avx512bf16", "avx512", "avx2")
TARGETS = ("attention_forward", "attention_backward")


class Library(NamedTuple):
    """The kernels that this processor can run.

    Attributes:
      why_not: why there are none, in words; else None.
      instructions: the instruction sets that the processor has.
      handle: keeps the library loaded.
    """

    why_not: str | None
    instructions: tuple[str, ...] = ()
    handle: Any = None


def path() -> pathlib.Path:
    """The path of the built extension."""
    return pathlib.Path(__file__).with_name(f"_kernel{sysconfig.get_config_var('EXT_SUFFIX')}")


@functools.cache  # a library is loaded once per process
def load() -> Library:
    """The library, or why there is none."""
    file = path()
    if not file.exists():
        return Library("not built (no C++ compiler when installed)")
    try:
        handle = ctypes.CDLL(str(file))
        name = handle.attention_instructions
    except (OSError, AttributeError) as error:
        return Library(f"not loaded: {error}")
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.c_int64]
    found = tuple(x for i, x in enumerate(INSTRUCTIONS) if name(i + 1) is not None)
    if not found:
        return Library("this processor has neither AVX2 nor AVX-512 nor NEON")
    try:
        for target in TARGETS:
            capsule = jax.ffi.pycapsule(getattr(handle, target))
            jax.ffi.register_ffi_target(f"{target}_jax", capsule, platform="cpu")
    except jax.errors.JaxRuntimeError as error:
        return Library(f"this release of JAX has another interface: {error}")
    return Library(None, found, handle)
