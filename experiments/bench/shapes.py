"""The named shapes that benchmarks, ``compare`` and tests share.

``SHAPES`` are calls of the size of real models, which benchmarks time. ``SMALL`` and ``SMALL_LONG``
are sizes that the float64 oracle can check.

>>> print(SHAPES["causal 2048"])
8 heads, 2048, causal
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

import attention_jax as aj
from attention_jax.core.axes import Sizes
from attention_jax.testing.cases import LONG, NARROW


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call: B examples, T queries, S keys, N heads, K key-value heads, width H = D."""

    T: int
    S: int
    N: int
    B: int = 1
    K: int | None = None
    H: int = 64
    causal: bool = False
    window: int | None = None
    """Number of keys that a query attends to, the last being its own position."""
    document: int | None = None
    """Average length of the packed documents, which attend to themselves only."""

    def __str__(self) -> str:
        kind = "causal" if self.causal else "dense"
        if self.window:
            kind = f"window {self.window}"
        if self.document:
            kind = f"documents of {self.document}"
        heads = f"{self.N}" if self.K is None else f"{self.N}/{self.K}"
        lengths = f"{self.S}" if self.T == self.S else f"{self.T} x {self.S}"
        return f"{heads} heads, {lengths}, {kind}"

    def gflops(self, *, backward: bool = False) -> float:
        """GFLOPs of the forward pass, or of both passes, counted as if dense."""
        passes = 3.5 if backward else 1.0
        return passes * 4 * self.B * self.N * self.T * self.S * self.H / 1e9

    @property
    def num_key_value_numbers(self) -> int:
        """How many numbers the keys and values have."""
        return 2 * self.B * self.S * (self.K or self.N) * self.H

    @property
    def mask(self) -> aj.Mask | None:
        """The mask, as ours."""
        if self.window:
            return aj.masks.window(self.window - 1, 0)
        if self.document:
            return aj.masks.segments(self.documents())
        return aj.masks.causal() if self.causal else None

    def documents(self) -> np.ndarray:
        """``[T]``: the number of each token's document. The documents start at random."""
        count = self.T // (self.document or self.T)
        starts = np.random.default_rng(0).choice(np.arange(1, self.T), count - 1, replace=False)
        return np.searchsorted(np.sort(starts), np.arange(self.T), side="right").astype(np.int32)

    def structs(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of query ``[B T N H]``, key and value ``[B S K H]``, in float32."""
        query = jax.ShapeDtypeStruct((self.B, self.T, self.N, self.H), "float32")
        key = jax.ShapeDtypeStruct((self.B, self.S, self.K or self.N, self.H), "float32")
        return query, key, key

    def arrays(self) -> list[jax.Array]:
        """Random query, key and value."""
        keys = jax.random.split(jax.random.key(0), 3)
        return [
            jax.random.normal(key, struct.shape)
            for key, struct in zip(keys, self.structs(), strict=True)
        ]


WINDOW = 256  # the window of benchmarks, unless said otherwise


def _self_attention(T: int, N: int, **options: Any) -> Shape:
    return Shape(T, T, N, **options)


SHAPES: dict[str, Shape] = {
    # Self-attention: about as much work each, the longer the fewer heads.
    "dense 128": _self_attention(128, 64),
    "dense 512": _self_attention(512, 32),
    "dense 1024": _self_attention(1024, 16),
    "dense 2048": _self_attention(2048, 8),
    "dense 4096": _self_attention(4096, 4),
    "causal 2048": _self_attention(2048, 8, causal=True),
    "causal 4096": _self_attention(4096, 4, causal=True),
    "causal 8192": _self_attention(8192, 2, causal=True),
    "window 2048": _self_attention(2048, 8, window=WINDOW),
    "window 16384": _self_attention(16_384, 2, window=WINDOW),
    "documents 8192": _self_attention(8192, 4, document=256),
    # One query of a model like Llama 3, its keys and values in a cache.
    "decode 2048": Shape(1, 2048, N=32, K=8, H=128),
    "decode 8192": Shape(1, 8192, N=32, K=8, H=128),
    # A batch, which vmap may map over.
    "batch dense 128": _self_attention(128, 8, B=8),
    "batch causal 1024": _self_attention(1024, 4, B=4, causal=True),
    # Little work, to time the first call: tracing and compiling.
    "first causal 1024": _self_attention(1024, 2, causal=True),
    # Lengths at which a matrix of T x S would not fit in memory.
    "causal 65536": _self_attention(65_536, 1, causal=True),
    "window 1000000": _self_attention(1_000_000, 1, window=512),
}

# Around the length below which materializing the logits is faster.
SHORT = tuple(_self_attention(T, 8, B=max(1, 2048 // T)) for T in (16, 32, 64, 96, 128, 192, 256))

# Prime sizes that every library can compute: as many key-value heads as query heads, one width.
SMALL: Sizes = NARROW
SMALL_LONG: Sizes = dataclasses.replace(NARROW, T=LONG.T, S=LONG.S)
