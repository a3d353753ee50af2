"""FlashAttention 4 on NVIDIA GPUs, through the package ``fa4-jax``.

An adapter: it accepts the calls that the kernel computes exactly and refuses the others. Causal
masks and windows at the end of the keys are the kernel's own, which skips what lies outside; other
masks become a function in the kernel, which computes every block. NaN in padding would reach the
output through a probability of 0, so fully masked queries, keys and values are zeroed before the
call. A fully masked query gives 0, as the package promises.

It is differentiable once, in both modes.

Source: https://pypi.org/project/fa4-jax, version 0.1.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.backends.call import (
    Backend,
    Call,
    Spec,
    positions_refused,
    symbolic_sizes_refused,
)
from attention_jax.backends.guards import guard
from attention_jax.core.axes import Sizes
from attention_jax.core.softmax import zero_rows
from attention_jax.masks import Band, Chunked, Dilated, Lengths, Mask, Segments
from attention_jax.masks.base import conjuncts

PACKAGE = "fa4_jax"
# Of its forward mode on all cards, and of its backward pass on Blackwell; a spec does not say which
# card there is.
WIDEST_HEAD = 128
# Masks that have a function in ``fa4_masks``.
FUNCTIONS = (Band, Lengths, Segments, Chunked, Dilated)
INSTEAD = "('pallas_gpu', 'blockwise')"
# Pairs whose visibility is looked at together.
PAIRS = 2**24


class FA4Mask(NamedTuple):
    """A mask in the kernel's terms: all of these must hold."""

    left: int | None  # of the kernel's own window, which is aligned at the last key
    right: int | None
    functions: tuple[Mask, ...]


@dataclasses.dataclass(frozen=True)
class FA4(Backend):
    """FlashAttention 4, for the calls that it computes exactly.

    Attributes:
      interpret: run the package's formula in plain JAX, on any platform, to test the adapter.
    """

    # The kernel takes the scale as a number.
    STATIC_NUMBERS = True
    interpret: bool = False

    def why_unsupported(self, spec: Spec) -> str | None:
        """What of a call the kernel does not do, in words; or None."""
        z, dtype, scale = spec.sizes, jnp.dtype(spec.dtype), spec.scale
        if reason := symbolic_sizes_refused(z) or positions_refused(spec):
            return reason
        refusals = (
            (
                spec.platform != "gpu" and not self.interpret,
                f"its kernel is for NVIDIA GPUs, the platform is {spec.platform}",
            ),
            (
                importlib.util.find_spec(PACKAGE) is None,
                "the package fa4-jax is not installed: pip install -e '.[gpu]', with Python 3.12 "
                "or later",
            ),
            (spec.partitioned, "the compiler cannot partition its kernel: use shard_map"),
            (
                dtype not in (jnp.bfloat16, jnp.float16),
                f"its kernel computes in bfloat16 and float16 only, query is {dtype.name}",
            ),
            (
                bool(z.H % 8 or z.D % 8),
                f"widths must be multiples of 8, got {z.H} (H) and {z.D} (D)",
            ),
            (
                max(z.H, z.D) > WIDEST_HEAD,
                f"heads wider than {WIDEST_HEAD} are not for every card, got {z.H} (H) and "
                f"{z.D} (D)",
            ),
            (bool(spec.score), f"score {_names(spec.score)} has no place in its kernel"),
            (spec.sinks, "softmax sinks have no place in its kernel"),
            (spec.dropout, "dropout has no place in its kernel"),
            (spec.return_lse, "its backward pass takes no gradient of the lse"),
            (scale is None, "scale is an array, its kernel needs a number known while tracing"),
            (
                scale is not None and not (scale > 0.0 and math.isfinite(scale)),
                f"scale is {scale}, which must be positive and finite: its kernel scales a maximum",
            ),
        )
        for refused, reason in refusals:
            if refused:
                return reason
        plan = _plan(spec.mask, z)
        return plan if isinstance(plan, str) else None

    def run(self, call: Call, spec: Spec) -> tuple[jax.Array, jax.Array]:
        """Output ``[*B T N D]``, and zeros ``[*B T N]`` in the place of the lse."""
        from fa4_jax import flash_attn  # type: ignore[import-not-found]

        from attention_jax.backends import fa4_masks

        z = spec.sizes
        plan = _plan(call.mask, z)
        if isinstance(plan, str):
            raise NotImplementedError(f"implementation 'fa4' cannot: {plan}")
        query, key, value = guard(
            call[:3],
            "fa4",
            INSTEAD,
            batched="its kernel has no vmap with a mask that is a function in it"
            if plan.functions
            else None,
        )
        B = math.prod(z.B)
        query, key, value = (x.reshape(B, *x.shape[len(z.B) :]) for x in (query, key, value))
        function = fa4_masks.function(plan.functions, z)
        queries, keys = _visible(plan, function, z)
        query, key, value = zero_rows(queries, query), zero_rows(keys, key), zero_rows(keys, value)
        out = flash_attn(
            query,
            key,
            value,
            window_size=(plan.left, plan.right),  # (None, 0) is its causal kernel
            scale=spec.scale,
            mask_mod=function,
            backend="reference" if self.interpret else "cute",
        )
        shape = (*z.B, z.T, z.N)
        return zero_rows(queries, out).reshape(*shape, z.D), jnp.zeros(shape, jnp.float32)

    def extra_bytes(self, spec: Spec) -> int:
        """Copies with zeroed padding."""
        z, plan = spec.sizes, _plan(spec.mask, spec.sizes)
        if isinstance(plan, str) or _all_visible(plan, z):
            return 0
        entries = z.T * z.N * (z.H + z.D) + z.S * z.K * (z.H + z.D)
        return math.prod(z.B) * entries * jnp.dtype(spec.dtype).itemsize


