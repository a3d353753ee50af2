"""Loads and stores of tiles in a GPU kernel.

A kernel gets a reference to each whole operand, with all heads of all examples; ``Refs`` holds
those of one head. Tile sizes are powers of two: entries beyond an array are loaded as 0 and not
stored, and the formulas mask these pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from attention_jax.backends import primitive
from attention_jax.backends.primitive import Dims
from attention_jax.backends.tile import Visible, local_axes
from attention_jax.core.compat import triton
from attention_jax.core.pytree import Leaf, Lookup, leaves
from attention_jax.scores import tile_indices

MIN_TILE = 16  # Triton's products need tiles of at least this many rows and columns


def padded(n: int) -> int:
    """The size of a tile that covers ``n`` rows or columns: a power of two.

    >>> from attention_jax.backends.pallas_gpu.refs import padded
    >>> padded(11), padded(64), padded(65)
    (16, 64, 128)
    """
    return max(MIN_TILE, pl.next_power_of_2(n))


@dataclasses.dataclass(frozen=True)
class MappedRef:
    """A reference to an operand with mapped axes, and the index of one head along them."""

    ref: Any
    dims: Dims
    head_index: tuple[Any, ...]

    @property
    def core(self) -> tuple[int, ...]:
        """The shape of one head of one example."""
        return primitive.core_shape(self.ref.shape, self.dims)

    def _index(self, *core: Any) -> tuple[Any, ...]:
        rest = iter(core)
        return tuple(
            self.head_index[self.dims.index(axis)] if axis in self.dims else next(rest)
            for axis in range(len(self.ref.shape))
        )

    def entry(self, *core: Any) -> Any:
        """The entries at these indices, ints or int arrays that broadcast."""
        index = self._index(*jnp.broadcast_arrays(*core))
        return triton.load(self.ref.at[index])

    def load(self, *window: tuple[Any, int], inside: bool = False) -> jax.Array:
        """Loads a tile, with zeros beyond the array.

        Args:
          window: ``(start, size)`` for each core axis.
          inside: whether the first axis of the tile is known to lie within the array.
        """
        at, mask = self._tile(window, inside)
        return triton.load(at, mask=mask, other=None if mask is None else self._zero())

    def put_entry(self, x: jax.Array, *core: Any) -> None:
        """Stores one entry."""
        triton.store(self.ref.at[self._index(*core)], x.astype(self.ref.dtype))

    def store(self, x: jax.Array, *window: tuple[Any, int]) -> None:
        """Stores a tile, without the entries beyond the array."""
        at, mask = self._tile(window, False)
        triton.store(at, x.astype(self.ref.dtype), mask=mask)

    def _zero(self) -> jax.Array:
        return jnp.zeros((), self.ref.dtype)

    def _tile(self, window: tuple[tuple[Any, int], ...], inside: bool) -> tuple[Any, Any]:
        """References to the entries of a tile, and which of them lie within the array.

        None for the latter means all, which loads faster. Entries are addressed by index arrays,
        because a tile may be longer than the array and a slice may not; on a GPU both compile to
        the same code.
        """
        sizes = tuple(size for _, size in window)
        indices, mask = [], None
        for axis, ((start, size), length) in enumerate(zip(window, self.core, strict=True)):
            shape = [size if a == axis else 1 for a in range(len(window))]
            index = start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            indices.append(index)
            whole = isinstance(start, int) and start + size <= length
            if whole or (axis == 0 and inside):
                continue
            mask = index < length if mask is None else mask & (index < length)
        at = self.ref.at[self._index(*indices)]
        return at, None if mask is None else jnp.broadcast_to(mask, sizes)


class LookUps:
    """Records the entries that a rule looks up, to replay them under ``jvp``, where loads fail."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._left: Iterator[Any] | None = None

    def recorded(self, entry: Callable[..., Any]) -> Callable[..., Any]:
        """A function that calls ``entry``, and after ``replay`` returns the recorded values."""

        def look_up(*index: Any) -> Any:
            if self._left is not None:
                return next(self._left)
            self._values.append(entry(*index))
            return self._values[-1]

        return look_up

    def replay(self) -> None:
        """From now on, returns the recorded values in the same order."""
        self._left = iter(self._values)


class PairTile(NamedTuple):
    """One tile of query-key pairs."""

    dot: jax.Array  # [t s]: query . key
    s: jax.Array  # [t s]: the logits, -inf where masked
    slope: jax.Array | None  # [t s]: derivative of the logits, see Refs.tile; None means 1
    visible: Visible | None  # None: all pairs
    dropout_factor: jax.Array | None  # [t s]: what dropout multiplies probabilities by


