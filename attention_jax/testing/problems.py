"""The checker's numbers: a case as what a function is given and as what the oracle says to it."""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax import reference
from attention_jax.masks import Mask
from attention_jax.testing.cases import Case
from attention_jax.testing.rules import MASKS, SCORES, Arrays, Term, positions


class Inputs(NamedTuple):
    """The numbers of one call and of the loss that is differentiated; leaves are arrays or None."""

    query: Any  # [*B T N H]
    key: Any  # [*B S K H]
    value: Any  # [*B S K D]
    sinks: Any  # [N] or None
    scale: Any  # scalar or None
    score: tuple[Arrays, ...]  # what each score holds
    d_out: Any  # [*B T N D]
    d_lse: Any  # [*B T N]


class Problem(NamedTuple):
    """A case with its numbers."""

    case: Case
    mask: Mask | None
    terms: tuple[Term, ...]
    dropout_key: np.ndarray  # the two words of a threefry key
    keep: np.ndarray | None  # bool [*B N T S]
    seen: np.ndarray  # bool [*B N T S]: mask, and no -inf bias
    clean: Inputs
    planted: Inputs  # with NaN and inf where nothing may look, if the case says so


def problem(case: Case) -> Problem:
    """The numbers of a case: the same whenever it is asked."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    z, dtype = case.sizes, jnp.dtype(case.dtype)
    wide = np.dtype(case.wide)

    def normal(*shape: int, dtype: Any = dtype) -> np.ndarray:
        return np.asarray(rng.normal(size=shape)).astype(dtype)

    mask, visible = MASKS[case.mask](case, rng)
    terms = tuple(part(case, normal, rng) for part in SCORES[case.score])
    clean = Inputs(
        query=(normal(*z.B, z.T, z.N, z.H) * case.magnitude).astype(dtype),
        key=normal(*z.B, z.S, z.K, z.H),
        value=normal(*z.B, z.S, z.K, z.D),
        sinks=normal(z.N) if case.sinks else None,
        scale=None if case.scale is None else np.asarray(case.scale, wide),
        score=tuple(term.arrays for term in terms),
        d_out=normal(*z.B, z.T, z.N, z.D),
        d_lse=normal(*z.B, z.T, z.N, dtype=wide),
    )
    shape = (*z.B, z.N, z.T, z.S)
    hidden = np.zeros(shape)
    for term in terms:  # a softcap after a bias of -inf makes it finite again
        hidden = _step(term, term.arrays)(hidden)
    _, j = positions(case)
    real = (j >= 0)[..., None, None, :]  # keys at negative positions are masked
    seen = np.broadcast_to(visible & real, shape) & (hidden != -np.inf)
    words = rng.integers(2**32, size=2, dtype=np.uint32)
    keep = _keep(words, case) if case.dropout_rate else None
    planted = _plant(clean, seen, case, rng) if case.planted else clean
    return Problem(case, mask, terms, words, keep, seen, clean, planted)


def oracle(p: Problem, gradients: bool) -> dict[str, np.ndarray]:
    """What is right, by the names that a report's rows have."""
    x = p.clean
    wide: dict[str, Any] = {
        name: np.asarray(getattr(x, name), np.float64) for name in ("query", "key", "value")
    }
    options: dict[str, Any] = {
        "mask": p.seen,
        "score": [_step(t, a) for t, a in zip(p.terms, x.score, strict=True)],
        "sinks": x.sinks,
        "scale": x.scale,
        "keep": p.keep,
        "dropout_rate": p.case.dropout_rate,
    }
    out, lse, _ = reference.attention(**wide, **options)
    right = {"out": out, "lse": lse} if p.case.lse else {"out": out}
    if not gradients:
        return right
    d_lse = x.d_lse if p.case.lse else None
    g = reference.attention_gradients(**wide, d_out=x.d_out, d_lse=d_lse, **options)
    right |= {"d query": g.query, "d key": g.key, "d value": g.value}
    right |= {} if x.sinks is None else {"d sinks": np.asarray(g.sinks)}
    right |= {} if x.scale is None else {"d scale": np.asarray(g.scale)}
    for term, arrays, d in zip(p.terms, x.score, g.score, strict=True):
        if term.pull is not None:
            pulled = term.pull(d, **_exact(arrays))
            right |= {f"d {term.name}.{name}": a for name, a in pulled.items()}
        elif arrays:
            right[f"d {term.name}.array"] = np.asarray(d)
    return right


