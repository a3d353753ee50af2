"""Positions: sinusoidal and learned vectors, rotary angles and their scalings, relative terms.

Positions are explicit integers ``[*B T]``, so packed, padded and cached sequences need nothing
special. Rotary embedding rotates pairs of features of a query or key by an angle that grows with
the position, so that the products of queries and keys depend on their distance alone::

    angle_i = position * f_i,   f_i = theta ** (-2 i / width)

>>> import numpy as np
>>> from attention_jax.positions import rotary
>>> query = np.ones((2, 5, 4, 16), np.float32)  # *B T N H
>>> padded_left = np.array([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])  # the second row has three tokens
>>> rotary(query, padded_left).shape
(2, 5, 4, 16)

A ``Scaling`` is a value that changes the frequencies ``f`` for sequences longer than those that a
model was trained on. ALiBi, T5's relative bias and Shaw's relative embeddings are scores:
``attention_jax.scores``.
"""

from attention_jax.positions.rope import Rotary as Rotary
from attention_jax.positions.rope import rotary as rotary
from attention_jax.positions.scalings import NTK as NTK
from attention_jax.positions.scalings import DynamicNTK as DynamicNTK
from attention_jax.positions.scalings import Linear as Linear
from attention_jax.positions.scalings import Llama3 as Llama3
from attention_jax.positions.scalings import LongRoPE as LongRoPE
from attention_jax.positions.scalings import Scaling as Scaling
from attention_jax.positions.scalings import YaRN as YaRN
from attention_jax.positions.scalings import frequencies as frequencies
from attention_jax.positions.transformer_xl import transformer_xl as transformer_xl
from attention_jax.positions.vectors import learned as learned
from attention_jax.positions.vectors import sinusoidal as sinusoidal

__all__ = [
    "NTK",
    "DynamicNTK",
    "Linear",
    "Llama3",
    "LongRoPE",
    "Rotary",
    "Scaling",
    "YaRN",
    "frequencies",
    "learned",
    "rotary",
    "sinusoidal",
    "transformer_xl",
]
