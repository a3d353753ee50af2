"""cuDNN's flash attention on NVIDIA GPUs, through ``jax.nn.dot_product_attention``.

An adapter: it accepts the calls that cuDNN computes exactly, refuses the others, and adds what the
kernel does not guarantee. Fully masked queries and keys are zeroed before the call, and such rows
of the output after it, so that NaN in padding reaches neither the output nor a gradient. In every
call to the kernel, each query attends to at least one key.

Like ``jax.nn``'s call to cuDNN, it can be differentiated once, in reverse mode: ``jvp`` and
``hessian`` are refused. They would need cuDNN's backward pass without its forward pass, which no
public function provides; otherwise every training step would run the forward pass twice.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

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
from attention_jax.core.axes import AnyArray, Sizes
from attention_jax.core.softmax import zero_rows
from attention_jax.masks import Band, Dense, Lengths, Mask
from attention_jax.masks.base import conjuncts
from attention_jax.scores import Bias, Score

# The limit on GPUs before Hopper; a spec does not name the GPU.
WIDEST_HEAD = 128
# If the last tile of keys is partial and the lengths are not passed, the backward pass has returned
# NaN for rows of very negative logits. The rows of a tile are this number or a divisor of it.
TILE = 128
# Masks a pair in a bias: its exponential is 0 relative to that of any logit, and unlike -inf it can
# be subtracted from itself. Float16 cannot represent it.
MASKED = -(2.0**41)
# Rows in which every bias is below this are shifted up: a logit loses its digits when such a number
# is added to it, and the lowest ones overflow when they are converted to base 2.
FAR = -(2.0**20)
# What error messages suggest.
INSTEAD = "('pallas_gpu', 'blockwise')"


class CuDNNMask(NamedTuple):
    """A mask in cuDNN's terms."""

    causal: bool
    window: int | None  # how many keys before its own a query attends to; None: all
    query_lengths: tuple[int | AnyArray, ...]  # the least applies
    key_lengths: tuple[int | AnyArray, ...]


class VisibleOfCall(NamedTuple):
    """The visible queries, keys and pairs of all heads; axes may have size 1, None is all."""

    queries: Bool[Array, "B T N"] | None  # whether the query has a visible key
    keys: Bool[Array, "B S K"] | None  # whether the key is visible to some query
    pairs: Bool[Array, "B N T S"] | None  # only if there is a bias


@dataclasses.dataclass(frozen=True)
class CuDNN(Backend):
    """cuDNN's fused kernel, for the calls that it computes exactly."""

    # cuDNN takes the scale as a number.
    STATIC_NUMBERS = True

    def why_unsupported(self, spec: Spec) -> str | None:
        """Why cuDNN, as ``jax.nn`` calls it, does not compute a call exactly; None if it does."""
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
            (z.D != z.H, f"value must be as wide as key, got widths {z.D} (D) and {z.H} (H)"),
            (z.H % 8 != 0, f"the width of a head must be a multiple of 8, got {z.H} (H)"),
            (
                z.H > WIDEST_HEAD,
                f"heads wider than {WIDEST_HEAD} do not run on every GPU, got {z.H} (H)",
            ),
            (spec.sinks, "softmax sinks are not supported by jax.nn's call to cuDNN"),
            (
                spec.dropout,
                "dropout here is a hash of the key and the indices, cuDNN draws other bits",
            ),
            (spec.return_lse, "jax.nn stops the gradient of the lse and rounds it"),
            (scale is None, "scale is an array, but cuDNN needs a number known while tracing"),
            (
                scale is not None and not (scale > 0.0 and math.isfinite(scale)),
                f"scale is {scale}, which must be positive and finite: cuDNN may apply it after "
                "taking row maxima",
            ),
        )
        if reason := symbolic_sizes_refused(z) or positions_refused(spec):
            return reason
        for refused, reason in refusals:
            if refused:
                return reason
        kernel_mask = _kernel_mask(spec.mask, z)
        if isinstance(kernel_mask, str):
            return kernel_mask
        return _why_not_scores(spec.score, dtype, kernel_mask, z)

    def run(self, call: Call, spec: Spec) -> tuple[jax.Array, jax.Array]:
        """Output ``[*B T N D]``, and zeros ``[*B T N]`` in place of the lse.

        Those zeros are never returned: calls that return the lse are refused.
        """
        z = spec.sizes
        kernel_mask = _kernel_mask(call.mask, z)
        if isinstance(kernel_mask, str):
            raise NotImplementedError(f"implementation 'cudnn' cannot: {kernel_mask}")
        B = math.prod(z.B)
        query, key, value = (x.reshape(B, *x.shape[len(z.B) :]) for x in call[:3])
        bias = _flat_bias(call.score[0].array, z) if call.score else None  # type: ignore[attr-defined]
        query_length = _length(kernel_mask.query_lengths, z.T, z)
        key_length = _length(kernel_mask.key_lengths, z.S, z)

        visible = _visible(kernel_mask, bias, query_length, key_length, z)
        query = zero_rows(visible.queries, query)
        key, value = zero_rows(visible.keys, key), zero_rows(visible.keys, value)
        if bias is not None and visible.pairs is not None:
            bias = _bounded(bias, visible.pairs)

        # Padded queries are computed too, from zeros: cuDNN does not specify rows beyond a query
        # length, and the backward pass reads them.
        lengths = None
        if key_length is not None or z.T % TILE or z.S % TILE:
            keys = (
                jnp.full((B,), z.S, jnp.int32) if key_length is None else jnp.maximum(key_length, 1)
            )
            lengths = jnp.full((B,), z.T, jnp.int32), keys
        out = zero_rows(
            visible.queries, _attend(query, key, value, bias, lengths, kernel_mask, spec.scale)
        )
        shape = (*z.B, z.T, z.N)
        return out.reshape(*shape, z.D), jnp.zeros(shape, jnp.float32)

    def extra_bytes(self, spec: Spec) -> int:
        """Copies of operands and output with zeroed padding, and of the bias without ``-inf``."""
        z, kernel_mask = spec.sizes, _kernel_mask(spec.mask, spec.sizes)
        if isinstance(kernel_mask, str):
            return 0
        B, width = math.prod(z.B), jnp.dtype(spec.dtype).itemsize
        padded = bool(kernel_mask.query_lengths or kernel_mask.key_lengths)
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


