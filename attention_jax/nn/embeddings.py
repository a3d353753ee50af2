"""Embeddings of tokens, positions and types; the tied output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.core.axes import (
    AnyArray,
    check_broadcasts,
    check_finite,
    check_positions,
    check_tokens,
    int_at_least,
    same_rank,
)
from attention_jax.core.dropout import check_rate
from attention_jax.core.shards import gathered
from attention_jax.nn.linear import Product
from attention_jax.nn.logical import logical
from attention_jax.nn.padding import as_real, filled, places
from attention_jax.nn.rngs import check_rngs
from attention_jax.positions import learned, sinusoidal
from attention_jax.positions.vectors import rows

EMBED_INIT = nnx.initializers.normal(0.02)
POSITIONS = (None, "learned", "sinusoidal")


class Embeddings(nnx.Module):
    """``scale * table[token] + positions[position] + types[type]``, then the norm, then dropout.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import Embeddings
    >>> embed = Embeddings(10, 8, positions="learned", max_length=5, rngs=nnx.Rngs(0))
    >>> embed(np.array([[3, 1, 4]])).shape
    (1, 3, 8)
    >>> embed.logits(np.ones((1, 3, 8), np.float32)).shape
    (1, 3, 10)
    """

    def __init__(
        self,
        vocabulary: int,
        features: int,
        *,
        positions: str | None = None,
        max_length: int | None = None,
        first_position: int = 0,
        types: int = 0,
        scale: float = 1.0,
        norm: Callable[[], nnx.Module] | None = None,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        embedding_init: nnx.Initializer = EMBED_INIT,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the tables.

        Args:
          vocabulary: number of tokens (V).
          features: width of the model (E).
          positions: ``"learned"``, ``"sinusoidal"`` or None.
          max_length: number of learned positions.
          first_position: row of the table for position 0. The rows before it are not used:
            RoBERTa's table has two of them.
          types: number of token types (segments of BERT), 0 for none.
          scale: of the token vectors.
          norm: constructor of a norm, applied to the sum.
          dropout_rate: of the result.
          dtype, param_dtype: of the result and of the tables.
          embedding_init: initializer of the tables.
          rngs: for parameters and dropout.

        Raises:
          ValueError: unknown ``positions``, or learned ones without ``max_length``.
        """
        for name, x in {"vocabulary": vocabulary, "features": features}.items():
            int_at_least(name, x, 1)
        int_at_least("types", types, 0)
        check_rngs(rngs)
        check_rate(dropout_rate)
        check_finite("scale", scale)
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {positions!r}")

        def table(rows: int, name: str | None) -> nnx.Param[jax.Array]:
            init = embedding_init(rngs.params(), (rows, features), param_dtype)
            return nnx.Param(init, **logical(name, "embed"))

        self.tokens = table(vocabulary, "vocab")
        if positions == "learned" and max_length is None:
            raise ValueError("max_length must be given with learned positions")
        if max_length is not None:
            int_at_least("max_length", max_length, 1)
        int_at_least("first_position", first_position, 0)
        self.positions = nnx.data(
            table(first_position + max_length, None)  # type: ignore[operator]
            if positions == "learned"
            else None
        )
        self.types = nnx.data(table(types, None) if types else None)
        self.norm = nnx.data(None if norm is None else norm())
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)
        self.sinusoidal = positions == "sinusoidal"
        self.scale, self.dtype, self.first_position = scale, dtype, first_position
        self.moved: Callable[[jax.Array], jax.Array] | None = None  # set by ``moved_embeddings``

    def __call__(
        self, tokens: Any, *, positions: Any = None, types: Any = None, real: Any = None
    ) -> jax.Array:
        """Vectors ``[*B T E]``.

        Args:
          tokens: integers ``[*B T]``.
          positions: integers that broadcast to ``[*B T]``; default from 0, or from the first real
            token.
          types: integers that broadcast to ``[*B T]``; default 0.
          real: bool ``[*B T]``, False for padding, where tokens, positions and types may hold any
            integers; default: all are real.

        Raises:
          ValueError: a token, position or type is out of range. Under ``jit``, where values are not
            known, its vector is NaN instead, as in ``jax.numpy.take``, so that the loss is NaN too;
            a clipped index would silently train another row. Negative ones are out of range.
          TypeError: not integers.
        """
        tokens = check_positions(tokens, "tokens")
        real = as_real(real, tokens.shape)
        x = self.vectors(filled(tokens, real))
        positions = places(positions, real)
        if positions is None:
            positions = jnp.arange(x.shape[-2], dtype=jnp.int32)
        check_broadcasts("positions", check_positions(positions), x.shape[:-1])
        if self.positions is not None:
            table = gathered(self.positions[...], 1)
            table = table[self.first_position :] if self.first_position else table
            x = _sum(x, self._cast(learned(table, positions)))
        if self.sinusoidal:
            x = _sum(x, sinusoidal(positions, x.shape[-1], dtype=x.dtype))
        if self.types is not None:
            types = jnp.zeros((), jnp.int32) if types is None else types
            check_broadcasts("types", check_positions(types, "types"), x.shape[:-1])
            x = _sum(
                x, self._cast(rows(gathered(self.types[...], 1), filled(types, real), "types"))
            )
        elif types is not None:
            raise ValueError("types must be None: these embeddings have no types (types=0)")
        x = x if self.norm is None else self.norm(x)
        return self.dropout(x)

    def vectors(self, tokens: Any) -> jax.Array:
        """``scale * table[token]``, ``[*B T]`` to ``[*B T E]``, without positions, types and norm.

        Raises:
          ValueError, TypeError: as a call does.
        """
        tokens = check_positions(tokens, "tokens")
        if tokens.ndim < 1:
            raise ValueError("tokens must have shape [*B T], got ()")
        x = self._cast(rows(gathered(self.tokens[...], 1), tokens, "tokens"))
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)
        return x if self.moved is None else self.moved(x)

    def logits(self, x: Float[AnyArray, "*B T E"]) -> jax.Array:
        """The tied output head: ``x . table[token]`` for every token, ``[*B T V]``."""
        table = self.tokens[...]
        check_tokens("x", x, "[... E]", table.shape[-1])
        dtype = self.dtype or jnp.promote_types(x.dtype, table.dtype)
        x, contract = jnp.asarray(x, dtype), (((x.ndim - 1,), (0,)), ((), ()))
        return Product(embed=0)(x, table.astype(dtype).T, contract)

    def _cast(self, x: jax.Array) -> jax.Array:
        return x if self.dtype is None else x.astype(self.dtype)


