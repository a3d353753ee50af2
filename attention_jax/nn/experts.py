"""A mixture of experts: gated feed-forward layers, of which each token uses a few."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attention_jax.core.axes import (
    AnyArray,
    accumulation_dtype,
    check_tokens,
    int_at_least,
    positive_float,
)
from attention_jax.core.dropout import check_rate
from attention_jax.core.shards import explicit_mesh
from attention_jax.nn.feed_forward import ACTIVATIONS, FeedForward, check_activation
from attention_jax.nn.linear import linear
from attention_jax.nn.logical import logical
from attention_jax.nn.rngs import check_rngs

GATINGS = ("softmax", "sigmoid")
EXPERTS_INIT = nnx.initializers.lecun_normal(batch_axis=0)


class MixtureOfExperts(nnx.Module):
    """The weighted sum of the ``per_token`` experts that a router ranks highest for a token::

        p = softmax(x W_router)
        y = sum_e p_e (activation(x W_gate_e) * x W_up_e) W_down_e

    With ``gating="sigmoid"``, ``p = sigmoid(x W_router)``, and experts are ranked by ``p + b``: the
    correction ``b``, which gradients do not train, is to keep their loads even. With ``groups``,
    only the experts of the best ``groups_per_token`` groups are ranked. The value of a group is
    that of its best expert, with ``"sigmoid"`` the sum of its two best.

    The tokens are sorted by expert, and one ragged product computes all experts. Experts have no
    capacity: no token is dropped, whatever the router chooses. On a mesh, its axes must be Auto.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import MixtureOfExperts
    >>> module = MixtureOfExperts(8, 32, experts=4, per_token=2, rngs=nnx.Rngs(0))
    >>> module(np.ones((1, 5, 8), np.float32)).shape
    (1, 5, 8)

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks"; Gale et al. 2022,
    "MegaBlocks" (without dropped tokens); Jiang et al. 2024, "Mixtral of Experts"; DeepSeek-AI
    2024, "DeepSeek-V2" (groups) and "DeepSeek-V3" (sigmoid).
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        experts: int,
        per_token: int,
        normalize: bool = True,
        gating: str = "softmax",
        groups: int = 1,
        groups_per_token: int = 1,
        scale: float = 1.0,
        shared: int | None = None,
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
          gating: ``"softmax"`` or ``"sigmoid"``, see above.
          groups: of experts, equally large.
          groups_per_token: how many of them a token may use.
          scale: of the weights.
          shared: hidden width of one more expert, which every token uses with weight 1; None: none.
          activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"silu"``,
            ``"quick_gelu"`` or ``"tanh"``.
          dropout_rate: of the hidden activations.
          dtype: of the computation; default: the promoted dtype of inputs and parameters.
          param_dtype: of the parameters.
          kernel_init: of the experts, for shapes ``[X E F]`` and ``[X F E]``.
          rngs: for parameters and dropout.

        Raises:
          ValueError: more experts per token than there are, groups that do not fit, or an unknown
            activation or gating.
        """
        for name, x in {"features": features, "hidden": hidden}.items():
            int_at_least(name, x, 1)
        check_routing(experts, per_token, gating, groups, groups_per_token, scale)
        check_activation(activation)
        check_rngs(rngs)
        check_rate(dropout_rate)
        self.features, self.experts = features, experts
        self.per_token, self.normalize = per_token, normalize
        self.gating, self.scale = gating, scale
        self.groups, self.groups_per_token = groups, groups_per_token
        self.activation, self.dtype = ACTIVATIONS[activation], dtype
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        # Rounded to half precision, logits could choose other experts.
        wide = jnp.float32 if jnp.finfo(dtype or param_dtype).bits < 32 else dtype
        self.router = linear(
            features,
            experts,
            axes=("embed", None),
            use_bias=False,
            **types | {"dtype": wide},
            rngs=rngs,
        )
        self.correction = nnx.data(None)
        if gating == "sigmoid":
            zeros = jnp.zeros(experts, accumulation_dtype(param_dtype))
            self.correction = nnx.data(nnx.Variable(zeros, **logical(None)))

        def kernels(*widths: int, axes: tuple[str, str]) -> nnx.Param[jax.Array]:
            init = kernel_init(rngs.params(), (experts, *widths), param_dtype)
            return nnx.Param(init, **logical(None, *axes))

        self.gate = kernels(features, hidden, axes=("embed", "mlp"))
        self.up = kernels(features, hidden, axes=("embed", "mlp"))
        self.down = kernels(hidden, features, axes=("mlp", "embed"))
        self.shared = nnx.data(None)
        if shared is not None:
            options: dict[str, Any] = {"activation": activation, "gated": True, "bias": False}
            self.shared = FeedForward(
                features, shared, **options, dropout_rate=dropout_rate, **types, rngs=rngs
            )
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
        result = each.sum(axis=1).reshape(x.shape)
        if self.shared is not None:
            result = result + self.shared(x.astype(dtype), deterministic=deterministic, rngs=rngs)
        return result

    def route(self, tokens: Float[Array, "M E"]) -> tuple[jax.Array, jax.Array]:
        """The weights of each token's experts, float32 or wider, and their indices: ``[M k]``."""
        logits = self.router(tokens)
        gate = jax.nn.softmax if self.gating == "softmax" else jax.nn.sigmoid
        p = gate(logits.astype(accumulation_dtype(logits.dtype)))
        rank = p if self.correction is None else p + self.correction[...].astype(p.dtype)
        if self.groups > 1:
            best = 1 if self.gating == "softmax" else 2
            rank = jax.vmap(lambda x: _in_best_groups(x, self.groups, self.groups_per_token, best))(
                rank
            )
        _, chosen = jax.lax.top_k(rank, self.per_token)
        weights = jnp.take_along_axis(p, chosen, axis=-1)
        if self.normalize:  # sigmoids may all underflow
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return self.scale * weights, chosen


