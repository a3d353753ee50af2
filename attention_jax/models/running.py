"""How a stack runs its blocks: with less memory, or as a program that does not grow with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Remat = bool | Callable[..., bool]


def period(kinds: Sequence[Any]) -> int:
    """After how many entries a sequence repeats itself, to its end.

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
    """``block(x, **options)``; with ``remat`` the backward pass computes it anew."""
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
    """The blocks one after the other, in one loop.

    The program holds each of the first ``every`` blocks once, however many there are. Parameters
    stay where they are in the model; the call makes a stacked copy of them.

    Args:
      blocks: every ``every``-th of them is alike.
      x: the tokens.
      options: of all blocks.
      each: more of them, of each block.
      every: how many blocks one turn of the loop has.
      remat: as for ``run``.

    Raises:
      ValueError: blocks that should be alike are not.
    """
    parts = [_split(block) for block in blocks]
    graphs = [graph for graph, _, _ in parts]
    for i, graph in enumerate(graphs):
        if graph != graphs[i % every]:
            raise ValueError(
                f"scan needs blocks that are alike, but block {i} has other modules, options or "
                f"masks than block {i % every}: run the stack with scan=False"
            )
    turns = tuple(
        jax.tree.map(
            lambda *xs: _stack(xs),
            *[(counts, rest, own) for (_, counts, rest), own in _of(j, every, parts, each)],
        )
        for j in range(every)
    )

    def turn(x: Any, parts: Any) -> Any:
        after = []
        for graph, (counts, rest, own) in zip(graphs[:every], parts, strict=True):
            call = functools.partial(_call, graph)
            if remat is not False:  # within a loop nothing merges the two computations
                call = _checkpoint(call, remat, prevent_cse=False)
            x, counts = call(counts, rest, x, {**options, **own})
            after.append(counts)
        return x, tuple(after)

    x, after = jax.lax.scan(turn, x, turns)
    for i, block in enumerate(blocks):
        counts = after[i % every]
        if jax.tree.leaves(counts):
            nnx.update(block, jax.tree.map(lambda a, i=i: a[i // every], counts))
    return x


def _split(block: Any) -> tuple[Any, Any, Any]:
    """A block as its structure, the state of its random numbers, and the rest."""
    parts: Any = nnx.split(block, nnx.RngState, ...)
    return parts


def _of(j: int, every: int, parts: Sequence[Any], each: Sequence[Any]) -> Any:
    return zip(parts[j::every], each[j::every], strict=True)


def _call(graph: Any, counts: Any, rest: Any, x: Any, options: dict[str, Any]) -> Any:
    """A block's result, and its streams of random numbers after the call."""
    block = nnx.merge(graph, counts, rest, copy=True)
    result = block(x, **options)
    after, counts, _ = _split(block)
    if after != graph:
        raise NotImplementedError(
            "remat and scan keep nothing of a block's call but its result, and this block was "
            "changed by it (sow, say): run the stack with remat=False and scan=False"
        )
    return result, counts


def _checkpoint(call: Callable[..., Any], remat: Remat, *, prevent_cse: bool = True) -> Any:
    policy = None if isinstance(remat, bool) else remat
    return jax.checkpoint(call, policy=policy, prevent_cse=prevent_cse)


def _stack(xs: Sequence[Any]) -> jax.Array:
    """``jnp.stack``, in two steps whatever the number of arrays."""
    if jnp.ndim(xs[0]) == 0:
        return jnp.stack(xs)
    joined = jnp.concatenate(xs)
    return joined.reshape(len(xs), *jnp.shape(xs[0]))
