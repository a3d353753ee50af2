"""Peers: what a JAX user would call instead, behind our signature.

Each is given what it has an argument for and refuses the rest; nothing is repaired on the way, so
that the checker shows where they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.masks import Mask
from attention_jax.scores import Bias, Score


def jax_nn(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Mask | None = None,
    score: Sequence[Score] = (),
    sinks: Any = None,
    scale: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    return_lse: bool = False,
) -> Any:
    """``jax.nn.dot_product_attention``, as it is where ``jax`` is installed.

    Args: as for ``attention``.
    Returns: as ``attention``.
    Raises: NotImplementedError, for what it has no argument.

    >>> import jax.numpy as jnp
    >>> from attention_jax.testing import jax_nn
    >>> x = jnp.ones((2, 3, 1, 4))
    >>> jax_nn(x, x, x, sinks=jnp.zeros(1))
    Traceback (most recent call last):
    NotImplementedError: jax.nn.dot_product_attention has no sinks
    """
    name = "jax.nn.dot_product_attention"
    _refuse(name, sinks=sinks is not None, dropout=dropout_rate > 0)
    if value.shape[-1] != query.shape[-1]:
        raise NotImplementedError(f"{name} has no value width D other than H")
    batch = query.shape[:-3]
    flat = [x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)]
    bias, visible = (
        None
        if x is None
        else jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(-1, *x.shape[-3:])
        for x in _dense(name, query, key, mask, score)
    )
    fn: Callable[..., Any] = jax.nn.dot_product_attention
    result = fn(*flat, bias, visible, scale=scale, return_residual=return_lse)
    shape = (*query.shape[:-1], value.shape[-1])
    if return_lse:
        return result[0].reshape(shape), result[1].reshape(shape[:-1])
    return result.reshape(shape)


def flax_linen(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """``flax.linen.dot_product_attention``, as it is where ``flax`` is installed.

    Args: as for ``attention``.
    Returns: as ``attention``, without lse.
    Raises: NotImplementedError, for what it has no argument.

    >>> import jax.numpy as jnp
    >>> from attention_jax.testing import flax_linen
    >>> x = jnp.ones((2, 3, 1, 4))
    >>> flax_linen(x, x, x, scale=0.5)
    Traceback (most recent call last):
    NotImplementedError: flax.linen.dot_product_attention has no scale
    """
    import flax.linen

    if query.shape[-2] != key.shape[-2]:
        raise NotImplementedError("flax.linen.dot_product_attention has no K other than N")
    fn = flax.linen.dot_product_attention
    return _flax("flax.linen.dot_product_attention", fn, query, key, value, **options)


def flax_nnx(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """``flax.nnx.dot_product_attention``, as it is where ``flax`` is installed.

    Args: as for ``attention``.
    Returns: as ``attention``, without lse.
    Raises: NotImplementedError, for what it has no argument.

    >>> import jax.numpy as jnp
    >>> from attention_jax.testing import flax_nnx
    >>> x = jnp.ones((2, 3, 1, 4))
    >>> flax_nnx(x, x, x, return_lse=True)
    Traceback (most recent call last):
    NotImplementedError: flax.nnx.dot_product_attention has no lse
    """
    import flax.nnx

    fn = flax.nnx.dot_product_attention
    return _flax("flax.nnx.dot_product_attention", fn, query, key, value, **options)


def _flax(
    name: str,
    fn: Callable[..., Any],
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Mask | None = None,
    score: Sequence[Score] = (),
    sinks: Any = None,
    scale: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    return_lse: bool = False,
) -> Any:
    _refuse(
        name,
        positions=query_positions is not None or key_positions is not None,
        sinks=sinks is not None,
        scale=scale is not None,
        dropout=dropout_rate > 0,
        lse=return_lse,
    )
    bias, visible = _dense(name, query, key, mask, score)
    return fn(query, key, value, bias, visible)


def _refuse(name: str, **asked: bool) -> None:
    reasons = {"dropout": "dropout that NumPy can repeat"}
    for what, wanted in asked.items():
        if wanted:
            raise NotImplementedError(f"{name} has no {reasons.get(what, what)}")


def _dense(
    name: str, query: Any, key: Any, mask: Mask | None, score: Sequence[Score]
) -> tuple[Any, Any]:
    """Bias and mask as arrays ``[*B N T S]`` (axes of size 1 broadcast), or None."""
    *batch, T, N, _ = query.shape
    S = key.shape[-3]
    if len(score) > 1 or not all(isinstance(x, Bias) for x in score):
        raise NotImplementedError(f"{name} has no scores but one bias")
    bias = visible = None
    if score:
        bias = score[0].array  # type: ignore[attr-defined]
        bias = bias.reshape((1,) * (len(batch) + 3 - bias.ndim) + bias.shape)
    if mask is not None:
        visible = mask.to_dense(T, S, B=math.prod(batch), N=N).reshape(*batch, N, T, S)
    return bias, visible
