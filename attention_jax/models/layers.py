"""``Layers``: the configuration of the stack of layers that all models share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attention_jax.api import attention
from attention_jax.backends.arguments import as_mask, check_types
from attention_jax.core.axes import check_finite, int_at_least, kind, positive_float
from attention_jax.core.dropout import check_rate
from attention_jax.masks import Mask
from attention_jax.models.running import Remat, period
from attention_jax.nn import OnePlusRMSNorm
from attention_jax.nn.attention import default_head_dim
from attention_jax.nn.blocks import ORDERS
from attention_jax.nn.embeddings import POSITIONS
from attention_jax.nn.experts import check_routing
from attention_jax.nn.feed_forward import ACTIVATIONS
from attention_jax.nn.logical import logical
from attention_jax.positions import Rotary

_VECTOR = logical("norm")
NORMS: dict[str, Callable[..., nnx.Module]] = {
    # Flax's fast variance, E[x^2] - E[x]^2, loses digits where the mean is large.
    "layer": functools.partial(
        nnx.LayerNorm, use_fast_variance=False, scale_metadata=_VECTOR, bias_metadata=_VECTOR
    ),
    "rms": functools.partial(nnx.RMSNorm, scale_metadata=_VECTOR),
    "one_plus_rms": OnePlusRMSNorm,
}


@dataclasses.dataclass(frozen=True)
class Relative:
    """T5's learned relative position bias, one table for all layers of a stack.

    Attributes:
      buckets: rows of the table.
      max_distance: distances from here on share the last bucket.
    """

    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        int_at_least("buckets", self.buckets, 1)
        int_at_least("max_distance", self.max_distance, 1)


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the feed-forward layer; see ``nn.MixtureOfExperts``.

    Attributes:
      number: of experts (X).
      per_token: how many experts a token uses.
      normalize: divide the weights of a token's experts by their sum.
      hidden: width of each expert; default that of the feed-forward layer.
      gating, groups, groups_per_token, scale, shared: as for ``nn.MixtureOfExperts``.
      dense_layers: how many of the first layers have a feed-forward layer instead.
    """

    number: int
    per_token: int
    normalize: bool = True
    hidden: int | None = None
    gating: str = "softmax"
    groups: int = 1
    groups_per_token: int = 1
    scale: float = 1.0
    shared: int | None = None
    dense_layers: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "shared"):
            if getattr(self, name) is not None:
                int_at_least(name, getattr(self, name), 1)
        int_at_least("dense_layers", self.dense_layers, 0)
        check_routing(
            self.number,
            self.per_token,
            self.gating,
            self.groups,
            self.groups_per_token,
            self.scale,
            name="number",
        )


