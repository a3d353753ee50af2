"""What all the models share: a stack of layers, described by one frozen value."""

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
from attention_jax.cache import KVCache
from attention_jax.core.axes import AnyArray, int_at_least, same_rank
from attention_jax.masks import Mask
from attention_jax.models.running import Remat, period, run, scan
from attention_jax.nn import Block, FeedForward, MultiHeadAttention, OnePlusRMSNorm
from attention_jax.nn.attention import default_head_dim
from attention_jax.positions import Rotary

NORMS: dict[str, Callable[..., nnx.Module]] = {
    # The fast variance of Flax, E[x^2] - E[x]^2, loses digits where the mean is large.
    "layer": functools.partial(nnx.LayerNorm, use_fast_variance=False),
    "rms": nnx.RMSNorm,
    "one_plus_rms": OnePlusRMSNorm,
}


@dataclasses.dataclass(frozen=True)
class Relative:
    """T5's learned bias of the distance, one table for all layers of a stack."""

    buckets: int = 32
    max_distance: int = 128


@dataclasses.dataclass(frozen=True)
class Layers:
    """A stack of equal layers, which differ in their window at most."""

    features: int
    """Width of the model (E)."""
    num_layers: int
    num_heads: int
    """Query heads (N)."""
    num_kv_heads: int | None = None
    """Key-value heads (K); default N."""
    head_dim: int | None = None
    """Width of a head (H); default E / N."""
    hidden: int | None = None
    """Width of the feed-forward layer; default 4 E."""
    activation: str = "gelu"
    gated: bool = False
    norm: str = "layer"
    """``"layer"``, ``"rms"`` or ``"one_plus_rms"``."""
    norm_epsilon: float = 1e-5
    order: str = "pre"
    """Where the norms are: ``"pre"``, ``"post"`` or ``"both"``; see ``nn.Residual``."""
    bias: bool | tuple[str, ...] = True
    """Which projections of the attention have one; see ``nn.MultiHeadAttention``."""
    feed_forward_bias: bool = True
    fused: bool = False
    """Query, key and value in one product."""
    rotary: Rotary | None = None
    relative: Relative | None = None
    alibi: bool = False
    """Whether logits fall with the distance, in each head at its own rate."""
    mask: Mask | None = None
    """Who may see whom in every layer, beside causality and windows."""
    prefix_lm: bool = False
    """Whether a decoder's prompt sees itself in both directions, and the rest only what is before
    it. How long the prompt is, a call says (``prefix``); with caches, where it does not, it is what
    comes in the first call."""
    windows: tuple[int | None, ...] = (None,)
    """How many tokens a token sees, itself included: layer after layer, from the first again where
    there are more layers. A decoder's token sees them before it, an encoder's on both sides. None:
    all."""
    scale: float | None = None
    """Of the logits of attention; default ``1 / sqrt(H)``."""
    softcap: float | None = None
    """Of the logits of attention."""
    query_key_norm: bool = False
    sinks: bool = False
    gate: bool = False
    dropout_rate: float = 0.0
    """Of what each sublayer gives."""
    feed_forward_dropout_rate: float = 0.0
    """Of the hidden numbers of the feed-forward layer."""
    attention_dropout_rate: float = 0.0
    attention: Callable[..., Any] = attention
    """What gathers the values; see ``nn.MultiHeadAttention``."""
    implementation: str | tuple[str, ...] | None = None
    """Of attention."""
    dtype: Any = None
    """Of the computation; default: what inputs and parameters promote to."""
    param_dtype: Any = jnp.float32
    remat: Remat = False
    """Whether the backward pass computes each layer anew, rather than keep all that it made: less
    memory for about a third more time. Or a policy of ``jax.checkpoint_policies``, which says what
    to keep. ``model.set_attributes(remat=True)`` sets it in a model that is there."""
    scan: bool = False
    """Whether the layers run in one loop, so that the time to compile does not grow with their
    number. It takes a stacked copy of the parameters. With caches the layers run one by one: a loop
    would copy every cache for every token."""

    def __post_init__(self) -> None:
        """Checks, and fills in what depends on other fields, so that equal layers are equal."""
        for name in ("features", "num_layers", "num_heads"):
            int_at_least(name, getattr(self, name), 1)
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {sorted(NORMS)}, got {self.norm!r}")
        if not self.windows:
            raise ValueError("windows must have an entry, None to see all, got ()")
        for window in self.windows:
            if window is not None:
                int_at_least("windows", window, 1)
        if not isinstance(self.remat, bool) and not callable(self.remat):
            raise TypeError(
                f"remat must be True, False or one of jax.checkpoint_policies, got {self.remat!r}"
            )
        head_dim = self.head_dim
        filled = {
            "num_kv_heads": self.num_heads if self.num_kv_heads is None else self.num_kv_heads,
            "head_dim": default_head_dim(self.features, self.num_heads)
            if head_dim is None
            else head_dim,
            "hidden": 4 * self.features if self.hidden is None else self.hidden,
            "windows": tuple(self.windows[i % len(self.windows)] for i in range(self.num_layers)),
        }
        for name, x in filled.items():
            object.__setattr__(self, name, x)
        if self.scan and self.num_layers > 1 and period(self.windows) == self.num_layers:
            raise ValueError(
                f"scan needs windows that repeat within num_layers = {self.num_layers}, all layers "
                f"being part of a repetition, got {self.windows}"
            )

    @property
    def dtypes(self) -> dict[str, Any]:
        """Options of every module."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def new_norm(self, rngs: nnx.Rngs) -> Callable[..., nnx.Module]:
        """Makes a norm, of the model's width unless another is given."""

        def make(features: int = self.features, *, rngs: nnx.Rngs = rngs) -> nnx.Module:
            norm = NORMS[self.norm]
            return norm(features, epsilon=self.norm_epsilon, **self.dtypes, rngs=rngs)

        return make


