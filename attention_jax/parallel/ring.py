"""``ring``: keys and values travel around the devices while each computes with those it holds.

Forward, a running softmax merges the chunks; sinks join at the end. Backward, keys and values go
around again together with their accumulated gradients, to which each chunk adds its contribution,
computed from the normalizer of all keys.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context".
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from attention_jax import backends
from attention_jax.backends import Backend, Spec
from attention_jax.backends.call import Call, Results, call_at_positions, complete, spec_of
from attention_jax.backends.chunks import operands
from attention_jax.backends.guards import guard
from attention_jax.core import softmax
from attention_jax.core.axes import accumulation_dtype
from attention_jax.core.closures import varying_together
from attention_jax.core.dropout import Dropout
from attention_jax.core.positions import Contiguous
from attention_jax.core.pytree import leaves
from attention_jax.core.softmax import finite
from attention_jax.parallel.shards import Shard, along_keys


class Arrays(NamedTuple):
    """All arrays of a shard: those that travel with the keys, and those that stay.

    As a pytree it also holds one bool per array, such as whether the array varies.
    """

    key: Float[Array, "*B S K H"]
    value: Float[Array, "*B S K D"]
    key_positions: Int[Array, "*B S"] | None  # None: they count up
    travelling: list[jax.Array]  # of masks and scores
    query: Float[Array, "*B T N H"]
    scale: Float[Array, ""]
    sinks: Float[Array, " N"] | None
    staying: list[jax.Array]  # of masks and scores
    others: tuple[Dropout | None, jax.Array | Contiguous | None]  # with the positions of queries


V = TypeVar("V")
TRAVEL = ("key", "value", "key_positions", "travelling")


@dataclasses.dataclass(frozen=True)
class Ring:
    """The loop around the devices, without its arrays.

    Attributes:
      shard: one device's share, of which only what is not an array is used.
      choose: the backend for the spec of a chunk.
      spec: arguments of ``spec_of`` for every chunk.
    """

    shard: Shard
    choose: Callable[[Spec], Backend]
    spec: dict[str, Any]

    def arrays(self) -> Arrays:
        """The shard's arrays."""
        call, keys = self.shard.call, self.shard.keys
        both = (call.mask, call.score)
        travelling: list[jax.Array] = []
        staying: list[jax.Array] = []
        for x, goes in zip(jax.tree.leaves(both), self._travels(), strict=True):
            (travelling if goes else staying).append(x)
        return Arrays(
            call.key,
            call.value,
            None if isinstance(keys, Contiguous) else keys,
            travelling,
            call.query,
            call.scale,
            call.sinks,
            staying,
            (call.dropout, self.shard.queries),
        )

    def _travels(self) -> list[bool]:
        """Which arrays of mask and scores travel with the keys."""
        both = (self.shard.call.mask, self.shard.call.score)
        where = [
            along_keys(self.shard, x, leaf)
            for x, leaf in zip(jax.tree.leaves(both), leaves(both), strict=True)
        ]
        return [axis is not None and not whole for axis, whole in where]

    def call(self, x: Arrays, step: jax.Array) -> Call:
        """The call of this device's queries and the keys that it holds after ``step`` steps."""
        shard = self.shard
        owner = lax.rem(shard.index - step + shard.devices, shard.devices)
        S = shard.sizes.S
        both = (shard.call.mask, shard.call.score)
        travelling, staying = iter(x.travelling), iter(x.staying)
        found = []
        for old, leaf, goes in zip(
            jax.tree.leaves(both), leaves(both), self._travels(), strict=True
        ):
            array = next(travelling if goes else staying)
            axis, whole = along_keys(shard, old, leaf)
            if whole and axis is not None:
                array = lax.dynamic_slice_in_dim(array, owner * S, S, axis=axis % array.ndim)
            found.append(array)
        mask, score = jax.tree.unflatten(jax.tree.structure(both), found)
        dropout, queries = x.others
        call = Call(x.query, x.key, x.value, mask, score, None, x.scale, dropout)
        keys = Contiguous(owner * S) if x.key_positions is None else x.key_positions
        return complete(call_at_positions(call, queries, keys, resolved=True))[0]

    def backend(self, call: Call) -> tuple[Backend, Spec]:
        """The backend of a chunk, and what it is asked for."""
        spec = spec_of(call, self.shard.sizes, **self.spec)
        return self.choose(spec), spec

    def rotate(self, x: V) -> V:
        """Passes arrays on to the next device."""
        n = self.shard.devices
        pairs = [(i, (i + 1) % n) for i in range(n)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.shard.axis_name, pairs), x)

    # --- Forward.

    def forward(self, x: Arrays) -> Results:
        """Output and normalizer of this device's queries, over the keys of all devices."""
        z, n = self.shard.sizes, self.shard.devices
        dtype = accumulation_dtype(x.query.dtype)
        rows = (*z.B, z.T, z.N)
        count = math.prod(rows)

        def visit(state: softmax.State, x: Arrays, step: jax.Array) -> softmax.State:
            call = self.call(x, step)
            backend, spec = self.backend(call)
            out, m, log_l = backend.chunk(call, spec)
            out, m, log_l = out.reshape(count, z.D), m.reshape(count), log_l.reshape(count)
            total = jnp.exp(log_l)
            found = softmax.State(jnp.where(total == 0, -jnp.inf, m), total, out * total[:, None])
            return softmax.merge(state, found)

        def body(
            carry: tuple[softmax.State, dict[str, Any]], step: jax.Array
        ) -> tuple[tuple[softmax.State, dict[str, Any]], None]:
            state, moving = carry
            following = self.rotate(moving)  # under way while this device computes
            return (visit(state, x._replace(**moving), step), following), None

        state = softmax.State(*_varying_like(softmax.start(count, z.D, dtype), x.query))
        # The last rotation is not needed; leaving it out would take a second copy of the loop body
        # and double the time to compile.
        (state, _), _ = lax.scan(body, (state, _moving(x)), jnp.arange(n, dtype=jnp.int32))
        sinks = None
        if x.sinks is not None:
            sinks = jnp.broadcast_to(x.sinks.astype(dtype), rows).reshape(count)
        out, m, log_l = softmax.finish(state, sinks)
        return Results(out.reshape(*rows, z.D), m.reshape(rows), log_l.reshape(rows))

    # --- Backward.

    def backward(
        self, x: Arrays, varies: Arrays, results: Results, d_out: jax.Array, d_lse: jax.Array
    ) -> Arrays:
        """The cotangents of the arrays that vary; None for the others.

        Args:
          varies: for each array, whether it does.
          results: of all keys.
          d_out, d_lse: cotangents, in the dtype of the results.
        """
        n = self.shard.devices
        flat, structure = jax.tree.flatten(x)
        chosen = [i for i, moves in enumerate(jax.tree.leaves(varies)) if moves]
        sums = [jnp.zeros(flat[i].shape, _wide(flat[i].dtype)) for i in chosen]
        sums = _varying_like(sums, x.query)
        # Which of the sums travel with the keys.
        kinds = Arrays(
            *(jax.tree.map(lambda _, f=f: f in TRAVEL, v) for f, v in x._asdict().items())
        )
        travel = [jax.tree.leaves(kinds)[i] for i in chosen]

        def add(x: Arrays, step: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
            flat = jax.tree.leaves(x)

            def floats(*moving: jax.Array) -> list[jax.Array]:
                given = list(flat)
                for i, y in zip(chosen, moving, strict=True):
                    given[i] = y
                every = operands(self.call(jax.tree.unflatten(structure, given), step))
                return [every[i] for i in wrt]

            call = self.call(x, step)
            backend, spec = self.backend(call)
            wrt = self._operands(varies, call)
            if not wrt:
                return sums
            _, pull = jax.vjp(floats, *(flat[i] for i in chosen))
            found = backend.chunk_cotangents(call, spec, results, wrt, (d_out, d_lse))
            parts = pull(list(found))
            return [s + p.astype(s.dtype) for s, p in zip(sums, parts, strict=True)]

        def body(
            carry: tuple[dict[str, Any], list[jax.Array]], step: jax.Array
        ) -> tuple[tuple[dict[str, Any], list[jax.Array]], None]:
            moving, sums = carry
            following = self.rotate(moving)
            sums = add(x._replace(**moving), step, sums)
            return (following, self._rotated(sums, travel)), None

        # After n rotations the sums are back at the device whose keys they belong to.
        (_, sums), _ = lax.scan(body, (_moving(x), sums), jnp.arange(n, dtype=jnp.int32))
        result: list[Any] = [None] * len(flat)
        for i, total in zip(chosen, sums, strict=True):
            result[i] = total.astype(flat[i].dtype)
        found: Arrays = jax.tree.unflatten(structure, result)
        if varies.sinks and x.sinks is not None:
            found = found._replace(sinks=_d_sinks(x.sinks, results, d_out, d_lse))
        return found

    def _rotated(self, sums: list[jax.Array], travel: list[bool]) -> list[jax.Array]:
        return [self.rotate(s) if goes else s for s, goes in zip(sums, travel, strict=True)]

    def _operands(self, varies: Arrays, call: Call) -> list[int]:
        """The numbers of a call's operands that vary."""
        travelling, staying = iter(varies.travelling), iter(varies.staying)
        both = [next(travelling if goes else staying) for goes in self._travels()]
        masks = len(jax.tree.leaves(self.shard.call.mask))
        # A score at positions has these among its arrays, which are integers.
        given = [
            bool(moves)
            for moves, old in zip(both[masks:], jax.tree.leaves(self.shard.call.score), strict=True)
            if jnp.issubdtype(old.dtype, jnp.inexact)
        ]
        scores = iter(given)
        flags = [bool(each) for each in (varies.query, varies.key, varies.value)]
        flags += [
            next(scores) if jnp.issubdtype(old.dtype, jnp.inexact) else False
            for old in jax.tree.leaves(call.score)
        ]
        return [i for i, moves in enumerate([*flags, varies.scale]) if moves]


def _moving(x: Arrays) -> dict[str, Any]:
    return {name: getattr(x, name) for name in TRAVEL}


def _varying_like(arrays: Sequence[jax.Array], x: jax.Array) -> list[jax.Array]:
    """``arrays`` that vary along the mesh axes along which ``x`` does."""
    return varying_together([x, *arrays])[1:]


def _d_sinks(
    sinks: Float[Array, " N"], results: Results, d_out: jax.Array, d_lse: jax.Array
) -> Float[Array, " N"]:
    """``dsink = sum_i p_sink,i (dlse_i - do_i . out_i)``."""
    out, m, log_l = results
    p = jnp.exp((sinks.astype(m.dtype) - m) - finite(log_l))
    delta = jnp.where(out == 0, jnp.zeros_like(out), d_out * out).sum(-1)
    d_lse = jnp.where(log_l == -jnp.inf, jnp.zeros_like(d_lse), d_lse)
    return (p * (d_lse - delta)).sum(range(p.ndim - 1)).astype(sinks.dtype)


def attend(
    shard: Shard, asked: tuple[str | Backend, ...] | None, spec: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """Output and lse of this device's queries.

    Args:
      shard: one device's share.
      asked: implementations, by name or configured.
      spec: of the chunks, for ``spec_of``.
    """
    ring = Ring(shard, functools.partial(_choose, asked), spec)
    arrays = ring.arrays()
    flat, structure = jax.tree.flatten(arrays)
    flat = [jnp.asarray(x) for x in flat]
    flat = varying_together([*flat, shard.index])[:-1]
    floats = [i for i, x in enumerate(flat) if jnp.issubdtype(x.dtype, jnp.floating)]
    guarded = guard(
        tuple(flat[i] for i in floats),
        "ring",
        '"gather"',
        argument="strategy",
        forward_mode=False,
    )
    for i, x in zip(floats, guarded, strict=True):
        flat[i] = x
    # Eager shard_map cannot run a custom_vjp that asks which cotangents are zero; under jit it can.
    run = jax.jit(_with_gradient(ring), inline=True)
    found: tuple[jax.Array, jax.Array] = run(jax.tree.unflatten(structure, flat))
    return found


def _with_gradient(ring: Ring) -> Callable[[Arrays], tuple[jax.Array, jax.Array]]:
    """``ring`` as a function of its arrays with a gradient of its own."""

    def finished(x: Arrays, results: Results) -> tuple[jax.Array, jax.Array]:
        return results.out.astype(x.query.dtype), results.m + results.log_l

    @jax.custom_vjp
    def fn(x: Arrays) -> tuple[jax.Array, jax.Array]:
        return finished(x, ring.forward(x))

    def fwd(
        marked: Arrays,
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[Arrays, Results, _Static]]:
        x = jax.tree.map(lambda each: each.value, marked)
        varies = jax.tree.map(lambda each: each.perturbed and _is_float(each.value), marked)
        results = ring.forward(x)
        return finished(x, results), (x, results, _Static(varies))

    def bwd(
        residuals: tuple[Arrays, Results, _Static],
        cotangents: Sequence[jax.Array | SymbolicZero],
    ) -> tuple[Arrays]:
        x, results, varies = residuals
        d_out, d_lse = (
            jnp.zeros_like(like) if isinstance(d, SymbolicZero) else d.astype(like.dtype)
            for d, like in zip(cotangents, (results.out, results.m), strict=True)
        )
        d_out, d_lse, *_ = varying_together([d_out, d_lse, x.query])
        return (ring.backward(x, varies.value, results, d_out, d_lse),)

    fn.defvjp(fwd, bwd, symbolic_zeros=True)
    return fn


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of a sum of cotangents; a function may have complex arrays."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return dtype if is_complex else accumulation_dtype(dtype)


def _is_float(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """Bools that belong to the structure of the residuals."""

    value: Arrays

    def __hash__(self) -> int:
        return hash(tuple(jax.tree.leaves(self.value)))


def _choose(asked: tuple[str | Backend, ...] | None, spec: Spec) -> Backend:
    """The first backend of those asked for that computes with some of the keys at a time."""
    names = tuple(name for name, _ in backends.preference(spec)) if asked is None else asked
    known = backends.IMPLEMENTATIONS
    able = tuple(x for x in names if (x if isinstance(x, Backend) else known[x]).CHUNKS)
    if not able:
        raise NotImplementedError(
            f'strategy "ring" needs an implementation that computes with some of the keys at a '
            f"time, which {', '.join(map(str, names))} cannot: ask for one of "
            f"{', '.join(name for name, x in known.items() if x.CHUNKS)}, or for strategy "
            f'"gather"'
        )
    return backends.choose(able, spec).backend
