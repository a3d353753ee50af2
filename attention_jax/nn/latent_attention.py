"""Multi-head latent attention (DeepSeek) as a Flax module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax import cache as caches
from attention_jax.backends.arguments import MaskLike, as_mask, as_scores, check_types
from attention_jax.cache import Cache
from attention_jax.core.axes import AnyArray, check_tokens, int_at_least
from attention_jax.core.dropout import check_rate
from attention_jax.masks import Mask
from attention_jax.mechanisms import absorbed_latent_attention, latent_attention
from attention_jax.nn import calls
from attention_jax.nn.attention import Scores, default_head_dim
from attention_jax.nn.linear import BIAS_INIT, KERNEL_INIT, linear
from attention_jax.nn.logical import logical
from attention_jax.nn.rngs import check_rngs
from attention_jax.positions import Rotary

UP_INIT = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))


class LatentAttention(nnx.Module):
    """Self-attention whose keys and values come from one small vector per token, the latent::

        c, r  = x W_down;  c = norm(c), r = rotate(r)          of all heads, R + P numbers
        q, p  = norm(x W_a) W_query, or x W_query; p = rotate(p)    H + P numbers per head
        out_n = attention([q_n, p_n], [c U_n, r], c V_n)       H and D numbers from W_up
        out   = concat_n(out_n) W_o

    A cache holds ``c`` and ``r`` only. With few new tokens, their queries are projected to the
    latents instead of all latents to keys, ``q . (c U) = (q U^T) . c``, and the heads attend to the
    latents themselves; with many, keys and values are formed. The result is the same.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import LatentAttention
    >>> module = LatentAttention(8, num_heads=2, latent_features=6, rotary_dim=2, rngs=nnx.Rngs(0))
    >>> x = np.ones((1, 5, 8), np.float32)
    >>> module(x).shape
    (1, 5, 8)
    >>> out, cache = module(x, cache=module.init_cache((1,), capacity=7))
    >>> cache.key.shape, cache.value.shape  # latents and rotary keys
    ((1, 7, 1, 6), (1, 7, 1, 2))

    Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        latent_features: int,
        query_latent_features: int | None = None,
        head_dim: int | None = None,
        rotary_dim: int,
        value_dim: int | None = None,
        bias: bool = False,
        mask: Mask | None = None,
        score: Scores = (),
        scale: float | None = None,
        rotary: Rotary | None = None,
        norm: Callable[..., nnx.Module] | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
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
          num_heads: heads (N).
          latent_features: width of the latents of keys and values (R).
          query_latent_features: width of the latents of queries; None for none.
          head_dim: width of queries and keys without their rotary part (H); default
            ``features / num_heads``.
          rotary_dim: width of the rotary part (P), even.
          value_dim: width of values (D); default ``head_dim``.
          bias: whether the projections from and to the model's width have a bias, except that of
            queries without a latent.
          mask, score: applied in every call, together with those of the call.
          scale: of the logits; default ``1 / sqrt(H + P)``.
          rotary: rotates the rotary parts; None: they stay.
          norm: constructor of the norms of the latents, ``norm(width, rngs=rngs)``.
          dropout_rate, deterministic, implementation, dtype, param_dtype, kernel_init, bias_init:
            as for ``MultiHeadAttention``.
          rngs: for parameters and dropout.

        Raises:
          TypeError, ValueError: an option of another kind, or a width that is not positive.
        """
        head_dim = default_head_dim(features, num_heads) if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {
            "features": features,
            "num_heads": num_heads,
            "latent_features": latent_features,
            "head_dim": head_dim,
            "rotary_dim": rotary_dim,
            "value_dim": value_dim,
        }
        if query_latent_features is not None:
            sizes["query_latent_features"] = query_latent_features
        for name, x in sizes.items():
            int_at_least(name, x, 1)
        if rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even, got {rotary_dim}")
        check_rate(dropout_rate)
        check_types({"scale": scale})
        as_scores(score)  # raises unless these are scores
        calls.check_rotary(rotary)
        check_rngs(rngs)
        self.features, self.num_heads, self.latent_features = features, num_heads, latent_features
        self.head_dim, self.rotary_dim, self.value_dim = head_dim, rotary_dim, value_dim
        self.mask, self.score = calls.held(as_mask(mask)), calls.held(score)
        self.scale, self.rotary, self.implementation = scale, rotary, implementation
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.dtype, self.param_dtype = dtype, param_dtype

        project = functools.partial(
            linear,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        down = functools.partial(project, axes=("embed", None), use_bias=bias)
        N, R, H, P, D = num_heads, latent_features, head_dim, rotary_dim, value_dim
        self.query_down = self.query_norm = self.latent_norm = nnx.data(None)
        if query_latent_features is not None:
            self.query_down = down(features, query_latent_features)
            self.query_norm = nnx.data(norm and norm(query_latent_features, rngs=rngs))
        self.query = project(
            query_latent_features or features,
            N * (H + P),
            axes=("embed" if query_latent_features is None else None, "heads"),
            units=N,
            use_bias=False,
        )
        self.down = down(features, R + P)
        self.latent_norm = nnx.data(norm and norm(R, rngs=rngs))

        init = UP_INIT(rngs.params(), (R, N, H + D), param_dtype)
        self.key_value_up = nnx.Param(init, **logical(None, "heads", None))
        self.out = project(N * D, features, axes=("heads", "embed"), units=N, use_bias=bias)
        self.rngs = nnx.data(rngs.dropout.fork() if dropout_rate else None)

    def __call__(
        self,
        x: Float[AnyArray, "*B T E"],
        *,
        mask: MaskLike = None,
        score: Scores = (),
        positions: Any = None,
        cache: Cache | None = None,
        count: Any = None,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> Any:
        """Attends from each token of ``x`` to ``x`` itself, and to the tokens of the cache.

        Args:
          x: tokens ``[*B T E]``.
          mask, score, positions, cache, count, deterministic, rngs: as for ``MultiHeadAttention``.

        Returns:
          ``[*B T E]``; then the new cache, if there is one.

        Raises:
          ValueError: shapes that do not fit; a mask or score that the cache cannot honor.
        """
        check_tokens("x", x, "[*B T E]", self.features)
        calls.check_cache(cache, count, self.rotary)
        T = x.shape[-2]
        if positions is None:
            positions = calls.next_positions(cache, T)
        query, query_rotary = self._queries(x, positions)
        latent, key_rotary = self._latents(x, positions)
        scores = (*as_scores(self.score), *as_scores(score))
        visible, new_cache = calls.both_masks(self.mask, mask, whole=cache is None), None
        if cache is not None:  # latents and rotary keys take the places of keys and values
            latent, key_rotary, visible, new_cache = caches.extend(
                cache,
                latent[..., None, :],
                key_rotary[..., None, :],
                mask=visible,  # type: ignore[arg-type]  # a bool array raises an error
                count=count,
            )
            latent, key_rotary = latent[..., 0, :], key_rotary[..., 0, :]
            scores = caches.placed_scores(cache, scores, T, count=count)
        up = self.key_value_up[...].astype(query.dtype)
        key_up, value_up = jnp.split(up, [self.head_dim], axis=-1)
        absorbs = cache is not None and self._absorbs(T, cache.capacity)
        attend = absorbed_latent_attention if absorbs else latent_attention
        deterministic = self.deterministic if deterministic is None else deterministic
        named = {} if self.implementation is None else {"implementation": self.implementation}
        heads = attend(
            query,
            query_rotary,
            latent,
            key_rotary,
            key_up,
            value_up,
            mask=visible,
            score=scores,
            scale=self.scale,
            **calls.dropout(self.dropout_rate, deterministic, self.rngs if rngs is None else rngs),
            **named,
        )
        out = self.out(heads.reshape(*heads.shape[:-2], self.num_heads * self.value_dim))
        return out if cache is None else (out, new_cache)

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
        """An empty cache for latents ``[*B C 1 R]`` and rotary keys ``[*B C 1 P]``.

        With a ``page_size`` it is a ``PagedCache`` of ``batch = (rows,)``: ``cache.init_paged``.
        """
        return calls.new_cache(
            batch,
            rolling=rolling,
            page_size=page_size,
            pages=pages,
            capacity=capacity,
            num_kv_heads=1,
            head_dim=self.latent_features,
            value_dim=self.rotary_dim,
            dtype=dtype or self.dtype or self.param_dtype,
            quantize=quantize,
        )

    def _queries(self, x: Any, positions: Any) -> tuple[jax.Array, jax.Array]:
        """The parts ``[*B T N H]`` and ``[*B T N P]`` of the queries."""
        if self.query_down is not None:
            x = self.query_down(x)
            x = x if self.query_norm is None else self.query_norm(x)
        flat = self.query(x)
        heads = flat.reshape(*flat.shape[:-1], self.num_heads, self.head_dim + self.rotary_dim)
        query, rotated = jnp.split(heads, [self.head_dim], axis=-1)
        return query, self._rotated(rotated, positions)

    def _latents(self, x: Any, positions: Any) -> tuple[jax.Array, jax.Array]:
        """The latents ``[*B T R]`` and the rotary keys ``[*B T P]``."""
        latent, rotated = jnp.split(self.down(x), [self.latent_features], axis=-1)
        latent = latent if self.latent_norm is None else self.latent_norm(latent)
        return latent, self._rotated(rotated[..., None, :], positions)[..., 0, :]

    def _rotated(self, heads: jax.Array, positions: Any) -> jax.Array:
        return heads if self.rotary is None else self.rotary(heads, positions)

    def _absorbs(self, T: int, S: int) -> bool:
        """Whether attention to the latents takes fewer multiplications than forming the keys.

        Per head, ``T S (2 R + P) + T R (H + D)`` instead of ``T S (H + P + D) + S R (H + D)``.
        """
        R, wide = self.latent_features, self.head_dim + self.value_dim
        return T * S * (2 * R - wide) + T * R * wide < S * R * wide

    def set_view(self, deterministic: bool | None = None) -> None:
        """For ``nnx.view``."""
        if deterministic is not None:
            self.deterministic = deterministic