class Stack(nnx.Module):
    """Layers one after the other, and a norm after the last where they have theirs first."""

    def __init__(
        self,
        config: Layers,
        *,
        causal: bool,
        context_features: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the layers.

        Args:
          config: what they are made of.
          causal: whether a token sees none after it.
          context_features: width of a context that each layer attends to.
          rngs: for parameters and dropout.
        """
        self.causal, self.alibi = causal, config.alibi
        self.windows, self.prefix_lm = config.windows, config.prefix_lm
        self.remat, self.scan = config.remat, config.scan
        if config.prefix_lm and not causal:
            raise ValueError("prefix_lm must be False in an encoder, which sees all in any case")
        seen = [both(_seen(window, causal), config.mask) for window in self.windows]
        self.blocks = nnx.List([_block(config, mask, context_features, rngs) for mask in seen])
        norm = config.new_norm(rngs)
        self.norm = nnx.data(None if config.order == "post" else norm())
        self.relative, self.max_distance = nnx.data(None), 0
        if config.relative is not None:
            self.max_distance = config.relative.max_distance
            shape = config.relative.buckets, config.num_heads
            init = nnx.initializers.normal(config.features**-0.5)
            self.relative = nnx.data(nnx.Param(init(rngs.params(), shape, config.param_dtype)))

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
          contexts: what ``contexts`` made, one for each layer.
          real: bool ``[*B T]``, False for padding; without caches.
          mask: beside that of the layers.
          context_mask: who sees what of the context.
          positions: of the tokens, for rotary; default from 0, or from where the caches end.
          caches: of the tokens before, as ``init_caches`` makes them.
          count: how many of the tokens are real, with caches.
          prefix: how many of the first tokens of the sequence see each other in both directions,
            an int or int array ``[*B]``; with caches, all of them come in the first call.

        Returns:
          The tokens; with caches also the new ones.

        Raises:
          ValueError: ``real`` with caches; no ``prefix`` without caches where ``prefix_lm``; a
            ``prefix`` where all is seen in any case.
        """
        if caches is not None and real is not None:
            raise ValueError("real must be None with caches: put padding last and give count")
        if caches is not None and prefix is None and self.prefix_lm:
            new = jnp.asarray(x.shape[-2] if count is None else count, jnp.int32)
            prefix = jnp.where(caches[0].length == 0, new, 0)  # what comes first is the prompt
        mask = both(self._order(prefix), both(padding(real), mask))
        options = {"mask": mask, "score": self._score(), "positions": positions}
        each: list[dict[str, Any]] = [{} for _ in self.blocks]
        if contexts is not None:
            options["context_mask"] = context_mask
            each = [{"context": context} for context in contexts]
        after = []
        if caches is not None:
            for block, own, cache in zip(self.blocks, each, caches, strict=True):
                own = {**options, **own, "cache": cache, "count": count}
                x, cache = run(block, x, own, remat=self.remat)
                after.append(cache)
        elif self.scan:
            every = period(self.windows)
            x = scan(self.blocks, x, options, each=each, every=every, remat=self.remat)
        else:
            for block, own in zip(self.blocks, each, strict=True):
                x = run(block, x, {**options, **own}, remat=self.remat)
        x = x if self.norm is None else self.norm(x)
        return x if caches is None else (x, tuple(after))

    def contexts(self, context: Float[AnyArray, "*B S C"]) -> tuple[Any, ...]:
        """The keys and values that each layer makes of a context, for many calls."""
        cross: list[Any] = [block.cross_attention for block in self.blocks]
        return tuple(residual.sublayer.keys_values(context) for residual in cross)

    def init_caches(
        self, batch: tuple[int, ...], capacity: int, *, dtype: Any = None, spare: int = 0
    ) -> tuple[KVCache, ...]:
        """Empty caches; rolling, and no larger than the window, where a layer has one.

        Args:
          batch: the batch axes ``*B``.
          capacity: how many tokens each row can have.
          dtype: of keys and values; default that of the layers.
          spare: how many tokens a ``rollback`` can take back at a time.
        """
        caches = []
        for block, window in zip(self.blocks, self.windows, strict=True):
            needed = capacity if window is None else window + spare
            rolling, size = needed < capacity, min(needed, capacity)
            attention: Any = block.attention.sublayer
            caches.append(attention.init_cache(batch, size, dtype=dtype, rolling=rolling))
        return tuple(caches)

    def _order(self, prefix: Any) -> Mask | None:
        """Causality, but for a prefix."""
        if not self.causal:
            if prefix is not None:
                raise ValueError("prefix must be None where all tokens see each other")
            return None
        if prefix is None and self.prefix_lm:
            raise ValueError(
                "prefix must be given for a prefix-LM without caches: how many of the first tokens "
                "see each other"
            )
        return masks.causal() if prefix is None else masks.prefix(prefix) | masks.causal()

    def _score(self) -> tuple[scores.Score, ...]:
        found: list[scores.Score] = []
        if self.alibi:
            found.append(scores.alibi())
        if self.relative is not None:
            found.append(
                scores.relative_bias(
                    self.relative[...],
                    bidirectional=not self.causal,
                    max_distance=self.max_distance,
                )
            )
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
        rngs=rngs,
    )


