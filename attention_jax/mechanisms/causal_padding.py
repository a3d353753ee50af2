"""Masks of mechanisms without a matrix of logits, which support only causality and padding."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from attention_jax.backends.arguments import MaskLike, as_mask
from attention_jax.core.axes import Sizes
from attention_jax.core.pytree import full_rank
from attention_jax.masks import Band, Lengths, Padding
from attention_jax.masks.base import conjuncts


class CausalPadding(NamedTuple):
    """A mask made of causality and padding only."""

    causal: bool
    queries: Bool[Array, "*B T"] | None
    """False for padding; ``*B`` may have axes of size 1. None: no padding."""
    keys: Bool[Array, "*B S"] | None
    """The same for the keys."""


def as_causal_padding(mask: MaskLike, sizes: Sizes, who: str) -> CausalPadding:
    """Splits a mask into causality and the padding of queries and keys.

    Args:
      mask: None, ``masks.causal()``, ``masks.lengths``, ``masks.padding``, joined by ``&``.
      sizes: of the call.
      who: name of the calling function, for error messages.

    Raises:
      NotImplementedError: the mask has any other part.
    """
    causal = False
    queries: list[Any] = []
    keys: list[Any] = []
    for given in conjuncts(as_mask(mask)):
        part = full_rank(given.resolve(sizes.T, sizes.S, sizes.N), sizes, "mask")
        if isinstance(part, Band) and (part.left, part.right) == (None, 0):
            if not (isinstance(part.offset, int) and part.offset == 0 and sizes.T == sizes.S):
                raise NotImplementedError(
                    f"{who} supports masks.causal() only without an offset and with as many "
                    f"queries (T) as keys (S), got {given!r} with T = {sizes.T} and S = {sizes.S}: "
                    f"use attention"
                )
            causal = True
        elif isinstance(part, Lengths):
            for real, length, size in (
                (queries, part.query, sizes.T),
                (keys, part.key, sizes.S),
            ):
                if length is not None:
                    at = jnp.arange(size, dtype=jnp.int32).reshape(*[1 for _ in sizes.B], size)
                    real.append(at < (length if isinstance(length, int) else length[..., None]))
        elif isinstance(part, Padding):
            queries.append(part.query_ids >= 0)
            keys.append(part.key_ids >= 0)
        else:
            raise NotImplementedError(
                f"{who} supports masks.causal(), masks.lengths and masks.padding, joined by &, "
                f"got {given!r}: use attention"
            )
    return CausalPadding(causal, _all(queries), _all(keys))


def _all(flags: list[Any]) -> Any:
    return functools.reduce(operator.and_, flags) if flags else None


def zero_padding(x: jax.Array, real: Bool[Array, "*B T"] | None) -> jax.Array:
    """``[*B T N H]`` with padding zeroed, even if it holds NaN."""
    return x if real is None else keep_rows(real[..., None, None], x)


def keep_rows(rows: jax.Array, x: jax.Array) -> jax.Array:
    """``x`` where ``rows``, which broadcasts to it, is True or not 0; 0 elsewhere."""
    return jnp.where(rows, x, jnp.zeros_like(x))
