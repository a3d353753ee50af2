"""Stacked gated recurrent units (GRU), built from Flax's cells."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.training.task import Array


class GRU(nnx.Module):
    """A stack of GRU layers with dropout after each: ``[B T E]`` to ``[B T hidden]``.

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
        """Builds the layers.

        Args:
          features: width of the input.
          hidden: width of the output; with two directions, each gets half of it.
          num_layers: number of layers.
          bidirectional: whether each layer also reads the sequence backwards.
          dropout_rate: applied to the output of each layer.
          rngs: for parameters and dropout.

        Raises:
          ValueError: ``hidden`` is odd and ``bidirectional`` is set.
        """
        if bidirectional and hidden % 2:
            raise ValueError(f"hidden must be even if bidirectional, got {hidden}")
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

    def __call__(self, x: jax.Array, lengths: Array | None = None) -> jax.Array:
        """States of the last layer; those at positions from ``lengths [B]`` on are undefined."""
        for layer, dropout in zip(self.layers, self.dropouts, strict=True):
            x = dropout(layer(x, seq_lengths=lengths))
        return x


def last_state(states: jax.Array, lengths: Array) -> jax.Array:
    """The state ``[B E]`` of the last real token, from ``states [B T E]`` and ``lengths [B]``."""
    at = jnp.maximum(jnp.asarray(lengths, jnp.int32) - 1, 0)
    return jnp.take_along_axis(states, at[:, None, None], axis=1)[:, 0]
