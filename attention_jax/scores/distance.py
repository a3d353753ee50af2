"""Scores of the distance between query and key: ALiBi, T5's buckets, Shaw's embeddings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from attention_jax.core.axes import (
    AnyArray,
    PerExample,
    Size,
    as_int,
    checked_align,
    float_array,
    int_at_least,
    is_array,
    per_example,
)
from attention_jax.scores.base import Masking, Score


class Relative(Score):
    """A score of distances: query ``i`` lies at position ``i + offset`` among the keys."""

    AXES = {"offset": "*B"}
    DEFAULTS = {"offset": 0, "align": "start", "slopes": None, "dtype": "float32"}
    MASKING = Masking.NEVER
    offset: Any
    align: str

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        if self.align == "start":
            return self
        return dataclasses.replace(self, offset=self.offset + (S - T), align="start")

    def resolve_in_sequence(self, N: int) -> Self:
        return dataclasses.replace(self, align="start")

    def hoisted(self, dtype: Any, numbers: bool) -> Self:
        # No block map depends on the offset, so it need not be a constant of the program.
        if not numbers or is_array(self.offset):
            return self
        return dataclasses.replace(self, offset=np.asarray(self.offset, np.int32))

    def offset_per_example(self) -> bool:
        return is_array(self.offset)

    def _check_resolved(self) -> None:
        if self.align == "end":
            raise ValueError(
                'a score with align="end" has a rule only once T and S are known: use '
                "score.resolve(T, S, N)"
            )


class Alibi(Relative):
    """``s - slopes[n] * |q + offset - k|``."""

    NAME = "scores.alibi"
    AXES = {"slopes": "N", "offset": "*B"}
    slopes: Any
    dtype: str = "float32"  # of default slopes

    def hoisted(self, dtype: Any, numbers: bool) -> Self:
        return dataclasses.replace(super().hoisted(dtype, numbers), dtype=jnp.dtype(dtype).name)

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        return super().resolve(T, S, N)._with_slopes(N)

    def resolve_in_sequence(self, N: int) -> Self:
        return super().resolve_in_sequence(N)._with_slopes(N)

    def _with_slopes(self, N: int) -> Self:
        slopes = alibi_slopes(N, self.dtype) if self.slopes is None else self.slopes
        return dataclasses.replace(self, slopes=slopes)

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        self._check_resolved()
        if self.slopes is None:
            raise ValueError(
                "alibi() has a rule only once T, S and N are known: use score.resolve(T, S, N)"
            )
        s = jnp.asarray(s)
        distance = jnp.abs(jnp.asarray(q + self.offset - k)).astype(s.dtype)
        return s - jnp.asarray(self.slopes).astype(s.dtype) * distance


def alibi(
    slopes: Float[AnyArray, " N"] | None = None,
    *,
    offset: PerExample = 0,
    align: str = "start",
) -> Score:
    """``s - m_n * |i + offset - j|``: a linear penalty on distance.

    Args:
      slopes: ``m [N]``, differentiable; None takes ``alibi_slopes(N)``.
      offset: an int, or an int array ``[*B]``: the position of query 0 among the keys.
      align: ``"end"`` adds ``S - T`` to the offset.

    >>> import numpy as np
    >>> from attention_jax.scores import alibi
    >>> float(alibi(np.array([0.25])).score(np.float32(1.0), 0, 0, 2, 6))
    0.0

    Source: Press et al. 2022, "Train Short, Test Long".
    """
    if slopes is not None:
        float_array("slopes", slopes, (1,))
    return Alibi(slopes=slopes, offset=per_example("offset", offset), align=checked_align(align))


def alibi_slopes(num_heads: int, dtype: Any = np.float32) -> np.ndarray:
    """The geometric sequence ``2 ** (-8 i / N)``, for ``N`` a power of two.

    For other ``N``, that of the power below, then every other slope of the power above.

    >>> from attention_jax.scores import alibi_slopes
    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]

    Source: Press et al. 2022, "Train Short, Test Long", section 3.
    """
    int_at_least("num_heads", num_heads, 1)
    power = 2 ** math.floor(math.log2(num_heads))

    def sequence(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    slopes = sequence(power) + sequence(2 * power)[0::2][: num_heads - power]
    return np.asarray(slopes, dtype)


class RelativeBias(Relative):
    """``s + table[bucket(k - q - offset), n]``."""

    NAME = "scores.relative_bias"
    AXES = {"table": "R N", "offset": "*B"}
    table: Any
    bidirectional: bool
    max_distance: int

    def _buckets(self, distance: Any) -> Any:
        return relative_buckets(
            distance,
            num_buckets=self.table.shape[0],
            bidirectional=self.bidirectional,
            max_distance=self.max_distance,
        )

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        self._check_resolved()
        s = jnp.asarray(s)
        return s + self.table[self._buckets(k - q - self.offset)].astype(s.dtype)

    def tile(self, s: Any, b: Any, n: Any, q0: Any, k0: Any) -> Any:
        # A tile has only t + s - 1 distances. They are looked up by a product with one-hot rows,
        # whose transpose is a product too, whereas the transpose of a gather is a slow scatter.
        t, width = s.shape
        distances = k0 - q0 - self.offset - (t - 1) + jnp.arange(t + width - 1, dtype=jnp.int32)
        one_hot = jax.nn.one_hot(self._buckets(distances), self.table.shape[0], dtype=s.dtype)
        return s + skew(jnp.broadcast_to(one_hot @ self.table.astype(s.dtype), (t, t + width - 1)))


def relative_bias(
    table: Float[AnyArray, "R N"],
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    offset: PerExample = 0,
    align: str = "start",
) -> Score:
    """``s + table[bucket(j - i - offset), n]``: one learned bias per bucket of distances and head.

    Args:
      table: ``[R N]``, ``R`` buckets, differentiable.
      bidirectional: half the buckets are for keys after the query; if False, these share bucket 0.
      max_distance: larger distances share the last bucket.
      offset, align: as for ``alibi``.

    >>> import numpy as np
    >>> from attention_jax.scores import relative_bias
    >>> table = np.arange(8, dtype=np.float32)[:, None]
    >>> relative_bias(table).score(np.zeros(5, np.float32), 0, 0, 2, np.arange(5)).tolist()
    [2.0, 1.0, 0.0, 5.0, 6.0]

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (T5), section 2.1.
    """
    float_array("table", table, (2,))
    if table.shape[0] < (4 if bidirectional else 2) or (bidirectional and table.shape[0] % 2):
        raise ValueError(
            f"table must have an even number of at least 4 buckets (bidirectional) or at least 2, "
            f"got shape {table.shape} [R N]"
        )
    max_distance = as_int("max_distance", max_distance)
    if max_distance <= table.shape[0] // (4 if bidirectional else 2):
        raise ValueError(
            f"max_distance must exceed the exact distances of {table.shape[0]} buckets, got "
            f"{max_distance}"
        )
    return RelativeBias(
        table=table,
        offset=per_example("offset", offset),
        align=checked_align(align),
        bidirectional=bool(bidirectional),
        max_distance=max_distance,
    )


def relative_buckets(
    distance: Any, *, num_buckets: int, bidirectional: bool, max_distance: int
) -> Any:
    """T5's bucket of ``distance = j - i``: exact for near keys, logarithmic beyond.

    >>> import numpy as np
    >>> from attention_jax.scores import relative_buckets
    >>> relative_buckets(np.array([-200, -3, 0, 3]), num_buckets=32, bidirectional=True,
    ...                  max_distance=128).tolist()
    [15, 3, 0, 19]

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (T5), section 2.1.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    away = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    exact = side // 2
    # Float32 logarithms are part of the definition: published tables rely on them.
    log_ratio = jnp.log(jnp.maximum(away, exact).astype(jnp.float32) / exact) / math.log(
        max_distance / exact
    )
    far = jnp.minimum(exact + (log_ratio * (side - exact)).astype(jnp.int32), side - 1)
    bucket = jnp.where(away < exact, away.astype(jnp.int32), far)
    return bucket + jnp.where(distance > 0, side, 0) if bidirectional else bucket


