"""What mechanisms that have no matrix of logits can be told of who sees whom."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.backends.call import as_mask
from attention_jax.core.axes import Sizes
from attention_jax.core.pytree import full_rank
from attention_jax.masks import Band, Lengths, Padding
from attention_jax.masks.base import conjuncts


class Seen(NamedTuple):
    """Causality, and which queries and keys are real."""

    causal: bool
    queries: Any
    """bool ``[*B T]``, also with axes of size 1; None where all are."""
    keys: Any
    """The same of the keys, ``[*B S]``."""


def seen(mask: Any, sizes: Sizes, who: str) -> Seen:
    """What a mask says, where that is causality and padding.

    Args:
      mask: None, ``masks.causal()``, ``masks.lengths``, ``masks.padding``, joined by ``&``.
      sizes: of the call.
      who: the function, for errors.

    Raises:
      NotImplementedError: the mask says something else.
    """
    causal = False
    queries: list[Any] = []
    keys: list[Any] = []
    for part in conjuncts(as_mask(mask)):
        part = full_rank(part.resolve(sizes.T, sizes.S, sizes.N), sizes, "mask")
        if isinstance(part, Band) and (part.left, part.right) == (None, 0):
            if not (isinstance(part.offset, int) and part.offset == 0 and sizes.T == sizes.S):
                raise NotImplementedError(
                    f"{who} can be causal where query i sees keys up to i of as many, got mask "
                    f"with offset {part.offset}, T = {sizes.T}, S = {sizes.S}: take attention"
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
                f"{who} can hide what comes later and padding, got mask {type(part).__name__}: "
                f"take masks.causal(), masks.lengths and masks.padding, joined by &, or attention"
            )
    return Seen(causal, _all(queries), _all(keys))


def _all(flags: list[Any]) -> Any:
    found = None
    for x in flags:
        found = x if found is None else found & x
    return found


def only_seen(x: jax.Array, real: Any) -> jax.Array:
    """``[*B T N H]`` with zeros for the tokens that are not real: what they hold is not read."""
    return x if real is None else jnp.where(real[..., None, None], x, jnp.zeros_like(x))
