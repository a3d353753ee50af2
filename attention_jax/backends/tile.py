"""One tile of query-key pairs: the masks and scores cut to it, its visible pairs, its logits.

Everything here is for one head of one example, so masks and scores have no ``B`` and ``N`` axes.
The materialized formulas use a single tile of ``T x S``.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attention_jax.core.axes import Size
from attention_jax.core.pytree import Leaf, map_leaves
from attention_jax.core.softmax import zero_rows
from attention_jax.masks import Mask
from attention_jax.scores import Masking, Score, tile_indices

V = TypeVar("V")
MAX_EXAMINED = 2**18  # pairs that are evaluated while tracing, in about a millisecond


def local_axes(leaf: Leaf) -> tuple[str, ...]:
    """The axes of a leaf within one head of one example."""
    return tuple(a for a in leaf.axes if a not in ("B", "N"))


def as_tile(x: Any, leaf: Leaf) -> Any:
    """An array cut to a tile, in the shape that rules get: ``[t, 1]``, ``[1, s]`` or ``[t, s]``."""
    axes = local_axes(leaf)
    if "T" in axes and "S" not in axes:
        return jnp.expand_dims(x, 1)
    if "S" in axes and "T" not in axes:
        return jnp.expand_dims(x, 0)
    return jnp.asarray(x)


def whole(value: V) -> V:
    """``value`` with its arrays in the shapes for the tile of all pairs."""
    return map_leaves(as_tile, value)


class Visible(NamedTuple):
    """Which pairs of a tile are visible, that is, not masked."""

    pairs: Bool[Array, "t s"]
    queries: Bool[Array, " t"] | None  # whether a query has a visible key; None: all have
    keys: Bool[Array, " s"] | None  # whether a key is visible to some query; None: all are

    def zero_rows(self, q: Any, k: Any, v: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values with zeros in fully masked rows."""
        return zero_rows(self.queries, q), zero_rows(self.keys, k), zero_rows(self.keys, v)


def visible_pairs(
    mask: Mask | None,
    scores: tuple[Score, ...],
    b: Any,
    n: Any,
    shape: tuple[Size, Size],
    q0: Any,
    k0: Any,
    own: Any = None,
) -> Visible | None:
    """The visible pairs of the tile at ``(q0, k0)``: by mask, and by biases of ``-inf``.

    Args:
      mask, scores: cut to the tile.
      own: bool, broadcasts to ``[t s]``: False for pairs that another tile computes.

    Returns:
      None if all pairs are known to be visible.
    """
    parts = [] if own is None else [own]
    if mask is not None:
        parts.append(mask.rule(b, n, *tile_indices(shape, q0, k0)))
    for score in reversed(scores):
        if not score.MASKING.keeps:  # it may unmask what earlier scores masked
            break
        if score.MASKING.adds:
            parts.append(score.visible())
    if not parts:
        return None
    pairs = functools.reduce(jnp.logical_and, parts)
    pairs = jnp.broadcast_to(pairs, shape)
    queries: jax.Array | None = pairs.any(1)
    keys: jax.Array | None = pairs.any(0)
    if len(parts) == 1 and mask is not None and (known := _known(mask, b, n, shape, q0, k0)):
        every_query, every_key = known
        queries, keys = None if every_query else queries, None if every_key else keys
    return Visible(pairs, queries, keys)


def _known(
    mask: Mask, b: Any, n: Any, shape: tuple[Size, Size], q0: Any, k0: Any
) -> tuple[bool, bool] | None:
    """Whether all queries have a visible key, and all keys are visible; None if not known."""
    static = isinstance(q0, int) and isinstance(k0, int) and not jax.tree.leaves(mask)
    static = static and all(isinstance(n, int) for n in shape)
    if not static or math.prod(shape) > MAX_EXAMINED:
        return None
    q, k = (np.arange(size, dtype=np.int32) for size in shape)
    pairs = mask.rule(b, n, q0 + q[:, None], k0 + k[None, :])
    if not isinstance(pairs, np.ndarray | np.bool_):
        return None
    pairs = np.broadcast_to(pairs, shape)
    return bool(pairs.any(1).all()), bool(pairs.any(0).all())


def scores_of_visible(scores: V, visible: Visible) -> V:
    """Scores with zeros in the rows of their arrays that belong to fully masked queries."""
    queries = visible.queries
    if queries is None:
        return scores

    def rows(x: Any, leaf: Leaf) -> Any:
        axes = local_axes(leaf)
        if "T" not in axes or "S" in axes or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.where(queries.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

    return map_leaves(rows, scores)


def apply_scores(
    s: Float[Array, "t s"],
    scores: tuple[Score, ...],
    visible: Visible | None,
    b: Any,
    n: Any,
    q0: Any,
    k0: Any,
) -> Float[Array, "t s"]:
    """The scores in order, then the mask: ``-inf`` where a pair is masked."""
    for score in scores:
        s = score.tile(s, b, n, q0, k0)
        if visible is not None:  # a NaN of a masked pair must not reach the next score
            s = jnp.where(visible.pairs, s, jnp.zeros_like(s))
    return s if visible is None else _masked(s, visible.pairs)


@jax.custom_jvp
def _masked(s: Float[Array, "t s"], pairs: Bool[Array, "t s"]) -> Float[Array, "t s"]:
    """``-inf`` where a pair is masked; as a minimum, because XLA fuses that with the products."""
    return jnp.minimum(s, jnp.where(pairs, jnp.inf, -jnp.inf).astype(s.dtype))


@_masked.defjvp
def _masked_jvp(primals: Any, tangents: Any) -> Any:
    (s, pairs), (ds, _) = primals, tangents
    return _masked(s, pairs), jnp.where(pairs, ds, jnp.zeros_like(ds))


def unmasked_values(
    s: Float[Array, "t s"], v: Float[Array, "s D"], scores: tuple[Score, ...]
) -> Float[Array, "s D"]:
    """``v`` with zeros for keys that a score masked (logit ``-inf``) for the whole tile."""
    if not any(score.MASKING is Masking.UNKNOWN for score in scores):
        return v
    return zero_rows((s != -jnp.inf).any(0), v)
