"""One head of one example as a JAX primitive that supports every transformation.

``jax.custom_vjp`` does not support ``jvp``, and ``vmap`` batches the loops inside it, which on a
CPU makes every tile product four times slower. Three primitives avoid both::

    forward (operands)                          -> out, m, log_l
    tangent (operands, results, tangents)       -> d out, d log_l    linear in the tangents
    backward(operands, results, cotangents)     -> cotangents of the operands: tangent's transpose

where ``lse = m + log_l`` and ``m`` is the largest logit. The two are separate, because for large
logits their sum would lose the digits of ``log_l`` that tangent and backward need to recompute the
probabilities. ``m`` has no tangent: as only the sum matters, ``log_l`` carries all of it.

- ``jvp`` of forward is tangent, and the transpose of tangent is backward, which ``grad`` runs.
- ``vmap`` only records the new axis of each array, or that the array has none. The kernel loops
  over it and slices what it needs, so nothing is transposed, copied or repeated. A mapped axis
  costs as much as a batch axis, since batch axes and heads *are* mapped axes.
- Derivatives of tangent and backward, that is of second and higher order, are those of the
  materialized formulas, which JAX differentiates.

So ``jit``, ``grad``, ``jvp``, ``linearize``, ``hessian``, ``checkpoint``, ``scan``, ``shard_map``
and ``vmap`` over any arguments work, in any order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.tree_util import PyTreeDef
from jax.typing import DTypeLike

from attention_jax.backends.call import Head
from attention_jax.backends.mapped_axes import Dims as Dims
from attention_jax.backends.mapped_axes import Static as Static
from attention_jax.backends.mapped_axes import batch_cotangents, batch_results, vmapped
from attention_jax.backends.mapped_axes import core_shape as core_shape
from attention_jax.backends.mapped_axes import mapped_shape as mapped_shape
from attention_jax.backends.partition import over_devices
from attention_jax.core.axes import LSE_NAME, OUT_NAME, AnyArray, Shape, accumulation_dtype
from attention_jax.core.closures import varying_together
from attention_jax.core.compat import (
    Primitive,
    ad,
    batching,
    for_export,
    like,
    mlir,
    no_axes,
    num_devices,
    sharded_over,
    with_devices,
)

RESULTS = 3  # out, m and log_l

A = TypeVar("A")
# The mesh axes that one axis of an array is sharded over.
MeshAxes: TypeAlias = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The functions that the primitives run, from ``(static, *arrays)`` to a tuple of arrays."""

    forward: Callable[..., tuple[jax.Array, ...]]
    tangent: Callable[..., tuple[jax.Array, ...]]
    backward: Callable[..., tuple[jax.Array, ...]]
    plain: Callable[[Head], tuple[jax.Array, jax.Array, jax.Array]]  # out, m, log_l: materialized


def mesh_axes(
    static: Static, avals: Sequence[ShapedArray], rank: int, dims: Dims
) -> tuple[MeshAxes, ...]:
    """The explicit mesh axes of a result, whose mapped axes are sharded like those of operands."""
    axes: list[MeshAxes] = [None] * rank
    for level, axis in enumerate(dims):
        if axis is not None:
            there = (
                sharded_over(aval, each[level])
                for aval, each in zip(avals, static.in_dims, strict=True)
                if each[level] is not None
            )
            axes[axis] = next((names for names in there if names is not None), None)
    return tuple(axes)


class Primitives(NamedTuple):
    """The three primitives of a kernel."""

    forward: Primitive
    tangent: Primitive
    backward: Primitive


