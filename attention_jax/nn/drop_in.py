"""``attention`` with the signatures of ``jax.nn`` and Flax, so that existing code changes one line.

Every argument is honored, or refused by name. One result differs: a query with no visible key
gives 0 here, where they give the mean of all values.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.typing import ArrayLike

from attention_jax import masks, scores
from attention_jax.api import attention, attention_weights
from attention_jax.backends.arguments import check_flag
from attention_jax.core import dropout
from attention_jax.core.axes import (
    AnyArray,
    Sizes,
    check_broadcastable,
    check_positions,
    check_query_key_value,
    int_at_least,
    is_int,
)

Flag = bool | np.bool_


def attention_fn(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    bias: AnyArray | None = None,
    mask: AnyArray | None = None,
    broadcast_dropout: Flag = True,
    dropout_rng: Any = None,
    dropout_rate: float | np.floating[Any] = 0.0,
    deterministic: Flag = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: Flag = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    is_causal: Flag = False,
    promote_dtype: Callable[..., Any] | None = None,
) -> jax.Array:
    """For ``attention_fn=`` of Flax's Linen and NNX modules: softmax(q k^T / sqrt(H) + bias) v.

    Args:
      query, key, value: ``[*B T N H]``, ``[*B S K H]``, ``[*B S K D]``.
      bias: floating, broadcasts to ``[*B N T S]``, added to the logits.
      mask: broadcasts to ``[*B N T S]``; nonzero is visible.
      broadcast_dropout: use one dropout mask for all examples and heads.
      dropout_rng: a key of ``jax.random``, for dropout.
      dropout_rate, deterministic: the rate, in [0, 1), unless ``deterministic``.
      dtype: that query, key and value are cast to; default: their promoted dtype.
      precision: of products; they always use the full precision of the dtype.
      module: to ``sow`` the probabilities ``[*B N T S]`` into, as ``attention_weights``.
      force_fp32_for_softmax: the softmax always is in float32 or wider; this also keeps the sown
        probabilities from being cast to the dtype of the query.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: refused.
      is_causal: query ``i`` attends to keys up to ``i``.
      promote_dtype: replaces the cast, as ``promote_dtype((query, key, value), dtype=dtype)``.

    Returns:
      ``[*B T N D]``.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: a custom einsum.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import attention_fn
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
                f"{name} must be None: the products are part of a kernel and cannot be replaced"
            )
    broadcast_dropout = _flag("broadcast_dropout", broadcast_dropout)
    deterministic = _flag("deterministic", deterministic)
    force_fp32_for_softmax = _flag("force_fp32_for_softmax", force_fp32_for_softmax)
    is_causal = _flag("is_causal", is_causal)
    rate = _rate(dropout_rate, dropout_rng, deterministic)
    _check_precision(precision)
    query, key, value = _promoted(query, key, value, dtype, promote_dtype)
    sizes = check_query_key_value(query, key, value)
    bias = None if bias is None else _bias(bias, sizes)
    # Not `mask != 0`, which promotes the dtype of the mask.
    visible = None if mask is None else _pairs("mask", mask, sizes).astype(bool)

    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        bias: jax.Array | None,
        visible: jax.Array | None,
    ) -> jax.Array:
        drop = {"dropout_rate": rate, "dropout_key": dropout_rng} if rate else {}
        return attention(q, k, v, **_options(bias, visible, is_causal), **drop)

    if module is not None:
        weights = attention_weights(query, key, **_options(bias, visible, is_causal))
        _sow(module, weights if force_fp32_for_softmax else weights.astype(query.dtype))
    if rate and broadcast_dropout:
        attend = _with_one_dropout_mask(attend, len(sizes.B), sizes.G)
    return attend(query, key, value, bias, visible)


def _promoted(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    dtype: Any,
    promote_dtype: Callable[..., Any] | None,
) -> tuple[jax.Array, ...]:
    if dtype is not None and not _is_floating(dtype):
        raise TypeError(f"dtype must be floating or None, got {dtype!r}")
    arrays = _arrays(query, key, value)
    if promote_dtype is not None:
        if not callable(promote_dtype):
            raise TypeError(f"promote_dtype must be a function or None, got {promote_dtype!r}")
        return tuple(promote_dtype(arrays, dtype=dtype))
    dtype = jnp.result_type(*arrays) if dtype is None else dtype
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def _rate(rate: Any, key: Any, deterministic: bool) -> float:
    """The effective dropout rate."""
    if deterministic:
        dropout.check_rate(rate)
        return 0.0
    dropout.check(rate, key, "dropout_rng")
    return float(rate)


