"""The calls of attention that are timed, as values: shapes, mask and score, work to be done.

>>> call = Call("causal", B=4, T=4096, S=4096, N=16, K=16, H=128)
>>> print(call)
causal, B=4 T=4096 N=16 H=128
>>> round(call.flops(backward=False) / 1e9)
275
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax import masks, scores

WINDOW = 1024  # keys a query attends to, its own included
CAP = 50.0
WAVE = 0.01  # radians per position, of the score function

# By kind: all but dense and decode are causal too.
KINDS = ("causal", "dense", "window", "documents", "softcap", "alibi", "score_fn", "gqa", "decode")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call; axes as everywhere."""

    kind: str
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int

    def __str__(self) -> str:
        lengths = f"T={self.T}" if self.T == self.S else f"T={self.T} S={self.S}"
        heads = f"N={self.N}" if self.N == self.K else f"N={self.N} K={self.K}"
        return f"{self.kind}, B={self.B} {lengths} {heads} H={self.H}"

    @property
    def causal(self) -> bool:
        """Whether a query attends to no key after it."""
        return self.kind not in ("dense", "decode")

    @property
    def window(self) -> int | None:
        """Keys a query attends to at the most."""
        return min(WINDOW, self.S // 4) if self.kind == "window" else None

    @property
    def documents(self) -> np.ndarray | None:
        """The document of each token ``[B T]``: eight of random lengths."""
        if self.kind != "documents":
            return None
        rng = np.random.default_rng(0)
        starts = np.sort(rng.integers(1, self.T, (self.B, 7)), axis=1)
        return (np.arange(self.T)[None, :, None] >= starts[:, None, :]).sum(-1).astype(np.int32)

    @property
    def pairs(self) -> int:
        """Visible pairs of query and key, of one head, over the batch."""
        if not self.causal:
            return self.B * self.T * self.S
        i = np.arange(self.T, dtype=np.int64)
        keys = np.broadcast_to(i + 1, (self.B, self.T))
        if (ids := self.documents) is not None:
            # A query attends to the keys since the start of its document.
            new = np.diff(ids, axis=1, prepend=-1) != 0
            keys = i + 1 - np.maximum.accumulate(np.where(new, i, 0), axis=1)
        if self.window is not None:
            keys = np.minimum(keys, self.window)
        return int(keys.sum())

    def flops(self, *, backward: bool) -> float:
        """Of the visible pairs; the backward pass counts 2.5 times the forward pass."""
        return 4.0 * self.N * self.pairs * self.H * (3.5 if backward else 1.0)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values in 16 bits."""
        return 2 * 2 * self.B * self.S * self.K * self.H

    def arrays(self) -> list[jax.Array]:
        """Query, key, value and a cotangent in bfloat16, and the ids of documents if there are."""
        shapes = [(self.B, self.T, self.N, self.H), *[(self.B, self.S, self.K, self.H)] * 2]
        keys = jax.random.split(jax.random.key(0), 4)
        made = [
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(keys, [*shapes, shapes[0]], strict=True)
        ]
        ids = self.documents
        return made if ids is None else [*made, jnp.asarray(ids)]

    def options(self, ids: Any = None) -> dict[str, Any]:
        """Mask and score, as ``attention`` takes them."""
        mask = masks.causal() if self.causal else None
        if self.window is not None:
            mask = masks.window(self.window - 1, 0)
        if ids is not None:
            mask = masks.causal() & masks.segments(ids)
        score: Any = ()
        if self.kind == "softcap":
            score = scores.softcap(CAP)
        elif self.kind == "alibi":
            score = scores.alibi()
        elif self.kind == "score_fn":
            score = scores.score_fn(_wave)
        return {"mask": mask, "score": score}


def _wave(s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
    """Adds a wave over the distance, which no kernel has built in."""
    return s + jnp.cos((q - k).astype(jnp.float32) * jnp.float32(WAVE)).astype(s.dtype)


def calls(dry: bool) -> Iterator[Call]:
    """The calls in the order of what they tell: every kind at one size first, then all lengths.

    16,384 tokens and 2,048 features each, but for decoding: one token, 32,768 cached ones.
    """
    if dry:
        for kind in KINDS:
            yield _call(kind, 64, 16, tokens=64, features=32)
        return
    for kind in KINDS:
        yield _call(kind, 4096, 128)
    for H in (128, 64):
        for kind in ("causal", "dense"):
            for length in (16_384, 1024, 4096, 512, 2048, 8192):
                if (kind, length, H) not in (("causal", 4096, 128), ("dense", 4096, 128)):
                    yield _call(kind, length, H)
    for kind in ("window", "documents", "softcap", "alibi", "score_fn", "gqa"):
        yield _call(kind, 16_384, 128)
    for kind in KINDS[2:]:
        yield _call(kind, 4096, 64)


def _call(kind: str, length: int, H: int, *, tokens: int = 16_384, features: int = 2048) -> Call:
    N = features // H
    K = max(1, N // 4) if kind in ("gqa", "decode") else N
    if kind == "decode":
        return Call(kind, 8, 1, 2 * tokens, 2 * N, 2 * K, H)
    return Call(kind, max(1, tokens // length), length, length, N, K, H)
