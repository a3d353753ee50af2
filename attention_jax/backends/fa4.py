"""FlashAttention 4 on NVIDIA GPUs, through the package ``fa4-jax``.

An adapter: it accepts the calls that the kernel computes exactly and refuses the others. Causal
masks and windows that are aligned at the last key use the kernel's own window, which skips the
blocks outside; other masks become a function in the kernel, which then computes every block. NaN in
padding would reach the output through a probability of 0, so fully masked queries, keys and values
are zeroed before the call. The output of a fully masked query is 0, as the package promises.

It can be differentiated once, in either mode.

Source: https://pypi.org/project/fa4-jax, version 0.1.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

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
from attention_jax.scores import Score

PACKAGE = "fa4_jax"
# The limit of its forward-mode derivative on all GPUs and of its backward pass on Blackwell; a spec
# does not name the GPU.
WIDEST_HEAD = 128
# Masks that have a function in ``fa4_masks``.
FUNCTIONS = (Band, Lengths, Segments, Chunked, Dilated)
# What error messages suggest.
INSTEAD = "('pallas_gpu', 'blockwise')"
# The visibility of this many pairs is computed at a time.
PAIRS = 2**24


class FA4Mask(NamedTuple):
    """A mask in the kernel's terms: a pair is visible where all of these hold."""

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
        """Why the kernel does not support a call, in words; None if it does."""
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
            (spec.partitioned, "XLA cannot partition its kernel: use shard_map"),
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
                f"heads wider than {WIDEST_HEAD} do not run on every GPU, got {z.H} (H) and "
                f"{z.D} (D)",
            ),
            (bool(spec.score), f"score {_names(spec.score)} is not supported by its kernel"),
            (spec.sinks, "softmax sinks are not supported by its kernel"),
            (spec.dropout, "dropout is not supported by its kernel"),
            (spec.return_lse, "its backward pass takes no gradient of the lse"),
            (scale is None, "scale is an array, but its kernel needs a number known while tracing"),
            (
                scale is not None and not (scale > 0.0 and math.isfinite(scale)),
                f"scale is {scale}, which must be positive and finite: its kernel scales maxima",
            ),
        )
        for refused, reason in refusals:
            if refused:
                return reason
        kernel_mask = _kernel_mask(spec.mask, z)
        return kernel_mask if isinstance(kernel_mask, str) else None

    def run(self, call: Call, spec: Spec) -> tuple[jax.Array, jax.Array]:
        """Output ``[*B T N D]``, and zeros ``[*B T N]`` in place of the lse."""
        from fa4_jax import flash_attn  # type: ignore[import-not-found]

        from attention_jax.backends import fa4_masks

        z = spec.sizes
        kernel_mask = _kernel_mask(call.mask, z)
        if isinstance(kernel_mask, str):
            raise NotImplementedError(f"implementation 'fa4' cannot: {kernel_mask}")
        query, key, value = guard(
            call[:3],
            "fa4",
            INSTEAD,
            batched="its kernel has no vmap rule for masks other than its own window"
            if kernel_mask.functions
            else None,
        )
        B = math.prod(z.B)
        query, key, value = (x.reshape(B, *x.shape[len(z.B) :]) for x in (query, key, value))
        function = fa4_masks.function(kernel_mask.functions, z)
        queries, keys = _visible(kernel_mask, function, z)
        query, key, value = zero_rows(queries, query), zero_rows(keys, key), zero_rows(keys, value)
        out = flash_attn(
            query,
            key,
            value,
            window_size=(kernel_mask.left, kernel_mask.right),  # (None, 0) is its causal kernel
            scale=spec.scale,
            mask_mod=function,
            backend="reference" if self.interpret else "cute",
        )
        shape = (*z.B, z.T, z.N)
        return zero_rows(queries, out).reshape(*shape, z.D), jnp.zeros(shape, jnp.float32)

    def extra_bytes(self, spec: Spec) -> int:
        """Copies of operands and output with zeroed padding."""
        z, kernel_mask = spec.sizes, _kernel_mask(spec.mask, spec.sizes)
        if isinstance(kernel_mask, str) or _all_visible(kernel_mask, z):
            return 0
        entries = z.T * z.N * (z.H + z.D) + z.S * z.K * (z.H + z.D)
        return math.prod(z.B) * entries * jnp.dtype(spec.dtype).itemsize


def _names(scores: tuple[Score, ...]) -> str:
    return ", ".join(type(x).__name__ for x in scores)


def _kernel_mask(mask: Mask | None, sizes: Sizes) -> FA4Mask | str:
    """The mask in the kernel's terms, or why it has none."""
    left: int | None = None
    right: int | None = None
    functions = []
    for part in conjuncts(mask):
        if not isinstance(part, FUNCTIONS):
            return f"mask {type(part).__name__} is not supported by its kernel"
        window = _own_window(part, sizes)
        if window is None:
            functions.append(part)
            continue
        left = window[0] if left is None else left if window[0] is None else min(left, window[0])
        right = (
            window[1] if right is None else right if window[1] is None else min(right, window[1])
        )
    return FA4Mask(left, right, tuple(functions))


def _own_window(mask: Mask, sizes: Sizes) -> tuple[int | None, int | None] | None:
    """The mask as the kernel's window, aligned at the last key; None if it is not one."""
    if not isinstance(mask, Band) or not isinstance(mask.offset, int):
        return None
    shift = mask.offset - (sizes.S - sizes.T)
    left = None if mask.left is None else mask.left - shift
    right = None if mask.right is None else mask.right + shift
    # The kernel's window must contain the query's own position.
    return None if min(left or 0, right or 0) < 0 else (left, right)


def _all_visible(kernel_mask: FA4Mask, sizes: Sizes) -> bool:
    """Whether every query has a visible key and every key is visible; False if not known."""
    if kernel_mask.functions:
        return False
    # The queries are at the last T of the S positions.
    early = kernel_mask.left is None or sizes.T == sizes.S or kernel_mask.left >= sizes.S - sizes.T
    return sizes.T <= sizes.S and early


def _visible(
    kernel_mask: FA4Mask, function: Callable[..., jax.Array] | None, sizes: Sizes
) -> tuple[Bool[Array, "B T 1"] | None, Bool[Array, "B S 1"] | None]:
    """The queries and keys that are not fully masked; None: all."""
    if _all_visible(kernel_mask, sizes):
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
        if kernel_mask.left is not None:
            pairs &= distance >= -kernel_mask.left
        if kernel_mask.right is not None:
            pairs &= distance <= kernel_mask.right
        if function is not None:
            pairs &= function(b, jnp.int32(0), q, k)
        return keys | pairs.any(1), pairs.any(2)

    keys, found = jax.lax.scan(block, jnp.zeros((B, S), bool), jnp.arange(count, dtype=jnp.int32))
    queries = jnp.zeros((B, T), bool)
    starts = jnp.minimum(jnp.arange(count) * step, T - step)
    rows = (starts[:, None] + jnp.arange(step)).reshape(-1)
    queries = queries.at[:, rows].set(jnp.swapaxes(found, 0, 1).reshape(B, -1))
    return queries[:, :, None], keys[:, :, None]
