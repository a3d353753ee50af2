"""Scores: frozen values that change a logit before the softmax, and compose in sequence.

A score is a pytree with one method, ``score(s, b, n, q, k) -> s``: the logit ``s`` of
query ``q`` and key ``k`` in head ``n`` of example ``b``, changed. Its arrays may be
traced, batched over ``*B`` and differentiated.

>>> import numpy as np
>>> q, k = np.arange(2)[:, None], np.arange(3)[None, :]
>>> s = np.zeros((2, 3), np.float32)
>>> alibi(np.array([0.5])).score(s, 0, 0, q, k).tolist()
[[0.0, -0.5, -1.0], [-0.5, 0.0, -0.5]]

Each class says its fields, its ``rule`` for one tile (see ``values`` for what a field
looks like there), and, where the tile's contiguous indices allow something faster than
looking up every pair, ``tile``. A test holds the two equal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from attention_jax.core.axes import AnyArray, Size, is_array
from attention_jax.core.closures import hoist, of_tile
from attention_jax.core.pytree import Value, indexable

__all__ = [
    "Score",
    "alibi",
    "alibi_slopes",
    "at_positions",
    "bias",
    "relative_bias",
    "relative_buckets",
    "relative_embedding",
    "score_fn",
    "softcap",
]


class Score(Value):
    """A change of the logits. Subclasses give ``rule``."""

    # True where the result may be -inf, which hides the key as a mask does.
    HIDES: ClassVar[bool] = False
    # True where a logit of -inf stays -inf.
    KEEPS_HIDDEN: ClassVar[bool] = True
    # True where the rule reads ``q`` or ``k``.
    OF_POSITIONS: ClassVar[bool] = True

    def score(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        """The logits ``s`` of queries ``q`` and keys ``k`` in head ``n`` of example ``b``, changed.

        Args:
          s: logits, ``q`` and ``k`` broadcast to their shape.
          b, n: example (counted over the flattened ``*B``) and query head.
          q, k: positions; ints or integer arrays that broadcast.
        """
        return self.at(b, n, q, k).rule(s, b, n, q, k)

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        """The rule for one tile: the fields are already cut to it."""
        raise NotImplementedError(f"{type(self).__name__} must define rule(s, b, n, q, k)")

    def visible(self) -> Any:
        """Where this score, cut to a tile, does not hide the key; None where it never hides one."""
        return None

    def tile(self, s: Any, b: Any, n: Any, q0: Any, k0: Any) -> Any:
        """``rule`` on the tile ``s [t s]`` whose first query is ``q0`` and first key ``k0``."""
        return self.rule(s, b, n, *tile_indices(s.shape, q0, k0))


def tile_indices(shape: tuple[Size, Size], q0: Any, k0: Any) -> tuple[jax.Array, jax.Array]:
    """Query indices ``[t, 1]`` and key indices ``[1, s]`` of a tile."""
    t, s = shape
    return (
        q0 + jnp.arange(t, dtype=jnp.int32)[:, None],
        k0 + jnp.arange(s, dtype=jnp.int32)[None, :],
    )


class Softcap(Score):
    """``cap * tanh(s / cap)``."""

    KEEPS_HIDDEN = False
    OF_POSITIONS = False
    cap: Any  # a float, or the same as a scalar array

    def hoisted(self, dtype: Any, numbers: bool) -> Self:
        known = isinstance(self.cap, float)
        return type(self)(np.asarray(self.cap, dtype)) if numbers and known else self

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        s = jnp.asarray(s)
        cap = jnp.asarray(self.cap).astype(s.dtype)
        return cap * jnp.tanh(s / cap)


def softcap(cap: float) -> Score:
    """``cap * tanh(s / cap)``: keeps logits within ``(-cap, cap)``.

    >>> float(softcap(2.0).score(np.float32(100.0), 0, 0, 0, 0))
    2.0

    Source: Gemma Team 2024, "Gemma 2", section 2.
    """
    if isinstance(cap, bool) or not isinstance(cap, (int, float)):
        raise TypeError(f"cap must be a float, got {type(cap).__name__}")
    if not (cap > 0 and math.isfinite(cap)):
        raise ValueError(f"cap must be positive and finite, got {cap}")
    return Softcap(float(cap))


class Aligned(Score):
    """A score of distances: query ``i`` lies at ``i + offset`` among the keys."""

    AXES = {"offset": "*B"}
    offset: Any
    align: str

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        if self.align == "start":
            return self
        return dataclasses.replace(self, offset=self.offset + (S - T), align="start")

    def hoisted(self, dtype: Any, numbers: bool) -> Self:
        # No table of blocks depends on it, so it need not be part of the program.
        if not numbers or is_array(self.offset):
            return self
        return dataclasses.replace(self, offset=np.asarray(self.offset, np.int32))


class Alibi(Aligned):
    """``s - slopes[n] * |q + offset - k|``."""

    AXES = {"slopes": "N", "offset": "*B"}
    slopes: Any
    dtype: str = "float32"  # of default slopes

    def hoisted(self, dtype: Any, numbers: bool) -> Self:
        return dataclasses.replace(super().hoisted(dtype, numbers), dtype=jnp.dtype(dtype).name)

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        slopes = alibi_slopes(N, self.dtype) if self.slopes is None else self.slopes
        return dataclasses.replace(super().resolve(T, S, N), slopes=slopes)

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        if self.slopes is None or self.align == "end":
            raise ValueError(
                "alibi() and align='end' have a rule only once T, S and N are known: use "
                "score.resolve(T, S, N)"
            )
        s = jnp.asarray(s)
        distance = jnp.abs(jnp.asarray(q + self.offset - k)).astype(s.dtype)
        return s - jnp.asarray(self.slopes).astype(s.dtype) * distance


def alibi(
    slopes: Float[AnyArray, " N"] | None = None, *, offset: Any = 0, align: str = "start"
) -> Score:
    """``s - m_n * |i + offset - j|``: a linear penalty on distance.

    Args:
      slopes: ``m [N]``, differentiable; None takes ``alibi_slopes(N)``.
      offset: an int, or an int array ``[*B]``: the position of query 0 among the keys.
      align: ``"end"`` adds ``S - T`` to the offset.

    >>> float(alibi(np.array([0.25])).score(np.float32(1.0), 0, 0, 2, 6))
    0.0

    Source: Press et al. 2022, "Train Short, Test Long".
    """
    if slopes is not None:
        _float_array("slopes", slopes, (1,))
    _offset_and_align(offset, align)
    return Alibi(slopes=slopes, offset=offset, align=align)


def alibi_slopes(num_heads: int, dtype: Any = np.float32) -> np.ndarray:
    """The geometric sequence ``2 ** (-8 i / N)``; between powers of two, every other of the next.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]

    Source: Press et al. 2022, "Train Short, Test Long", section 3.
    """
    power = 2 ** math.floor(math.log2(num_heads))

    def sequence(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    slopes = sequence(power) + sequence(2 * power)[0::2][: num_heads - power]
    return np.asarray(slopes, dtype)


class Bias(Score):
    """``s + array``."""

    AXES = {"array": "*B N T S"}
    BROADCAST = True
    OF_POSITIONS = False
    array: Any

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        s = jnp.asarray(s)
        # Not `s + array` alone: what is hidden stays hidden, also where the logit is NaN.
        return jnp.where(self.visible(), s + jnp.asarray(self.array).astype(s.dtype), -jnp.inf)

    def visible(self) -> Any:
        return jnp.asarray(self.array) != -jnp.inf


def bias(array: Float[AnyArray, "..."]) -> Score:
    """``s + array[b, n, i, j]``; ``-inf`` hides a key as a mask does.

    Args:
      array: floating, broadcastable to ``[*B N T S]``, differentiable.

    >>> score = bias(np.array([[0.5, -np.inf]]))
    >>> score.score(np.zeros(2, np.float32), 0, 0, 0, np.arange(2)).tolist()
    [0.5, -inf]
    """
    _float_array("array", array, None)
    return Bias(array)


class RelativeBias(Aligned):
    """``s + table[bucket(k - q - offset), n]``."""

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
        if self.align == "end":
            raise ValueError(
                "align='end' has a rule only once T and S are known: use score.resolve"
            )
        s = jnp.asarray(s)
        return s + self.table[self._buckets(k - q - self.offset)].astype(s.dtype)

    def tile(self, s: Any, b: Any, n: Any, q0: Any, k0: Any) -> Any:
        # A tile has only t + s - 1 distances. Their values come by a product with one-hot rows,
        # whose transpose is a product too: a gather's would be a slow scatter.
        t, width = s.shape
        distances = k0 - q0 - self.offset - (t - 1) + jnp.arange(t + width - 1, dtype=jnp.int32)
        one_hot = jax.nn.one_hot(self._buckets(distances), self.table.shape[0], dtype=s.dtype)
        return s + skew(jnp.broadcast_to(one_hot @ self.table.astype(s.dtype), (t, t + width - 1)))


def relative_bias(
    table: Float[AnyArray, "R N"],
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    offset: Any = 0,
    align: str = "start",
) -> Score:
    """``s + table[bucket(j - i - offset), n]``: one learned bias per bucket of distances and head.

    Args:
      table: ``[R N]``, ``R`` buckets, differentiable.
      bidirectional: half the buckets are for keys after the query; else those share bucket 0.
      max_distance: distances from here on share the last bucket.
      offset, align: as for ``alibi``.

    >>> table = np.arange(8, dtype=np.float32)[:, None]
    >>> relative_bias(table).score(np.zeros(5, np.float32), 0, 0, 2, np.arange(5)).tolist()
    [2.0, 1.0, 0.0, 5.0, 6.0]

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (T5), section 2.1.
    """
    _float_array("table", table, (2,))
    _offset_and_align(offset, align)
    if table.shape[0] < (4 if bidirectional else 2) or (bidirectional and table.shape[0] % 2):
        raise ValueError(
            f"table must have an even number of at least 4 buckets (bidirectional) or at least 2, "
            f"got shape {table.shape} [R N]"
        )
    if max_distance <= table.shape[0] // (4 if bidirectional else 2):
        raise ValueError(
            f"max_distance must exceed the exact distances of {table.shape[0]} buckets, got "
            f"{max_distance}"
        )
    return RelativeBias(
        table=table,
        offset=offset,
        align=align,
        bidirectional=bool(bidirectional),
        max_distance=int(max_distance),
    )


def relative_buckets(
    distance: Any, *, num_buckets: int, bidirectional: bool, max_distance: int
) -> Any:
    """T5's bucket of ``distance = j - i``: exact when near, logarithmic further off.

    >>> relative_buckets(np.array([-200, -3, 0, 3]), num_buckets=32, bidirectional=True,
    ...                  max_distance=128).tolist()
    [15, 3, 0, 19]

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (T5), section 2.1.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    away = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    exact = side // 2
    # The comparison on float32 logarithms is part of the definition: published tables rely on it.
    log_ratio = jnp.log(jnp.maximum(away, exact).astype(jnp.float32) / exact) / math.log(
        max_distance / exact
    )
    far = jnp.minimum(exact + (log_ratio * (side - exact)).astype(jnp.int32), side - 1)
    bucket = jnp.where(away < exact, away.astype(jnp.int32), far)
    return bucket + jnp.where(distance > 0, side, 0) if bidirectional else bucket


