"""What an implementation is asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

from attention_jax.axes import Sizes
from attention_jax.masks import Mask
from attention_jax.scores import Score


class Request(NamedTuple):
    """Everything about a call but the numbers in its arrays.

    Mask and scores are resolved and their arrays, if any, at full rank (see ``values.full_rank``).
    """

    sizes: Sizes
    dtype: Any
    mask: Mask | None
    score: tuple[Score, ...]
    scale: float | None  # None: an array, whose value is not known while tracing
    sinks: bool  # are there any
    dropout: bool  # is the dropout rate above 0
    return_lse: bool  # is the lse asked for
    platform: str  # "cpu", "gpu" or "tpu"
    partitioned: bool = False  # does the compiler split the program over a mesh of devices
