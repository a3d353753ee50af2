"""Weights as 8-bit integers with a scale per channel, a quarter of the memory of float32."""

from __future__ import annotations

from typing import Any

from flax import nnx

from attention_jax.core.int8 import quantize
from attention_jax.nn.lora import Frozen

# Parameters by the end of their path, and the axis that a scale is shared along: the inputs of a
# kernel [E F] or of experts [X E F], and a row of a table [V E].
AXES = {"kernel": -2, "gate": -2, "up": -2, "down": -2, "tokens": -1}


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
