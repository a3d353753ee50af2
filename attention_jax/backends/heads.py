"""Maps a function of one head of one example over ``*B``, ``K`` and ``G`` with ``vmap``.

A head function takes a ``Head``::

    query [T H], key [S H], value [S D], a mask and scores without B and N axes,
    sink, scale, b, n (scalars)

An array is mapped over the axes it has and not repeated over those it lacks: keys and values are
not copied for the ``G`` query heads that share them, nor a bias for the examples that share it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from attention_jax.backends.call import Call, Head
from attention_jax.core.axes import Shape, Sizes
from attention_jax.core.compat import sharded_over
from attention_jax.core.pytree import leaves
from attention_jax.core.shards import explicit_mesh


def over_heads_and_examples(
    head: Callable[[Head], Any],
    call: Call,
    sizes: Sizes,
    outputs: tuple[str, ...],
    inputs: tuple[str, str, str] = ("*B T N H", "*B S K H", "*B S K D"),
    *,
    reshape: bool = True,
) -> tuple[jax.Array, ...]:
    """Maps ``head`` over all heads of all examples.

    Args:
      head: a function of a ``Head`` that returns a tuple of arrays.
      call: the arguments, with masks and scores at full rank.
      sizes: of the axes.
      outputs: the axes of each result, with ``*B`` and ``N``, such as ``"*B T N D"``.
      inputs: the axes of query, key and value.
      reshape: see ``lift``.
    """
    flat, flat_axes, structure = as_arrays(call, sizes, inputs)

    def one(*xs: Any) -> Any:
        given: Head = jax.tree.unflatten(structure, xs)
        chex.assert_shape(given.query, (sizes.T, sizes.H))
        chex.assert_shape(given.key, (sizes.S, sizes.H))
        chex.assert_shape(given.value, (sizes.S, sizes.D))
        chex.assert_rank([given.scale, given.b, given.n], 0)
        return head(given)

    return lift(one, flat, sizes, flat_axes, outputs, reshape=reshape)


def as_arrays(
    call: Call,
    sizes: Sizes,
    inputs: tuple[str, str, str] = ("*B T N H", "*B S K H", "*B S K D"),
) -> tuple[list[Any], list[str | tuple[str, ...]], Any]:
    """The arrays of a call, the axes of each, and the structure of a ``Head`` that holds them.

    Args:
      call, sizes, inputs: as for ``over_heads_and_examples``.
    """
    xp = jnp if sizes.symbolic_batch else np
    b = xp.arange(math.prod(sizes.B), dtype=np.int32).reshape(sizes.B)
    n = np.arange(sizes.N, dtype=np.int32)
    arguments = Head(*call, b=b, n=n)
    axes = Head(*inputs, None, None, "N", "", None, "*B", "N")  # type: ignore[arg-type]
    flat, structure = jax.tree.flatten(arguments)
    flat_axes: list[Any] = []
    for argument, letters in zip(arguments, axes, strict=True):
        if letters is None:  # masks, scores, dropout: each array declares its own axes
            flat_axes += [leaf.axes for leaf in leaves(argument)]
        elif argument is not None:
            flat_axes += [letters] * len(jax.tree.leaves(argument))
    return flat, flat_axes, structure


def lift(
    head: Callable[..., Any],
    arrays: Sequence[Any],
    sizes: Sizes,
    inputs: Sequence[str | tuple[str, ...]],
    outputs: Sequence[str],
    *,
    reshape: bool = True,
) -> tuple[jax.Array, ...]:
    """Maps a function of the arrays of one head over all heads of all examples.

    Args:
      head: from the arrays, without the axes ``*B``, ``N`` and ``K``, to a tuple of arrays.
      arrays: whole arrays; axes ``*B`` and ``N`` of size 1 broadcast.
      sizes: the sizes of the axes.
      inputs: the axes of each array, such as ``"*B S K H"``; axes other than ``*B``, ``N`` and
        ``K`` are passed on to ``head``.
      outputs: the axes of each result: ``*B``, and ``N``, or ``K`` for results that do not depend
        on the query heads.
      reshape: remove mapped axes of size 1 by a reshape; if False, map over them too, because XLA
        does not update a KV cache in place if a reshaped view of it is passed to a kernel.

    >>> import numpy as np
    >>> from attention_jax.backends.heads import lift
    >>> from attention_jax.core.axes import Sizes
    >>> sizes = Sizes(B=(2,), T=3, S=5, K=2, G=2, H=7, D=7)
    >>> query, key = np.ones((2, 3, 4, 7)), np.ones((2, 5, 2, 7))
    >>> inputs = "*B T N H", "*B S K H"
    >>> lift(lambda q, k: (q @ k.T,), (query, key), sizes, inputs, ["*B N T S"])[0].shape
    (2, 4, 3, 5)
    """
    if mesh := explicit_mesh(arrays):

        def on_shard(local: Sizes, *xs: Any) -> Any:
            return lift(head, xs, local, inputs, outputs, reshape=reshape)

        return _on_each_device(on_shard, arrays, sizes, inputs, outputs, mesh)
    batch = [f"B{i}" for i in range(len(sizes.B))]
    levels = dict(zip([*batch, "K", "G"], [*sizes.B, sizes.K, sizes.G], strict=True))

    def named(axes: str | tuple[str, ...]) -> list[str]:
        letters = axes.split() if isinstance(axes, str) else axes
        spelled = {"*B": batch, "B": batch, "N": ["K", "G"]}
        return [name for a in letters for name in spelled.get(a, [a])]

    def split_heads(x: Any, axes: str | tuple[str, ...]) -> tuple[Any, list[str]]:
        """``x`` with ``N`` as ``K, G``, without the mapped axes along which it has size 1."""
        letters = axes.split() if isinstance(axes, str) else list(axes)
        x = jnp.asarray(x)
        if not letters:  # a scalar, or an array of a function, which each head gets whole
            return x, []
        shape: list[int] = []
        d = 0
        for a in letters:
            if a in ("*B", "B"):
                shape += x.shape[d : d + len(batch)]
                d += len(batch)
            elif a == "N":
                shape += [sizes.K, sizes.G] if x.shape[d] == sizes.N else [1, 1]
                d += 1
            else:
                shape.append(x.shape[d])
                d += 1
        names = named(axes)
        drop = [
            i
            for i, name in enumerate(names)
            if name in levels and shape[i] == 1 and (reshape or levels[name] != 1)
        ]
        x = x.reshape(*[size for i, size in enumerate(shape) if i not in drop])
        return x, [name for i, name in enumerate(names) if i not in drop]

    split, names = [], []
    for x, letters in zip(arrays, inputs, strict=True):
        x, remaining = split_heads(x, letters)
        split.append(x)
        names.append(remaining)

    mapped = head
    # Along the other axes every array has size 1, and the last reshape adds them to the results. If
    # they were added earlier, XLA would not remove transposes that undo each other.
    mapped_levels = [level for level in levels if any(level in r for r in names)]
    spelled = [[a for a in named(o) if a not in levels or a in mapped_levels] for o in outputs]
    results, plan = spelled, []
    for level in mapped_levels:  # outermost first; each removes its axis
        where = tuple(r.index(level) if level in r else None for r in names)
        names = [[x for x in r if x != level] for r in names]
        out = tuple(r.index(level) if level in r else None for r in results)
        results = [[x for x in r if x != level] for r in results]
        plan.append((where, out))
    for where, out in reversed(plan):
        mapped = jax.vmap(mapped, in_axes=where, out_axes=out)
    outs = mapped(*split)

    def join_heads(x: jax.Array, o: str, axes: list[str]) -> jax.Array:
        lengths = {"K": sizes.K, "N": sizes.N} | dict(zip(axes, x.shape, strict=True))
        shape: list[int] = []
        for a in o.split():
            shape += sizes.B if a == "*B" else [lengths[a]]
        return x.reshape(shape)

    return tuple(join_heads(x, o, axes) for x, o, axes in zip(outs, outputs, spelled, strict=True))


# --- Arrays sharded over the explicit axes of a mesh: each device maps its own shard.


def kernel_on_each_device(
    run: Callable[[Call, Sizes], tuple[jax.Array, jax.Array]], call: Call, sizes: Sizes
) -> tuple[jax.Array, jax.Array]:
    """Runs a kernel for all heads and examples, on each device for its shard of them.

    XLA cannot partition a kernel, not even if all arrays are replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not any(mesh.shape[name] > 1 for name in mesh.explicit_axes):
        return run(call, sizes)
    flat, inputs, structure = as_arrays(call, sizes)

    def on_shard(local: Sizes, *xs: Any) -> Any:
        head: Head = jax.tree.unflatten(structure, xs)
        return run(Call(*head[:8]), local)

    out, lse = _on_each_device(
        on_shard, flat, sizes, inputs, ("*B T N D", "*B T N"), mesh, kernel=True
    )
    return out, lse