def _check_precision(precision: Any) -> None:
    for x in precision if isinstance(precision, tuple) else (precision,):
        if isinstance(x, (jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset)):
            continue
        try:
            jax.lax.Precision(x)
        except ValueError as e:
            raise ValueError(
                f"precision must be None, a jax.lax.Precision or the name of one, got {x!r}"
            ) from e


def _sow(module: Any, weights: jax.Array) -> None:
    if isinstance(module, linen.Module):
        module.sow("intermediates", "attention_weights", weights)
    elif isinstance(module, nnx.Module):
        module.sow(nnx.Intermediate, "attention_weights", weights)
    else:
        raise TypeError(f"module must be a Flax module or None, got {type(module).__name__}")


def _options(bias: jax.Array | None, visible: jax.Array | None, is_causal: bool) -> dict[str, Any]:
    mask = None if visible is None else masks.dense(visible)
    if is_causal:
        mask = masks.causal() if mask is None else mask & masks.causal()
    return {"mask": mask, "score": () if bias is None else scores.bias(bias)}


def _with_one_dropout_mask(
    attend: Callable[..., jax.Array], batch: int, group: int
) -> Callable[..., jax.Array]:
    """``attend`` mapped over heads and examples, so that all have the indices ``b = n = 0``."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, *arrays: jax.Array | None) -> jax.Array:
        k, v = (jnp.repeat(x, group, axis=-2) for x in (k, v))
        # Heads become batch axes, of one head each: [*B N T 1 H].
        q, k, v = (jnp.swapaxes(x, -2, -3)[..., None, :] for x in (q, k, v))
        arrays = tuple(
            None if x is None else x.reshape((1,) * (batch + 3 - x.ndim) + x.shape) for x in arrays
        )
        return jnp.swapaxes(mapped(batch + 1, q, k, v, *arrays)[..., 0, :], -2, -3)

    def mapped(
        levels: int, q: jax.Array, k: jax.Array, v: jax.Array, *arrays: jax.Array | None
    ) -> jax.Array:
        if not levels:
            return attend(q, k, v, *arrays)
        axes = tuple(None if x is None or x.shape[0] == 1 else 0 for x in arrays)
        arrays = tuple(
            x[0] if x is not None and axis is None else x
            for x, axis in zip(arrays, axes, strict=True)
        )

        def one(q: jax.Array, k: jax.Array, v: jax.Array, *arrays: jax.Array | None) -> jax.Array:
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
    scale: ArrayLike | None = None,
    is_causal: Flag = False,
    query_seq_lengths: ArrayLike | Sequence[int] | None = None,
    key_value_seq_lengths: ArrayLike | Sequence[int] | None = None,
    local_window_size: int | np.integer[Any] | Sequence[int | np.integer[Any]] | None = None,
    implementation: str | None = None,
    return_residual: Flag = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """``attention`` with the arguments of ``jax.nn.dot_product_attention``.

    Args:
      query, key, value: ``[B T N H]``, ``[B S K H]``, ``[B S K D]``, or all without ``B``.
      bias: floating, broadcasts to ``[B N T S]``, added to the logits.
      mask: bool, broadcasts to ``[B N T S]``; True is visible.
      scale: of the logits; default ``1 / sqrt(H)``.
      is_causal: query ``i`` attends to keys up to ``i``.
      query_seq_lengths, key_value_seq_lengths: integers ``[B]``, how many tokens are real; larger
        values mean all.
      local_window_size: how many keys to the left and right of its own position a query attends
        to; an int for both.
      implementation: any name that ``attention`` takes (``"xla"`` is the materialized formula);
        default: as ``attention`` chooses.
      return_residual: also return the logsumexp ``[B T N]``, in the query's dtype and without a
        gradient, as ``jax.nn``. For a precise and differentiable one, call ``attention`` with
        ``return_lse``.

    Returns:
      ``[B T N D]``; with ``return_residual`` also the logsumexp.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: the named implementation does not support the call; the message says
        which ones do.

    >>> import jax
    >>> from attention_jax.nn import dot_product_attention
    >>> x = jax.numpy.ones((1, 5, 2, 4))
    >>> dot_product_attention(x, x, x, is_causal=True).shape
    (1, 5, 2, 4)
    """
    query, key, value = _arrays(query, key, value)
    sizes = check_query_key_value(query, key, value)
    return_residual = _flag("return_residual", return_residual)
    visible = [masks.causal()] if _flag("is_causal", is_causal) else []
    if mask is not None:
        mask = _pairs("mask", mask, sizes)
        if mask.dtype != bool:
            raise TypeError(
                f"mask must be bool (True = visible), got dtype {mask.dtype}: to add to the "
                f"logits, use bias"
            )
        visible.append(masks.dense(mask))
    lengths = {
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    if any(x is not None for x in lengths.values()):
        queries, keys = (None if x is None else _lengths(n, x, sizes) for n, x in lengths.items())
        visible.append(masks.lengths(query=queries, key=keys))
    if local_window_size is not None:
        visible.append(masks.window(*_window(local_window_size)))
    call = functools.partial(
        attention,
        query,
        key,
        value,
        mask=functools.reduce(operator.and_, visible) if visible else None,
        score=() if bias is None else scores.bias(_bias(bias, sizes)),
        scale=_scale(scale),
        implementation=implementation,
    )
    if not return_residual:
        return call()
    out, lse = call(return_lse=True)
    return out, jax.lax.stop_gradient(lse.astype(query.dtype))


# --- Checks of arguments, under the names that they have here.


def _arrays(query: Any, key: Any, value: Any) -> tuple[jax.Array, ...]:
    named = {"query": query, "key": key, "value": value}
    return tuple(_array(name, x) for name, x in named.items())


def _array(name: str, x: Any) -> jax.Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as e:
        raise TypeError(f"{name} must be an array, got {type(x).__name__}") from e


def _flag(name: str, x: Any) -> bool:
    x = bool(x) if isinstance(x, np.bool_) else x
    check_flag(name, x)
    return bool(x)


def _pairs(name: str, x: Any, sizes: Sizes) -> jax.Array:
    """An array over pairs, which must broadcast to ``[*B N T S]``.

    A batch axis of size 1 is accepted where query, key and value have none.
    """
    x = _array(name, x)
    if not sizes.B and x.ndim == 4 and x.shape[0] == 1:
        x = x[0]
    check_broadcastable(name, x.shape, sizes)
    return x


def _bias(bias: ArrayLike, sizes: Sizes) -> jax.Array:
    bias = _pairs("bias", bias, sizes)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(
            f"bias must have a floating dtype, got {bias.dtype}: it is added to the logits; to "
            f"mark visible keys, use mask"
        )
    return bias


def _lengths(name: str, x: Any, sizes: Sizes) -> jax.Array:
    """One int per example; without a batch axis, of shape ``()`` or ``(1,)``."""
    given, x = x, check_positions(_array(name, x), name)
    if x.shape != sizes.B and (sizes.B or x.shape != (1,)):
        raise ValueError(
            f"{name} has shape {x.shape}, expected [B] = {sizes.B or (1,)}: one length for each "
            f"example"
        )
    # Values on a device are not waited for; there, negative lengths count as 0.
    if not isinstance(given, jax.Array) and (least := np.min(given, initial=0)) < 0:
        raise ValueError(f"{name} must not be negative, got {least}")
    return x.reshape(sizes.B).astype(jnp.int32)


def _window(size: Any) -> tuple[int, int]:
    both = (size, size) if is_int(size) else size
    try:
        left, right = (int_at_least("local_window_size", x, 0) for x in both)
    except (TypeError, ValueError) as e:
        raise type(e)(
            f"local_window_size must be an int or a pair of ints (left, right), each at least 0, "
            f"got {size!r}: for an unbounded side, give the length of the sequence"
        ) from e
    return left, right


def _scale(scale: ArrayLike | None) -> ArrayLike | None:
    """Also accepts NumPy numbers and integer arrays, as ``jax.nn`` does."""
    if isinstance(scale, (np.integer, np.floating)):
        return float(scale)
    if isinstance(scale, (jax.Array, np.ndarray)) and jnp.issubdtype(scale.dtype, jnp.integer):
        return jnp.asarray(scale).astype(jnp.float32)
    return scale
