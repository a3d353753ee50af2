"""cuDNN's flash attention on NVIDIA GPUs, through ``jax.nn.dot_product_attention``.

An adapter: it accepts the calls that cuDNN computes exactly, refuses the others, and adds what the
kernel does not guarantee. Every query of the kernel attends to at least one key; fully masked
queries and keys are zeroed before the call, and such rows of the output after it, so that NaN in
padding reaches neither the output nor a gradient.

It is differentiable once, in reverse mode, as ``jax.nn``'s call of cuDNN is: ``jvp`` and
``hessian`` are refused. They would need cuDNN's backward pass apart from its forward pass, which no
public function has; without it, every training step would run the forward pass twice.
"""

from __future__ import annotations

import dataclasses
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
from attention_jax.masks import Band, Dense, Lengths, Mask
from attention_jax.masks.base import conjuncts
from attention_jax.scores import Bias, Score

# On cards before Hopper; a spec does not say which card there is.
WIDEST_HEAD = 128
# If the last tile of keys is partial, the backward pass has given NaN for rows of very small logits
# unless it is given the lengths. Tiles have this many rows, or a divisor of it.
TILE = 128
# Masks a pair in a bias: its exponential is 0 next to that of any logit, and unlike -inf it can be
# subtracted from itself. Float16 cannot represent it.
MASKED = -(2.0**41)
# Rows whose bias is below this throughout are shifted up: sums of such numbers have no precision
# left, and the lowest ones overflow in base 2.
FAR = -(2.0**20)


INSTEAD = "('pallas_gpu', 'blockwise')"


class CuDNNMask(NamedTuple):
    """A mask in cuDNN's terms."""

    causal: bool
    window: int | None  # keys before its own that a query attends to; None: all
    query_lengths: tuple[Any, ...]  # ints or int arrays [*B]; the least counts
    key_lengths: tuple[Any, ...]


class VisibleOfCall(NamedTuple):
    """The visible queries, keys and pairs of all heads; axes may have size 1, None is all."""

    queries: Any  # bool [B T N]: the query has a visible key
    keys: Any  # bool [B S K]: the key is visible to a query
    pairs: Any  # bool [B N T S], only if there is a bias


