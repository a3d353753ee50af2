"""Scores in the forms that the kernel supports: softcap, bias, and a bias by distance."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.backends.call import Head
from attention_jax.backends.tile import whole
from attention_jax.scores import (
    Alibi,
    Bias,
    Masking,
    RelativeBias,
    Score,
    Softcap,
    tile_indices,
)
from attention_jax.scores.at_positions import ScoreAtPositions
from attention_jax.scores.distance import skew

MOST_SCORES = 8  # per call, as in call.h
# With at most this many queries, scores at arbitrary positions become a bias of T x S.
FEW_QUERIES = 16


class Diagonal(Score):
    """``s + array[k - q + T - 1]``: a bias that depends on the distance of query and key alone."""

    AXES = {"array": "L"}  # T + S - 1 distances
    MASKING = Masking.NEVER
    array: Any
    T: int

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        return s + jnp.asarray(self.array)[k - q + (self.T - 1)]

    def tile(self, s: Any, b: Any, n: Any, q0: Any, k0: Any) -> Any:
        t, width = s.shape
        start = k0 - q0 + (self.T - t)
        part = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.array), start, t + width - 1)
        return s + skew(jnp.broadcast_to(part.astype(s.dtype), (t, t + width - 1)))


def why_unsupported(scores: tuple[Score, ...], T: int) -> str | None:
    """Why the kernel does not support these scores, in words; None if it does."""
    if len(scores) > MOST_SCORES:
        return f"{len(scores)} scores: it takes at most {MOST_SCORES}"
    for score in scores:
        inner = score.score_ if isinstance(score, ScoreAtPositions) else score
        if isinstance(inner, Alibi | RelativeBias):
            if isinstance(score, ScoreAtPositions) and not score.contiguous and T > FEW_QUERIES:
                name = type(inner).__name__
                return f"score {name} at positions: it takes at most {FEW_QUERIES} queries"
        elif not isinstance(inner, Softcap | Bias):
            known = "softcap, bias, alibi and relative_bias"
            return f"score {type(inner).__name__}: its kernel supports {known}"
    return None


def native(head: Head) -> tuple[Score, ...]:
    """The scores of one head as ``Softcap``, ``Bias`` and ``Diagonal``, which hold float32."""
    return tuple(as_native(head, score) for score in head.score)


def as_native(head: Head, score: Score) -> Score:
    """One of a head's scores in a form that the kernel has."""
    T, S = head.query.shape[0], head.key.shape[0]
    if isinstance(score, ScoreAtPositions) and isinstance(score.score_, Softcap | Bias):
        score = score.score_  # whose rules do not use positions
    if isinstance(score, Softcap):
        return Softcap(jnp.asarray(score.cap, jnp.float32))
    if isinstance(score, Bias):
        return Bias(jnp.asarray(score.array).astype(jnp.float32))
    if isinstance(score, ScoreAtPositions) and not score.contiguous:
        zeros = jnp.zeros((T, S), jnp.float32)
        at = tile_indices((T, S), 0, 0)
        return Bias(whole(score).rule(zeros, head.b, head.n, *at))
    # Query 0 has all distances to keys at 1 - T and on.
    distances = np.arange(1 - T, S, dtype=np.int32)[None, :]
    zeros = jnp.zeros(distances.shape, jnp.float32)
    array = score.rule(zeros, head.b, head.n, np.zeros((1, 1), np.int32), distances)
    return Diagonal(array[0], T)