@dataclasses.dataclass(frozen=True)
class HeadAttention:
    """The three primitives as functions of one head, to be mapped over heads by ``vmap``."""

    primitives: Primitives

    def __call__(self, head: Head, schedule: Any, config: Any) -> tuple[jax.Array, jax.Array]:
        """Output and lse."""
        out, m, log_l = self.forward(head, schedule, config)
        return out, m + log_l

    def forward(self, head: Head, schedule: Any, config: Any) -> tuple[jax.Array, ...]:
        """Output, m and log l."""
        leaves, structure = jax.tree.flatten(operands(head, schedule))
        static = Static(structure, config, (), ((),) * len(leaves), ((),) * RESULTS)
        leaves = varying_together(map(jnp.asarray, leaves))
        return tuple(self.primitives.forward.bind(*leaves, static=static))

    def tangent(
        self,
        head: Head,
        schedule: Any,
        config: Any,
        results: Sequence[jax.Array],
        tangents: dict[int, jax.Array],
    ) -> tuple[jax.Array, ...]:
        """Tangents of output and log l, linear in those of the operands; see ``blockwise``.

        Args:
          results: output, m and log l. They may be results over more keys than the head has; the
            tangents are then the contribution of the head's keys.
          tangents: by index of the operand among the differentiable ones.
        """
        leaves, structure = jax.tree.flatten(operands(head, schedule))
        arrays = [*leaves, *results, *tangents.values()]
        dims: tuple[Dims, ...] = ((),) * len(arrays)
        static = Static(structure, config, (), dims, ((),) * 2, tuple(tangents))
        arrays = varying_together(map(jnp.asarray, arrays))
        return tuple(self.primitives.tangent.bind(*arrays, static=static))


def make(name: str, kernel: Kernel, elsewhere: Kernel | None = None) -> HeadAttention:
    """Defines the three primitives of a kernel.

    Args:
      elsewhere: for a kernel that is native code for this machine's CPU: what runs in its place on
        other platforms and in exported programs.
    """
    p = Primitives(*(Primitive(f"{name}_{part}") for part in Primitives._fields))
    other = kernel if elsewhere is None else elsewhere
    _register(p.forward, kernel.forward, other.forward, _results)
    _register(p.tangent, kernel.tangent, other.tangent, _results)
    _register(p.backward, kernel.backward, other.backward, _cotangents)

    batching.primitive_batchers[p.forward] = functools.partial(batch_results, p.forward)
    batching.primitive_batchers[p.tangent] = functools.partial(batch_results, p.tangent)
    batching.primitive_batchers[p.backward] = functools.partial(batch_cotangents, p.backward)

    ad.primitive_jvps[p.forward] = functools.partial(_forward_jvp, p)
    ad.primitive_transposes[p.tangent] = functools.partial(_tangent_transpose, p)
    ad.primitive_jvps[p.tangent] = functools.partial(
        _higher_jvp, p.tangent, functools.partial(_plain_tangent, kernel)
    )
    ad.primitive_jvps[p.backward] = functools.partial(
        _higher_jvp, p.backward, functools.partial(_plain_backward, kernel)
    )

    return HeadAttention(p)


# --- Operands: a head and a schedule as a flat list of arrays.

# The differentiable ones, query, key, value, scores, sink and scale; then mask, dropout, b, n and
# the schedule, which is the kernel's own. Leaves are arrays or whatever stands for them.
Operands: TypeAlias = tuple[tuple[Any, ...], tuple[Any, ...]]


def operands(head: Head, schedule: Any) -> Operands:
    """A head and a schedule as a pytree whose differentiable leaves come first."""
    query, key, value, mask, score, sink, scale, dropout, b, n = head
    return (query, key, value, score, sink, scale), (mask, dropout, b, n, schedule)


def as_head(tree: Operands) -> tuple[Head, Any]:
    """The inverse of ``operands``."""
    (query, key, value, score, sink, scale), (mask, dropout, b, n, schedule) = tree
    return Head(query, key, value, mask, score, sink, scale, dropout, b, n), schedule


def num_differentiable(structure: PyTreeDef) -> int:
    """The number of leaves that can have tangents, which come first: query, ..., sink, scale."""
    differentiable, _ = jax.tree.unflatten(structure, range(structure.num_leaves))
    return len(jax.tree.leaves(differentiable))


# --- Shapes and lowering.


def _register(
    primitive: Primitive,
    run: Callable[..., Sequence[jax.Array]],
    elsewhere: Callable[..., Sequence[jax.Array]],
    shapes: Callable[[Static, Sequence[ShapedArray]], list[ShapedArray]],
) -> None:
    """Registers the implementation, shapes and lowering of a primitive."""
    primitive.multiple_results = True
    primitive.def_impl(lambda *arrays, static: list(run(static, *arrays)))
    primitive.def_abstract_eval(lambda *avals, static: shapes(static, avals))
    mlir.register_lowering(primitive, _lowering(elsewhere, elsewhere))
    if elsewhere is not run:
        mlir.register_lowering(primitive, _lowering(run, elsewhere), platform="cpu")


