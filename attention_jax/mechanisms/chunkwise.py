"""Mechanisms that carry a matrix from token to token, a piece of the sequence at a time.

The matrix ``S [M D]`` is all that they remember of the keys and values before, so that time and
memory grow with the length and not with its square, and a token can be added at the same cost
wherever it stands. Within a piece of ``C`` tokens all pairs are computed at once, as products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.backends.call import check_flag, check_types
from attention_jax.backends.heads import lift
from attention_jax.core.axes import (
    Sizes,
    accumulation_dtype,
    check_float_array,
    check_query_key_value,
)
from attention_jax.core.closures import varying_together
from attention_jax.mechanisms.causal_padding import Seen, only_seen, seen

Step = Callable[..., tuple[jax.Array, jax.Array]]


def over_pieces(
    step: Step, state: jax.Array, arrays: Sequence[jax.Array], size: int
) -> tuple[jax.Array, jax.Array]:
    """``step(state, *pieces)`` on ``size`` tokens after the other: the output, and the last state.

    Zeros fill the last piece. What is between two states is computed again in the backward pass.
    """
    state, *arrays = varying_together((state, *arrays))
    T = arrays[0].shape[0]
    size = max(min(size, T), 1)
    count = -(-T // size)
    pieces = [
        jnp.pad(x, ((0, count * size - T), (0, 0))).reshape(count, size, x.shape[1]) for x in arrays
    ]

    def one(state: jax.Array, pieces: Any) -> tuple[jax.Array, jax.Array]:
        out, state = step(state, *pieces)
        return state, out

    state, out = jax.lax.scan(jax.checkpoint(one), state, pieces)
    return out.reshape(count * size, out.shape[-1])[:T], state


def checked(
    query: Any, key: Any, value: Any, mask: Any, scale: Any, who: str
) -> tuple[Sizes, Seen]:
    """Sizes and mask of a call that reads from left to right.

    Raises:
      TypeError, ValueError, NotImplementedError: an argument is wrong; the message names it.
    """
    check_types({"query": query, "key": key, "value": value, "scale": scale})
    sizes = check_query_key_value(query, key, value)
    found = seen(mask, sizes, who)
    if not found.causal:
        raise ValueError(
            f"{who} reads from left to right: mask must have masks.causal() in it, got {mask!r}"
        )
    return sizes, found


def check_gate(name: str, x: Any, sizes: Sizes, widths: Sequence[int]) -> None:
    """Raises unless ``x`` is ``[*B S K .]`` of one of these widths."""
    check_float_array(name, x)
    start = (*sizes.B, sizes.S, sizes.K)
    if tuple(x.shape[:-1]) != start or x.shape[-1] not in widths:
        expected = " or ".join(str((*start, width)) for width in widths)
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def left_to_right(
    step: Step,
    size: int,
    sizes: Sizes,
    found: Seen,
    query: Any,
    arrays: Sequence[Any],
    width: tuple[int, int],
    state: Any,
    return_state: bool,
    dtype: Any,
) -> Any:
    """Lifts a step over pieces to all heads and examples.

    Args:
      step: from the state, pieces of the query and of the arrays to output and state.
      size: of a piece.
      sizes, found: of the call.
      query: ``[*B T N .]``.
      arrays: ``[*B S K .]``; what is not seen, and of the query too, is made 0.
      width: of the state.
      state: that after the tokens before, or None: 0.
      return_state: whether to return that after these.
      dtype: of the output; sums and the state are in float32 or wider.
    """
    check_flag("return_state", return_state)
    wide = accumulation_dtype(dtype)
    shape = (*sizes.B, sizes.K, *width)
    if state is None:
        state = jnp.zeros(shape, wide)
    elif state.shape != shape:
        raise ValueError(f"state must have shape [*B K M D] = {shape}, got {state.shape}")
    out, state = lift(
        lambda state, *pieces: over_pieces(step, state, pieces, size),
        [
            jnp.asarray(state, wide),
            only_seen(jnp.asarray(query, wide), found.queries),
            *(only_seen(jnp.asarray(x, wide), found.keys) for x in arrays),
        ],
        sizes,
        ["*B K M D", "*B T N H", *["*B S K H"] * len(arrays)],
        ["*B T N D", "*B K M D"],
    )
    out = out.astype(dtype)
    return (out, state) if return_state else out