def _on_each_device(
    run: Callable[..., Any],
    arrays: Sequence[Any],
    sizes: Sizes,
    inputs: Sequence[str | tuple[str, ...]],
    outputs: Sequence[str],
    mesh: AbstractMesh,
    *,
    kernel: bool = False,
) -> tuple[jax.Array, ...]:
    """``run(local sizes, *shards)`` on each device: axes other than batch and heads are gathered.

    Arrays that are sharded differently from the first are resharded like it.

    Args:
      kernel: whether ``run`` is a kernel, which has all mesh axes manual and whose results do not
        track the axes along which they vary.
    """
    arrays = [jnp.asarray(x) for x in arrays]
    batch = [f"B{i}" for i in range(len(sizes.B))]
    full = dict(zip(batch, sizes.B, strict=True)) | {"N": sizes.N, "K": sizes.K}

    def letters(axes: str | tuple[str, ...]) -> list[str]:
        split = axes.split() if isinstance(axes, str) else axes
        return [letter for a in split for letter in (batch if a in ("*B", "B") else [a])]

    mesh_axes = axes_of_mapped(arrays, [letters(axes) for axes in inputs], sizes, mesh)

    def num_shards(letter: str) -> int:
        return math.prod(mesh.shape[name] for name in mesh_axes.get(letter, ()))

    def spec(axes: str | tuple[str, ...], shape: Shape | None = None) -> PartitionSpec:
        """An axis of size 1 is replicated."""
        split = [
            mesh_axes.get(letter) if shape is None or shape[i] == full.get(letter) else None
            for i, letter in enumerate(letters(axes))
        ]
        return PartitionSpec(*split)

    in_specs = tuple(spec(axes, x.shape) for x, axes in zip(arrays, inputs, strict=True))
    arrays = [
        jax.sharding.reshard(x, NamedSharding(mesh, s))
        for x, s in zip(arrays, in_specs, strict=True)
    ]
    K = sizes.K // num_shards("K")
    local = dataclasses.replace(
        sizes,
        B=tuple(full[b] // num_shards(b) for b in batch),
        K=K,
        G=sizes.N // num_shards("N") // K,
    )
    # An enclosing vmap may map over the other mesh axes.
    used = {name for names in mesh_axes.values() for name in names}
    mapped = jax.shard_map(
        lambda *xs: run(local, *xs),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=tuple(spec(axes) for axes in outputs),
        axis_names=set(mesh.explicit_axes) if kernel else used,
        check_vma=not kernel,
    )
    return mapped(*arrays)


def axes_of_mapped(
    arrays: Sequence[Any],
    letters: Sequence[Sequence[str]],
    sizes: Sizes,
    mesh: AbstractMesh,
    taken: tuple[str, ...] = (),
) -> dict[str, tuple[str, ...]]:
    """The mesh axes over which ``B0``, ``B1``, ..., ``N`` and ``K`` are sharded.

    Args:
      arrays: the first that is sharded along an axis decides.
      letters: the axis letters of each array.
      sizes: the sizes of the axes.
      mesh: the mesh.
      taken: mesh axes that are already in use.
    """
    full = {f"B{i}": size for i, size in enumerate(sizes.B)} | {"N": sizes.N, "K": sizes.K}
    found: dict[str, tuple[str, ...]] = {}
    for x, axes in zip(arrays, letters, strict=True):
        for letter, length, names in zip(axes, x.shape, spec_of_array(x), strict=False):
            used = {*taken, *(name for group in found.values() for name in group)}
            if names and length == full.get(letter) and not used & set(names):
                found.setdefault(letter, names)
    _align_heads(found, sizes, mesh)
    return found


def spec_of_array(x: Any) -> tuple[tuple[str, ...], ...]:
    """The mesh axes along which each axis of ``x``, an array or its shape, is sharded."""
    spec = (sharded_over(jax.typeof(x), axis) for axis in range(x.ndim))
    return tuple(() if s is None else s if isinstance(s, tuple) else (s,) for s in spec)


def _align_heads(mesh_axes: dict[str, tuple[str, ...]], sizes: Sizes, mesh: AbstractMesh) -> None:
    """Query heads are sharded like the key-value heads that they read, or not at all.

    A single key-value head is replicated.
    """
    names = mesh_axes.get("N") or mesh_axes.get("K")
    for letter in ("N", "K"):
        mesh_axes.pop(letter, None)
    if names is None:
        return
    if sizes.K % math.prod(mesh.shape[name] for name in names) == 0:
        mesh_axes["N"] = mesh_axes["K"] = names
    elif sizes.K == 1:
        mesh_axes["N"] = names
