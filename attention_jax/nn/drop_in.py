"""``attention`` with the arguments of others: existing code switches in one line.

Every argument is honoured or refused by name. What differs is what the others leave to chance: a
query that a mask lets see no key gives 0 here, where they give the mean of all values.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.typing import ArrayLike

from attention_jax import masks, scores
from attention_jax.attention import attention, attention_weights
from attention_jax.axes import AnyArray


def attention_fn(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    bias: AnyArray | None = None,
    mask: AnyArray | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    is_causal: bool = False,
) -> jax.Array:
    """For ``attention_fn=`` of Flax's Linen and NNX modules: softmax(q k^T / sqrt(H) + bias) v.

    Args:
      query, key, value: ``[*B T N H]``, ``[*B S K H]``, ``[*B S K D]``.
      bias: broadcasts to ``[*B N T S]``, added to the logits.
      mask: broadcasts to ``[*B N T S]``; visible where not 0.
      broadcast_dropout: drop the same pairs in every example and head.
      dropout_rng: a key of ``jax.random``, for dropout.
      dropout_rate, deterministic: the rate, unless ``deterministic``.
      dtype: what query, key and value are cast to; default: the one they promote to.
      precision: of products; they have all that the dtype has, which is at least what is asked.
      module: where to ``sow`` the probabilities ``[*B N T S]``, as ``attention_weights``.
      force_fp32_for_softmax: the softmax is in float32 or wider in any case.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: refused.
      is_causal: query ``i`` sees no key after ``i``.

    Returns:
      ``[*B T N D]``.

    Raises:
      NotImplementedError: an einsum of one's own.

    >>> import numpy as np
    >>> module = nnx.MultiHeadAttention(
    ...     num_heads=2, in_features=8, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
    >>> module(np.ones((1, 5, 8), np.float32)).shape
    (1, 5, 8)
    """
    replaced = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, x in replaced.items():
        if x is not None:
            raise NotImplementedError(
                f"{name} must be None: the products are inside a kernel and cannot be replaced"
            )
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    rate = 0.0 if deterministic else dropout_rate
    visible = None if mask is None else jnp.asarray(mask).astype(bool)
    if module is not None:
        weights = attention_weights(query, key, **_options(bias, visible, is_causal))
        if isinstance(module, linen.Module):
            module.sow("intermediates", "attention_weights", weights)
        else:
            module.sow(nnx.Intermediate, "attention_weights", weights)

    def attend(q: Any, k: Any, v: Any, bias: Any, visible: Any) -> jax.Array:
        dropout = {"dropout_rate": rate, "dropout_key": dropout_rng} if rate else {}
        return attention(q, k, v, **_options(bias, visible, is_causal), **dropout)

    if rate and broadcast_dropout:
        attend = _alike(attend, query.ndim - 3, query.shape[-2] // key.shape[-2])
    return attend(query, key, value, bias, visible)


def _options(bias: Any, visible: Any, is_causal: bool) -> dict[str, Any]:
    mask = None if visible is None else masks.dense(visible)
    if is_causal:
        mask = masks.causal() if mask is None else mask & masks.causal()
    return {"mask": mask, "score": () if bias is None else scores.bias(jnp.asarray(bias))}


def _alike(attend: Callable[..., jax.Array], batch: int, group: int) -> Callable[..., jax.Array]:
    """``attend`` on one head of one example after the other, none of which knows its number."""

    def run(q: Any, k: Any, v: Any, *arrays: Any) -> jax.Array:
        k, v = (jnp.repeat(x, group, axis=-2) for x in (k, v))
        # Every head of every example, with an axis of one head left: [*B N T 1 H].
        q, k, v = (jnp.swapaxes(x, -2, -3)[..., None, :] for x in (q, k, v))
        arrays = tuple(
            None if x is None else x.reshape((1,) * (batch + 3 - x.ndim) + x.shape) for x in arrays
        )
        return jnp.swapaxes(mapped(batch + 1, q, k, v, *arrays)[..., 0, :], -2, -3)

    def mapped(levels: int, q: Any, k: Any, v: Any, *arrays: Any) -> jax.Array:
        if not levels:
            return attend(q, k, v, *arrays)
        axes = tuple(None if x is None or x.shape[0] == 1 else 0 for x in arrays)
        arrays = tuple(
            x[0] if x is not None and axis is None else x
            for x, axis in zip(arrays, axes, strict=True)
        )

        def one(q: Any, k: Any, v: Any, *arrays: Any) -> jax.Array:
            return mapped(levels - 1, q, k, v, *arrays)

        return jax.vmap(one, in_axes=(0, 0, 0, *axes))(q, k, v, *arrays)

    return run


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """``attention`` with the arguments of ``jax.nn.dot_product_attention``.

    Args:
      query, key, value: ``[B T N H]``, ``[B S K H]``, ``[B S K D]``, or all without ``B``.
      bias: broadcasts to ``[B N T S]``, added to the logits.
      mask: bool, broadcasts to ``[B N T S]``; True is visible.
      scale: of the logits; default ``1 / sqrt(H)``.
      is_causal: query ``i`` sees no key after ``i``.
      query_seq_lengths, key_value_seq_lengths: ints ``[B]``, how many are real.
      local_window_size: keys to the left and right of a query's own place that it sees; an int for
        both.
      implementation: ``"xla"`` is the materialised one; ``"cudnn"`` is refused; None: our choice.
      return_residual: also the logsumexp ``[B T N]``.

    Returns:
      ``[B T N D]``; with ``return_residual`` also the logsumexp.

    Raises:
      NotImplementedError: ``implementation="cudnn"``.

    >>> x = jax.numpy.ones((1, 5, 2, 4))
    >>> dot_product_attention(x, x, x, is_causal=True).shape
    (1, 5, 2, 4)
    """
    if implementation == "cudnn":
        raise NotImplementedError(
            "implementation 'cudnn' cannot be called from here: use jax.nn.dot_product_attention"
        )
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    visible = [masks.causal()] if is_causal else []
    if mask is not None:
        visible.append(masks.dense(_of_rank(mask, query.ndim)))
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        lengths = (
            None if x is None else _per_example(x, query.ndim)
            for x in (query_seq_lengths, key_value_seq_lengths)
        )
        visible.append(masks.lengths(*lengths))
    if local_window_size is not None:
        if isinstance(local_window_size, int):
            local_window_size = local_window_size, local_window_size
        left, right = local_window_size
        visible.append(masks.window(left, right))
    together = functools.reduce(operator.and_, visible) if visible else None
    rest: dict[str, Any] = {
        "score": () if bias is None else scores.bias(_of_rank(bias, query.ndim)),
        "scale": scale,
        "implementation": implementation,
        "return_lse": return_residual,
    }
    return attention(query, key, value, mask=together, **rest)


def _of_rank(x: ArrayLike, rank: int) -> jax.Array:
    """Without leading axes of size 1 that an example without batch axes does not have."""
    x = jnp.asarray(x)
    while x.ndim > rank and x.shape[0] == 1:
        x = x[0]
    return x


def _per_example(x: ArrayLike, rank: int) -> Any:
    x = jnp.asarray(x, jnp.int32)
    return x.reshape(()) if rank == 3 else x