def _names(scores: tuple[Any, ...]) -> str:
    return ", ".join(type(x).__name__ for x in scores)


def _plan(mask: Mask | None, sizes: Sizes) -> FA4Mask | str:
    """The mask in the kernel's terms, or why it has none."""
    left: int | None = None
    right: int | None = None
    functions = []
    for part in conjuncts(mask):
        if not isinstance(part, FUNCTIONS):
            return f"mask {type(part).__name__} has no place in its kernel"
        own = _own_window(part, sizes)
        if own is None:
            functions.append(part)
            continue
        left = own[0] if left is None else left if own[0] is None else min(left, own[0])
        right = own[1] if right is None else right if own[1] is None else min(right, own[1])
    return FA4Mask(left, right, tuple(functions))


def _own_window(mask: Mask, sizes: Sizes) -> tuple[int | None, int | None] | None:
    """Left and right of the kernel's window, which is aligned at the end; None if it is not one."""
    if not isinstance(mask, Band) or not isinstance(mask.offset, int):
        return None
    shift = mask.offset - (sizes.S - sizes.T)
    left = None if mask.left is None else mask.left - shift
    right = None if mask.right is None else mask.right + shift
    # A window that does not hold its own position is not one for the kernel.
    return None if min(left or 0, right or 0) < 0 else (left, right)


def _all_visible(plan: FA4Mask, sizes: Sizes) -> bool:
    """Whether every query has a key and every key a query, as far as that is known."""
    if plan.functions:
        return False
    # The positions of the queries are the last T of the S keys.
    early = plan.left is None or sizes.T == sizes.S or plan.left >= sizes.S - sizes.T
    return sizes.T <= sizes.S and early


def _visible(plan: FA4Mask, function: Any, sizes: Sizes) -> tuple[Any, Any]:
    """Bool ``[B T 1]`` and ``[B S 1]``: the queries and keys not fully masked; None is all."""
    if _all_visible(plan, sizes):
        return None, None
    B, T, S = math.prod(sizes.B), sizes.T, sizes.S
    step = max(1, min(T, PAIRS // max(1, B * S)))
    count = -(-T // step)
    b = jnp.arange(B, dtype=jnp.int32)[:, None, None]
    k = jnp.arange(S, dtype=jnp.int32)

    def block(keys: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The last block overlaps the one before it.
        q = jnp.minimum(i * step, T - step) + jnp.arange(step, dtype=jnp.int32)[:, None]
        distance = k - q - jnp.int32(S - T)
        pairs = jnp.ones((B, step, S), bool)
        if plan.left is not None:
            pairs &= distance >= -plan.left
        if plan.right is not None:
            pairs &= distance <= plan.right
        if function is not None:
            pairs &= function(b, jnp.int32(0), q, k)
        return keys | pairs.any(1), pairs.any(2)

    keys, found = jax.lax.scan(block, jnp.zeros((B, S), bool), jnp.arange(count, dtype=jnp.int32))
    queries = jnp.zeros((B, T), bool)
    starts = jnp.minimum(jnp.arange(count) * step, T - step)
    rows = (starts[:, None] + jnp.arange(step)).reshape(-1)
    queries = queries.at[:, rows].set(jnp.swapaxes(found, 0, 1).reshape(B, -1))
    return queries[:, :, None], keys[:, :, None]