def _kernel_mask(mask: Mask | None, sizes: Sizes) -> CuDNNMask | str:
    """The mask in cuDNN's terms, or why it has none."""
    bands, spans = [], []
    for part in conjuncts(mask):
        if isinstance(part, Lengths):
            spans.append(part)
        elif isinstance(part, Band):
            if not isinstance(part.offset, int):
                return "mask has an offset per example, but cuDNN's causal mask is aligned top-left"
            if part.offset != 0:
                return f"mask has offset {part.offset}, but cuDNN's causal mask is aligned top-left"
            bands.append(part)
        elif isinstance(part, Dense):
            return "mask is a bool array, which jax.nn would turn into a bias of T x S"
        else:
            return f"mask {type(part).__name__} is not supported by jax.nn's call to cuDNN"
    # A bound beyond all positions is no bound.
    left = min((b.left for b in bands if b.left is not None and b.left < sizes.T - 1), default=None)
    right = min(
        (b.right for b in bands if b.right is not None and b.right < sizes.S - 1), default=None
    )
    kernel_mask = CuDNNMask(
        causal=right == 0,
        window=left,
        query_lengths=tuple(s.query for s in spans if s.query is not None),
        key_lengths=tuple(s.key for s in spans if s.key is not None),
    )
    if right is not None and right > 0:
        return f"mask allows {right} keys after the query, but cuDNN's window ends at the query"
    if left is not None and not kernel_mask.causal:
        return "mask has a left window without causal, whose right bound jax.nn would ignore"
    if kernel_mask.causal and sizes.T != sizes.S:
        return (
            f"mask is causal and T is {sizes.T} but S is {sizes.S}: kernels differ in where "
            f"they then put the diagonal"
        )
    if left is not None and kernel_mask.key_lengths:
        return "mask has a window and key lengths, which can leave queries fully masked"
    return kernel_mask


def _why_not_scores(
    scores: tuple[Score, ...], dtype: Any, kernel_mask: CuDNNMask, sizes: Sizes
) -> str | None:
    for score in scores:
        if not isinstance(score, Bias):
            return f"score {type(score).__name__} is not supported by jax.nn's call to cuDNN"
    if not scores:
        return None
    if len(scores) > 1:
        return f"score has {len(scores)} biases, but cuDNN takes one"
    array = scores[0].array  # type: ignore[attr-defined]
    if dtype != jnp.bfloat16:
        return (
            f"score is a bias in {dtype.name}, which cannot represent the number for masked pairs"
        )
    if array.dtype != dtype:
        return (
            f"score is a bias of {jnp.dtype(array.dtype).name}, but cuDNN needs the dtype of "
            f"query, {dtype.name}"
        )
    if array.shape[-2:] != (sizes.T, sizes.S):
        return (
            f"score is a bias of shape {tuple(array.shape)}, whose last axes must be T and S = "
            f"({sizes.T}, {sizes.S}) in full"
        )
    if sizes.T % 2 or sizes.S % 2:
        return f"score is a bias, whose T and S must be even, got {sizes.T} and {sizes.S}"
    if kernel_mask.window is not None:
        return "score is a bias and mask a window, which not every version of cuDNN supports"
    return None