class Refs:
    """The operands of one head of one example, as references."""

    def __init__(self, static: primitive.Static, refs: tuple[Any, ...], head_index: Any) -> None:
        count = static.structure.num_leaves
        operands = [MappedRef(r, d, head_index) for r, d in zip(refs, static.in_dims, strict=True)]
        self.config, self.rest = static.config, operands[count:]
        self.head: Any  # a Head of MappedRefs
        self.head, self.schedules = primitive.as_head(
            jax.tree.unflatten(static.structure, operands[:count])
        )
        head = self.head
        (self.T, self.H), (self.S, self.D) = head.query.core, head.value.core
        self.b, self.n = head.b.entry(), head.n.entry()
        self.scale = head.scale.entry().astype(jnp.float32)
        self.sink = None if head.sink is None else head.sink.entry().astype(jnp.float32)
        self.scores_mask = any(score.MASKING.adds for score in head.score)

    def rows(self, operand: MappedRef, start: Any, size: int, *, inside: bool = False) -> jax.Array:
        """Loads rows of query, key, value or output: ``[size]``, or ``[size, padded(width)]``."""
        return operand.load(
            (start, size), *((0, padded(n)) for n in operand.core[1:]), inside=inside
        )

    def put(self, operand: MappedRef, x: jax.Array, start: Any, size: int) -> None:
        """Stores rows, see ``rows``."""
        operand.store(x, (start, size), *((0, padded(n)) for n in operand.core[1:]))

    def _local(
        self, value: Any, shape: tuple[int, int], q0: Any, k0: Any, look_ups: LookUps | None = None
    ) -> Any:
        """A mask or scores with their arrays cut to a tile, in the shapes that rules expect."""
        windows = {"T": (q0, shape[0]), "S": (k0, shape[1])}

        def local(operand: MappedRef, leaf: Leaf) -> Any:
            axes = local_axes(leaf)
            if not operand.core:
                return operand.entry()
            if not axes or not set(axes) <= windows.keys():  # a table that rules index
                entry = operand.entry if look_ups is None else look_ups.recorded(operand.entry)
                return Lookup(entry, operand.core, operand.ref.dtype)
            x = operand.load(
                *(windows[a] if n > 1 else (0, 1) for a, n in zip(axes, operand.core, strict=True))
            )
            if axes == ("T",):
                return x[:, None]
            return x[None, :] if axes == ("S",) else x

        arrays, structure = jax.tree.flatten(value)
        local_arrays = [local(x, leaf) for x, leaf in zip(arrays, leaves(value), strict=True)]
        return jax.tree.unflatten(structure, local_arrays)

    def tile(
        self,
        q: jax.Array,
        k: jax.Array,
        q0: Any,
        k0: Any,
        *,
        masked: bool,
        slope: bool = False,
        leaf: int | None = None,
    ) -> PairTile:
        """The tile of queries ``q [t H]`` and keys ``k [s H]``.

        Args:
          q0, k0: indices of the first query and key.
          masked: False if the mask hides no pair of the tile.
          slope: whether to compute ``slope``: the derivative of the final logits with respect to
            those before the scores, or, with ``leaf``, to this array of the scores.
          leaf: index among the arrays of the scores.
        """
        shape = q.shape[0], k.shape[0]
        at = tile_indices(shape, q0, k0)
        pairs = None
        if masked:
            pairs = (at[0] < self.T) & (at[1] < self.S)
            if self.head.mask is not None:
                mask = self._local(self.head.mask, shape, q0, k0)
                pairs = pairs & mask.rule(self.b, self.n, *at)
            pairs = jnp.broadcast_to(pairs, shape)
        look_ups = LookUps()
        arrays, structure = jax.tree.flatten(self._local(self.head.score, shape, q0, k0, look_ups))

        def apply(s: jax.Array, arrays: list[Any]) -> jax.Array:
            for score in jax.tree.unflatten(structure, arrays):
                s = score.rule(s, self.b, self.n, *at)
                if pairs is not None:  # a NaN of a masked pair must not reach the next score
                    s = jnp.where(pairs, s, jnp.zeros_like(s))
            return s

        dot = product(q, k, 1, 1)
        s0 = self.scale * dot
        s0 = s0 if pairs is None else jnp.where(pairs, s0, jnp.zeros_like(s0))
        s, change = apply(s0, arrays), None
        if self.head.score and slope:
            look_ups.replay()
            x = s0 if leaf is None else arrays[leaf]

            def along(x: jax.Array) -> jax.Array:
                if leaf is None:
                    return apply(x, arrays)
                return apply(s0, [*arrays[:leaf], x, *arrays[leaf + 1 :]])

            s, change = jax.jvp(along, (x,), (jnp.ones_like(x),))
        if pairs is not None:
            s = jnp.where(pairs, s, -jnp.inf)
        if self.scores_mask:
            pairs = s != -jnp.inf
        visible = None if pairs is None else Visible(pairs, some(pairs, 1), some(pairs, 0))
        kept = None
        if self.head.dropout is not None:
            dropout = self._local(self.head.dropout, shape, q0, k0)
            keep = dropout.keep(self.b, self.n, *at)
            kept = jnp.where(keep, 1 / dropout.keep_probability, jnp.float32(0.0))
        return PairTile(dot, s, change, visible, kept)


def some(x: jax.Array, axis: int) -> jax.Array:
    """``x.any(axis)``, which Triton does not have."""
    return x.astype(jnp.int32).max(axis) > 0


def product(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """A matrix product in float32; float32 operands are not rounded to TF32."""
    return jax.lax.dot_general(
        a,
        b,
        (((contract_a,), (contract_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
