"""A mixture of experts: gated feed-forward layers, of which each token uses a few."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attention_jax.core.axes import AnyArray, accumulation_dtype, check_tokens, int_at_least
from attention_jax.core.dropout import check_rate
from attention_jax.core.shards import explicit_mesh
from attention_jax.nn.feed_forward import ACTIVATIONS, check_activation
from attention_jax.nn.linear import linear
from attention_jax.nn.logical import logical
from attention_jax.nn.rngs import check_rngs

EXPERTS_INIT = nnx.initializers.lecun_normal(batch_axis=0)


class MixtureOfExperts(nnx.Module):
    """The weighted sum of the ``per_token`` experts that a router ranks highest for a token::

        p = softmax(x W_router)
        y = sum_e p_e (activation(x W_gate_e) * x W_up_e) W_down_e

    The tokens are sorted by expert, and one ragged product computes all experts. Experts have no
    capacity: no token is dropped, whatever the router chooses. On a mesh, its axes must be Auto.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import MixtureOfExperts
    >>> module = MixtureOfExperts(8, 32, experts=4, per_token=2, rngs=nnx.Rngs(0))
    >>> module(np.ones((1, 5, 8), np.float32)).shape
    (1, 5, 8)

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks"; Gale et al. 2022,
    "MegaBlocks" (without dropped tokens); Jiang et al. 2024, "Mixtral of Experts".
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        experts: int,
        per_token: int,
        normalize: bool = True,
        activation: str = "silu",
        dropout_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., jax.Array] = EXPERTS_INIT,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the router and the experts.

        Args:
          features: width of the model (E).
          hidden: hidden width of each expert (F).
          experts: how many there are (X).
          per_token: how many a token uses.
          normalize: divide the weights of a token's experts by their sum.
          activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"silu"``,
            ``"quick_gelu"`` or ``"tanh"``.
          dropout_rate: of the hidden activations.
          dtype: of the computation; default: the promoted dtype of inputs and parameters.
          param_dtype: of the parameters.
          kernel_init: of the experts, for shapes ``[X E F]`` and ``[X F E]``.
          rngs: for parameters and dropout.

        Raises:
          ValueError: more experts per token than there are, or an unknown activation.
        """
        sizes = {"features": features, "hidden": hidden, "experts": experts, "per_token": per_token}
        for name, x in sizes.items():
            int_at_least(name, x, 1)
        if per_token > experts:
            raise ValueError(f"per_token must be at most experts, got {per_token} and {experts}")
        check_activation(activation)
        check_rngs(rngs)
        check_rate(dropout_rate)
        self.features, self.experts = features, experts
        self.per_token, self.normalize = per_token, normalize
        self.activation, self.dtype = ACTIVATIONS[activation], dtype
        self.router = linear(
            features,
            experts,
            axes=("embed", None),
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

        def kernels(*widths: int, axes: tuple[str, str]) -> nnx.Param[jax.Array]:
            init = kernel_init(rngs.params(), (experts, *widths), param_dtype)
            return nnx.Param(init, **logical(None, *axes))

        self.gate = kernels(features, hidden, axes=("embed", "mlp"))
        self.up = kernels(features, hidden, axes=("embed", "mlp"))
        self.down = kernels(hidden, features, axes=("mlp", "embed"))
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs if dropout_rate else None)

    def __call__(
        self,
        x: Float[AnyArray, "*B T E"],
        *,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> jax.Array:
        """``[*B T E]`` to the same shape.

        Raises:
          NotImplementedError: arrays that are sharded over explicit mesh axes.
        """
        x = jnp.asarray(x)
        check_tokens("x", x, "[... E]", self.features)
        if explicit_mesh(x, *jax.tree.leaves(self.gate.get_raw_value())) is not None:
            raise NotImplementedError(
                "MixtureOfExperts sorts tokens of all devices, which explicit mesh axes do not "
                "allow: make the mesh with axis_types of AxisType.Auto"
            )
        dtype = self.dtype or jnp.promote_types(x.dtype, self.gate.dtype)
        tokens = x.reshape(math.prod(x.shape[:-1]), self.features).astype(dtype)
        k = self.per_token
        weights, chosen = self.route(tokens)
        order = jnp.argsort(chosen.reshape(-1))  # of all choices, k for each token
        sizes = jnp.bincount(chosen.reshape(-1), length=self.experts).astype(jnp.int32)
        rows = tokens[order // k]

        def product(x: jax.Array, kernels: nnx.Param[jax.Array]) -> jax.Array:
            return jax.lax.ragged_dot(x, kernels[...].astype(dtype), sizes)

        hidden = self.activation(product(rows, self.gate)) * product(rows, self.up)
        hidden = self.dropout(hidden, deterministic=deterministic, rngs=rngs)
        each = jnp.zeros_like(rows).at[order].set(product(hidden, self.down))
        each = each.reshape(len(tokens), k, self.features) * weights[..., None].astype(dtype)
        return each.sum(axis=1).reshape(x.shape)

    def route(self, tokens: Float[Array, "M E"]) -> tuple[jax.Array, jax.Array]:
        """The weights of each token's experts, float32 or wider, and their indices: ``[M k]``."""
        logits = self.router(tokens)
        p = jax.nn.softmax(logits.astype(accumulation_dtype(logits.dtype)), axis=-1)
        weights, chosen = jax.lax.top_k(p, self.per_token)
        if self.normalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights, chosen
