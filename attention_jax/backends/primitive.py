"""One head of one example as a JAX primitive that every transformation understands.

``jax.custom_vjp`` alone refuses ``jvp`` and, under ``vmap``, batches the loops inside it, which on
a CPU makes every tile product four times slower. Three primitives do better::

    forward (operands)                          -> out, m, log_l
    tangent (operands, results, tangents)       -> d out, d log_l    linear in the tangents
    backward(operands, results, cotangents)     -> cotangents of the operands: tangent's transpose

where ``lse = m + log_l``: the largest logit and what remains. They stay apart because their sum
would round ``log_l`` away where logits are large, and with it the probabilities that are computed
again in tangent and backward. ``m`` counts as a constant: only the sum ever matters.

- ``jvp`` of forward is tangent; its transpose, hence ``grad``, is backward.
- ``vmap`` of any of them only notes, for each array, where the new axis is (or that there is none).
  The kernel then loops over it and cuts out what it needs: nothing is moved, copied or repeated,
  and a mapped axis costs what a batch axis costs, since batch axes and heads *are* mapped axes.
- Derivatives of tangent and backward, that is second and higher orders, are derivatives of the
  plain materialised formulas, which JAX differentiates by itself.

So ``jit``, ``grad``, ``jvp``, ``linearize``, ``hessian``, ``checkpoint``, ``scan``, ``shard_map``
and ``vmap`` over any arguments work, in any order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attention_jax.backends.call import Head
from attention_jax.core.axes import LSE_NAME, OUT_NAME, Shape, accumulation_dtype
from attention_jax.core.closures import varying_together
from attention_jax.core.compat import Primitive, ad, batching, like, mlir, no_axes, sharded_over

# out, m and log_l.
RESULTS = 3

# Where each mapped axis of an array is, outermost first; None: the array does not have it.
Dims = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Static:
    """What a primitive's program depends on, besides shapes."""

    structure: Any  # of the operands, a pytree (Head, visits)
    config: Any  # the kernel's own
    levels: Shape = ()  # sizes of the mapped axes, outermost first
    in_dims: tuple[Dims, ...] = ()  # one per array
    out_dims: tuple[Dims, ...] = ()  # one per result; None: summed over that axis
    wrt: tuple[int, ...] = ()  # tangent and backward: the operands that vary


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the primitives run: each takes ``(static, *arrays)`` and returns a tuple of arrays."""

    forward: Callable[..., Any]
    tangent: Callable[..., Any]
    backward: Callable[..., Any]
    plain: Callable[..., Any]  # head -> out, m, log_l: materialised


def core_shape(shape: Shape, dims: Dims) -> tuple[int, ...]:
    """The shape without the mapped axes."""
    return tuple(n for axis, n in enumerate(shape) if axis not in dims)


def mapped_shape(core: Shape, dims: Dims, levels: Shape) -> Shape:
    """The shape with the mapped axes."""
    rank = len(core) + sum(d is not None for d in dims)
    at = {d: n for d, n in zip(dims, levels, strict=True) if d is not None}
    rest = iter(core)
    return tuple(at[axis] if axis in at else next(rest) for axis in range(rank))


def spec(static: Static, avals: Sequence[Any], rank: int, dims: Dims) -> tuple[Any, ...]:
    """The explicit mesh axes of a result: its mapped axes are sharded as those of the operands."""
    axes: list[Any] = [None] * rank
    for level, place in enumerate(dims):
        if place is not None:
            there = (
                sharded_over(aval, each[level])
                for aval, each in zip(avals, static.in_dims, strict=True)
                if each[level] is not None
            )
            axes[place] = next((names for names in there if names is not None), None)
    return tuple(axes)


def num_differentiable(structure: Any) -> int:
    """The first leaves are the ones that can have tangents: query, key, value, scores, sink, scale.

    ``Head`` is unpacked in this order by ``operands``.
    """
    differentiable, _ = jax.tree.unflatten(structure, range(structure.num_leaves))
    return len(jax.tree.leaves(differentiable))


def operands(head: Head, visits: Any) -> Any:
    """A pytree whose differentiable leaves come first."""
    query, key, value, mask, score, sink, scale, dropout, b, n = head
    return (query, key, value, score, sink, scale), (mask, dropout, b, n, visits)


def as_head(tree: Any) -> tuple[Head, Any]:
    """The inverse of ``operands``."""
    (query, key, value, score, sink, scale), (mask, dropout, b, n, visits) = tree
    return Head(query, key, value, mask, score, sink, scale, dropout, b, n), visits


def make(name: str, kernel: Kernel) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The three primitives on a kernel, as one function ``(head, visits, config) -> out, lse``."""
    forward_p, tangent_p, backward_p = (
        Primitive(f"{name}_{part}") for part in ("forward", "tangent", "backward")
    )

    def results(static: Static, avals: Sequence[Any]) -> list[Any]:
        """Shape and dtype of out, (m,) log_l: at least float32, the caller rounds."""
        query, _, value = (
            core_shape(x.shape, d) for x, d in zip(avals[:3], static.in_dims, strict=False)
        )
        accumulation = accumulation_dtype(avals[0].dtype)
        cores = [(query[0], value[1])] + [(query[0],)] * (len(static.out_dims) - 1)
        shapes = [
            mapped_shape(core, dims, static.levels)
            for core, dims in zip(cores, static.out_dims, strict=True)
        ]
        return [
            like(avals[0], shape, accumulation, spec(static, avals, len(shape), dims))
            for shape, dims in zip(shapes, static.out_dims, strict=True)
        ]

    def cotangents(static: Static, avals: Sequence[Any]) -> list[Any]:
        """Shape and dtype of the operands' cotangents."""
        shapes = [
            mapped_shape(core_shape(avals[i].shape, static.in_dims[i]), d, static.levels)
            for i, d in zip(static.wrt, static.out_dims, strict=True)
        ]
        return [
            like(avals[i], shape, avals[i].dtype, spec(static, avals, len(shape), dims))
            for i, shape, dims in zip(static.wrt, shapes, static.out_dims, strict=True)
        ]

    # --- Plain formulas, for derivatives of the derivatives.

    def split(static: Static, arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        n = static.structure.num_leaves
        return list(arrays[:n]), list(arrays[n + RESULTS :])  # the results are recomputed

    def plain_of(static: Static, arrays: list[Any]) -> Callable[..., Any]:
        """out, log_l as a function of the operands that vary."""

        def fn(*varying: Any) -> Any:
            new = list(arrays)
            for i, x in zip(static.wrt, varying, strict=True):
                new[i] = x
            head, _ = as_head(jax.tree.unflatten(static.structure, new))
            out, m, log_l = kernel.plain(head)
            return out, jax.lax.stop_gradient(m) + log_l

        return fn

    def plain_tangent(static: Static, *arrays: Any) -> Any:
        xs, tangents = split(static, arrays)
        varying = tuple(xs[i] for i in static.wrt)
        return jax.jvp(plain_of(static, xs), varying, tuple(tangents))[1]

    def plain_backward(static: Static, *arrays: Any) -> Any:
        xs, cots = split(static, arrays)
        _, pull = jax.vjp(plain_of(static, xs), *(xs[i] for i in static.wrt))
        return pull(tuple(cots))

    def vmapped(fn: Callable[..., Any], static: Static) -> Callable[..., Any]:
        """``fn`` of one head, mapped as ``static`` says."""

        def run(*arrays: Any) -> tuple[Any, ...]:
            mapped: Callable[..., Any] = lambda *xs: tuple(fn(static, *xs))  # noqa: E731
            ins = [list(d) for d in static.in_dims]
            plan = []
            for level, size in enumerate(static.levels):
                where = tuple(d[level] for d in ins)
                for d, w in zip(ins, where, strict=True):  # the axis is gone for inner levels
                    if w is not None:
                        d[:] = [x - 1 if x is not None and x > w else x for x in d]
                plan.append((where, size))
            for where, size in reversed(plan):
                mapped = jax.vmap(mapped, in_axes=where, out_axes=0, axis_size=size)
            results = []
            for x, dims in zip(mapped(*arrays), static.out_dims, strict=True):
                x = x.sum(tuple(i for i, d in enumerate(dims) if d is None))
                kept = [d for d in dims if d is not None]
                results.append(jnp.moveaxis(x, range(len(kept)), kept))
            return tuple(results)

        return run

    # --- Rules.

    def forward_jvp(primals: Any, tangents: Any, *, static: Static) -> Any:
        out, m, log_l = forward_p.bind(*primals, static=static)
        # What the backward pass needs of this one, for policies of `jax.checkpoint` to save.
        out = checkpoint_name(out, OUT_NAME)
        m, log_l = (checkpoint_name(x, LSE_NAME) for x in (m, log_l))
        constant = ad.Zero(jax.typeof(m).to_tangent_aval())
        possible = num_differentiable(static.structure)
        wrt = tuple(
            i
            for i in range(possible)
            if type(tangents[i]) is not ad.Zero and jnp.issubdtype(primals[i].dtype, jnp.inexact)
        )
        if not wrt:
            zeros = (ad.Zero(jax.typeof(x).to_tangent_aval()) for x in (out, log_l))
            return (out, m, log_l), (next(zeros), constant, next(zeros))
        in_dims = static.in_dims + static.out_dims + tuple(static.in_dims[i] for i in wrt)
        static = dataclasses.replace(
            static, in_dims=in_dims, out_dims=(static.out_dims[0], static.out_dims[2]), wrt=wrt
        )
        varying = (tangents[i] for i in wrt)
        dout, dlog_l = tangent_p.bind(*primals, out, m, log_l, *varying, static=static)
        return (out, m, log_l), (dout, constant, dlog_l)

    def tangent_transpose(cots: Any, *args: Any, static: Static) -> Any:
        n = static.structure.num_leaves + RESULTS
        cots = [ad.instantiate_zeros(c) for c in cots]
        tangent_dims = static.in_dims[n:]
        static = dataclasses.replace(
            static, in_dims=static.in_dims[:n] + static.out_dims, out_dims=tangent_dims
        )
        return [None] * n + list(backward_p.bind(*args[:n], *cots, static=static))

    def higher(plain: Callable[..., Any], primitive: Primitive) -> Callable[..., Any]:
        def rule(primals: Any, tangents: Any, *, static: Static) -> Any:
            outs = primitive.bind(*primals, static=static)
            varying = [
                i
                for i, t in enumerate(tangents)
                if type(t) is not ad.Zero and jnp.issubdtype(primals[i].dtype, jnp.inexact)
            ]

            def fn(*xs: Any) -> Any:
                new = list(primals)
                for i, x in zip(varying, xs, strict=True):
                    new[i] = x
                return vmapped(plain, static)(*new)

            _, dots = jax.jvp(
                fn, tuple(primals[i] for i in varying), tuple(tangents[i] for i in varying)
            )
            return outs, dots

        return rule

    def batch(primitive: Primitive, args: Any, dims: Any, *, static: Static) -> Any:
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
        in_dims = tuple(_insert(d, old) for d, old in zip(dims, static.in_dims, strict=True))
        # Results carry the new axis where their operand does, so that nothing is transposed.
        sources = static.wrt if primitive is backward_p else (0,) * len(static.out_dims)
        places = [dims[i] if dims[i] is not None else 0 for i in sources]
        if primitive is not backward_p:  # m and log_l have one axis less than the query
            places = [min(p, len(core)) for p, core in zip(places, _ranks(static), strict=True)]
        out_dims = tuple(_insert(p, old) for p, old in zip(places, static.out_dims, strict=True))
        static = dataclasses.replace(
            static, levels=(size, *static.levels), in_dims=in_dims, out_dims=out_dims
        )
        return primitive.bind(*args, static=static), places

    def _ranks(static: Static) -> list[range]:
        """Axes of out, (m,) log_l before the new one is inserted."""
        kept = [sum(d is not None for d in dims) for dims in static.out_dims]
        cores = (2,) + (1,) * (len(kept) - 1)
        return [range(core + k) for core, k in zip(cores, kept, strict=True)]

    for primitive, run, shapes in (
        (forward_p, kernel.forward, results),
        (tangent_p, kernel.tangent, results),
        (backward_p, kernel.backward, cotangents),
    ):
        primitive.multiple_results = True

        def implementation(
            *arrays: Any, static: Static, run: Callable[..., Any] = run
        ) -> list[Any]:
            return list(run(static, *arrays))

        primitive.def_impl(implementation)
        primitive.def_abstract_eval(lambda *avals, static, shapes=shapes: shapes(static, avals))
        mlir.register_lowering(primitive, _lowering(implementation))
        batching.primitive_batchers[primitive] = functools.partial(batch, primitive)

    ad.primitive_jvps[forward_p] = forward_jvp
    ad.primitive_jvps[tangent_p] = higher(plain_tangent, tangent_p)
    ad.primitive_jvps[backward_p] = higher(plain_backward, backward_p)
    ad.primitive_transposes[tangent_p] = tangent_transpose

    def bind(head: Head, visits: Any, config: Any) -> tuple[jax.Array, jax.Array]:
        leaves, structure = jax.tree.flatten(operands(head, visits))
        static = Static(structure, config, (), ((),) * len(leaves), ((),) * RESULTS)
        out, m, log_l = forward_p.bind(*varying_together(map(jnp.asarray, leaves)), static=static)
        return out, m + log_l

    return bind


def _insert(new: int | None, old: Dims) -> Dims:
    """``old``, once an array has got a further mapped axis at ``new``; it becomes the outermost."""
    if new is None:
        return (None, *old)
    return (new, *(d + 1 if d is not None and d >= new else d for d in old))


def _lowering(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Lowers a function without the mesh axes in its types: its loops run on one device."""

    def on_one_device(*arrays: Any, **params: Any) -> Any:
        with no_axes():
            return implementation(*arrays, **params)

    lower = mlir.lower_fun(on_one_device, multiple_results=True)

    def rule(ctx: Any, *args: Any, **params: Any) -> Any:
        plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        return lower(ctx.replace(avals_in=plain), *args, **params)

    return rule
