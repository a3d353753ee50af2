"""Norms that Flax does not have: Gemma's RMSNorm, and vectors of length 1."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.core.axes import AnyArray, accumulation_dtype, check_tokens, same_rank
from attention_jax.nn.logical import logical


class OnePlusRMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + epsilon) * (1 + scale)``, in float32 or wider; ``scale`` starts at 0.

    With the 1, weight decay pulls the factor toward 1 instead of 0.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import OnePlusRMSNorm
    >>> norm = OnePlusRMSNorm(2, epsilon=0.0, rngs=nnx.Rngs(0))
    >>> norm(np.array([[3.0, 3.0]], np.float32)).tolist()
    [[1.0, 1.0]]

    Source: Gemma Team 2024, "Gemma", the published code.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the scale.

        Args:
          num_features: width of the last axis (E).
          epsilon: added to the mean square.
          dtype: of the result; default: the promoted dtype of input and scale.
          param_dtype: of the scale.
          rngs: not used; norms are constructed with it.
        """
        self.normalize = nnx.RMSNorm(num_features, epsilon=epsilon, use_scale=False, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros(num_features, param_dtype), **logical("norm"))
        self.dtype = dtype

    def __call__(self, x: Float[AnyArray, "... E"]) -> jax.Array:
        """Normalized over the last axis."""
        x = jnp.asarray(x)
        check_tokens("x", x, "[... E]", self.scale[...].shape[-1])
        scale = self.scale[...]
        dtype = self.dtype or jnp.promote_types(x.dtype, scale.dtype)
        wide = accumulation_dtype(dtype)
        normalized = self.normalize(x.astype(wide))
        normalized, factor = same_rank(normalized, 1 + scale.astype(wide))
        return (normalized * factor).astype(dtype)


def unit(x: Float[AnyArray, "... E"]) -> jax.Array:
    """``x / |x|`` in float32 or wider; a vector of zeros stays.

    >>> import numpy as np
    >>> from attention_jax.nn.norms import unit
    >>> unit(np.array([3.0, 4.0], np.float32)).round(3).tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    x = jnp.asarray(x)
    x = x.astype(accumulation_dtype(x.dtype))
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