class RelativeEmbedding(Aligned):
    """``s + query[q] . table[clip(k - q - offset)]``."""

    AXES = {"query": "*B T N H", "table": "R N H", "offset": "*B"}
    query: Any
    table: Any

    def _rows(self, distance: Any) -> Any:
        reach = self.table.shape[0] // 2
        return jnp.clip(distance, -reach, reach) + reach

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        if self.align == "end":
            raise ValueError(
                "align='end' has a rule only once T and S are known: use score.resolve"
            )
        s = jnp.asarray(s)
        rows = self.table[self._rows(k - q - self.offset)]
        return s + (self.query.astype(s.dtype) * rows.astype(s.dtype)).sum(-1)

    def tile(self, s: Any, b: Any, n: Any, q0: Any, k0: Any) -> Any:
        # Every query with the t + s - 1 distances of the tile, then each row shifted to its own.
        t, width = s.shape
        distances = k0 - q0 - self.offset - (t - 1) + jnp.arange(t + width - 1, dtype=jnp.int32)
        one_hot = jax.nn.one_hot(self._rows(distances), self.table.shape[0], dtype=s.dtype)
        query = self.query[:, 0, :].astype(s.dtype)
        return s + skew((query @ self.table.astype(s.dtype).T) @ one_hot.T)


