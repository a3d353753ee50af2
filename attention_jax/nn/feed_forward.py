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
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "tanh": jnp.tanh,
}


def check_activation(x: Any, name: str = "activation") -> None:
    """Raises ValueError unless ``x`` is the name of an activation."""
    if x not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {sorted(ACTIVATIONS)}, got {x!r}")


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
        fused: bool = False,
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
          activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"silu"``,
            ``"quick_gelu"``, ``"tanh"``, or a function.
          gated: adds a third projection, see above.
          fused: project gate and up in one product; no effect if not gated.
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
        self.activation, self.features = activation, features
        fused = fused and gated
        split = functools.partial(project, features, hidden, axes=("embed", "mlp"))
        self.gate = nnx.data(split() if gated and not fused else None)
        self.up = nnx.data(None if fused else split())
        # Never sharded by its columns: half of them belong to each of the two.
        self.gate_up = nnx.data(
            project(features, 2 * hidden, axes=("embed", None)) if fused else None
        )
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
        check_tokens("x", x, "[... E]", self.features)
        if self.gate_up is not None:
            gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
            hidden = self.activation(gate) * up
        elif self.gate is not None:
            hidden = self.activation(self.gate(x)) * self.up(x)  # type: ignore[misc]
        else:
            hidden = self.activation(self.up(x))  # type: ignore[misc]
        return self.down(self.dropout(hidden, deterministic=deterministic, rngs=rngs))