def _seen(window: int | None, causal: bool) -> Mask | None:
    """What a layer's window lets see, beside causality."""
    if window is None:
        return None
    if causal:
        return masks.window(window - 1, None)
    return masks.window(window // 2, (window - 1) // 2)


def padding(real: Bool[AnyArray, "*B S"] | None, queries: int | None = None) -> Mask | None:
    """``masks.padding``, and no mask where all tokens are real."""
    return None if real is None else masks.padding(real, queries)


def both(a: Mask | None, b: Mask | None) -> Mask | None:
    """What both let see."""
    return b if a is None else a if b is None else a & b


def positions_after(caches: tuple[KVCache, ...], T: int, count: Any) -> jax.Array:
    """Positions ``[*B T]`` of new tokens; those of padding, after ``count``, repeat the last."""
    new, length = same_rank(jnp.arange(T, dtype=jnp.int32), caches[0].length[..., None])
    if count is not None:
        most = jnp.maximum(jnp.asarray(count, jnp.int32) - 1, 0)
        new = jnp.minimum(*same_rank(new, most[..., None]))
    return length + new


def last(x: jax.Array, count: Any) -> jax.Array:
    """Of ``[*B T E]`` the token at ``count - 1``, ``[*B E]``."""
    at = jnp.broadcast_to(jnp.asarray(count, jnp.int32) - 1, x.shape[:-2])
    return jnp.take_along_axis(x, at[..., None, None], axis=-2)[..., 0, :]