@dataclasses.dataclass(frozen=True)
class Latent:
    """Latent attention in the place of self-attention; see ``nn.LatentAttention``.

    ``Layers.head_dim`` is the width of queries and keys without their rotary part.

    Attributes:
      features: width of the latents of keys and values (R).
      rotary_dim: width of the rotary part (P).
      value_dim: width of values (D); default ``Layers.head_dim``.
      query_features: width of the latents of queries; None for none.
      norm_epsilon: of the norms of latents.
    """

    features: int
    rotary_dim: int
    value_dim: int | None = None
    query_features: int | None = None
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("features", "rotary_dim", "value_dim", "query_features"):
            if getattr(self, name) is not None or name in ("features", "rotary_dim"):
                int_at_least(name, getattr(self, name), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """Configuration of a stack of layers, alike except for their windows and rotary positions.

    Attributes:
      features: width of the model (E).
      num_layers: number of layers.
      num_heads: query heads (N).
      num_kv_heads: key-value heads (K); default N.
      head_dim: width of a head (H); default E / N.
      hidden: width of the feed-forward layer; default 4 E.
      activation: of the feed-forward layer: ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"silu"``,
        ``"quick_gelu"`` or ``"tanh"``.
      gated: whether the feed-forward layer is gated, as SwiGLU; see ``nn.FeedForward``.
      experts: a mixture of gated feed-forward layers; needs ``gated`` and no ``feed_forward_bias``.
      latent: latent attention; needs one key-value head per head, and ``bias`` True or False, as in
        ``nn.LatentAttention``.
      norm: ``"layer"``, ``"rms"`` or ``"one_plus_rms"``.
      norm_epsilon: added to the variance.
      norm_bias: whether norms have a bias; RMS norms never do.
      first_norm: whether the attention of the first layer has a norm, which normalized embeddings
        do not need; see ``nn.Block``.
      order: position of the norms, ``"pre"``, ``"post"``, ``"both"`` or ``"after"``; see
        ``nn.Residual``.
      parallel: whether attention and feed-forward layer read the same input; see ``nn.Block``.
      residual_scale: of the output of each sublayer, before it is added.
      bias: which projections of the attention have a bias; see ``nn.MultiHeadAttention``.
      feed_forward_bias: whether the projections of the feed-forward layer have a bias.
      fused: project query, key and value in one product, and so the two of a gated feed-forward
        layer.
      rotary: rotary positions; or a tuple with those of each layer, repeated if there are more
        layers, where None is a layer without positions.
      relative: T5's relative position bias.
      alibi: add ALiBi, a penalty linear in the distance with a slope per head.
      mask: applied in every layer, combined with causality and windows.
      prefix_lm: whether a decoder's prompt attends to itself in both directions, while other tokens
        attend to previous ones only. A call gives the length of the prompt (``prefix``); with
        caches, the default is the tokens of the first call.
      windows: how many tokens a token attends to, itself included, for each layer, repeated if
        there are more layers. A decoder's window ends at the token, an encoder's is centered on it.
        None: no window.
      scale: of the logits of attention; default ``1 / sqrt(H)``.
      softcap: of the logits of attention.
      query_key_norm: normalize queries and keys: True, each head; ``"joint"``, all heads of a token
        together.
      sinks: give each head a learned logit in the denominator of its softmax.
      gate: gate the heads; see ``nn.MultiHeadAttention``.
      dropout_rate: of the output of each sublayer.
      attention_output_dropout_rate: of the output of the attention; default ``dropout_rate``.
      feed_forward_dropout_rate: of the hidden activations of the feed-forward layer.
      attention_dropout_rate: of the attention probabilities.
      attention: ``attention``, or a mechanism in its place; see ``nn.MultiHeadAttention``.
      implementation: of attention.
      dtype: of the computation; default: the promoted dtype of inputs and parameters.
      param_dtype: of the parameters.
      remat: whether the backward pass recomputes each layer instead of storing its intermediates,
        which saves memory for about a third more time; or a policy of ``jax.checkpoint_policies``
        that selects what to store. ``model.set_attributes(remat=True)`` sets it in a model.
      scan: whether the layers run in one ``lax.scan``, so that compile time does not grow with
        their number. It needs a stacked copy of the parameters. With caches the layers run one by
        one, since a scan would copy every cache for every token.
    """

    features: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    activation: str = "gelu"
    gated: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    norm: str = "layer"
    norm_epsilon: float = 1e-5
    norm_bias: bool = True
    first_norm: bool = True
    order: str = "pre"
    parallel: bool = False
    residual_scale: float = 1.0
    bias: bool | tuple[str, ...] = True
    feed_forward_bias: bool = True
    fused: bool = False
    rotary: Rotary | tuple[Rotary | None, ...] | None = None
    relative: Relative | None = None
    alibi: bool = False
    mask: Mask | None = None
    prefix_lm: bool = False
    windows: tuple[int | None, ...] = (None,)
    scale: float | None = None
    softcap: float | None = None
    query_key_norm: bool | str = False
    sinks: bool = False
    gate: bool = False
    dropout_rate: float = 0.0
    attention_output_dropout_rate: float | None = None
    feed_forward_dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    attention: Callable[..., Any] = attention
    implementation: str | tuple[str, ...] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    remat: Remat = False
    scan: bool = False

    def __post_init__(self) -> None:
        """Checks the fields and fills in defaults, so that equal stacks compare equal."""
        for name in ("features", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden"):
            if getattr(self, name) is not None or name in ("features", "num_layers", "num_heads"):
                int_at_least(name, getattr(self, name), 1)
        known = {"norm": sorted(NORMS), "activation": sorted(ACTIVATIONS), "order": list(ORDERS)}
        for name, values in known.items():
            if (x := getattr(self, name)) not in values:
                raise ValueError(f"{name} must be one of {values}, got {x!r}")
        for name in ("dropout_rate", "feed_forward_dropout_rate", "attention_dropout_rate"):
            check_rate(getattr(self, name), name)
        if self.attention_output_dropout_rate is not None:
            check_rate(self.attention_output_dropout_rate, "attention_output_dropout_rate")
        check_types({"scale": self.scale})
        if self.experts is not None and (not self.gated or self.feed_forward_bias):
            raise ValueError("experts needs gated=True and feed_forward_bias=False")
        self._check_latent()
        check_finite("residual_scale", self.residual_scale)
        if self.query_key_norm not in (False, True, "joint"):
            raise ValueError(
                f"query_key_norm must be False, True or 'joint', got {self.query_key_norm!r}"
            )
        if self.softcap is not None:
            positive_float("softcap", self.softcap)
        if not isinstance(self.windows, (tuple, list)):
            raise TypeError(
                f"windows must be a tuple with one window per layer, repeated if there are more "
                f"layers, got {kind(self.windows)}: for one window in all layers, give "
                f"windows=({self.windows!r},)"
            )
        if not self.windows:
            raise ValueError("windows must have an entry, None for no window, got ()")
        if (mask := as_mask(self.mask)) is not self.mask:
            object.__setattr__(self, "mask", mask)
        for window in self.windows:
            if window is not None:
                int_at_least("windows", window, 1)
        if not isinstance(self.remat, bool) and not callable(self.remat):
            raise TypeError(
                f"remat must be True, False or one of jax.checkpoint_policies, got {self.remat!r}"
            )
        head_dim = self.head_dim
        resolved: dict[str, Any] = {
            "num_kv_heads": self.num_heads if self.num_kv_heads is None else self.num_kv_heads,
            "head_dim": default_head_dim(self.features, self.num_heads)
            if head_dim is None
            else head_dim,
            "hidden": 4 * self.features if self.hidden is None else self.hidden,
            "windows": self._each(self.windows),
            "attention_output_dropout_rate": None
            if self.attention_output_dropout_rate == self.dropout_rate
            else self.attention_output_dropout_rate,
            "rotary": self._rotary(),
        }
        latent, experts = self.latent, self.experts
        if latent is not None and latent.value_dim is None:
            resolved["latent"] = dataclasses.replace(latent, value_dim=resolved["head_dim"])
        if experts is not None and experts.hidden == resolved["hidden"]:
            resolved["experts"] = dataclasses.replace(experts, hidden=None)
        for name, x in resolved.items():
            object.__setattr__(self, name, x)
        if not self.first_norm and (self.order != "pre" or self.scan):
            raise ValueError(
                f"first_norm must be True with scan, and with another order than 'pre', got "
                f"order={self.order!r}, scan={self.scan}"
            )
        if self.scan and self.experts is not None and self.experts.dense_layers:
            raise ValueError(
                f"scan needs layers of one structure, but the first {self.experts.dense_layers} of "
                f"experts are dense (dense_layers)"
            )
        if self.scan and self.num_layers > 1 and self.period == self.num_layers:
            raise ValueError(
                f"scan needs windows that repeat, and rotary with them, with a period below "
                f"num_layers = {self.num_layers} that divides it, got {self.windows} and "
                f"{self.rotary}"
            )

    def _check_latent(self) -> None:
        """Raises for options that latent attention does not have."""
        if self.latent is None:
            return
        expected = {
            "num_kv_heads": (None, self.num_heads),
            "bias": (True, False),
            **dict.fromkeys(("fused", "query_key_norm", "sinks", "gate"), (False,)),
            "attention": (attention,),
        }
        for name, values in expected.items():
            if (x := getattr(self, name)) not in values:
                raise ValueError(f"{name} must be {values[-1]} with latent, got {x!r}")

    def _each(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """An entry for each layer: those given, repeated."""
        return tuple(given[i % len(given)] for i in range(self.num_layers))

    def _rotary(self) -> Rotary | tuple[Rotary | None, ...] | None:
        """One entry if all layers have the same, else an entry for each layer."""
        given = self.rotary if isinstance(self.rotary, (tuple, list)) else (self.rotary,)
        for x in given:
            if x is not None and not isinstance(x, Rotary):
                raise TypeError(f"rotary must be a Rotary, None, or a tuple of them, got {kind(x)}")
        if not given:
            raise ValueError("rotary must have an entry, None for no positions, got ()")
        each = self._each(tuple(given))
        return each[0] if all(x == each[0] for x in each) else each

    @property
    def rotaries(self) -> tuple[Rotary | None, ...]:
        """The rotary positions of each layer."""
        return self._each(self.rotary if isinstance(self.rotary, tuple) else (self.rotary,))

    @property
    def period(self) -> int:
        """The number of layers after which windows and rotary positions repeat."""
        return period(tuple(zip(self.windows, self.rotaries, strict=True)))

    @property
    def dtypes(self) -> dict[str, Any]:
        """``dtype`` and ``param_dtype``, as options of every module."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def new_norm(self, rngs: nnx.Rngs, epsilon: float | None = None) -> Callable[..., nnx.Module]:
        """A constructor of norms, of the model's width unless another is given."""
        epsilon = self.norm_epsilon if epsilon is None else epsilon

        def make(features: int = self.features, *, rngs: nnx.Rngs = rngs) -> nnx.Module:
            norm = NORMS[self.norm]
            if self.norm == "layer":
                norm = functools.partial(norm, use_bias=self.norm_bias)
            return norm(features, epsilon=epsilon, **self.dtypes, rngs=rngs)

        return make


def check_embeddings(config: Any) -> None:
    """Checks the fields of a configuration that ``Embeddings`` takes."""
    int_at_least("vocabulary", config.vocabulary, 1)
    if config.positions not in POSITIONS:
        raise ValueError(f"positions must be one of {POSITIONS}, got {config.positions!r}")
    if config.positions == "learned" and config.max_length is None:
        raise ValueError("max_length must be given with learned positions")
    if config.max_length is not None:
        int_at_least("max_length", config.max_length, 1)
    check_rate(config.dropout_rate)