@dataclasses.dataclass(frozen=True)
class CuDNN(Backend):
    """cuDNN's fused kernel, for the calls that it computes exactly."""

    # cuDNN takes the scale as a number.
    STATIC_NUMBERS = True

    def why_unsupported(self, spec: Spec) -> str | None:
        """What of a call cuDNN, as ``jax.nn`` calls it, does not do or not do right; or None."""
        z, dtype, scale = spec.sizes, jnp.dtype(spec.dtype), spec.scale
        refusals = (
            (
                spec.platform != "gpu",
                f"cuDNN is for NVIDIA GPUs, the platform is {spec.platform}",
            ),
            (
                dtype not in (jnp.bfloat16, jnp.float16),
                f"cuDNN computes in bfloat16 and float16 only, query is {dtype.name}",
            ),
            (z.D != z.H, f"jax.nn wants value as wide as key, got widths {z.D} (D) and {z.H} (H)"),
            (z.H % 8 != 0, f"the width of a head must be a multiple of 8, got {z.H} (H)"),
            (
                z.H > WIDEST_HEAD,
                f"heads wider than {WIDEST_HEAD} are not for every card, got {z.H} (H)",
            ),
            (spec.sinks, "softmax sinks have no place in cuDNN's kernel as jax.nn calls it"),
            (
                spec.dropout,
                "dropout is a hash of the key and the indices here, cuDNN draws its own",
            ),
            (spec.return_lse, "jax.nn stops the gradient of the lse and rounds it"),
            (scale is None, "scale is an array, cuDNN needs a number known while tracing"),
            (
                scale is not None and not (scale > 0.0 and math.isfinite(scale)),
                f"scale is {scale}, which must be positive and finite: kernels may scale a maximum",
            ),
        )
        if reason := symbolic_sizes_refused(z) or positions_refused(spec):
            return reason
        for refused, reason in refusals:
            if refused:
                return reason
        plan = _plan(spec.mask, z)
        if isinstance(plan, str):
            return plan
        return _why_not_scores(spec.score, dtype, plan, z)

    def run(self, call: Call, spec: Spec) -> tuple[jax.Array, jax.Array]:
        """Output ``[*B T N D]``, and zeros ``[*B T N]`` in the place of the lse.

        Those zeros are never returned: calls that return the lse are refused.
        """
        z = spec.sizes
        plan = _plan(call.mask, z)
        if isinstance(plan, str):
            raise NotImplementedError(f"implementation 'cudnn' cannot: {plan}")
        B = math.prod(z.B)
        query, key, value = (x.reshape(B, *x.shape[len(z.B) :]) for x in call[:3])
        bias = _flat_bias(call.score[0].array, z) if call.score else None  # type: ignore[attr-defined]
        query_length = _length(plan.query_lengths, z.T, z)
        key_length = _length(plan.key_lengths, z.S, z)

        visible = _visible(plan, bias, query_length, key_length, z)
        query = zero_rows(visible.queries, query)
        key, value = zero_rows(visible.keys, key), zero_rows(visible.keys, value)
        if bias is not None:
            bias = _bounded(bias, visible)

        # Padded queries are computed too, from zeros: cuDNN does not specify rows beyond a query
        # length, and the backward pass reads them.
        lengths = None
        if key_length is not None or z.T % TILE or z.S % TILE:
            keys = (
                jnp.full((B,), z.S, jnp.int32) if key_length is None else jnp.maximum(key_length, 1)
            )
            lengths = jnp.full((B,), z.T, jnp.int32), keys
        out = zero_rows(
            visible.queries, _attend(query, key, value, bias, lengths, plan, spec.scale)
        )
        shape = (*z.B, z.T, z.N)
        return out.reshape(*shape, z.D), jnp.zeros(shape, jnp.float32)

    def extra_bytes(self, spec: Spec) -> int:
        """Copies with zeroed padding, and of the bias without ``-inf``."""
        z, plan = spec.sizes, _plan(spec.mask, spec.sizes)
        if isinstance(plan, str):
            return 0
        B, width = math.prod(z.B), jnp.dtype(spec.dtype).itemsize
        padded = bool(plan.query_lengths or plan.key_lengths)
        entries = 0
        if padded or spec.score:
            entries += (
                2 * B * z.T * z.N * z.H + 2 * B * z.S * z.K * z.H
            )  # query, output; key, value
        for score in spec.score:
            if isinstance(score, Bias):
                *batch, n, _, _ = score.array.shape
                entries += (B if padded or math.prod(batch) > 1 else 1) * n * z.T * z.S
        return entries * width


# --- From our terms to cuDNN's.


def _plan(mask: Mask | None, sizes: Sizes) -> CuDNNMask | str:
    """The mask in cuDNN's terms, or why it has none."""
    bands, spans = [], []
    for part in conjuncts(mask):
        if isinstance(part, Lengths):
            spans.append(part)
        elif isinstance(part, Band):
            if not isinstance(part.offset, int):
                return "mask has an offset per example, cuDNN's causal mask starts top-left"
            if part.offset != 0:
                return f"mask has offset {part.offset}, cuDNN's causal mask starts top-left"
            bands.append(part)
        elif isinstance(part, Dense):
            return "mask is a bool array, which jax.nn would turn into a bias of T x S"
        else:
            return f"mask {type(part).__name__} has no place in cuDNN's kernel as jax.nn calls it"
    # A bound beyond all positions is no bound.
    left = min((b.left for b in bands if b.left is not None and b.left < sizes.T - 1), default=None)
    right = min(
        (b.right for b in bands if b.right is not None and b.right < sizes.S - 1), default=None
    )
    plan = CuDNNMask(
        causal=right == 0,
        window=left,
        query_lengths=tuple(s.query for s in spans if s.query is not None),
        key_lengths=tuple(s.key for s in spans if s.key is not None),
    )
    if right is not None and right > 0:
        return f"mask allows {right} keys after the query, cuDNN's window ends with it"
    if left is not None and not plan.causal:
        return "mask has a left window without causal, from which jax.nn drops the future's bound"
    if plan.causal and sizes.T != sizes.S:
        return (
            f"mask is causal and T is {sizes.T} but S is {sizes.S}: kernels differ in where the "
            f"diagonal is then"
        )
    if left is not None and plan.key_lengths:
        return "mask has a window and key lengths, which leave fully masked queries"
    return plan