def _sum(x: jax.Array, vectors: jax.Array) -> jax.Array:
    """The sum of token vectors and others, which may have fewer batch axes."""
    a, b = same_rank(x, vectors)
    return a + b


def moved_embeddings(model: nnx.Module, move: Callable[[jax.Array], jax.Array]) -> Any:
    """A copy of a model with perturbed token vectors: ``move(x)`` for each look-up ``x``.

    For adversarial training, noise on the embeddings, or the saliency of tokens (the gradient with
    respect to the perturbation).

    Args:
      model: holds ``Embeddings``. It is not changed.
      move: from ``[*B T E]`` to the same shape. It is called once for each look-up, in the order
        of the computation.

    Returns:
      A copy of the model that shares its parameter values.

    Raises:
      ValueError: the model has no ``Embeddings``.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import Embeddings, moved_embeddings
    >>> embed = Embeddings(10, 4, rngs=nnx.Rngs(0))
    >>> moved = moved_embeddings(embed, lambda x: x + 1)
    >>> tokens = np.array([[3, 1]])
    >>> bool((moved(tokens) == embed(tokens) + 1).all())
    True

    Source: Miyato et al. 2017, "Adversarial Training Methods for Semi-Supervised Text
    Classification" (as a use).
    """
    copy = nnx.merge(*nnx.split(model))
    found = [module for _, module in nnx.iter_modules(copy) if isinstance(module, Embeddings)]
    if not found:
        raise ValueError("model must hold Embeddings, got a model without")
    for module in found:
        module.moved = move
    return copy
