"""A transformer layer: sublayers, each with a residual connection and its norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.cache import Cache
from attention_jax.core.axes import AnyArray, check_finite
from attention_jax.core.dropout import check_rate
from attention_jax.nn.attention import MultiHeadAttention

ORDERS = ("pre", "post", "both", "after")


class Residual(nnx.Module):
    """A residual connection around a sublayer ``f``, with one of four positions of the norm::

        pre    x + scale * f(norm(x))
        post   norm(x + scale * f(x))
        both   x + scale * norm_after(f(norm(x)))
        after  x + scale * norm_after(f(x))

    Further results of the sublayer are passed through.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import Residual
    >>> norm = lambda: nnx.LayerNorm(8, rngs=nnx.Rngs(0))
    >>> Residual(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), norm)(np.ones((5, 8), np.float32)).shape
    (5, 8)

    Source: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture"; Gemma Team
    2024, "Gemma 2" (both); OLMo Team 2024, "2 OLMo 2 Furious" (after).
    """

    def __init__(
        self,
        sublayer: Callable[..., Any],
        norm: Callable[[], nnx.Module] | None,
        *,
        order: str = "pre",
        scale: float = 1.0,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Takes the sublayer and creates its norms.

        Args:
          sublayer: a module, or any function of ``x``.
          norm: constructor of a norm; None for none.
          order: ``"pre"``, ``"post"``, ``"both"`` or ``"after"``, see above.
          scale: of the output of the sublayer.
          dropout_rate: of the output of the sublayer.
          rngs: for dropout.

        Raises:
          ValueError: an unknown order; no norm with an order other than ``"pre"``.
        """
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
        if norm is None and order != "pre":
            raise ValueError(f"order must be 'pre' without a norm, got {order!r}")
        check_rate(dropout_rate)
        check_finite("scale", scale)
        self.sublayer, self.order, self.scale = sublayer, order, scale
        before, after = order != "after", order in ("both", "after")
        self.norm = nnx.data(norm() if norm is not None and before else None)
        self.norm_after = nnx.data(norm() if norm is not None and after else None)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)

    def __call__(self, x: Any, *args: Any, **options: Any) -> Any:
        """``x`` plus the output of the sublayer, which ``args`` and ``options`` are passed to."""
        y, *more = self.branch(x, *args, **options)
        x = x + y
        if self.order == "post":
            x = self.norm(x)  # type: ignore[misc]
        return (x, *more) if more else x

    def branch(self, x: Any, *args: Any, **options: Any) -> tuple[Any, ...]:
        """The term that a call adds to ``x``, and further results of the sublayer."""
        before = self.norm if self.order in ("pre", "both") else None
        result = self.sublayer(x if before is None else before(x), *args, **options)
        y, *more = result if isinstance(result, tuple) else (result,)
        if self.norm_after is not None:
            y = self.norm_after(y)
        y = self.dropout(y)
        if self.scale != 1.0:
            y = y * jnp.asarray(self.scale, y.dtype)
        return y, *more


class Block(nnx.Module):
    """Self-attention, cross-attention if there is a context, then a feed-forward layer.

    With ``parallel``, attention and feed-forward layer read the same input::

        x + attention(norm(x)) + feed_forward(norm(x))

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

    Source: Wang and Komatsuzaki 2021, "GPT-J-6B" (parallel).
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        feed_forward: Callable[[Any], Any],
        *,
        norm: Callable[[], nnx.Module],
        cross_attention: MultiHeadAttention | None = None,
        order: str = "pre",
        scale: float = 1.0,
        parallel: bool = False,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float | None = None,
        attention_norm: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Wraps each sublayer in a ``Residual``.

        Args:
          attention: self-attention.
          feed_forward: applied to each token.
          norm: constructor of a norm.
          cross_attention: attention to a context, between the two.
          order: ``"pre"``, ``"post"``, ``"both"`` or ``"after"``; see ``Residual``.
          scale: of the output of each sublayer.
          parallel: see above; each sublayer has a norm of its own.
          dropout_rate: of the output of each sublayer.
          attention_dropout_rate: of the output of the self-attention; default ``dropout_rate``.
          attention_norm: whether the self-attention has a norm.
          rngs: for dropout.

        Raises:
          ValueError: ``parallel`` with a cross-attention or ``order="post"``.
        """
        if parallel and (cross_attention is not None or order == "post"):
            raise ValueError("parallel must be False with a cross-attention or order='post'")
        self.parallel = parallel

        def residual(sublayer: Any, rate: float = dropout_rate, normed: bool = True) -> Residual:
            options: dict[str, Any] = {"order": order, "scale": scale, "rngs": rngs}
            return Residual(sublayer, norm if normed else None, dropout_rate=rate, **options)

        rate = dropout_rate if attention_dropout_rate is None else attention_dropout_rate
        self.attention = residual(attention, rate, attention_norm)
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
        cache: Cache | None = None,
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
        options = {
            "mask": mask,
            "score": score,
            "positions": positions,
            "cache": cache,
            "count": count,
        }
        if self.parallel:
            attended, *more = self.attention.branch(x, **options)
            x = x + attended + self.feed_forward.branch(x)[0]
            return x if cache is None else (x, *more)
        result = self.attention(x, **options)
        x, new_cache = result if cache is not None else (result, None)
        if self.cross_attention is not None:
            x = self.cross_attention(x, context, mask=context_mask)
        x = self.feed_forward(x)
        return x if cache is None else (x, new_cache)