class RelativeEmbedding(Relative):
    """``s + query[q] . table[clip(k - q - offset)]``."""

    NAME = "scores.relative_embedding"
    AXES = {"query": "*B T N H", "table": "R N H", "offset": "*B"}
    NEW_TOKENS = frozenset({"query"})
    query: Any
    table: Any

    def _rows(self, distance: Any) -> Any:
        c = self.table.shape[0] // 2
        return jnp.clip(distance, -c, c) + c

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        self._check_resolved()
        s = jnp.asarray(s)
        rows = self.table[self._rows(k - q - self.offset)]
        return s + (self.query.astype(s.dtype) * rows.astype(s.dtype)).sum(-1)

    def tile(self, s: Any, b: Any, n: Any, q0: Any, k0: Any) -> Any:
        # Computes all t + s - 1 distances of the tile for every query, then aligns the rows.
        t, width = s.shape
        distances = k0 - q0 - self.offset - (t - 1) + jnp.arange(t + width - 1, dtype=jnp.int32)
        one_hot = jax.nn.one_hot(self._rows(distances), self.table.shape[0], dtype=s.dtype)
        query = self.query[:, 0, :].astype(s.dtype)
        return s + skew((query @ self.table.astype(s.dtype).T) @ one_hot.T)


def relative_embedding(
    query: Float[AnyArray, "*B T N H"],
    table: Float[AnyArray, "..."],
    *,
    offset: PerExample = 0,
    align: str = "start",
) -> Score:
    """``s + q_i . a_clip(j - i - offset)``: learned vectors for near distances.

    The logits are scaled before scores are added; to scale this term too, scale ``query``.

    Args:
      query: ``[*B T N H]``, differentiable.
      table: ``a [R H]`` for all heads or ``[R N H]``, ``R = 2 c + 1`` distances ``-c .. c``,
        differentiable.
      offset, align: as for ``alibi``.

    >>> import numpy as np
    >>> from attention_jax.scores import relative_embedding
    >>> table = np.array([[-1.0], [0.0], [2.0]], np.float32)
    >>> score = relative_embedding(np.ones((3, 1, 1), np.float32), table)
    >>> score.score(np.zeros(3, np.float32), 0, 0, 1, np.arange(3)).tolist()
    [-1.0, 0.0, 2.0]

    Source: Shaw et al. 2018, "Self-Attention with Relative Position Representations", eq. 5.
    """
    float_array("query", query)
    float_array("table", table, (2, 3))
    if query.ndim < 3:
        raise ValueError(f"query must have at least 3 axes [*B T N H], got shape {query.shape}")
    if table.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"table has width {table.shape[-1]} (H) but query has {query.shape[-1]}: they must be "
            f"equal"
        )
    if table.shape[0] % 2 == 0:
        raise ValueError(f"table must have an odd number of rows (R = 2 c + 1), got {table.shape}")
    if table.ndim == 2:
        table = table[:, None, :]
    return RelativeEmbedding(
        query=query,
        table=table,
        offset=per_example("offset", offset),
        align=checked_align(align),
    )


def skew(x: jax.Array) -> jax.Array:
    """``y[i, j] = x[i, j + t - 1 - i]`` for ``x [t, t + s - 1]``: diagonals become columns.

    It is a pad and two reshapes, as is its transpose.

    >>> import jax.numpy as jnp
    >>> from attention_jax.scores.distance import skew
    >>> skew(jnp.array([[-1, 0, 1, 2], [-1, 0, 1, 2]])).tolist()
    [[0, 1, 2], [-1, 0, 1]]
    """
    t, width = x.shape
    s = width - t + 1
    # Row i starts at entry t - 1 - i: pad each row by one entry, then read rows one entry shorter.
    flat = jnp.pad(x, ((0, 0), (0, 1))).reshape(-1)
    return flat[t - 1 : t - 1 + t * width].reshape(t, width)[:, :s]