class Order(NamedTuple):
    """The order in which the plain formula does things that it may do in any order."""

    first: Any  # is the query scaled, or the logits
    S: Any  # keys
    H: Any  # entries of query and key
    D: Any  # entries of value


class Tries(NamedTuple):
    """What the plain formula is tried on; every leaf has one entry per try along a new axis."""

    inputs: Inputs
    seen: Any  # bool [tries *B N T S]
    keep: Any  # bool [tries *B N T S] or None
    order: Order


# The axes of a result, and of its gradient, that are reordered.
REORDERED: dict[str, dict[int, str]] = {
    "query": {-1: "H"},
    "key": {-3: "S", -1: "H"},
    "value": {-3: "S", -1: "D"},
    "out": {-1: "D"},
    "pairs": {-1: "S"},
}


def reordered(name: str, x: np.ndarray, order: Order) -> np.ndarray:
    """``x``, the array or the gradient of this name, in this order."""
    for axis, letter in REORDERED.get(name.removeprefix("d "), {}).items():
        x = np.take(x, getattr(order, letter), axis)
    return x


def tries(p: Problem, number: int) -> Tries:
    """The clean inputs as they are, then moved by one rounding each and in another order.

    A sum's rounding error may be small by luck, one number's most of all: the worst error of
    several is what the formula's error is. NumPy reorders: each gather and scatter in the plain
    formula would make it slower to compile.
    """
    rng, z = np.random.default_rng(0), p.case.sizes
    eps = float(jnp.finfo(p.case.dtype).eps)

    def rounded(x: Any) -> Any:
        moved = np.asarray(x, np.float64) * (1.0 + eps * rng.choice((-1.0, 1.0), x.shape))
        return moved.astype(x.dtype)

    def one(x: Inputs, order: Order) -> Tries:
        x = x._replace(
            query=reordered("query", x.query, order),
            key=reordered("key", x.key, order),
            value=reordered("value", x.value, order),
            d_out=reordered("out", x.d_out, order),
        )
        keep = None if p.keep is None else reordered("pairs", p.keep, order)
        return Tries(x, reordered("pairs", p.seen, order), keep, order)

    every = [one(p.clean, Order(np.False_, *map(np.arange, (z.S, z.H, z.D))))]
    for i in range(1, number):
        order = Order(np.bool_(i % 2), *map(rng.permutation, (z.S, z.H, z.D)))
        every.append(one(jax.tree.map(rounded, p.clean), order))
    stacked: Tries = jax.tree.map(lambda *x: np.stack(x), *every)
    return stacked


def plain(p: Problem, x: Inputs, seen: Any, keep: Any, order: Order) -> tuple[Any, ...]:
    """The formula, materialized, all of it in the case's dtype: what tolerances are derived from.

    Given what is visible and what dropout keeps, bool ``[*B N T S]``. These and the arrays of ``x``
    but for those of scores are in this order already.
    """
    dtype, G = x.query.dtype, p.case.sizes.G
    low = jnp.finfo(dtype).min / 2  # where hidden: finite, so that nothing becomes NaN
    q, k, v = x.query, jnp.repeat(x.key, G, axis=-2), jnp.repeat(x.value, G, axis=-2)
    scale = jnp.asarray(p.case.sizes.H**-0.5 if x.scale is None else x.scale, dtype)
    q = q * jnp.where(order.first, scale, 1)
    s = jnp.einsum("...tnh,...snh->...nts", q, k) * jnp.where(order.first, 1, scale)
    for term, arrays in zip(p.terms, x.score, strict=True):
        if term.add is None:
            s = term.cap * jnp.tanh(s / term.cap)
        else:
            added = jnp.asarray(term.add(jnp, **arrays), dtype)
            added = jnp.broadcast_to(added, s.shape)[..., order.S]
            s = jnp.where(added == -jnp.inf, low, s + added)
    sink = jnp.full((p.case.sizes.N,), low, dtype) if x.sinks is None else x.sinks
    s = jnp.concatenate(
        [jnp.where(seen, s, low), jnp.broadcast_to(sink[:, None, None], (*s.shape[:-1], 1))], -1
    )
    m = jax.lax.stop_gradient(s.max(-1, keepdims=True))
    e = jnp.where(s == low, 0, jnp.exp(s - m))
    total = e.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, m + jnp.log(total))[..., 0]
    weights = (e / total)[..., :-1]
    if keep is not None:
        weights = jnp.where(keep, weights / (1 - p.case.dropout_rate), 0)
    out = jnp.einsum("...nts,...snd->...tnd", weights, v)
    return (out, jnp.moveaxis(lse, -2, -1))[: 1 + p.case.lse]


