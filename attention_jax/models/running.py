"""Running the blocks of a stack: with rematerialization, or in one ``lax.scan``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.core.shards import explicit_mesh

Remat = bool | Callable[..., bool]


def period(kinds: Sequence[Any]) -> int:
    """The shortest period of a sequence that divides its length.

    >>> from attention_jax.models.running import period
    >>> period((None, None, None)), period((4, None, 4, None)), period((4, None, 4))
    (1, 2, 3)
    """
    length = len(kinds)
    return next(
        p
        for p in range(1, length + 1)
        if length % p == 0 and all(x == kinds[i % p] for i, x in enumerate(kinds))
    )


def run(block: Any, x: Any, options: dict[str, Any], *, remat: Remat) -> Any:
    """``block(x, **options)``; with ``remat`` the backward pass recomputes it."""
    if remat is False:
        return block(x, **options)
    graph, counts, rest = _split(block)
    call = _checkpoint(functools.partial(_call, graph), remat)
    result, counts = call(counts, rest, x, options)
    nnx.update(block, counts)
    return result


def scan(
    blocks: Sequence[nnx.Module],
    x: Any,
    options: dict[str, Any],
    *,
    each: Sequence[dict[str, Any]],
    every: int,
    remat: Remat,
) -> Any:
    """Runs the blocks in one ``lax.scan``, so that the program contains ``every`` of them only.

    Parameters stay in the model; the call makes a stacked copy of them.

    Args:
      blocks: of which each has the structure of the one ``every`` blocks before.
      x: the tokens.
      options: of all blocks.
      each: additional options of each block.
      every: number of blocks in one iteration.
      remat: as for ``run``.

    Raises:
      ValueError: blocks of different structure.
    """
    parts = [_split(block) for block in blocks]
    graphs = [graph for graph, _, _ in parts]
    for i, graph in enumerate(graphs):
        if graph != graphs[i % every]:
            raise ValueError(
                f"scan needs blocks of one structure, but block {i} has other modules, options or "
                f"masks than block {i % every}: run the stack with scan=False"
            )
    stacked = tuple(
        jax.tree.map(
            lambda *xs: _stack(xs),
            *[(counts, rest, own) for (_, counts, rest), own in _of(j, every, parts, each)],
        )
        for j in range(every)
    )

    def iteration(x: Any, parts: Any) -> Any:
        after = []
        for graph, (counts, rest, own) in zip(graphs[:every], parts, strict=True):
            call = functools.partial(_call, graph)
            if remat is not False:  # CSE cannot merge the two computations across a loop
                call = _checkpoint(call, remat, prevent_cse=False)
            x, counts = call(counts, rest, x, {**options, **own})
            after.append(counts)
        return x, tuple(after)

    x, after = jax.lax.scan(iteration, x, stacked)
    for i, block in enumerate(blocks):
        counts = after[i % every]
        if jax.tree.leaves(counts):
            nnx.update(block, jax.tree.map(lambda a, i=i: a[i // every], counts))
    return x


def _split(block: Any) -> tuple[Any, Any, Any]:
    """A block as its structure, its random state, and its other state."""
    parts: Any = nnx.split(block, nnx.RngState, ...)
    return parts


def _of(j: int, every: int, parts: Sequence[Any], each: Sequence[Any]) -> Any:
    return zip(parts[j::every], each[j::every], strict=True)


def _call(graph: Any, counts: Any, rest: Any, x: Any, options: dict[str, Any]) -> Any:
    """A block's result, and its random state after the call."""
    block = nnx.merge(graph, counts, rest, copy=True)
    result = block(x, **options)
    after, counts, _ = _split(block)
    if after != graph:
        raise NotImplementedError(
            "remat and scan discard changes that a call makes to a block, and this block was "
            "changed by its call (by sow, for example): run the stack with remat=False and "
            "scan=False"
        )
    return result, counts


def _checkpoint(call: Callable[..., Any], remat: Remat, *, prevent_cse: bool = True) -> Any:
    policy = None if isinstance(remat, bool) else remat
    return jax.checkpoint(call, policy=policy, prevent_cse=prevent_cse)


def _stack(xs: Sequence[Any]) -> jax.Array:
    """``jnp.stack``, without a mesh in two operations, whatever the number of arrays."""
    # Over a mesh, joining arrays along an axis that is sharded would gather them.
    if jnp.ndim(xs[0]) == 0 or not jax.sharding.get_abstract_mesh().empty or explicit_mesh(*xs):
        return jnp.stack(xs)
    joined = jnp.concatenate(xs)
    return joined.reshape(len(xs), *jnp.shape(xs[0]))