def _flat_bias(array: AnyArray, sizes: Sizes) -> jax.Array:
    """``[B or 1, N or 1, T, S]``."""
    array = jnp.asarray(array)
    batch, rest = array.shape[:-3], array.shape[-3:]
    if math.prod(batch) > 1:
        array = jnp.broadcast_to(array, (*sizes.B, *rest))
    return array.reshape(-1, *rest)


def _length(lengths: tuple[int | AnyArray, ...], most: int, sizes: Sizes) -> jax.Array | None:
    """The least of the lengths, ``[B]``, from 0 to ``most``; None if there are none."""
    if not lengths:
        return None
    # Clipped before the cast, because int32 cannot hold every int64.
    least, *others = (jnp.clip(jnp.asarray(x), 0, most).astype(jnp.int32) for x in lengths)
    for x in others:
        least = jnp.minimum(least, x)
    return jnp.broadcast_to(least, sizes.B).reshape(-1)


def _visible(
    kernel_mask: CuDNNMask,
    bias: jax.Array | None,
    query_length: jax.Array | None,
    key_length: jax.Array | None,
    sizes: Sizes,
) -> VisibleOfCall:
    """The visible queries, keys and pairs; a causal mask has ``T == S`` and no offset."""
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
        keys = real_keys & (real_queries if kernel_mask.causal else real_queries[:, :1])
        return VisibleOfCall(queries[:, :, None], keys[:, :, None], None)
    pairs = real_queries[:, None, :, None] & real_keys[:, None, None, :] & (bias != -jnp.inf)
    if kernel_mask.causal:
        pairs = pairs & (j[None, :] <= i[:, None])
    keys = pairs.any(axis=2)  # [B N S]
    if keys.shape[1] != 1:  # visible to one of the query heads that share it
        keys = keys.reshape(-1, sizes.K, sizes.G, sizes.S).any(axis=2)
    return VisibleOfCall(jnp.swapaxes(pairs.any(axis=3), 1, 2), jnp.swapaxes(keys, 1, 2), pairs)


def _bounded(bias: jax.Array, pairs: Bool[Array, "B N T S"]) -> jax.Array:
    """The bias without ``-inf``, shifted per row, which does not change the result."""
    has_key = pairs.any(axis=-1, keepdims=True)
    top = jnp.where(pairs, bias, -jnp.inf).max(axis=-1, keepdims=True)
    zero, masked = jnp.zeros((), bias.dtype), jnp.asarray(MASKED, bias.dtype)
    shift = jax.lax.stop_gradient(jnp.where(has_key & (top < FAR), top, zero))
    # Fully masked rows are 0: with MASKED throughout, their sums would have no precision.
    return jnp.where(pairs, jnp.maximum(bias - shift, masked), jnp.where(has_key, masked, zero))


# --- The call. Its vmap rule needs all arrays mapped along axis 0, including the cotangent.


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    lengths: tuple[jax.Array, jax.Array] | None,
    kernel_mask: CuDNNMask,
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
        # A window always comes with causal: otherwise jax.nn ignores that it ends at the query.
        is_causal=kernel_mask.causal,
        # jax.nn does not count the query's own key, and adds it for cuDNN.
        local_window_size=None if kernel_mask.window is None else (kernel_mask.window, 0),
        query_seq_lengths=None if lengths is None else lengths[0],
        key_value_seq_lengths=None if lengths is None else lengths[1],
        implementation="cudnn",
    )
    return _cotangent_mapped(out)


@jax.custom_batching.custom_vmap
def _align(arrays: Any) -> Any:
    """The arrays unchanged; under ``vmap``, if one of them is mapped, all of them are."""
    return arrays


@_align.def_vmap
def _align_mapped(size: int, mapped: Any, arrays: Any) -> Any:
    query, bias = arrays[0], arrays[3] if len(arrays) > 3 else None
    if bias is not None and bias.shape[-4:-2] != (query.shape[-4], query.shape[-2]):
        # Each mapped example has its own gradient of the bias, which cuDNN sums over these axes.
        raise NotImplementedError(
            "implementation 'cudnn' cannot: under vmap the bias of score must have the axes *B and "
            "N in full. Ask for implementation='xla'"
        )
    mapped_arrays = jax.tree.map(
        lambda x, is_mapped: x if is_mapped else jnp.broadcast_to(x, (size, *x.shape)),
        arrays,
        mapped[0],
    )
    # Again, for an enclosing vmap.
    return _align(mapped_arrays), jax.tree.map(lambda x: True, arrays)


@jax.custom_vjp
def _mapped_together(arrays: Any) -> Any:
    return _align(arrays)


# The lengths are integers: their cotangents arrive as float0 and are returned as None.
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
