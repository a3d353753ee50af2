"""The stack of layers that all models share."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float

from attention_jax import masks, scores
from attention_jax.cache import Cache
from attention_jax.core.axes import AnyArray
from attention_jax.core.shards import split_along
from attention_jax.masks import Mask
from attention_jax.models.layers import Layers
from attention_jax.models.running import run, scan
from attention_jax.models.tokens import both, padding
from attention_jax.nn import Block, FeedForward, MixtureOfExperts, MultiHeadAttention
from attention_jax.nn.logical import logical
from attention_jax.nn.padding import as_real


class Stack(nnx.Module):
    """Layers in sequence, then a final norm, unless each layer ends with one (``"post"``)."""

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
        self.period = config.period
        self.blocks = nnx.List(
            [_block(config, i, mask, context_features, rngs) for i, mask in enumerate(layer_masks)]
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
        caches: tuple[Cache, ...] | None = None,
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
        real = as_real(real, x.shape[:-1])
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
            every, remat = self.period, self.remat
            x = scan(self.blocks, x, options, each=each, every=every, remat=remat)
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
        self,
        batch: tuple[int, ...],
        capacity: int,
        *,
        dtype: Any = None,
        spare: int = 0,
        page_size: int | None = None,
        pages: int | None = None,
        quantize: str | None = None,
    ) -> tuple[Cache, ...]:
        """Empty caches; for a layer with a window, a rolling one no larger than the window.

        Args:
          batch: the batch axes ``*B``.
          capacity: the largest number of tokens per row.
          dtype: of keys and values; default that of the layers.
          spare: how many tokens one ``rollback`` can remove.
          page_size: tokens per page of paged caches, see ``cache.init_paged``, which hold all
            tokens also for layers with a window; None for plain and rolling ones.
          pages: the pages of each layer; default as many as all rows could need.
          quantize: ``"int8"`` to store keys and values as 8-bit integers, see ``cache.init``.
        """
        caches = []
        options: dict[str, Any] = {"page_size": page_size, "pages": pages, "quantize": quantize}
        for block, window in zip(self.blocks, self.windows, strict=True):
            needed = capacity if window is None or page_size is not None else window + spare
            rolling, size = needed < capacity, min(needed, capacity)
            attention: Any = block.attention.sublayer
            caches.append(
                attention.init_cache(batch, size, dtype=dtype, rolling=rolling, **options)
            )
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
    config: Layers, i: int, mask: Mask | None, context_features: int | None, rngs: nnx.Rngs
) -> Block:
    """Layer ``i``."""
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
        joint_norm=config.query_key_norm == "joint",
        sinks=config.sinks,
        gate=config.gate,
        dropout_rate=config.attention_dropout_rate,
        attention=config.attention,
        implementation=config.implementation,
        **config.dtypes,
        rngs=rngs,
    )
    cross = None
    own = heads(mask=mask, rotary=config.rotaries[i])
    if context_features is not None:
        cross = heads(context_features=context_features)
    feed_forward = _feed_forward(config, rngs)
    return Block(
        own,
        feed_forward,
        norm=norm,
        cross_attention=cross,
        order=config.order,
        scale=config.residual_scale,
        parallel=config.parallel,
        dropout_rate=config.dropout_rate,
        attention_dropout_rate=config.attention_output_dropout_rate,
        attention_norm=config.first_norm or i > 0,
        rngs=rngs,
    )


def _feed_forward(config: Layers, rngs: nnx.Rngs) -> FeedForward | MixtureOfExperts:
    sizes: Any = config.features, config.hidden
    options = {
        "activation": config.activation,
        "dropout_rate": config.feed_forward_dropout_rate,
        **config.dtypes,
        "rngs": rngs,
    }
    if config.experts is not None:
        experts, per_token = config.experts.number, config.experts.per_token
        options |= {"experts": experts, "per_token": per_token}
        return MixtureOfExperts(*sizes, normalize=config.experts.normalize, **options)
    bias, fused = config.feed_forward_bias, config.fused
    return FeedForward(*sizes, gated=config.gated, fused=fused, bias=bias, **options)


def _window_mask(window: int | None, causal: bool) -> Mask | None:
    """The mask of a layer's window, to be combined with causality."""
    if window is None:
        return None
    if causal:
        return masks.window(window - 1, None)
    return masks.window(window // 2, (window - 1) // 2)
