"""The context of cross-attention: its projected keys and values, and checks of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from attention_jax.core.axes import AnyArray, brief_fields, check_tokens
from attention_jax.masks import Mask


class KeysValues(NamedTuple):
    """Keys and values of a context, projected once for many calls.

    Attributes:
      key: ``[*B S K H]``.
      value: ``[*B S K D]``.
    """

    key: Float[AnyArray, "*B S K H"]
    value: Float[AnyArray, "*B S K D"]

    def __repr__(self) -> str:
        return brief_fields(self, self._fields)


def check_context(context: Any, width: int, *, rotary: bool, fused: bool) -> None:
    """Raises unless a module can attend to a context.

    Args:
      context: tokens ``[*B S C]``, or ``KeysValues``.
      width: of the tokens (C).
      rotary: whether the module rotates queries and keys.
      fused: whether it projects query, key and value in one product.
    """
    if isinstance(context, Mask) or getattr(context, "dtype", None) == jnp.bool_:
        raise TypeError("context must be tokens to attend to, got a mask: pass it as mask=")
    if rotary:
        raise ValueError(
            "context must be None with rotary: positions of two sequences are not comparable"
        )
    if fused:
        raise ValueError(
            "context must be None if query, key and value are fused: create the module with "
            "context_features"
        )
    if not isinstance(context, KeysValues):
        check_tokens("context", context, "[*B S C]", width)


def check_batch(context: AnyArray | KeysValues, x: AnyArray) -> None:
    """Raises unless a context, if it is not projected yet, has the batch axes of ``x``."""
    own = x.shape[:-2]
    batch = own if isinstance(context, KeysValues) else context.shape[:-2]
    if batch != own:
        raise ValueError(f"context has batch axes {batch} (*B) but x has {own}: they must be equal")