def _step(term: Term, arrays: Arrays) -> reference.Step:
    """A score in the oracle's terms."""
    if term.add is None:
        return reference.Softcap(term.cap)
    return reference.Bias(term.add(np, **_exact(arrays)))


def _exact(arrays: Arrays) -> Arrays:
    return {name: np.asarray(a, np.float64) for name, a in arrays.items()}


def _keep(words: np.ndarray, case: Case) -> np.ndarray:
    """``dropout.keep`` of every pair, in NumPy: bool ``[*B N T S]``."""
    z, rate = case.sizes, case.dropout_rate
    shift, u = np.right_shift, np.uint32

    def mix(x: np.ndarray) -> np.ndarray:  # the finalizer of MurmurHash3
        x = (x ^ shift(x, u(16))) * u(0x85EBCA6B)
        x = (x ^ shift(x, u(13))) * u(0xC2B2AE35)
        return x ^ shift(x, u(16))

    seed = np.zeros(1, u)
    for word in words:
        seed = mix(seed ^ word) + u(0x27D4EB2F)
    query, key = positions(case)
    b = np.arange(math.prod(z.B)).reshape(*z.B, 1, 1, 1)
    indices = b, np.arange(z.N)[:, None, None], query[..., None, :, None], key[..., None, None, :]
    h = seed
    odd_numbers = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
    for index, odd in zip(indices, odd_numbers, strict=True):
        h = mix(h ^ index.astype(u) * u(odd))
    return np.asarray(h < u(round((1.0 - rate) * 2.0**32)))


def _plant(x: Inputs, seen: np.ndarray, case: Case, rng: np.random.Generator) -> Inputs:
    """NaN and inf in every number that no visible pair uses."""
    z = case.sizes
    poison = np.array([np.nan, np.inf, -np.inf])

    def plant(array: np.ndarray, used: np.ndarray) -> np.ndarray:
        used = used.reshape(used.shape + (1,) * (array.ndim - used.ndim))
        drawn = rng.choice(poison, size=array.shape).astype(array.dtype)
        return np.where(used, array, drawn)

    rows = np.moveaxis(np.any(seen, -1), -2, -1)  # [*B T N]
    groups = seen.reshape(*z.B, z.K, z.G, z.T, z.S)
    keys = np.moveaxis(np.any(groups, (-3, -2)), -2, -1)  # [*B S K]
    planted_score = []
    for arrays in x.score:
        arrays = dict(arrays)
        if "query" in arrays:
            arrays["query"] = plant(arrays["query"], rows)
        if "array" in arrays:
            shape = (1,) * (seen.ndim - arrays["array"].ndim) + arrays["array"].shape
            along = tuple(a for a, size in enumerate(shape) if size == 1)
            used = np.any(seen, along, keepdims=True).reshape(arrays["array"].shape)
            # What is -inf hides a pair and must stay.
            arrays["array"] = plant(arrays["array"], used | (arrays["array"] == -np.inf))
        planted_score.append(arrays)
    return x._replace(
        query=plant(x.query, rows),
        key=plant(x.key, keys),
        value=plant(x.value, keys),
        d_out=plant(x.d_out, rows),
        # With sinks the lse of an empty row is the sink: its cotangent counts.
        d_lse=x.d_lse if case.sinks else plant(x.d_lse, rows),
        score=tuple(planted_score),
    )
