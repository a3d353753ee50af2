"""Causal mechanisms with a matrix state, computed one chunk of the sequence at a time::

    out_t, state_t = step(state_{t-1}, q_t, k_t, v_t)

The state ``[M D]`` summarizes all previous keys and values, so that time and memory are linear in
the length and decoding a token costs the same at any position. A mechanism writes its step for a
chunk of ``C`` tokens, whose ``C x C`` pairs are computed at once as matrix products; ``lax.scan``
carries the state from chunk to chunk, and ``heads.lift`` maps over heads and examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.backends.arguments import MaskLike, Scale, check_flag, check_types
from attention_jax.backends.heads import lift
from attention_jax.core.axes import (
    AnyArray,
    Key,
    Query,
    Sizes,
    Value,
    accumulation_dtype,
    check_float_array,
    check_query_key_value,
    kind,
    with_sizes,
)
from attention_jax.core.closures import varying_together
from attention_jax.masks import Mask, causal
from attention_jax.mechanisms.causal_padding import (
    CausalPadding,
    as_causal_padding,
    zero_padding,
)
from attention_jax.mechanisms.packing import PackedState, document_starts

CAUSAL = causal()

State = Float[Array, "*B K M D"]
Step = Callable[..., tuple[jax.Array, jax.Array]]
"""From the state and the chunks ``[C .]`` of one head to the output ``[C D]`` and the new state."""


def scan_chunks(
    step: Step, state: Float[Array, "M D"], arrays: Sequence[Float[Array, "T _"]], size: int
) -> tuple[Float[Array, "T _"], Float[Array, "M D"]]:
    """``out, state = step(state, *chunks)`` over chunks of ``size`` tokens, for one head.

    The last chunk is padded with zeros. The backward pass recomputes each chunk from its state.
    """
    state, *arrays = varying_together((state, *arrays))
    T = arrays[0].shape[0]
    size = max(min(size, T), 1)
    count = -(-T // size)
    chunks = [
        jnp.pad(x, ((0, count * size - T), (0, 0))).reshape(count, size, x.shape[1]) for x in arrays
    ]

    def body(state: jax.Array, chunks: Any) -> tuple[jax.Array, jax.Array]:
        out, state = step(state, *chunks)
        return state, out

    state, out = jax.lax.scan(jax.checkpoint(body), state, chunks)
    return out.reshape(count * size, out.shape[-1])[:T], state


def run_causal(
    step: Step,
    packed_step: Step,
    query: AnyArray,
    arrays: Sequence[AnyArray],
    *,
    chunk: int,
    state_shape: tuple[int, int],
    sizes: Sizes,
    padding: CausalPadding,
    segments: Any,
    state: State | PackedState | None,
    return_state: bool,
    dtype: Any,
) -> Any:
    """Scans a step over the chunks of every head of every example.

    Args:
      step: ``step(state, q, *arrays)`` for one chunk of one head.
      packed_step: ``packed_step(state, q, starts, *arrays)``, used with ``segments``; ``starts``
        ``[C 1]`` is 1 where a document begins and 0 elsewhere.
      query: ``[*B T N .]``.
      arrays: ``[*B S K .]`` each. Padding is zeroed, here and in the query.
      chunk: tokens per chunk.
      state_shape: ``(M, D)``.
      sizes, padding: as ``check_causal`` returns them.
      segments, state, return_state: of the public function, see ``gated_linear_attention``.
      dtype: of the output. Sums and the state are in float32 or wider.

    Returns:
      ``[*B T N D]``, 0 for padding; with ``return_state`` also the state.
    """
    check_flag("return_state", return_state)
    packing = document_starts(segments, state, padding, sizes)
    padding = packing.padding
    if packing.starts is not None:
        step, arrays = packed_step, (packing.starts, *arrays)
    wide = accumulation_dtype(dtype)
    shape = (*sizes.B, sizes.K, *state_shape)
    start = jnp.zeros(shape, wide) if packing.state is None else packing.state
    if start.shape != shape:
        M, D = state_shape
        raise ValueError(
            f"state must have shape "
            f"{with_sizes('[*B K M D]', {'*B': sizes.B, 'K': sizes.K, 'M': M, 'D': D})}, got "
            f"{start.shape}"
        )
    out, end = lift(
        lambda state, *arrays: scan_chunks(step, state, arrays, chunk),
        [
            jnp.asarray(start, wide),
            zero_padding(jnp.asarray(query, wide), padding.queries),
            *(zero_padding(jnp.asarray(x, wide), padding.keys) for x in arrays),
        ],
        sizes,
        ["*B K M D", "*B T N H", *["*B S K H"] * len(arrays)],
        ["*B T N D", "*B K M D"],
    )
    out = zero_padding(out, padding.queries).astype(dtype)
    return (out, packing.with_segment(end)) if return_state else out


def check_causal(
    query: Query, key: Key, value: Value, mask: MaskLike, scale: Scale, who: str
) -> tuple[Sizes, CausalPadding]:
    """Checks the arguments of a causal mechanism; returns its sizes and the padding.

    Raises:
      TypeError, ValueError, NotImplementedError: an argument is wrong; the message names it.
    """
    check_types({"query": query, "key": key, "value": value, "scale": scale})
    sizes = check_query_key_value(query, key, value)
    padding = as_causal_padding(mask, sizes, who)
    if not padding.causal:
        got = mask if mask is None or isinstance(mask, Mask) else kind(mask)
        raise ValueError(f"{who} is causal: mask must include masks.causal(), got {got!r}")
    return sizes, padding


def check_gate(name: str, x: Any, sizes: Sizes, layout: str) -> None:
    """Raises unless ``x`` is ``[*B S K]``; for the layout ``[*B S K H]`` with H or 1 for H."""
    check_float_array(name, x)
    shape = (*sizes.B, sizes.S, sizes.K)
    vector = layout == "[*B S K H]"
    allowed = [(*shape, width) for width in (sizes.H, 1)] if vector else [shape]
    if tuple(x.shape) not in allowed:
        expected = with_sizes(layout, sizes.of_letters()) + (" or H = 1" if vector else "")
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def scaled(query: Query, scale: Scale) -> jax.Array:
    """``scale * query`` in float32 or wider; the default scale is ``1 / sqrt(H)``."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return jnp.asarray(query, accumulation_dtype(query.dtype)) * scale
