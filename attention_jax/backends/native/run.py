"""Attention on a CPU in C++, forward and backward: the fastest backend for calls it supports.

The kernel keeps a tile of logits in registers and caches, and runs on XLA's thread pool. The header
of each source file in ``kernel/`` shows its loops and what each cache holds. It computes in
float32, with exact products of bfloat16 where the processor has them, and sums in a fixed order, so
results do not depend on the number of threads or the rest of the batch. ``blockwise`` computes
tangents and replaces the kernel in exported programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from attention_jax.backends import primitive, xla
from attention_jax.backends.blockwise import formulas
from attention_jax.backends.blockwise import run as blockwise
from attention_jax.backends.blockwise.loops import with_loop_operands
from attention_jax.backends.call import Head, Spec, has_positions, symbolic_sizes_refused
from attention_jax.backends.native import library, operands, scores, visible
from attention_jax.backends.native.operands import Config, Operand, Result, Role, Schedule
from attention_jax.backends.on_primitives import Plan, PrimitiveBackend
from attention_jax.backends.primitive import Static, core_shape
from attention_jax.core.axes import int_at_least
from attention_jax.scores import Score

BLOCK_K = 384  # the largest number of keys per block, BLOCK in kernels.h
# With at most this many queries, keys are not packed but read in place: for any number of heads
# 1.2 to 7 times as fast as packing them, from 5 queries on as fast or slower (AVX2 and AVX-512).
FEW_QUERIES = 4


def forward(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Output ``[T D]``, ``m [T]`` and ``log l [T]``."""
    (T, _), D = _core(static, arrays, 0), _core(static, arrays, 2)[1]
    all_levels = (True,) * len(static.levels)
    cores = ((Role.OUT, (T, D)), (Role.M, (T,)), (Role.LOG_L, (T,)))
    results = [
        Result(role, core, all_levels, dims, jnp.float32)
        for (role, core), dims in zip(cores, static.out_dims, strict=True)
    ]
    given = operands.forward_operands(static, arrays)
    return operands.run("attention_forward_jax", static, given, results)


def backward(static: Static, *arrays: Any) -> tuple[Any, ...]:
    """Cotangents of the operands in ``static.wrt``."""
    index = formulas.operand_index(static)
    all_levels = (True,) * len(static.levels)
    per_kv_head = tuple(not shared for shared in operands.group_levels(static))
    roles = {
        index.query: (Role.D_QUERY, all_levels, -1),
        index.key: (Role.D_KEY, per_kv_head, -1),
        index.value: (Role.D_VALUE, per_kv_head, -1),
        index.sink: (Role.D_SINK, all_levels, -1),
        index.scale: (Role.D_SCALE, all_levels, -1),
    }
    for number, i in enumerate(index.score):
        levels = tuple(d is not None for d in static.in_dims[i])
        roles[i] = (Role.D_SCORE, levels, number)

    def result(i: int, dims: Any) -> Result:
        role, levels, score = roles[i]
        return Result(role, _core(static, arrays, i), levels, dims, arrays[i].dtype, score)

    wanted = [result(i, dims) for i, dims in zip(static.wrt, static.out_dims, strict=True)]
    # The kernel always computes the gradients of query, key and value.
    unused = [
        Result(role, _core(static, arrays, i), levels, _front(levels), jnp.float32)
        for i in (index.query, index.key, index.value)
        if i not in static.wrt
        for role, levels, _ in (roles[i],)
    ]
    given: list[Operand] = operands.forward_operands(static, arrays)
    given += operands.result_operands(static, arrays)
    found = operands.run("attention_backward_jax", static, given, wanted + unused)
    return found[: len(wanted)]


def _core(static: Static, arrays: Any, i: int) -> Any:
    return core_shape(arrays[i].shape, static.in_dims[i])


def _front(levels: tuple[bool, ...]) -> Any:
    """The layout with the mapped axes first, in order."""
    return tuple(sum(levels[:i]) if kept else None for i, kept in enumerate(levels))


_LOOPS = primitive.Kernel(
    with_loop_operands(blockwise.KERNEL.forward),
    with_loop_operands(blockwise.KERNEL.tangent),
    with_loop_operands(blockwise.KERNEL.backward),
    xla.attend,
)


