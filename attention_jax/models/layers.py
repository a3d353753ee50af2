"""The stack of layers that all models share, and its configuration ``Layers``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float

from attention_jax import masks, scores
from attention_jax.api import attention
from attention_jax.backends.arguments import as_mask, check_types
from attention_jax.cache import KVCache
from attention_jax.core.axes import AnyArray, int_at_least, kind, positive_float, same_rank
from attention_jax.core.dropout import check_rate
from attention_jax.core.shards import split_along
from attention_jax.masks import Mask
from attention_jax.models.running import Remat, period, run, scan
from attention_jax.nn import Block, FeedForward, MultiHeadAttention, OnePlusRMSNorm
from attention_jax.nn.attention import default_head_dim
from attention_jax.nn.blocks import ORDERS
from attention_jax.nn.embeddings import POSITIONS
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """Configuration of a stack of layers. All layers are alike, but may have different windows.

    Attributes:
      features: width of the model (E).
      num_layers: number of layers.
      num_heads: query heads (N).
      num_kv_heads: key-value heads (K); default N.
      head_dim: width of a head (H); default E / N.
      hidden: width of the feed-forward layer; default 4 E.
      activation: of the feed-forward layer: ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"silu"``,
        ``"tanh"``.
      gated: whether the feed-forward layer is gated, as SwiGLU; see ``nn.FeedForward``.
      norm: ``"layer"``, ``"rms"`` or ``"one_plus_rms"``.
      norm_epsilon: added to the variance.
      order: position of the norms, ``"pre"``, ``"post"`` or ``"both"``; see ``nn.Residual``.
      bias: which projections of the attention have a bias; see ``nn.MultiHeadAttention``.
      feed_forward_bias: whether the projections of the feed-forward layer have a bias.
      fused: project query, key and value in one product.
      rotary: rotary positions.
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
      query_key_norm: normalize queries and keys per head.
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
    norm: str = "layer"
    norm_epsilon: float = 1e-5
    order: str = "pre"
    bias: bool | tuple[str, ...] = True
    feed_forward_bias: bool = True
    fused: bool = False
    rotary: Rotary | None = None
    relative: Relative | None = None
    alibi: bool = False
    mask: Mask | None = None
    prefix_lm: bool = False
    windows: tuple[int | None, ...] = (None,)
    scale: float | None = None
    softcap: float | None = None
    query_key_norm: bool = False
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
        resolved = {
            "num_kv_heads": self.num_heads if self.num_kv_heads is None else self.num_kv_heads,
            "head_dim": default_head_dim(self.features, self.num_heads)
            if head_dim is None
            else head_dim,
            "hidden": 4 * self.features if self.hidden is None else self.hidden,
            "windows": tuple(self.windows[i % len(self.windows)] for i in range(self.num_layers)),
        }
        for name, x in resolved.items():
            object.__setattr__(self, name, x)
        if self.scan and self.num_layers > 1 and period(self.windows) == self.num_layers:
            raise ValueError(
                f"scan needs windows that repeat with a period below num_layers = "
                f"{self.num_layers} that divides it, got {self.windows}"
            )

    @property
    def dtypes(self) -> dict[str, Any]:
        """``dtype`` and ``param_dtype``, as options of every module."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def new_norm(self, rngs: nnx.Rngs) -> Callable[..., nnx.Module]:
        """A constructor of norms, of the model's width unless another is given."""

        def make(features: int = self.features, *, rngs: nnx.Rngs = rngs) -> nnx.Module:
            norm = NORMS[self.norm]
            return norm(features, epsilon=self.norm_epsilon, **self.dtypes, rngs=rngs)

        return make