def _results(static: Static, avals: Sequence[ShapedArray]) -> list[ShapedArray]:
    """Shape and dtype of out, (m,) log_l: at least float32, which the caller casts."""
    query, _, value = (
        core_shape(x.shape, d) for x, d in zip(avals[:3], static.in_dims, strict=False)
    )
    accumulation = accumulation_dtype(avals[0].dtype)
    cores = [(query[0], value[1])] + [(query[0],)] * (len(static.out_dims) - 1)
    return [
        _result(static, avals, core, dims, accumulation)
        for core, dims in zip(cores, static.out_dims, strict=True)
    ]


def _cotangents(static: Static, avals: Sequence[ShapedArray]) -> list[ShapedArray]:
    """Shape and dtype of the operands' cotangents."""
    return [
        _result(static, avals, core_shape(avals[i].shape, static.in_dims[i]), dims, avals[i].dtype)
        for i, dims in zip(static.wrt, static.out_dims, strict=True)
    ]


def _result(
    static: Static, avals: Sequence[ShapedArray], core: Shape, dims: Dims, dtype: DTypeLike
) -> ShapedArray:
    shape = mapped_shape(core, dims, static.levels)
    return like(avals[0], shape, dtype, mesh_axes(static, avals, len(shape), dims))


def _lowering(run: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """Lowers a kernel, whose loops run on one device and have no mesh axes in their types.

    In a program that XLA partitions, each device runs its shard of the heads and examples. Exported
    programs contain no code or callback of this process.
    """

    def lower(ctx: Any, args: Any, fn: Callable[..., Any]) -> Any:
        def without_axes(*arrays: Any) -> Any:
            with no_axes():
                return list(fn(*arrays))

        plain = [ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        rule = mlir.lower_fun(without_axes, multiple_results=True)
        return rule(ctx.replace(avals_in=plain), *args)

    def rule(ctx: Any, *args: Any, static: Static) -> Any:
        exported = for_export(ctx)
        if num_devices(ctx) == 1:
            here = elsewhere if exported else run
            return lower(ctx, args, lambda *xs: here(static, *xs))
        tpu = "tpu" in ctx.module_context.platforms
        several = None if exported or tpu else with_devices(ctx)
        if several is None:
            return lower(ctx, args, lambda *xs: _all_heads(elsewhere, static, xs))
        return lower(several, args, lambda *xs: over_devices(run, static, xs))

    return rule


def _all_heads(
    run: Callable[..., Sequence[jax.Array]], static: Static, arrays: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """A kernel under ``vmap`` over all heads and examples, partitioned by XLA.

    For programs in which ``custom_partitioning`` cannot be used: it does not compile for TPUs
    ("Custom emitter for CustomSPMDPartitioning not found"), and cannot be exported, because it is a
    callback of this process.
    """

    def one_head(static: Static, *xs: jax.Array) -> Sequence[jax.Array]:
        none = dataclasses.replace(
            static,
            levels=(),
            in_dims=((),) * len(static.in_dims),
            out_dims=((),) * len(static.out_dims),
        )
        return run(none, *xs)

    return vmapped(one_head, static)(*arrays)


# --- Derivatives.

Tangent: TypeAlias = AnyArray | ad.Zero


def _forward_jvp(
    p: Primitives, primals: Sequence[AnyArray], tangents: Sequence[Tangent], *, static: Static
) -> tuple[tuple[jax.Array, ...], tuple[Tangent, ...]]:
    """The jvp of forward: the primitive tangent."""
    out, m, log_l = p.forward.bind(*primals, static=static)
    # Residuals of the backward pass, named for policies of `jax.checkpoint`.
    out = checkpoint_name(out, OUT_NAME)
    m, log_l = (checkpoint_name(x, LSE_NAME) for x in (m, log_l))
    constant = _zero(m)
    # A mask has no gradient, so the arrays that its function closes over get none.
    possible = num_differentiable(static.structure)
    wrt = tuple(i for i in _varying(primals, tangents) if i < possible)
    if not wrt:
        return (out, m, log_l), (_zero(out), constant, _zero(log_l))
    static = dataclasses.replace(
        static,
        in_dims=static.in_dims + static.out_dims + tuple(static.in_dims[i] for i in wrt),
        out_dims=(static.out_dims[0], static.out_dims[2]),
        wrt=wrt,
    )
    dots = (tangents[i] for i in wrt)
    dout, dlog_l = p.tangent.bind(*primals, out, m, log_l, *dots, static=static)
    return (out, m, log_l), (dout, constant, dlog_l)


def _tangent_transpose(p: Primitives, cotangents: Any, *args: Any, static: Static) -> Any:
    """The transpose of tangent: the primitive backward."""
    n = static.structure.num_leaves + RESULTS
    cotangents = [ad.instantiate_zeros(c) for c in cotangents]
    static = dataclasses.replace(
        static, in_dims=static.in_dims[:n] + static.out_dims, out_dims=static.in_dims[n:]
    )
    return [None] * n + list(p.backward.bind(*args[:n], *cotangents, static=static))


def _varying(primals: Sequence[AnyArray], tangents: Sequence[Tangent]) -> tuple[int, ...]:
    """The indices of the operands that have a tangent."""
    return tuple(
        i
        for i, (x, dx) in enumerate(zip(primals, tangents, strict=True))
        if type(dx) is not ad.Zero and jnp.issubdtype(x.dtype, jnp.inexact)
    )


def _zero(x: AnyArray) -> ad.Zero:
    return ad.Zero(jax.typeof(x).to_tangent_aval())


# --- Higher derivatives: those of the materialized formulas.


def _higher_jvp(
    primitive: Primitive,
    plain: Callable[..., tuple[jax.Array, ...]],
    primals: Sequence[AnyArray],
    tangents: Sequence[Tangent],
    *,
    static: Static,
) -> tuple[Sequence[jax.Array], Sequence[Tangent]]:
    """The jvp of tangent or backward, computed from its materialized formula."""
    wrt = _varying(primals, tangents)

    def formula(*varying: AnyArray) -> tuple[jax.Array, ...]:
        return vmapped(plain, static)(*_replaced(primals, wrt, varying))

    _, dots = jax.jvp(formula, tuple(primals[i] for i in wrt), tuple(tangents[i] for i in wrt))
    return primitive.bind(*primals, static=static), dots


def _plain_tangent(kernel: Kernel, static: Static, *arrays: AnyArray) -> tuple[jax.Array, ...]:
    """The materialized formula of tangent, for one head."""
    xs, tangents = _split(static, arrays)
    varying = tuple(xs[i] for i in static.wrt)
    return jax.jvp(_plain(kernel, static, xs), varying, tuple(tangents))[1]


def _plain_backward(kernel: Kernel, static: Static, *arrays: AnyArray) -> tuple[jax.Array, ...]:
    """The materialized formula of backward, for one head."""
    xs, cotangents = _split(static, arrays)
    _, vjp = jax.vjp(_plain(kernel, static, xs), *(xs[i] for i in static.wrt))
    return vjp(tuple(cotangents))


def _plain(
    kernel: Kernel, static: Static, arrays: Sequence[AnyArray]
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """out and log_l as a function of the operands that vary."""

    def formula(*varying: AnyArray) -> tuple[jax.Array, jax.Array]:
        new = _replaced(arrays, static.wrt, varying)
        head, _ = as_head(jax.tree.unflatten(static.structure, new))
        out, m, log_l = kernel.plain(head)
        return out, jax.lax.stop_gradient(m) + log_l

    return formula


def _split(static: Static, arrays: Sequence[A]) -> tuple[list[A], list[A]]:
    """The operands and the tangents or cotangents, without the results between them."""
    n = static.structure.num_leaves
    return list(arrays[:n]), list(arrays[n + RESULTS :])


def _replaced(arrays: Sequence[A], where: Sequence[int], new: Sequence[A]) -> list[A]:
    arrays = list(arrays)
    for i, x in zip(where, new, strict=True):
        arrays[i] = x
    return arrays