@dataclasses.dataclass(frozen=True)
class Native(PrimitiveBackend):
    """The kernel in C++.

    Attributes:
      block_k: keys per block, a multiple of 96 up to 384.
      instructions: ``"avx512bf16"``, AVX-512 with products of bfloat16; ``"avx512"``, ``"avx2"`` or
        ``"neon"``. None chooses the first that the processor has, except NEON, which is untested.
      few_queries: with at most this many queries (T), keys are not packed.
    """

    block_k: int = BLOCK_K
    instructions: str | None = None
    few_queries: int = FEW_QUERIES
    PRIMITIVES = primitive.make(
        "attention_native",
        primitive.Kernel(forward, _LOOPS.tangent, backward, xla.attend),
        elsewhere=_LOOPS,
    )
    RESHAPE = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_k", int_at_least("block_k", self.block_k, 96))
        object.__setattr__(self, "few_queries", int_at_least("few_queries", self.few_queries, 0))
        if self.block_k % 96 or self.block_k > BLOCK_K:
            raise ValueError(
                f"block_k must be a multiple of 96 up to {BLOCK_K}, got {self.block_k}"
            )
        if self.instructions not in (None, *library.INSTRUCTIONS):
            raise ValueError(
                f"instructions must be one of {', '.join(library.INSTRUCTIONS)} or None, got "
                f"{self.instructions!r}"
            )

    def why_unsupported(self, spec: Spec) -> str | None:
        if spec.platform != "cpu":
            return f"its kernel is for CPUs, the platform is {spec.platform}"
        found = library.load()
        if found.why_not is not None:
            return found.why_not
        if self.instructions is not None and self.instructions not in found.instructions:
            return f"this processor has {', '.join(found.instructions)}, not {self.instructions}"
        if self._instructions() is None:
            return (
                f"its kernel for this processor is not tested yet: ask for "
                f"Native(instructions={found.instructions[0]!r})"
            )
        if reason := symbolic_sizes_refused(spec.sizes):
            return reason
        if spec.sizes.D == 0:
            return "value has width 0"
        dtype = jnp.dtype(spec.dtype)
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"{dtype.name}: it takes float32, bfloat16 and float16, and computes in float32"
        if spec.dropout and has_positions(spec):
            return "dropout with query_positions or key_positions: its dropout counts from 0"
        return scores.why_unsupported(spec.score, spec.sizes.T) or visible.why_unsupported(spec)

    def head_plan(self, spec: Spec) -> Plan:
        instructions = self._instructions()
        if instructions is None:
            raise RuntimeError(
                "no tested instruction set on this CPU; why_unsupported should have refused "
                "the call"
            )
        number = 1 + library.INSTRUCTIONS.index(instructions)
        options = self.block_k, number, self.few_queries

        def planned(one: Head) -> tuple[Head, Schedule, Config]:
            schedule, config = plan(one, options)
            return one._replace(score=scores.native(one)), schedule, config

        return planned

    def planned_score(self) -> Callable[[Head, Score], Score] | None:
        return scores.as_native

    def _instructions(self) -> str | None:
        """The instruction set asked for, or a tested one; None if this processor has none."""
        if self.instructions is not None:
            return self.instructions
        found = library.load().instructions
        return next((x for x in library.TESTED if x in found), None)

    def extra_bytes(self, spec: Spec) -> int:
        """The packed keys, values and rows of one thread, and the bits of the mask."""
        z = spec.sizes
        rows = min(z.T * z.G, 768)
        one = BLOCK_K * (z.H + z.D + 16) + rows * (z.H + z.D + 16)
        return 4 * one + visible.bits_bytes(spec)

    def block(self, spec: Spec) -> tuple[int, int]:
        return visible.UNIT_Q, visible.UNIT_K


def plan(head: Head, options: tuple[int, int, int]) -> tuple[Schedule, Config]:
    """The visible pairs in the kernel's form, and the blocks for ``blockwise``."""
    T, S = head.query.shape[0], head.key.shape[0]
    # A fixed block size, because choosing among several would take most of the time spent here.
    block = min(T, blockwise.UNKNOWN[0]), min(S, blockwise.UNKNOWN[1])
    loops_schedule, loops = blockwise.plan(head, block)
    return Schedule(visible.visible(head), loops_schedule), Config(options, loops)
