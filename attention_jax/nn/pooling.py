"""Pooling: from the vectors of all tokens to one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attention_jax.core.axes import (
    AnyArray,
    accumulation_dtype,
    check_real,
    check_tokens,
    int_at_least,
)
from attention_jax.core.shards import gathered
from attention_jax.nn.attention import MultiHeadAttention
from attention_jax.nn.embeddings import EMBED_INIT
from attention_jax.nn.logical import logical
from attention_jax.nn.rngs import check_rngs


def mean(
    x: Float[AnyArray, "*B T E"], real: Bool[AnyArray, "*B T"] | None = None
) -> Float[Array, "*B E"]:
    """The mean of the real tokens; 0 if there are none.

    Args:
      x: tokens ``[*B T E]``; padding is ignored, even NaN.
      real: bool ``[*B T]``, False for padding; default: all are real.

    >>> import numpy as np
    >>> from attention_jax.nn.pooling import mean
    >>> mean(np.array([[1.0], [3.0], [np.nan]], np.float32), np.array([True, True, False])).tolist()
    [2.0]
    """
    x = jnp.asarray(x)
    check_tokens("x", x, "[*B T E]", x.shape[-1] if x.ndim else 0)
    wide = x.astype(accumulation_dtype(x.dtype))
    if real is None:
        total, count = wide.sum(axis=-2), x.shape[-2]
        return (total / max(count, 1)).astype(x.dtype)
    check_real(real, x.shape[:-1])
    total = jnp.where(real[..., None], wide, 0).sum(axis=-2)
    number = jnp.maximum(jnp.sum(real, axis=-1, dtype=total.dtype), 1)
    return (total / number[..., None]).astype(x.dtype)


def first(
    x: Float[AnyArray, "*B T E"], real: Bool[AnyArray, "*B T"] | None = None
) -> Float[Array, "*B E"]:
    """The first real token.

    Args:
      x: tokens ``[*B T E]``.
      real: bool ``[*B T]``, False for padding; default: all are real.

    >>> import numpy as np
    >>> from attention_jax.nn.pooling import first
    >>> first(np.array([[np.nan], [1.0]], np.float32), np.array([False, True])).tolist()
    [1.0]
    """
    x = jnp.asarray(x)
    if real is None:
        return x[..., 0, :]
    check_real(real, x.shape[:-1])
    at = jnp.argmax(jnp.asarray(real), axis=-1)
    return jnp.take_along_axis(x, at[..., None, None], axis=-2)[..., 0, :]


class ClassToken(nnx.Module):
    """A learned token prepended to the others, whose final vector represents the sequence.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import ClassToken
    >>> ClassToken(8, rngs=nnx.Rngs(0))(np.ones((2, 5, 8), np.float32)).shape
    (2, 6, 8)

    Source: Devlin et al. 2019, "BERT"; Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words".
    """

    def __init__(
        self,
        features: int,
        *,
        param_dtype: Any = jnp.float32,
        init: nnx.Initializer = EMBED_INIT,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the token.

        Args:
          features: width of the tokens (E).
          param_dtype, init: of the token.
          rngs: for the token.
        """
        check_rngs(rngs)
        self.token = nnx.Param(
            init(rngs.params(), (1, features), param_dtype), **logical(None, "embed")
        )

    def __call__(self, x: Float[AnyArray, "*B T E"]) -> Float[Array, "*B T1 E"]:
        """``[*B T E]`` to ``[*B 1+T E]``."""
        check_tokens("x", x, "[*B T E]", self.token[...].shape[-1])
        token = gathered(self.token[...], 1).astype(x.dtype)
        return jnp.concatenate(
            [jnp.broadcast_to(token, (*x.shape[:-2], 1, x.shape[-1])), x], axis=-2
        )


class AttentionPooling(nnx.Module):
    """Attention pooling: learned queries attend to the tokens.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import AttentionPooling
    >>> pool = AttentionPooling(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> pool(np.ones((2, 5, 8), np.float32)).shape
    (2, 8)

    Source: Lee et al. 2019, "Set Transformer", section 3.2.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        queries: int = 1,
        param_dtype: Any = jnp.float32,
        init: nnx.Initializer = EMBED_INIT,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        """Creates the queries and their attention.

        Args:
          features: width of the tokens (E).
          num_heads: heads (N).
          queries: number of pooled vectors.
          param_dtype, init: of the queries.
          rngs: for parameters.
          **options: of ``MultiHeadAttention``.
        """
        check_rngs(rngs)
        int_at_least("queries", queries, 1)
        learned = init(rngs.params(), (queries, features), param_dtype)
        self.queries = nnx.Param(learned, **logical(None, "embed"))
        self.attention = MultiHeadAttention(
            features,
            num_heads,
            context_features=features,
            param_dtype=param_dtype,
            rngs=rngs,
            **options,
        )

    def __call__(
        self, x: Float[AnyArray, "*B T E"], real: Bool[AnyArray, "*B T"] | None = None
    ) -> jax.Array:
        """``[*B T E]`` to ``[*B E]``; with several queries, to ``[*B queries E]``.

        Args:
          x: tokens ``[*B T E]``.
          real: bool ``[*B T]``, False for padding; default: all are real.
        """
        check_tokens("x", x, "[*B T E]", self.attention.features)
        if real is not None:
            check_real(real, x.shape[:-1])
        queries = gathered(self.queries[...], 1).astype(x.dtype)
        mask = None if real is None else real[..., None, None, :]
        batch = x.shape[:-2]
        queries = jnp.broadcast_to(queries, (*batch, *queries.shape))
        pooled = self.attention(queries, x, mask=mask)
        return pooled[..., 0, :] if queries.shape[-2] == 1 else pooled