class Stack(nnx.Module):
    """Layers in sequence; with the norms in front of the sublayers, a final norm too."""

    def __init__(
        self,
        config: Layers,
        *,
        causal: bool,
        context_features: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the layers.

        Args:
          config: of the layers.
          causal: whether tokens attend only to previous tokens and themselves.
          context_features: width of a context, for cross-attention in every layer.
          rngs: for parameters and dropout.
        """
        self.causal, self.alibi = causal, config.alibi
        self.windows, self.prefix_lm = config.windows, config.prefix_lm
        self.remat, self.scan = config.remat, config.scan
        self.sequence_axis: str | None = None  # the Auto mesh axis that splits sequences
        if config.prefix_lm and not causal:
            raise ValueError("prefix_lm must be False in an encoder, which is bidirectional")
        layer_masks = [both(_window_mask(window, causal), config.mask) for window in self.windows]
        self.blocks = nnx.List(
            [_block(config, mask, context_features, rngs) for mask in layer_masks]
        )
        norm = config.new_norm(rngs)
        self.norm = nnx.data(None if config.order == "post" else norm())
        self.relative, self.max_distance = nnx.data(None), 0
        if config.relative is not None:
            self.max_distance = config.relative.max_distance
            shape = config.relative.buckets, config.num_heads
            init = nnx.initializers.normal(config.features**-0.5)
            self.relative = nnx.data(
                nnx.Param(init(rngs.params(), shape, config.param_dtype), **logical(None, "heads"))
            )

    def __call__(
        self,
        x: Float[AnyArray, "*B T E"],
        contexts: Any = None,
        *,
        real: Bool[AnyArray, "*B T"] | None = None,
        mask: Mask | None = None,
        context_mask: Mask | None = None,
        positions: Any = None,
        caches: tuple[KVCache, ...] | None = None,
        count: Any = None,
        prefix: Any = None,
    ) -> Any:
        """Tokens ``[*B T E]`` to tokens of the same shape.

        Args:
          x: the tokens.
          contexts: from ``self.contexts``, one for each layer.
          real: bool ``[*B T]``, False for padding; without caches.
          mask: combined with those of the layers.
          context_mask: which tokens of the context each token may attend to.
          positions: of the tokens, for rotary; default from 0, or from the end of the caches.
          caches: of the previous tokens, see ``init_caches``.
          count: how many of the tokens are real, with caches.
          prefix: how many of the first tokens of the sequence attend to each other in both
            directions, an int or int array ``[*B]``; with caches, all of them must be in the first
            call.

        Returns:
          The tokens; with caches also the new ones.

        Raises:
          ValueError: ``real`` with caches; ``prefix_lm`` without a ``prefix`` or caches; a
            ``prefix`` in an encoder.
        """
        if caches is not None and real is not None:
            raise ValueError("real must be None with caches: put padding last and give count")
        if caches is not None and prefix is None and self.prefix_lm:
            new = jnp.asarray(x.shape[-2] if count is None else count, jnp.int32)
            prefix = jnp.where(caches[0].length == 0, new, 0)  # the first call is the prompt
        mask = both(self._causal_mask(prefix), both(padding(real), mask))
        options = {"mask": mask, "score": self._score(), "positions": positions}
        each: list[dict[str, Any]] = [{} for _ in self.blocks]
        if contexts is not None:
            options["context_mask"] = context_mask
            each = [{"context": context} for context in contexts]
        x = split_along(x, -2, self.sequence_axis, "the length of sequences")
        new_caches = []
        if caches is not None:
            for block, own, cache in zip(self.blocks, each, caches, strict=True):
                own = {**options, **own, "cache": cache, "count": count}
                x, cache = run(block, x, own, remat=self.remat)
                new_caches.append(cache)
        elif self.scan:
            every = period(self.windows)
            x = scan(self.blocks, x, options, each=each, every=every, remat=self.remat)
        else:
            for block, own in zip(self.blocks, each, strict=True):
                x = run(block, x, {**options, **own}, remat=self.remat)
        x = x if self.norm is None else self.norm(x)
        return x if caches is None else (x, tuple(new_caches))

    def contexts(self, context: Float[AnyArray, "*B S C"]) -> tuple[Any, ...]:
        """Each layer's keys and values of a context, computed once for many calls."""
        cross: list[Any] = [block.cross_attention for block in self.blocks]
        return tuple(residual.sublayer.keys_values(context) for residual in cross)

    def init_caches(
        self, batch: tuple[int, ...], capacity: int, *, dtype: Any = None, spare: int = 0
    ) -> tuple[KVCache, ...]:
        """Empty caches; for a layer with a window, a rolling one no larger than the window.

        Args:
          batch: the batch axes ``*B``.
          capacity: the largest number of tokens per row.
          dtype: of keys and values; default that of the layers.
          spare: how many tokens one ``rollback`` can remove.
        """
        caches = []
        for block, window in zip(self.blocks, self.windows, strict=True):
            needed = capacity if window is None else window + spare
            rolling, size = needed < capacity, min(needed, capacity)
            attention: Any = block.attention.sublayer
            caches.append(attention.init_cache(batch, size, dtype=dtype, rolling=rolling))
        return tuple(caches)

    def _causal_mask(self, prefix: Any) -> Mask | None:
        """The causal mask, with a bidirectional prefix if there is one."""
        if not self.causal:
            if prefix is not None:
                raise ValueError("prefix must be None in an encoder, which is bidirectional")
            return None
        if prefix is None and self.prefix_lm:
            raise ValueError(
                "prefix must be given for a prefix-LM without caches: the number of first tokens "
                "that attend in both directions"
            )
        return masks.causal() if prefix is None else masks.prefix(prefix) | masks.causal()

    def _score(self) -> tuple[scores.Score, ...]:
        found: list[scores.Score] = []
        if self.alibi:
            found.append(scores.alibi())
        if self.relative is not None:
            table, both = self.relative[...], not self.causal
            bias = scores.relative_bias(table, bidirectional=both, max_distance=self.max_distance)
            found.append(bias)
        return tuple(found)


def _block(
    config: Layers, mask: Mask | None, context_features: int | None, rngs: nnx.Rngs
) -> Block:
    norm = config.new_norm(rngs)
    heads = functools.partial(
        MultiHeadAttention,
        config.features,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        fused=config.fused,
        bias=config.bias,
        scale=config.scale,
        score=() if config.softcap is None else scores.softcap(config.softcap),
        norm=norm if config.query_key_norm else None,
        sinks=config.sinks,
        gate=config.gate,
        dropout_rate=config.attention_dropout_rate,
        attention=config.attention,
        implementation=config.implementation,
        **config.dtypes,
        rngs=rngs,
    )
    cross = None
    own = heads(mask=mask, rotary=config.rotary)
    if context_features is not None:
        cross = heads(context_features=context_features)
    feed_forward = FeedForward(
        config.features,
        config.hidden,  # type: ignore[arg-type]
        activation=config.activation,
        gated=config.gated,
        bias=config.feed_forward_bias,
        dropout_rate=config.feed_forward_dropout_rate,
        **config.dtypes,
        rngs=rngs,
    )
    return Block(
        own,
        feed_forward,
        norm=norm,
        cross_attention=cross,
        order=config.order,
        dropout_rate=config.dropout_rate,
        attention_dropout_rate=config.attention_output_dropout_rate,
        rngs=rngs,
    )


def _window_mask(window: int | None, causal: bool) -> Mask | None:
    """The mask of a layer's window, to be combined with causality."""
    if window is None:
        return None
    if causal:
        return masks.window(window - 1, None)
    return masks.window(window // 2, (window - 1) // 2)


def padding(real: Bool[AnyArray, "*B S"] | None, queries: int | None = None) -> Mask | None:
    """``masks.padding``; None if all tokens are real."""
    return None if real is None else masks.padding(real, queries=queries)


def both(a: Mask | None, b: Mask | None) -> Mask | None:
    """``a & b``, where None is no mask."""
    return b if a is None else a if b is None else a & b


def positions_after(caches: tuple[KVCache, ...], T: int, count: Any) -> jax.Array:
    """Positions ``[*B T]`` of new tokens; padding, after ``count``, repeats the last one."""
    new, length = same_rank(jnp.arange(T, dtype=jnp.int32), caches[0].length[..., None])
    if count is not None:
        most = jnp.maximum(jnp.asarray(count, jnp.int32) - 1, 0)
        new = jnp.minimum(*same_rank(new, most[..., None]))
    return length + new


def last(x: jax.Array, count: Any) -> jax.Array:
    """The vector of the last real token, ``x[*B, count - 1]``: ``[*B T E]`` to ``[*B E]``."""
    at = jnp.broadcast_to(jnp.asarray(count, jnp.int32) - 1, x.shape[:-2])
    return jnp.take_along_axis(x, at[..., None, None], axis=-2)[..., 0, :]


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
