"""The classic models of sequences: Flax's gated recurrent units, with and without attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class GRU(nnx.Module):
    """Layers of gated recurrent units: ``[B T E]`` to ``[B T E]``, dropout between them.

    Source: Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder".
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        num_layers: int,
        *,
        bidirectional: bool = False,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the layers.

        Args:
          features: width of the input.
          hidden: width of the result, of which each direction has half where there are two.
          num_layers: layers.
          bidirectional: whether a layer also reads from the end.
          dropout_rate: of what each layer gives.
          rngs: for parameters and dropout.
        """
        if bidirectional and hidden % 2:
            raise ValueError(f"hidden must be even for two directions, got {hidden}")
        layers: list[Any] = []
        dropouts = []
        for i in range(num_layers):
            width = features if i == 0 else hidden
            size = hidden // 2 if bidirectional else hidden

            def unit(width: int = width, size: int = size) -> Any:
                return nnx.RNN(nnx.GRUCell(width, size, rngs=rngs), rngs=rngs)

            layers.append(nnx.Bidirectional(unit(), unit()) if bidirectional else unit())
            dropouts.append(nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None))
        self.layers, self.dropouts = nnx.List(layers), nnx.List(dropouts)

    def __call__(self, x: jax.Array, lengths: Any = None) -> jax.Array:
        """The states of the last layer; those of padding, from ``lengths [B]`` on, mean nothing."""
        for layer, dropout in zip(self.layers, self.dropouts, strict=True):
            x = dropout(layer(x, seq_lengths=lengths))
        return x


def last_state(states: jax.Array, lengths: Any) -> jax.Array:
    """Of ``[B T E]`` the state of the last real token, ``[B E]``."""
    at = jnp.maximum(jnp.asarray(lengths, jnp.int32) - 1, 0)
    return jnp.take_along_axis(states, at[:, None, None], axis=1)[:, 0]
