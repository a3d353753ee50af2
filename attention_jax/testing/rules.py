"""Masks and scores a second time, in NumPy: the rules that the oracle and the tests share.

First the rules themselves, on query positions ``i`` and key positions ``j``. A kind of mask is a
function of a case: the mask to test, and its rule for this case. A kind of score is a list of such
functions: the score, and its formula. The oracle is given these rules and formulas only: it shares
no line with what is tested.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from attention_jax import masks, scores
from attention_jax.masks import Mask
from attention_jax.scores import Score
from attention_jax.testing.cases import Case

Arrays = dict[str, np.ndarray]
Normal = Callable[..., np.ndarray]  # (*shape, dtype=the case's) -> normally distributed numbers

# --- Rules.


def band(i: Any, j: Any, left: Any = None, right: Any = None, offset: Any = 0) -> Any:
    """``i + offset - left <= j <= i + offset + right``; None is no bound on that side."""
    distance = np.asarray(j - i - offset)
    visible = np.ones(distance.shape, bool)
    if left is not None:
        visible = visible & (-left <= distance)
    if right is not None:
        visible = visible & (distance <= right)
    return visible


def strided(i: Any, j: Any, stride: int) -> Any:
    """Keys at multiples of ``stride`` from the query."""
    return np.remainder(i - j, stride) == 0


def same_chunk(i: Any, j: Any, size: int) -> Any:
    """Query and key are in one chunk of ``size`` positions."""
    return np.floor(i / size) == np.floor(j / size)


def same_segment(query_ids: Any, key_ids: Any) -> Any:
    """Equal ids; a negative id is padding."""
    return (query_ids == key_ids) & (query_ids >= 0) & (key_ids >= 0)


def neighbors(i: Any, j: Any, shape: tuple[int, ...], size: tuple[int, ...]) -> Any:
    """On every axis of a grid, the key is at most half a window from the query's clamped cell."""
    visible = np.True_
    cells = np.unravel_index(i, shape), np.unravel_index(j, shape)
    for a, b, n, w in zip(*cells, shape, size, strict=True):
        center = np.minimum(np.maximum(a, w // 2), n - 1 - w // 2)
        visible = visible & (abs(center - b) <= w // 2)
    return visible


def in_layout(i: Any, j: Any, layout: np.ndarray, block: int) -> Any:
    """The layout's entry for the blocks of query and key."""
    return layout[i // block, j // block]


def alibi_slopes(N: int) -> list[float]:
    """A geometric sequence from 2^(-8/N); between powers of two, every other of the next power's.

    Source: Press et al. 2022, "Train Short, Test Long", and its published code.
    """
    power = 1 << (N.bit_length() - 1)
    if power == N:
        return [2.0 ** (-8.0 * m / N) for m in range(1, N + 1)]
    return alibi_slopes(power) + alibi_slopes(2 * power)[0::2][: N - power]


def t5_bucket(distance: Any, buckets: int, bidirectional: bool, max_distance: int) -> Any:
    """T5's bucket of distances ``j - i``, in float32 where it rounds, as the published code.

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning".
    """
    side = buckets // 2 if bidirectional else buckets
    away = abs(distance) if bidirectional else np.maximum(-distance, 0)
    exact = side // 2
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    far = np.minimum(exact + ratio.astype(np.int32), side - 1)
    bucket = np.where(away < exact, away, far)
    return bucket + side * (distance > 0) if bidirectional else bucket


def clipped(distance: Any, most: int) -> Any:
    """The row of a table of ``2 most + 1`` distances ``j - i``."""
    return np.minimum(np.maximum(distance, -most), most) + most


# --- Masks.


def _per_example(case: Case, rng: np.random.Generator, low: int, high: int) -> tuple[Any, Any]:
    """Ints ``[*B]``, and the same as ``[*B 1 1 1]``."""
    x = np.asarray(rng.integers(low, high, size=case.sizes.B), np.int32)
    return x, x[..., None, None, None]


def positions(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Of queries and keys, int32 ``[T]`` and ``[S]``, or ``[*B T]`` and ``[*B S]``."""
    z, rng = case.sizes, np.random.default_rng(zlib.crc32(case.positions.encode()))
    query, key = (np.arange(n, dtype=np.int32) for n in (z.T, z.S))
    if case.positions == "shuffled":
        query, key = (rng.permutation(z.T + z.S)[:n].astype(np.int32) for n in (z.T, z.S))
        key[rng.random(z.S) < 0.2] = -1
    elif case.positions == "per example":
        query = query + np.asarray(rng.integers(0, z.S, size=(*z.B, 1)), np.int32)
        key = key + np.asarray(rng.integers(0, z.T, size=(*z.B, 1)), np.int32)
    return query, key


def _ij(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Positions as ``[T 1]`` and ``[1 S]``, or ``[*B 1 T 1]`` and ``[*B 1 1 S]``."""
    query, key = positions(case)
    i, j = query[..., :, None], key[..., None, :]
    return (i, j) if query.ndim == 1 else (i[..., None, :, :], j[..., None, :, :])


def _none(case: Case, rng: np.random.Generator) -> tuple[Mask | None, Any]:
    return None, np.True_


def _causal(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    i, j = _ij(case)
    return masks.causal(), band(i, j, right=0)


def _causal_end(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    i, j = _ij(case)
    return masks.causal(align="end"), band(i, j, right=0, offset=case.sizes.S - case.sizes.T)


def _causal_offsets(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    (i, j), (offset, o) = _ij(case), _per_example(case, rng, -case.sizes.T, case.sizes.S)
    return masks.causal(offset), band(i, j, right=0, offset=o)


def _window_offset(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    i, j = _ij(case)
    return masks.window(7, 3, offset=2), band(i, j, 7, 3, offset=2)


def _prefix_or_causal(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    (i, j), (length, n) = _ij(case), _per_example(case, rng, 0, case.sizes.S + 1)
    return masks.prefix(length) | masks.causal(), (j < n) | band(i, j, right=0)


def _lengths(case: Case, rng: np.random.Generator, least: int = 1) -> tuple[Mask, Any]:
    i, j = _ij(case)
    query, t = _per_example(case, rng, least, max(case.sizes.T, 2))
    key, s = _per_example(case, rng, least, max(case.sizes.S, 2))
    if least == 0:  # one example with no keys, one with no queries
        key.flat[0], query.flat[-1] = 0, 0
    return masks.lengths(query=query, key=key), (i < t) & (j < s)


def _segments(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    z = case.sizes
    q, k = (np.sort(rng.integers(-1, 4, size=(*z.B, n)), -1).astype(np.int32) for n in (z.T, z.S))
    return masks.segments(q, k), same_segment(q[..., None, :, None], k[..., None, None, :])


def _chunked(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    i, j = _ij(case)
    return masks.chunked(9), same_chunk(i, j, 9)


def _not_chunked(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    i, j = _ij(case)
    return ~masks.chunked(9) & masks.causal(), ~same_chunk(i, j, 9) & band(i, j, right=0)


def _dilated(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    i, j = _ij(case)
    return masks.dilated(3) & masks.causal(), strided(i, j, 3) & band(i, j, right=0)


def _global(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    i, j = _ij(case)
    flags = rng.random((*case.sizes.B, case.sizes.T)) < 0.1
    flagged = flags[..., None, :, None] | flags[..., None, None, :]
    return masks.global_tokens(flags) | masks.window(2, 2), flagged | band(i, j, 2, 2)


def _neighborhood(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    shape, size = {35: ((5, 7), (3, 5)), 143: ((11, 13), (5, 3))}[case.sizes.T]
    return masks.neighborhood(shape, size), neighbors(*_ij(case), shape, size)


def _block_sparse(case: Case, rng: np.random.Generator, traced: bool = False) -> tuple[Mask, Any]:
    z, block = case.sizes, 6
    layout = rng.random((-(-z.T // block), -(-z.S // block))) < 0.5
    mask = masks.block_sparse(jnp.asarray(layout) if traced else layout, block)
    return mask, in_layout(*_ij(case), layout, block)


def _dense(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    z = case.sizes
    array = rng.random((*z.B, z.N, z.T, z.S)) < 0.6
    array[..., 3::4, :] = False  # every fourth row sees nothing
    array[..., -1, :, :] &= z.T > 1  # nor does the last head, if there is one query
    return masks.dense(array), array


def _nothing(case: Case, rng: np.random.Generator) -> tuple[Mask, Any]:
    array = np.zeros((case.sizes.T, case.sizes.S), bool)
    return masks.dense(array), array


def _some_pairs(b: Any, n: Any, q: Any, k: Any, table: Any) -> Any:
    return (q + 2 * k + n + table[b]) % 5 > 1


def _mask_fn(case: Case, rng: np.random.Generator, evaluate: bool = False) -> tuple[Mask, Any]:
    i, j = _ij(case)
    table, t = _per_example(case, rng, 0, 5)
    seen = np.remainder(i + 2 * j + np.arange(case.sizes.N)[:, None, None] + t, 5) > 1
    return masks.mask_fn(_some_pairs, table.reshape(-1), evaluate=evaluate), seen


MASKS: dict[str, Callable[[Case, np.random.Generator], tuple[Mask | None, Any]]] = {
    "none": _none,
    "nothing": _nothing,
    "causal": _causal,
    "causal end": _causal_end,
    "causal offsets": _causal_offsets,
    "window offset": _window_offset,
    "prefix | causal": _prefix_or_causal,
    "lengths": _lengths,
    "length 0": functools.partial(_lengths, least=0),
    "segments": _segments,
    "chunked": _chunked,
    "~chunked & causal": _not_chunked,
    "dilated & causal": _dilated,
    "global | window": _global,
    "neighborhood": _neighborhood,
    "block_sparse": _block_sparse,
    "block_sparse traced": functools.partial(_block_sparse, traced=True),
    "dense": _dense,
    "mask_fn": _mask_fn,
    "mask_fn evaluated": functools.partial(_mask_fn, evaluate=True),
}


# --- Scores.


@dataclasses.dataclass(frozen=True)
class Term:
    """One score as the checker sees it.

    A softcap, or something added to the logits: ``add(xp, **arrays)`` is that, broadcastable to
    ``[*B N T S]``, in NumPy or ``jax.numpy``; ``pull(d, **arrays)`` are the gradients of its
    arrays, given that of what was added, ``[*B N T S]`` (None: of the array added, as it is).
    """

    name: str
    build: Callable[..., Score]
    arrays: Arrays = dataclasses.field(default_factory=dict)
    cap: float = math.inf
    add: Callable[..., Any] | None = None
    pull: Callable[..., Arrays] | None = None


def _softcap(case: Case, normal: Normal, rng: np.random.Generator) -> Term:
    return Term("softcap", lambda: scores.softcap(2.5), cap=2.5)


def _bias(case: Case, normal: Normal, rng: np.random.Generator, hide: float = 0.0) -> Term:
    z = case.sizes
    batch = [b if "B" in case.bias else 1 for b in z.B]
    if "b" in case.bias:
        batch[-1:] = z.B[-1:]
    shape = (*batch, *(getattr(z, a) if a in case.bias else 1 for a in "NTS"))
    while shape and shape[0] == 1:  # axes that it broadcasts along, it need not have
        shape = shape[1:]
    array = normal(*shape, dtype=jnp.dtype(case.bias_dtype or case.dtype))
    if hide:
        array = np.where(rng.random(shape) < hide, np.asarray(-np.inf, array.dtype), array)
        if "T" in case.bias and z.T > 1:
            array[..., 1::4, :] = -np.inf  # whole rows
    return Term("bias", lambda array: scores.bias(array), {"array": array}, add=_itself)


def _sum_of(formula: str, *operands: np.ndarray) -> np.ndarray:
    """``np.einsum``, then summed over the examples, which are what ``...`` stands for."""
    result = np.einsum(formula, *(np.asarray(x, np.float64) for x in operands), optimize=True)
    rank = len(formula.split("...")[-1])
    return np.sum(result, tuple(range(result.ndim - rank)))


def _itself(xp: Any, array: Any) -> Any:
    return array


def _alibi(case: Case, normal: Normal, rng: np.random.Generator, own: bool = True) -> Term:
    """With its own slopes and aligned to the end, or with default slopes and offsets ``[*B]``."""
    z, (i, j) = case.sizes, _ij(case)
    offsets, o = _per_example(case, rng, -5, 9)
    distance = abs(i + (z.S - z.T if own else o) - j).astype(np.float64)

    def add(xp: Any, slopes: Any = None) -> Any:
        if slopes is None:
            return -np.asarray(alibi_slopes(z.N))[:, None, None] * distance
        return -slopes[:, None, None] * xp.asarray(distance, slopes.dtype)

    def pull(d: np.ndarray, slopes: Any = None) -> Arrays:
        if slopes is None:
            return {}
        return {"slopes": _sum_of("...nts,ts->...n", d, -distance)}

    def build(slopes: Any = None) -> Score:
        if slopes is None:
            return scores.alibi(offset=offsets)
        return scores.alibi(slopes, align="end")

    arrays = {"slopes": abs(normal(z.N)) / 4} if own else {}
    return Term("alibi", build, arrays, add=add, pull=pull)


def _relative_bias(
    case: Case, normal: Normal, rng: np.random.Generator, causal: bool = False
) -> Term:
    """T5: the entry of each distance's bucket, in both directions or one."""
    i, j = _ij(case)
    distance, buckets, most = j - i - 2, 8, 20
    bucket = t5_bucket(distance, buckets, not causal, most)
    hot = bucket[..., None] == np.arange(buckets)  # [T S R]

    def add(xp: Any, table: Any) -> Any:
        return xp.einsum("rn,tsr->nts", table, xp.asarray(hot, table.dtype))

    def pull(d: np.ndarray, table: np.ndarray) -> Arrays:
        return {"table": _sum_of("...nts,tsr->...rn", d, hot)}

    def build(table: Any) -> Score:
        return scores.relative_bias(table, bidirectional=not causal, max_distance=most, offset=2)

    return Term(
        "relative_bias", build, {"table": normal(buckets, case.sizes.N)}, add=add, pull=pull
    )


def _relative_embedding(
    case: Case, normal: Normal, rng: np.random.Generator, shared: bool = False
) -> Term:
    """Shaw: ``query_i . table[clip(j - i - offset, -c, c) + c]``, aligned to the end."""
    z, (i, j), c = case.sizes, _ij(case), 4
    hot = clipped(j - i - (z.S - z.T), c)[..., None] == np.arange(2 * c + 1)  # [T S R]
    rows = "rh" if shared else "rnh"

    def add(xp: Any, query: Any, table: Any) -> Any:
        products = xp.einsum(f"...tnh,{rows}->...ntr", query, table)
        return xp.einsum("...ntr,tsr->...nts", products, xp.asarray(hot, table.dtype))

    def pull(d: np.ndarray, query: np.ndarray, table: np.ndarray) -> Arrays:
        d_products = np.einsum("...nts,tsr->...ntr", d, hot.astype(float), optimize=True)
        return {
            "query": np.einsum(f"...ntr,{rows}->...tnh", d_products, table),
            "table": _sum_of(f"...ntr,...tnh->...{rows}", d_products, query),
        }

    arrays = {
        "query": normal(*z.B, z.T, z.N, z.H),
        "table": normal(2 * c + 1, *(() if shared else (z.N,)), z.H),
    }

    def build(query: Any, table: Any) -> Score:
        return scores.relative_embedding(query, table, align="end")

    return Term("relative_embedding", build, arrays, add=add, pull=pull)


def _looked_up(s: Any, b: Any, n: Any, q: Any, k: Any, table: Any) -> Any:
    return s + table[(q + 2 * k + b) % 5, n].astype(s.dtype)


def _score_fn(case: Case, normal: Normal, rng: np.random.Generator) -> Term:
    z, (i, j) = case.sizes, _ij(case)
    b = np.arange(math.prod(z.B)).reshape(z.B)[..., None, None]
    hot = np.remainder(i + 2 * j + b, 5)[..., None] == np.arange(5)  # [*B T S R]

    def add(xp: Any, table: Any) -> Any:
        return xp.einsum("rn,...tsr->...nts", table, xp.asarray(hot, table.dtype))

    def pull(d: np.ndarray, table: np.ndarray) -> Arrays:
        return {"table": _sum_of("...nts,...tsr->...rn", d, hot)}

    def build(table: Any) -> Score:
        return scores.score_fn(_looked_up, table)

    return Term("score_fn", build, {"table": normal(5, z.N)}, add=add, pull=pull)


def _hide_some(s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
    return jnp.where((q + k) % 3 == 0, -jnp.inf, s + jnp.asarray(0.5, s.dtype))


def _hiding_score_fn(case: Case, normal: Normal, rng: np.random.Generator) -> Term:
    i, j = _ij(case)
    added = np.where(np.isin(i + j, np.arange(0, 1000, 3)), -np.inf, 0.5)
    return Term(
        "score_fn",
        lambda: scores.score_fn(_hide_some),
        add=lambda xp: added,
        pull=lambda d: {},
    )


_hiding_bias = functools.partial(_bias, hide=0.25)

SCORES: dict[str, tuple[Callable[[Case, Normal, np.random.Generator], Term], ...]] = {
    "none": (),
    "softcap": (_softcap,),
    "alibi": (_alibi,),
    "bias": (_bias,),
    "-inf bias": (_hiding_bias,),
    "relative_bias": (_relative_bias,),
    "relative_bias, causal": (functools.partial(_relative_bias, causal=True),),
    "relative_embedding": (_relative_embedding,),
    "relative_embedding, shared": (functools.partial(_relative_embedding, shared=True),),
    "score_fn": (_score_fn,),
    "hiding score_fn": (_hiding_score_fn,),
    "bias, softcap": (_bias, _softcap),
    "-inf bias, softcap": (_hiding_bias, _softcap),
    "softcap, alibi": (_softcap, functools.partial(_alibi, own=False)),
}
