"""Multi-head attention as a Flax module: projections around ``attention``."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax import cache as caches
from attention_jax.api import attention as softmax_attention
from attention_jax.api import attention_weights
from attention_jax.backends.arguments import MaskLike, as_mask, as_scores, check_flag, check_types
from attention_jax.cache import Cache, PagedCache
from attention_jax.core.axes import (
    AnyArray,
    Size,
    check_tokens,
    int_at_least,
    kind,
    same_rank,
)
from attention_jax.core.dropout import check_rate
from attention_jax.masks import Mask
from attention_jax.mechanisms.as_attention import check_attention, check_weights
from attention_jax.nn.context import KeysValues, check_batch, check_context
from attention_jax.nn.linear import BIAS_INIT, KERNEL_INIT, linear, names_with_bias
from attention_jax.nn.logical import logical
from attention_jax.nn.rngs import check_rngs, dropout_key
from attention_jax.positions import Rotary
from attention_jax.scores import Score

Scores = Score | tuple[Score, ...]

# The logical axis of each projection's width; that of fused ones mixes heads of several kinds.
SHARDED: dict[tuple[str, ...], str] = {
    ("query",): "heads",
    ("key",): "kv_heads",
    ("value",): "kv_heads",
}


class MultiHeadAttention(nnx.Module):
    """Multi-head self-attention, or cross-attention to a context::

        q, k, v = x W_q, c W_k, c W_v                  c = x, or the context
        out     = concat_n(attention(q_n, k_n, v_n)) W_o

    Variants are arguments: a mask (local, global, causal), a score, rotary positions. With
    ``norm``, queries and keys are normalized before they are rotated, each head alone or, with
    ``joint_norm``, all heads of a token together; with ``gate``, the heads are multiplied by
    ``sigmoid(x W_g)`` before the output projection; with ``sinks``, each head has a learned logit
    in the denominator of its softmax.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax import masks
    >>> from attention_jax.nn import MultiHeadAttention
    >>> module = MultiHeadAttention(8, num_heads=2, mask=masks.causal(), rngs=nnx.Rngs(0))
    >>> module(np.ones((1, 5, 8), np.float32)).shape
    (1, 5, 8)

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        context_features: int | None = None,
        out_features: int | None = None,
        fused: bool = False,
        bias: bool | Collection[str] = True,
        mask: Mask | None = None,
        score: Scores = (),
        scale: float | None = None,
        rotary: Rotary | None = None,
        norm: Callable[..., nnx.Module] | None = None,
        joint_norm: bool = False,
        sinks: bool = False,
        gate: bool = False,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        attention: Callable[..., Any] = softmax_attention,
        implementation: str | tuple[str, ...] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        bias_init: nnx.Initializer = BIAS_INIT,
        rngs: nnx.Rngs,
    ) -> None:
        """Creates the projections.

        Args:
          features: width of the model (E).
          num_heads: query heads (N).
          num_kv_heads: key-value heads (K), of which ``num_heads`` is a multiple; default N.
          head_dim: width of queries and keys (H); default ``features / num_heads``.
          value_dim: width of values (D); default ``head_dim``.
          context_features: width of the context, which every call must then give.
          out_features: width of the result; default ``features``.
          fused: project query, key and value in one product (key and value, with a context).
          bias: which projections have a bias: all, none, or some of ``"query"``, ``"key"``,
            ``"value"``, ``"gate"``, ``"out"``.
          mask, score: applied in every call, together with those of the call.
          scale: of the logits; default ``1 / sqrt(H)``.
          rotary: rotates queries and keys by their positions.
          norm: constructor of the norms of queries and keys, ``norm(width, rngs=rngs)``.
          joint_norm, sinks, gate: see above; ``joint_norm`` has no effect without a norm.
          dropout_rate: of the attention probabilities.
          deterministic: disables dropout; ``train()`` and ``eval()`` set it.
          attention: ``attention`` of this library, or a function with the same arguments, which
            should raise for those that it does not support (see ``mechanisms.as_attention``).
          implementation: passed to ``attention`` if not None.
          dtype: of the computation; default: the promoted dtype of inputs and parameters.
          param_dtype: of the parameters.
          kernel_init, bias_init: initializers of the projections.
          rngs: for parameters and dropout.

        Raises:
          ValueError: sizes that do not fit, or an unknown projection.
        """
        head_dim = default_head_dim(features, num_heads) if head_dim is None else head_dim
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        value_dim = head_dim if value_dim is None else value_dim
        out_features = features if out_features is None else out_features
        sizes = {
            "features": features,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "context_features": features if context_features is None else context_features,
            "out_features": out_features,
        }
        for name, x in sizes.items():
            int_at_least(name, x, 1)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        check_rate(dropout_rate)
        check_types({"scale": scale})
        as_scores(score)  # raises unless these are scores
        if rotary is not None and not isinstance(rotary, Rotary):
            raise TypeError(f"rotary must be a Rotary or None, got {kind(rotary)}")
        check_rngs(rngs)
        check_attention(attention)
        if rotary is not None and context_features is not None:
            raise ValueError(
                "rotary must be None with context_features: positions of two sequences are not "
                "comparable"
            )
        has_bias = names_with_bias(bias)
        self.features, self.context_features = features, context_features
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.mask, self.score = _held(as_mask(mask)), _held(score)
        self.scale, self.rotary, self.joint_norm = scale, rotary, joint_norm
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.attention, self.implementation = attention, implementation
        self.dtype, self.param_dtype = dtype, param_dtype

        project = functools.partial(
            linear,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        N, K, H, D = num_heads, num_kv_heads, head_dim, value_dim
        widths = {"query": N * H, "key": K * H, "value": K * D}
        together = [["query"], ["key"], ["value"]]
        if fused:
            together = [["query", "key", "value"]]
            if context_features is not None:
                together = [["query"], ["key", "value"]]
        for names in together:
            biases = {has_bias(name) for name in names}
            if len(biases) > 1:
                raise ValueError(f"bias must be the same for {names}, which are fused")
            source = features
            if context_features is not None and names != ["query"]:
                source = context_features
            width = sum(widths[name] for name in names)
            axis, heads = SHARDED.get(tuple(names), "qkv"), K if names != ["query"] else N
            projection = project(
                source, width, axes=("embed", axis), units=heads, use_bias=biases.pop()
            )
            setattr(self, "_".join(names), projection)
        self.together = tuple(tuple(names) for names in together)
        wide = (N * H, K * H) if joint_norm else (H, H)
        norms = [None if norm is None else norm(width, rngs=rngs) for width in wide]
        self.query_norm, self.key_norm = map(nnx.data, norms)
        self.sinks = nnx.data(
            nnx.Param(jnp.zeros(N, param_dtype), **logical("heads")) if sinks else None
        )
        gating = functools.partial(project, axes=("embed", "heads"), units=N)
        self.gate = nnx.data(gating(features, N * D, use_bias=has_bias("gate")) if gate else None)
        self.out = project(
            N * D, out_features, axes=("heads", "embed"), units=N, use_bias=has_bias("out")
        )
        self.rngs = nnx.data(rngs.dropout.fork() if dropout_rate else None)

    # --- Calls.

    def __call__(
        self,
        x: Float[AnyArray, "*B T E"],
        context: Float[AnyArray, "*B S C"] | KeysValues | None = None,
        *,
        mask: MaskLike = None,
        score: Scores = (),
        positions: Any = None,
        cache: Cache | None = None,
        count: Any = None,
        return_weights: bool = False,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> Any:
        """Attends from each token of ``x`` to ``x`` itself or to a context.

        Args:
          x: tokens ``[*B T E]``.
          context: tokens to attend to, ``[*B S C]`` or their ``keys_values``; default ``x`` itself.
          mask: combined with that of the module by ``&``: a ``Mask``, or a bool array that
            broadcasts to ``[*B N T S]``. With a cache, a ``Mask`` in terms of positions; if neither
            is given, ``masks.causal()``.
          score: applied after those of the module.
          positions: of the tokens, integers that broadcast to ``[*B T]``, for ``rotary``; default
            from 0, or from the end of the cache.
          cache: the previous tokens. Masks and scores mean the same as for all tokens at once, or
            are refused; see ``attention_jax.cache``.
          count: how many of the tokens are real, with a cache; see ``cache.attend``.
          return_weights: also return the probabilities ``[*B N T S]``, without dropout.
          deterministic, rngs: as in Flax; default those of the module.

        Returns:
          ``[*B T E]``; then the weights, if requested; then the new cache, if there is one.

        Raises:
          ValueError: a context that is missing or does not suit this module; shapes that do not
            fit; a mask or score that the cache cannot honor.
          NotImplementedError: weights of a mechanism that has none.
        """
        T = self._check(x, context, cache)
        if cache is None and count is not None:
            raise ValueError("count must be None without a cache: mark padding with mask")
        check_flag("return_weights", return_weights)
        if return_weights:
            check_weights(self.attention)
        if positions is None:
            positions = jnp.arange(T, dtype=jnp.int32)
            if cache is not None:
                length, positions = same_rank(cache.length[..., None], positions)
                positions = length + positions
        if isinstance(context, KeysValues):
            (query,) = self._project(x, None, "query")
            key, value = context
        else:
            source = x if context is None else context
            query, key, value = self._project(x, source, "query", "key", "value")
            key = self._normed_and_rotated(key, self.key_norm, positions)
        query = self._normed_and_rotated(query, self.query_norm, positions)
        scores = (*as_scores(self.score), *as_scores(score))
        visible, new_cache = _both(self.mask, mask, whole=cache is None), None
        options: dict[str, Any] = {
            "sinks": None if self.sinks is None else self.sinks[...],
            "scale": self.scale,
        }
        named = {} if self.implementation is None else {"implementation": self.implementation}
        named |= self._dropout(deterministic, rngs)
        in_place = self.attention is softmax_attention and not return_weights
        if isinstance(cache, PagedCache) and in_place:  # others get the pages of each row, gathered
            options |= {"mask": visible, "score": scores, "count": count, **named}
            heads, new_cache = caches.attend(cache, query, key, value, **options)
            return self._finish(heads, x), new_cache
        if cache is not None:
            key, value, visible, new_cache = caches.extend(
                cache,
                key,
                value,
                mask=visible,  # type: ignore[arg-type]  # a bool array raises an error
                count=count,
            )
            scores = caches.placed_scores(cache, scores, T, count=count)
        options |= {"mask": visible, "score": scores}
        heads = self.attention(query, key, value, **options, **named)
        result = self._finish(heads, x)
        more: tuple[Any, ...] = ()
        if return_weights:
            more = (attention_weights(query, key, **options),)
        if cache is not None:
            more = (*more, new_cache)
        return (result, *more) if more else result

    def keys_values(self, context: Float[AnyArray, "*B S C"]) -> KeysValues:
        """Projects a context once, to be passed to many calls instead of it.

        Args:
          context: ``[*B S C]``.

        >>> import numpy as np
        >>> from flax import nnx
        >>> from attention_jax.nn import MultiHeadAttention
        >>> module = MultiHeadAttention(8, num_heads=2, context_features=6, rngs=nnx.Rngs(0))
        >>> module.keys_values(np.ones((1, 5, 6), np.float32)).key.shape
        (1, 5, 2, 4)
        """
        self._check_context(context)
        if isinstance(context, KeysValues):
            raise TypeError("context must be an array [*B S C], got KeysValues")
        key, value = self._project(None, context, "key", "value")
        return KeysValues(self._normed_and_rotated(key, self.key_norm, None), value)

    def init_cache(
        self,
        batch: tuple[int, ...],
        capacity: int,
        *,
        dtype: Any = None,
        rolling: bool = False,
        page_size: int | None = None,
        pages: int | None = None,
        quantize: str | None = None,
    ) -> Cache:
        """An empty cache for the keys and values of this module; see ``cache.init``.

        With a ``page_size`` it is a ``PagedCache`` of ``batch = (rows,)``; see ``init_paged``.
        """
        options: dict[str, Any] = {
            "capacity": capacity,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "dtype": dtype or self.dtype or self.param_dtype,
            "quantize": quantize,
        }
        if page_size is None:
            if pages is not None:
                raise ValueError("pages must be None without a page_size")
            return caches.init(batch, rolling=rolling, **options)
        if not isinstance(batch, tuple) or len(batch) != 1:
            raise ValueError(f"batch must be (rows,) with a page_size, got {batch}")
        if rolling:
            raise ValueError("rolling must be False with a page_size: pages hold all tokens")
        return caches.init_paged(batch[0], page_size=page_size, pages=pages, **options)

    # --- Parts.

    def _check(self, x: Any, context: Any, cache: Any) -> Size:
        check_tokens("x", x, "[*B T E]", self.features)
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(f"cache must be a KVCache, a PagedCache or None, got {kind(cache)}")
        if context is None and self.context_features is not None:
            raise ValueError(
                f"context must be given: this module attends to one, of width "
                f"{self.context_features} (context_features)"
            )
        scaling: Any = None if self.rotary is None else self.rotary.scaling
        dynamic = scaling is not None and scaling.depends_on_length
        if cache is not None and dynamic and (cache.rolling or cache.capacity > scaling.original):
            raise NotImplementedError(
                f"cache cannot be used with {type(scaling).__name__} beyond its {scaling.original} "
                f"original tokens: cached keys would have to be rotated again; use another scaling"
            )
        if context is not None:
            if cache is not None:
                raise ValueError(
                    "cache must be None with a context: project it once, with keys_values"
                )
            self._check_context(context)
            check_batch(context, x)
        T: Size = x.shape[-2]
        return T

    def _check_context(self, context: Any) -> None:
        check_context(
            context,
            self.context_features or self.features,
            rotary=self.rotary is not None,
            fused="query" in self.together[0] and len(self.together[0]) > 1,
        )

    def _project(
        self, x: AnyArray | None, context: AnyArray | None, *wanted: str
    ) -> list[jax.Array]:
        """Heads ``[*B T N H]`` by name: queries of ``x``, keys and values of ``context``."""
        shapes = {
            "query": (self.num_heads, self.head_dim),
            "key": (self.num_kv_heads, self.head_dim),
            "value": (self.num_kv_heads, self.value_dim),
        }
        heads = {}
        for names in self.together:
            if set(names) & set(wanted):
                flat = getattr(self, "_".join(names))(x if "query" in names else context)
                ends = itertools.accumulate(math.prod(shapes[name]) for name in names)
                for name, part in zip(
                    names, jnp.split(flat, list(ends)[:-1], axis=-1), strict=True
                ):
                    heads[name] = part.reshape(*part.shape[:-1], *shapes[name])
        return [heads[name] for name in wanted]

    def _normed_and_rotated(
        self, heads: jax.Array, norm: Callable[..., jax.Array] | None, positions: Any
    ) -> jax.Array:
        """Queries or keys, normalized and rotated."""
        if norm is not None:
            # Heads are neighbors in the projection, which is normalized as a whole.
            flat = jax.lax.collapse(heads, heads.ndim - 2) if self.joint_norm else heads
            heads = norm(flat).reshape(heads.shape)
        return heads if self.rotary is None else self.rotary(heads, positions)

    def _finish(self, heads: jax.Array, x: Any) -> jax.Array:
        """Heads ``[*B T N D]``, gated and projected to ``[*B T E]``."""
        flat = heads.reshape(*heads.shape[:-2], math.prod(heads.shape[-2:]))
        if self.gate is not None:
            flat = flat * jax.nn.sigmoid(self.gate(x))
        return self.out(flat)

    def _dropout(self, deterministic: bool | None, rngs: Any) -> dict[str, Any]:
        """Options of ``attention``."""
        deterministic = self.deterministic if deterministic is None else deterministic
        check_flag("deterministic", deterministic)
        if deterministic or not self.dropout_rate:
            return {}
        return {
            "dropout_rate": self.dropout_rate,
            "dropout_key": dropout_key(self.rngs if rngs is None else rngs),
        }

    def set_view(self, deterministic: bool | None = None) -> None:
        """For ``nnx.view``."""
        if deterministic is not None:
            self.deterministic = deterministic


def default_head_dim(features: int, num_heads: int) -> int:
    """``features / num_heads``; raises unless it is an integer."""
    int_at_least("num_heads", num_heads, 1)
    if features % num_heads:
        raise ValueError(
            f"features must be a multiple of num_heads unless head_dim is given, got {features} "
            f"and {num_heads}"
        )
    return features // num_heads


def _held(value: Any) -> Any:
    """A mask or scores as an attribute: data to Flax if they hold arrays, else static."""
    return nnx.data(value) if jax.tree.leaves(value) else value


def _both(own: Mask | None, mask: MaskLike, *, whole: bool) -> MaskLike:
    """The masks of module and call combined; a bool array is passed on if it is the only one."""
    if own is None or mask is None or not (whole or isinstance(mask, Mask)):
        return own if mask is None else mask
    given = as_mask(mask)
    return own if given is None else own & given