def relative_embedding(
    query: Float[AnyArray, "*B T N H"],
    table: Float[AnyArray, "..."],
    *,
    offset: Any = 0,
    align: str = "start",
) -> Score:
    """``s + q_i . a_clip(j - i - offset)``: learned vectors for near distances.

    The logits are scaled before scores are added; to scale this term too, scale ``query``.

    Args:
      query: ``[*B T N H]``, differentiable.
      table: ``a [R H]`` for all heads or ``[R N H]``, ``R = 2 c + 1`` distances ``-c .. c``,
        differentiable.
      offset, align: as for ``alibi``.

    >>> table = np.array([[-1.0], [0.0], [2.0]], np.float32)
    >>> score = relative_embedding(np.ones((3, 1, 1), np.float32), table)
    >>> score.score(np.zeros(3, np.float32), 0, 0, 1, np.arange(3)).tolist()
    [-1.0, 0.0, 2.0]

    Source: Shaw et al. 2018, "Self-Attention with Relative Position Representations", eq. 5.
    """
    _float_array("query", query, None)
    _float_array("table", table, (2, 3))
    _offset_and_align(offset, align)
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
    return RelativeEmbedding(query=query, table=table, offset=offset, align=align)


def skew(x: jax.Array) -> jax.Array:
    """``y[i, j] = x[i, j + t - 1 - i]`` for ``x [t, t + s - 1]``: diagonals become columns.

    A pad and two reshapes; so is its transpose.

    >>> skew(jnp.array([[-1, 0, 1, 2], [-1, 0, 1, 2]])).tolist()
    [[0, 1, 2], [-1, 0, 1]]
    """
    t, width = x.shape
    s = width - t + 1
    # Row i starts t - 1 - i entries late: one entry more per row, read in rows one entry shorter.
    flat = jnp.pad(x, ((0, 0), (0, 1))).reshape(-1)
    return flat[t - 1 : t - 1 + t * width].reshape(t, width)[:, :s]


