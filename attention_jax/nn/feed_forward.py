"""The feed-forward layer, applied to each token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.core.axes import AnyArray, check_tokens, int_at_least
from attention_jax.core.dropout import check_rate
from attention_jax.nn.linear import BIAS_INIT, KERNEL_INIT, linear
from attention_jax.nn.rngs import check_rngs

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class FeedForward(nnx.Module):
    """``activation(x W_up) W_down``; gated, ``(activation(x W_gate) * x W_up) W_down``.

    Gated with ``"silu"`` it is SwiGLU, with ``"gelu"`` GEGLU.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import FeedForward
    >>> FeedForward(8, 32, rngs=nnx.Rngs(0))(np.ones((1, 5, 8), np.float32)).shape
    (1, 5, 8)

    Source: Vaswani et al. 2017, section 3.3; Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: str | Callable[[jax.Array], jax.Array] = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        bias_init: nnx.Initializer = BIAS_INIT,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the projections.

        Args:
          features: width of the model (E).
          hidden: width between the projections.
          activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"silu"``, ``"tanh"``, or a
            function.
          gated: adds a third projection, see above.
          bias: whether the projections have a bias.
          dropout_rate: of the hidden activations.
          dtype, param_dtype, kernel_init, bias_init: as for ``MultiHeadAttention``.
          rngs: for parameters and dropout.

        Raises:
          TypeError, ValueError: an unknown activation, or a width that is not positive.
        """
        for name, x in {"features": features, "hidden": hidden}.items():
            int_at_least(name, x, 1)
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                raise ValueError(
                    f"activation must be one of {sorted(ACTIVATIONS)} or a function, got "
                    f"{activation!r}"
                )
            activation = ACTIVATIONS[activation]
        if not callable(activation):
            raise TypeError(f"activation must be a name or a function, got {activation!r}")
        check_rngs(rngs)
        check_rate(dropout_rate)
        project = functools.partial(
            linear,
            use_bias=bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.activation = activation
        self.gate = nnx.data(project(features, hidden, axes=("embed", "mlp")) if gated else None)
        self.up = project(features, hidden, axes=("embed", "mlp"))
        self.down = project(hidden, features, axes=("mlp", "embed"))
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)

    def __call__(
        self,
        x: Float[AnyArray, "*B T E"],
        *,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> jax.Array:
        """``[*B T E]`` to the same shape."""
        x = jnp.asarray(x)
        check_tokens("x", x, "[... E]", self.up.in_features)
        if self.gate is None:
            hidden = self.activation(self.up(x))
        else:
            hidden = self.activation(self.gate(x)) * self.up(x)
        return self.down(self.dropout(hidden, deterministic=deterministic, rngs=rngs))