def _why_not_scores(
    scores: tuple[Score, ...], dtype: Any, plan: CuDNNMask, sizes: Sizes
) -> str | None:
    for score in scores:
        if not isinstance(score, Bias):
            return f"score {type(score).__name__} has no place in cuDNN's kernel as jax.nn calls it"
    if not scores:
        return None
    if len(scores) > 1:
        return f"score has {len(scores)} biases, cuDNN takes one"
    array = scores[0].array  # type: ignore[attr-defined]
    if dtype != jnp.bfloat16:
        return f"score is a bias in a call of {dtype.name}, which holds no number that hides a pair"
    if array.dtype != dtype:
        return (
            f"score is a bias of {jnp.dtype(array.dtype).name}, cuDNN wants {dtype.name}, as query"
        )
    if array.shape[-2:] != (sizes.T, sizes.S):
        return (
            f"score is a bias of shape {tuple(array.shape)}, whose last axes must be T and S = "
            f"({sizes.T}, {sizes.S}) in full"
        )
    if sizes.T % 2 or sizes.S % 2:
        return f"score is a bias, whose T and S must be even, got {sizes.T} and {sizes.S}"
    if plan.window is not None:
        return "score is a bias and mask a window, which not every cuDNN takes together"
    return None


def _flat_bias(array: Any, sizes: Sizes) -> jax.Array:
    """``[B or 1, N or 1, T, S]``."""
    array = jnp.asarray(array)
    batch, rest = array.shape[:-3], array.shape[-3:]
    if math.prod(batch) > 1:
        array = jnp.broadcast_to(array, (*sizes.B, *rest))
    return array.reshape(-1, *rest)


def _length(lengths: tuple[Any, ...], most: int, sizes: Sizes) -> jax.Array | None:
    """The least of the lengths, ``[B]``, from 0 to ``most``; None where there are none."""
    if not lengths:
        return None
    # Clipped before the cast, which could not hold every int64.
    least, *others = (jnp.clip(jnp.asarray(x), 0, most).astype(jnp.int32) for x in lengths)
    for x in others:
        least = jnp.minimum(least, x)
    return jnp.broadcast_to(least, sizes.B).reshape(-1)


def _visible(
    plan: CuDNNMask, bias: Any, query_length: Any, key_length: Any, sizes: Sizes
) -> VisibleOfCall:
    """What is visible, given that a causal mask has ``T == S`` and no offset."""
    i, j = jnp.arange(sizes.T, dtype=jnp.int32), jnp.arange(sizes.S, dtype=jnp.int32)
    if bias is None and query_length is None and key_length is None:
        return VisibleOfCall(None, None, None)
    real_queries = (
        jnp.ones((1, sizes.T), bool) if query_length is None else i < query_length[:, None]
    )
    real_keys = jnp.ones((1, sizes.S), bool) if key_length is None else j < key_length[:, None]
    if bias is None:
        # A query with a visible key attends to the first; under causal, query j attends to key j.
        queries = real_queries & real_keys[:, :1]
        keys = real_keys & (real_queries if plan.causal else real_queries[:, :1])
        return VisibleOfCall(queries[:, :, None], keys[:, :, None], None)
    pairs = real_queries[:, None, :, None] & real_keys[:, None, None, :] & (bias != -jnp.inf)
    if plan.causal:
        pairs = pairs & (j[None, :] <= i[:, None])
    keys = pairs.any(axis=2)  # [B N S]
    if keys.shape[1] != 1:  # visible to one of the query heads that share it
        keys = keys.reshape(-1, sizes.K, sizes.G, sizes.S).any(axis=2)
    return VisibleOfCall(jnp.swapaxes(pairs.any(axis=3), 1, 2), jnp.swapaxes(keys, 1, 2), pairs)