class ScoreFn(Score):
    """Any function."""

    HIDES = True
    KEEPS_HIDDEN = False
    fn: Callable[..., Any]
    arrays: tuple[Any, ...]

    def hoisted(self, dtype: Any, numbers: bool) -> Self:
        dtypes = (dtype, *(jnp.int32,) * 4)
        return type(self)(*hoist(self.fn, self.arrays, dtypes, "score_fn"))

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        s = jnp.asarray(s)
        changed = self.fn(s, b, n, q, k, *map(indexable, self.arrays))
        shape = jnp.broadcast_shapes(s.shape, np.shape(q), np.shape(k))
        return jnp.asarray(of_tile("score_fn", changed, shape, s.dtype))


def score_fn(fn: Callable[..., Any], *arrays: AnyArray) -> Score:
    """``fn(s, b, n, q, k, *arrays)``: the FlexAttention contract.

    Args:
      fn: takes logits ``s [t, s]``, int scalars ``b``, ``n``, int arrays ``q [t, 1]``,
        ``k [1, s]``; returns logits that broadcast to ``s``, which are cast to its dtype. It may
        close over arrays, traced ones too.
      *arrays: what ``fn`` looks things up in. Kernels for GPUs can look up these, but of what
        ``fn`` closes over they can take only numbers. Floating arrays of both kinds are
        differentiable. The gradient of an array costs its size once per tile: for one of
        ``T x S``, use ``bias``.

    >>> nearer = score_fn(lambda s, b, n, q, k: s - 0.5 * abs(q - k))
    >>> float(nearer.score(np.float32(3.0), 0, 0, 4, 2))
    2.0
    """
    if not callable(fn):
        raise TypeError(
            f"fn must be a function of (s, b, n, q, k, *arrays), got {type(fn).__name__}"
        )
    for x in arrays:
        if not is_array(x):
            raise TypeError(f"arrays must be JAX or NumPy arrays, got {type(x).__name__}")
    return ScoreFn(fn, tuple(arrays))


