"""A transformer layer: sublayers, each with a residual connection and its norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Float

from attention_jax.cache import KVCache
from attention_jax.core.axes import AnyArray
from attention_jax.core.dropout import check_rate
from attention_jax.nn.attention import MultiHeadAttention

ORDERS = ("pre", "post", "both")


class Residual(nnx.Module):
    """A residual connection around a sublayer ``f``, with one of three positions of the norm::

        pre    x + f(norm(x))
        post   norm(x + f(x))
        both   x + norm_after(f(norm(x)))

    Further results of the sublayer are passed through.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import Residual
    >>> norm = lambda: nnx.LayerNorm(8, rngs=nnx.Rngs(0))
    >>> Residual(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), norm)(np.ones((5, 8), np.float32)).shape
    (5, 8)

    Source: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture"; Gemma Team
    2024, "Gemma 2" (both).
    """

    def __init__(
        self,
        sublayer: Callable[..., Any],
        norm: Callable[[], nnx.Module],
        *,
        order: str = "pre",
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Takes the sublayer and creates its norms.

        Args:
          sublayer: a module, or any function of ``x``.
          norm: constructor of a norm.
          order: ``"pre"``, ``"post"`` or ``"both"``, see above.
          dropout_rate: of the output of the sublayer.
          rngs: for dropout.

        Raises:
          ValueError: an unknown order.
        """
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
        check_rate(dropout_rate)
        self.sublayer, self.order = sublayer, order
        self.norm = norm()
        self.norm_after = nnx.data(norm() if order == "both" else None)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)

    def __call__(self, x: Any, *args: Any, **options: Any) -> Any:
        """``x`` plus the output of the sublayer, which ``args`` and ``options`` are passed to."""
        result = self.sublayer(x if self.order == "post" else self.norm(x), *args, **options)
        y, *more = result if isinstance(result, tuple) else (result,)
        if self.norm_after is not None:
            y = self.norm_after(y)
        x = x + self.dropout(y)
        if self.order == "post":
            x = self.norm(x)
        return (x, *more) if more else x


class Block(nnx.Module):
    """Self-attention, cross-attention if there is a context, then a feed-forward layer.

    >>> import functools, numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import Block, FeedForward, MultiHeadAttention
    >>> rngs = nnx.Rngs(0)
    >>> block = Block(
    ...     MultiHeadAttention(8, num_heads=2, rngs=rngs),
    ...     FeedForward(8, 32, rngs=rngs),
    ...     norm=functools.partial(nnx.LayerNorm, 8, rngs=rngs),
    ... )
    >>> block(np.ones((1, 5, 8), np.float32)).shape
    (1, 5, 8)
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        feed_forward: Callable[[Any], Any],
        *,
        norm: Callable[[], nnx.Module],
        cross_attention: MultiHeadAttention | None = None,
        order: str = "pre",
        dropout_rate: float = 0.0,
        attention_dropout_rate: float | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Wraps each sublayer into a ``Residual``.

        Args:
          attention: self-attention.
          feed_forward: applied to each token.
          norm: constructor of a norm.
          cross_attention: attention to a context, between the two.
          order: ``"pre"``, ``"post"`` or ``"both"``; see ``Residual``.
          dropout_rate: of the output of each sublayer.
          attention_dropout_rate: of the output of the self-attention; default ``dropout_rate``.
          rngs: for dropout.
        """

        def residual(sublayer: Any, rate: float = dropout_rate) -> Residual:
            return Residual(sublayer, norm, order=order, dropout_rate=rate, rngs=rngs)

        rate = dropout_rate if attention_dropout_rate is None else attention_dropout_rate
        self.attention = residual(attention, rate)
        self.cross_attention = nnx.data(
            None if cross_attention is None else residual(cross_attention)
        )
        self.feed_forward = residual(feed_forward)

    def __call__(
        self,
        x: Float[AnyArray, "*B T E"],
        context: Any = None,
        *,
        mask: Any = None,
        context_mask: Any = None,
        score: Any = (),
        positions: Any = None,
        cache: KVCache | None = None,
        count: Any = None,
    ) -> Any:
        """Tokens ``[*B T E]`` to tokens of the same shape.

        Args:
          x: the tokens.
          context: for the cross-attention: ``[*B S C]``, or its ``keys_values``.
          mask, score, positions, cache, count: of the self-attention.
          context_mask: of the cross-attention.

        Returns:
          The tokens; with a cache also the new one.

        Raises:
          ValueError: a context without a cross-attention, or the other way round.
        """
        if (context is None) != (self.cross_attention is None):
            has, got = ("no", "a") if context is not None else ("a", "no")
            raise ValueError(
                f"context must be given if and only if there is a cross-attention: the block has "
                f"{has} cross-attention, got {got} context"
            )
        result = self.attention(
            x, mask=mask, score=score, positions=positions, cache=cache, count=count
        )
        x, new_cache = result if cache is not None else (result, None)
        if self.cross_attention is not None:
            x = self.cross_attention(x, context, mask=context_mask)
        x = self.feed_forward(x)
        return x if cache is None else (x, new_cache)