def _bounded(bias: jax.Array, visible: VisibleOfCall) -> jax.Array:
    """The bias without ``-inf``, shifted by a constant per row, which the result ignores."""
    has_key = jnp.swapaxes(visible.queries, 1, 2)[..., None]
    top = jnp.where(visible.pairs, bias, -jnp.inf).max(axis=-1, keepdims=True)
    zero, masked = jnp.zeros((), bias.dtype), jnp.asarray(MASKED, bias.dtype)
    shift = jax.lax.stop_gradient(jnp.where(has_key & (top < FAR), top, zero))
    # Fully masked rows are 0: with MASKED throughout, their sums would have no precision.
    return jnp.where(
        visible.pairs, jnp.maximum(bias - shift, masked), jnp.where(has_key, masked, zero)
    )


# --- The call. Its vmap rule needs all arrays mapped along axis 0, the cotangent too.


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    lengths: tuple[jax.Array, jax.Array] | None,
    plan: CuDNNMask,
    scale: float | None,
) -> jax.Array:
    arrays = (query, key, value) if bias is None else (query, key, value, bias)
    query, key, value, *biases = guard(arrays, "cudnn", INSTEAD, forward_mode=False)
    bias = biases[0] if biases else None
    query, key, value, bias, lengths = _mapped_together((query, key, value, bias, lengths))
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        scale=scale,
        # Never a window alone: without causal, jax.nn forgets that it ends with the query.
        is_causal=plan.causal,
        # Keys other than its own, for jax.nn; it adds that one for cuDNN.
        local_window_size=None if plan.window is None else (plan.window, 0),
        query_seq_lengths=None if lengths is None else lengths[0],
        key_value_seq_lengths=None if lengths is None else lengths[1],
        implementation="cudnn",
    )
    return _cotangent_mapped(out)


@jax.custom_batching.custom_vmap
def _align(arrays: Any) -> Any:
    """The arrays as they are; under ``vmap``, all of them mapped where one is."""
    return arrays


@_align.def_vmap
def _align_mapped(size: int, mapped: Any, arrays: Any) -> Any:
    query, bias = arrays[0], arrays[3] if len(arrays) > 3 else None
    if bias is not None and bias.shape[-4:-2] != (query.shape[-4], query.shape[-2]):
        # Each mapped example has its own gradient of the bias, which cuDNN sums over these axes.
        raise NotImplementedError(
            "implementation 'cudnn' cannot: under vmap the bias of score must have the axes *B and "
            "N in full. Implementation 'xla' can"
        )
    mapped_arrays = jax.tree.map(
        lambda x, is_mapped: x if is_mapped else jnp.broadcast_to(x, (size, *x.shape)),
        arrays,
        mapped[0],
    )
    # Again, for a vmap around this one.
    return _align(mapped_arrays), jax.tree.map(lambda x: True, arrays)


@jax.custom_vjp
def _mapped_together(arrays: Any) -> Any:
    return _align(arrays)


# The lengths are integers, whose cotangents come as float0 and go as None.
_mapped_together.defvjp(
    lambda arrays: (_align(arrays), None),
    lambda _, cotangents: ((*cotangents[:4], None),),
)


@jax.custom_vjp
def _cotangent_mapped(out: jax.Array) -> jax.Array:
    return out


_cotangent_mapped.defvjp(
    lambda out: (out, out),
    lambda out, cotangent: (_align((cotangent, out))[0],),
)