# --- Scores of positions rather than of places in the arrays.


class _Wrapped(Score):
    """A score whose rule is told other positions."""

    score_: Score

    HIDES = property(lambda self: self.score_.HIDES)
    KEEPS_HIDDEN = property(lambda self: self.score_.KEEPS_HIDDEN)

    def visible(self) -> Any:
        return self.score_.visible()

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        # Positions are those of one sequence: its last query and its last key are the same token.
        return dataclasses.replace(self, score_=self.score_.resolve(1, 1, N))


class Placed(_Wrapped):
    """``score`` of the positions of query and key."""

    AXES = {"query_positions": "*B T", "key_positions": "*B S"}
    query_positions: Any
    key_positions: Any

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.score_.rule(s, b, n, self.query_positions, self.key_positions)


class Later(_Wrapped):
    """``score`` of queries that begin at position ``start``, and keys that begin at 0."""

    AXES = {"start": "*B"}
    start: Any

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.score_.rule(s, b, n, q + self.start, k)

    def tile(self, s: Any, b: Any, n: Any, q0: Any, k0: Any) -> Any:
        return self.score_.tile(s, b, n, q0 + self.start, k0)


def at_positions(
    score: Score,
    query_positions: Int[AnyArray, "*B T"],
    key_positions: Int[AnyArray, "*B S"],
) -> Score:
    """``score`` of the positions of queries and keys, as ``masks.at_positions`` for masks.

    Query ``i`` and key ``j`` get what ``score`` gives ``query_positions[i]`` and
    ``key_positions[j]``, positions in one sequence: ``align="end"`` is ``align="start"``.

    Args:
      score: its rule sees positions in place of indices; arrays it holds stay in the order of the
        queries and keys of the call.
      query_positions, key_positions: int arrays ``[*B T]`` and ``[*B S]``, of one dtype. A key at
        a negative position must be hidden by the mask.

    >>> placed = at_positions(alibi(np.array([0.5])), np.array([4]), np.array([4, 5, 3]))
    >>> placed.score(np.zeros((1, 3), np.float32), 0, 0, np.array([[0]]), np.arange(3)).tolist()
    [[0.0, -0.5, -0.5]]
    """
    if not isinstance(score, Score):
        raise TypeError(f"score must be a Score, got {type(score).__name__}")
    for name, x in (("query_positions", query_positions), ("key_positions", key_positions)):
        if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.signedinteger) or not x.ndim:
            raise TypeError(f"{name} must be a signed integer array with a last axis, got {x!r}")
    if query_positions.dtype != key_positions.dtype:
        raise TypeError(
            f"query_positions and key_positions must have one dtype, got {query_positions.dtype} "
            f"and {key_positions.dtype}"
        )
    return Placed(score, query_positions, key_positions) if score.OF_POSITIONS else score


def later(score: Score, start: Int[AnyArray, "*B"]) -> Score:
    """``score`` of queries at positions from ``start [*B]`` on and keys at positions from 0 on.

    The same as ``at_positions`` with contiguous positions, by the faster ``tile`` of the score.
    """
    return Later(score, start) if score.OF_POSITIONS else score


def unwrapped(score: Score) -> Score:
    """The score whose rule it is, without the positions it is told."""
    while isinstance(score, _Wrapped):
        score = score.score_
    return score


def _float_array(name: str, x: Any, ranks: tuple[int, ...] | None) -> None:
    if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
        got = f"dtype {x.dtype}" if is_array(x) else type(x).__name__
        raise TypeError(f"{name} must be a floating array, got {got}")
    if ranks is not None and x.ndim not in ranks:
        allowed = " or ".join(map(str, ranks))
        raise ValueError(f"{name} must have {allowed} axes, got shape {x.shape}")


def _offset_and_align(offset: Any, align: str) -> None:
    if isinstance(offset, bool) or not (
        isinstance(offset, (int, np.integer))
        or (is_array(offset) and jnp.issubdtype(offset.dtype, jnp.signedinteger))
    ):
        raise TypeError(f"offset must be an int or an integer array, got {offset!r}")
    if align not in ("start", "end"):
        raise ValueError(f'align must be "start" or "end", got {align!r}')
