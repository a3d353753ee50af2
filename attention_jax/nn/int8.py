"""Weights as 8-bit integers with a scale per channel, a quarter of the memory of float32."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.core.axes import AnyArray, accumulation_dtype
from attention_jax.nn.lora import Frozen

MOST = 127
# Parameters by the end of their path, and the axis that a scale is shared along: the inputs of a
# kernel [E F], of experts [X E F], of heads [R N H], and a row of a table [V E].
AXES = {"kernel": -2, "gate": -2, "up": -2, "down": -2, "key_value_up": -3, "tokens": -1}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array as integers and scales; indexing it gives floating-point numbers.

    Attributes:
      integers: int8, from -127 to 127.
      scale: of each channel, in the dtype of the array; it broadcasts to ``integers``.
    """

    integers: Any  # within JAX's transformations not always an array
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return self.integers.shape

    @property
    def ndim(self) -> int:
        """Its number of axes."""
        return self.integers.ndim

    @property
    def size(self) -> int:
        """Its number of entries."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the array that indexing gives."""
        return self.scale.dtype

    def __getitem__(self, index: Any) -> jax.Array:
        return (self.integers.astype(self.dtype) * self.scale)[index]


def quantize(x: Float[AnyArray, "..."], axis: int) -> Quantized:
    """Rounds an array to integers, with one scale along ``axis``::

        s = max |x| / 127        q = round(x / s)        |q s - x| <= s / 2

    Args:
      x: any floating dtype; the bound holds up to its rounding.
      axis: whose entries share a scale.

    Raises:
      ValueError: infinite or NaN entries, if the values are known.

    >>> import numpy as np
    >>> from attention_jax.nn.int8 import quantize
    >>> q = quantize(np.array([[1.0, -100.0], [0.3, 254.0]], np.float32), axis=0)
    >>> q.integers.tolist(), q.scale.round(4).tolist()
    ([[127, -50], [38, 127]], [[0.007899999618530273, 2.0]])
    """
    x = jnp.asarray(x)
    info, wide = jnp.finfo(x.dtype), accumulation_dtype(x.dtype)
    largest = jnp.abs(x.astype(wide)).max(axis, keepdims=True)
    if not isinstance(largest, jax.core.Tracer) and not jnp.isfinite(largest).all():
        raise ValueError("x must be finite to be quantized, got infinite or NaN entries")
    # Rounded up, 127 steps could overflow.
    scale = jnp.minimum(largest / MOST, float(info.max) / MOST * (1 - float(info.eps)))
    least, unit = float(jnp.finfo(wide).tiny), float(info.smallest_subnormal)
    if unit >= least:  # float16: a small scale is rounded up, so that 127 steps still suffice
        scale = jnp.where(scale < float(info.tiny), jnp.ceil(scale / unit) * unit, scale)
    scale = jnp.where(scale < least, 1, scale).astype(x.dtype)  # zeros, or as good as zeros
    integers = jnp.round(x.astype(wide) / scale.astype(wide))
    return Quantized(jnp.clip(integers, -MOST, MOST).astype(jnp.int8), scale)


def quantized(model: nnx.Module) -> Any:
    """A copy of a model whose projections and token embeddings are 8-bit integers.

    Each output of a projection, and each token, has a scale of its own. Weights are widened when
    they are used: the model needs a quarter of the memory of float32 and half of bfloat16, and its
    activations are computed as before. On a CPU a step takes longer, since XLA writes the widened
    weights to memory. Norms, biases, routers and tables of positions stay as they are.

    Args:
      model: is not changed.

    Returns:
      A model for inference: what is quantized is ``Frozen`` and cannot be trained, saved as a
      checkpoint or quantized again. Train adapters on it with ``low_rank``.

    Raises:
      ValueError: nothing to quantize; low-rank adapters; infinite or NaN weights.

    >>> import jax, numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import FeedForward, quantized
    >>> model = FeedForward(64, 256, rngs=nnx.Rngs(0))
    >>> small = quantized(model)
    >>> size = lambda model: sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    >>> round(size(model) / size(small), 1)
    3.7
    >>> x = np.random.default_rng(0).normal(size=(1, 5, 64)).astype(np.float32)
    >>> bool(np.abs(small(x) - model(x)).max() < 0.02)
    True

    Source: Dettmers et al. 2022, "LLM.int8()", without its separate outliers.
    """
    graph, state = nnx.split(model)
    old = dict(nnx.to_flat_state(state))
    if any(isinstance(x, nnx.LoRAParam) for x in old.values()):
        raise ValueError("model has low-rank adapters: quantize it first, then call low_rank")
    flat = {path: in_int8(path, x) for path, x in old.items()}
    if all(flat[path] is x for path, x in old.items()):
        raise ValueError("model must have projections or embeddings in floating-point numbers")
    return nnx.merge(graph, nnx.from_flat_state(flat), copy=True)


def in_int8(path: tuple[Any, ...], variable: Any) -> Any:
    """The variable with a ``Quantized`` value, if it is a projection or a table of tokens.

    A router stays as it is: rounding could make it choose other experts.
    """
    value, axis = variable.get_raw_value(), AXES.get(path[-1])
    if axis is None or "router" in path or not isinstance(variable, nnx.Param) or value.ndim < 2:
        return variable
    return Frozen.from_metadata(quantize(value, axis), variable.get_metadata())