def _in_best_groups(rank: Float[Array, " X"], groups: int, kept: int, best: int) -> jax.Array:
    """For one token, ``rank`` with -inf outside the ``kept`` groups of the largest value.

    The value of a group is the sum of its ``best`` largest ranks.
    """
    grouped = rank.reshape(groups, -1)
    value = jax.lax.top_k(grouped, best)[0].sum(axis=-1)
    _, at = jax.lax.top_k(value, kept)
    keep = jnp.zeros(groups, bool).at[at].set(True)
    return jnp.where(keep[:, None], grouped, -jnp.inf).reshape(-1)


def check_routing(
    experts: int,
    per_token: int,
    gating: str,
    groups: int,
    groups_per_token: int,
    scale: float,
    *,
    name: str = "experts",
) -> None:
    """Raises unless a router can choose ``per_token`` of the experts by these options.

    In errors the number of experts is called ``name``.
    """
    sizes = {name: experts, "per_token": per_token, "groups": groups}
    for argument, x in {**sizes, "groups_per_token": groups_per_token}.items():
        int_at_least(argument, x, 1)
    if gating not in GATINGS:
        raise ValueError(f"gating must be one of {GATINGS}, got {gating!r}")
    positive_float("scale", scale)
    if experts % groups:
        raise ValueError(f"groups must divide {name}, got {groups} and {experts}")
    if groups_per_token > groups:
        raise ValueError(
            f"groups_per_token must be at most groups, got {groups_per_token} and {groups}"
        )
    least = 1 if gating == "softmax" or groups == 1 else 2
    if experts // groups < least:
        raise ValueError(
            f"groups must have at least {least} experts each with gating={gating!r}, got {experts} "
            f"experts in {groups} groups"
        )
    if per_token > (most := experts // groups * groups_per_token):
        of = name if groups == 1 else "the experts of groups_per_token groups"
        raise ValueError(f"per_token must be at most {of}, got {per_token} and {most}")
