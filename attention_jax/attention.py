"""The public functions: ``attention``, ``attention_weights``, ``explain``.

They check arguments, bring them into one form, choose an implementation and run it. The formulas
are in ``backends/xla.py`` (readable) and ``backends/blockwise.py`` (fast), and before those, in
NumPy, in ``reference.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attention_jax import backends, dropout, masks
from attention_jax.axes import (
    AnyArray,
    Key,
    Normaliser,
    Output,
    Query,
    Sizes,
    Value,
    accumulation_dtype,
    check_broadcastable,
    check_float_array,
    check_query_key_value,
    is_array,
)
from attention_jax.backends import Request, xla
from attention_jax.explanation import Explanation, explain_blocks
from attention_jax.lift import Call
from attention_jax.masks import Mask
from attention_jax.scores import Score
from attention_jax.values import full_rank

__all__ = ["attention", "attention_weights", "explain"]

MaskLike = Mask | Bool[AnyArray, "..."] | None
ScoreLike = Score | Sequence[Score]
Sinks = Float[AnyArray, " N"] | None
Scale = float | Float[AnyArray, ""] | None
Implementation = str | Sequence[str] | None


@overload
def attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: MaskLike = ...,
    score: ScoreLike = ...,
    sinks: Sinks = ...,
    scale: Scale = ...,
    dropout_rate: float = ...,
    dropout_key: Any = ...,
    implementation: Implementation = ...,
    return_lse: Literal[False] = ...,
) -> Output: ...
@overload
def attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: MaskLike = ...,
    score: ScoreLike = ...,
    sinks: Sinks = ...,
    scale: Scale = ...,
    dropout_rate: float = ...,
    dropout_key: Any = ...,
    implementation: Implementation = ...,
    return_lse: Literal[True],
) -> tuple[Output, Normaliser]: ...
def attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sinks: Sinks = None,
    scale: Scale = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    implementation: Implementation = None,
    return_lse: bool = False,
) -> Output | tuple[Output, Normaliser]:
    """Softmax attention in all its forms.

    For each query ``i`` of each head of each example::

        s_ij  = scale * query_i . key_j     then scores, in the given order, then the mask
        lse_i = log(sum_j exp s_ij + exp sink)
        out_i = sum_j dropout(exp(s_ij - lse_i)) value_j

    A query that sees no key gives output 0, lse ``-inf`` (with sinks: the sink) and zero
    gradients. What keys hold that no query may see reaches nothing, even NaN.

    Args:
      query: ``[*B T N H]``, any floating dtype; sums are in at least float32.
      key: ``[*B S K H]``; ``N`` is a multiple of ``K``, query head ``n`` reads key head
        ``n // (N // K)``.
      value: ``[*B S K D]``.
      mask: who sees whom: a ``Mask`` from ``attention_jax.masks``, or a bool array broadcastable
        to ``[*B N T S]``, True where visible.
      score: changes of the logits: a ``Score`` from ``attention_jax.scores``, or a sequence.
      sinks: ``[N]``, an extra logit per head that takes probability and gives no value.
      scale: what ``query . key`` is multiplied by; None is ``1 / sqrt(H)``. May be traced.
      dropout_rate: probability of dropping a probability, in [0, 1); the rest is scaled up.
      dropout_key: a JAX random key. Keep or drop is a hash of it and ``(b, n, i, j)``.
      implementation: a name, a sequence of names to try in order, or None to choose.
      return_lse: also return the natural-log normaliser.

    Returns:
      The output ``[*B T N D]`` in the query's dtype; with ``return_lse`` also the lse
      ``[*B T N]`` in float32 or wider. Both are differentiable.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: the named implementation cannot do this; the message says which can.

    >>> import jax, attention_jax as aj
    >>> q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 4, 8)) for i in range(3))
    >>> aj.attention(q, k, v, mask=aj.masks.causal(), score=aj.scores.softcap(30.0)).shape
    (2, 5, 4, 8)

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
    """
    mask, score = _as_mask(mask), _as_scores(score)
    arrays = {"query": query, "key": key, "value": value, "sinks": sinks, "scale": scale}
    _check_types(arrays)
    dropout.check(dropout_rate, dropout_key)
    _check_flag("return_lse", return_lse)
    platform = backends.platform()
    arrays["scale"], number = _scale(scale, query)
    out, lse = _attention(
        arrays,
        mask,
        score,
        dropout_key if dropout_rate > 0.0 else None,
        # Part of the program where kernels need it so; on a CPU another number is not traced again.
        scale=None if platform == "cpu" else number,
        dropout_rate=float(dropout_rate),
        implementation=backends.check_names(implementation),
        return_lse=return_lse,
        platform=platform,
        partitioned=backends.partitioned(),
    )
    return (out, lse) if return_lse else out


def attention_weights(
    query: Query,
    key: Key,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sinks: Sinks = None,
    scale: Scale = None,
) -> Float[Array, "*B N T S"]:
    """The probabilities themselves, for looking at: ``p_ij = exp(s_ij - lse_i)``.

    Args:
      query, key, mask, score, sinks, scale: as for ``attention``.

    Returns:
      ``[*B N T S]`` in float32 or wider; a row that sees nothing is 0, and with sinks a row sums
      to less than 1.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> import jax.numpy as jnp, attention_jax as aj
    >>> q = jnp.zeros((3, 1, 2))
    >>> aj.attention_weights(q, q, mask=aj.masks.causal())[0, 1].tolist()
    [0.5, 0.5, 0.0]
    """
    mask, score = _as_mask(mask), _as_scores(score)
    arrays = {"query": query, "key": key, "sinks": sinks, "scale": scale}
    _check_types(arrays)
    arrays["scale"], _ = _scale(scale, query)
    return _weights(arrays, mask, score)


def explain(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sinks: Any = None,
    scale: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    implementation: Implementation = None,
    return_lse: bool = False,
    platform: str | None = None,
) -> Explanation:
    """Which implementation a call of ``attention`` runs, why, and what it costs.

    Args:
      query, key, value: arrays, or ``jax.ShapeDtypeStruct``: nothing is computed with them.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``; None is the one in use.
      The rest as for ``attention``.

    Returns:
      A value that prints as a table. ``chosen`` is None where none of those asked for can.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> import jax, attention_jax as aj
    >>> x = jax.ShapeDtypeStruct((1, 2048, 8, 64), "float32")
    >>> print(aj.explain(x, x, x, mask=aj.masks.window(255, 0)).chosen)
    blockwise
    """
    mask, score = _as_mask(mask), _as_scores(score)
    sizes = check_query_key_value(query, key, value)
    _check_scalars_and_sinks(sinks, scale, sizes)
    if dropout_rate:
        dropout.check(dropout_rate, dropout_key)
    _check_flag("return_lse", return_lse)
    mask, score = _resolve(mask, score, sizes)
    platform = platform or backends.platform()
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f'platform must be "cpu", "gpu" or "tpu", got {platform!r}')
    request = Request(
        sizes=sizes,
        dtype=query.dtype,
        mask=mask,
        score=score,
        scale=_scale(scale, query)[1],
        sinks=sinks is not None,
        dropout_rate=float(dropout_rate),
        return_lse=return_lse,
        platform=platform,
        partitioned=backends.partitioned(),
    )
    names = backends.check_names(implementation)
    try:
        chosen, reasons = backends.choose(names, request)
    except NotImplementedError:
        chosen = None
        reasons = {
            name: f"cannot: {reason}" if (reason := i.why_unsupported(request)) else "not asked for"
            for name, i in backends.IMPLEMENTATIONS.items()
        }
    return Explanation(
        chosen=chosen,
        platform=platform,
        reasons=reasons,
        extra_bytes={
            name: 0 if _nothing_to_see(sizes) else i.extra_bytes(request)
            for name, i in backends.IMPLEMENTATIONS.items()
        },
        **explain_blocks(
            mask, sizes, None if chosen is None else backends.IMPLEMENTATIONS[chosen].block(request)
        ),
    )


# --- From arguments to a Call. What follows runs while tracing, once per shape.


@functools.partial(
    jax.jit,
    static_argnames=(
        "scale",
        "dropout_rate",
        "implementation",
        "return_lse",
        "platform",
        "partitioned",
    ),
)
def _attention(
    arrays: dict[str, Any],
    mask: Mask | None,
    score: tuple[Score, ...],
    dropout_key: Any,
    *,
    scale: float | None,
    dropout_rate: float,
    implementation: str | tuple[str, ...] | None,
    return_lse: bool,
    platform: str,
    partitioned: bool,
) -> tuple[jax.Array, jax.Array]:
    sizes = check_query_key_value(arrays["query"], arrays["key"], arrays["value"])
    seed = None if dropout_key is None else dropout.seed(dropout_key)
    call = _call(arrays, mask, score, seed, sizes)
    request = Request(
        sizes=sizes,
        dtype=call.query.dtype,
        mask=call.mask,
        score=call.score,
        scale=scale,
        sinks=call.sinks is not None,
        dropout_rate=dropout_rate,
        return_lse=return_lse,
        platform=platform,
        partitioned=partitioned,
    )
    chosen, _ = backends.choose(implementation, request)
    if _nothing_to_see(sizes):
        return _unseen(call, sizes)
    return backends.IMPLEMENTATIONS[chosen].run(call, request)


@jax.jit
def _weights(arrays: dict[str, Any], mask: Mask | None, score: tuple[Score, ...]) -> jax.Array:
    arrays = {**arrays, "value": arrays["key"]}
    sizes = check_query_key_value(arrays["query"], arrays["key"], arrays["value"])
    call = _call(arrays, mask, score, None, sizes)
    if _nothing_to_see(sizes):
        dtype = accumulation_dtype(call.query.dtype)
        return jnp.zeros((*sizes.B, sizes.N, sizes.T, sizes.S), dtype)
    return xla.attention_weights(call, sizes)


def _call(
    arrays: dict[str, Any],
    mask: Mask | None,
    score: tuple[Score, ...],
    seed: Any,
    sizes: Sizes,
) -> Call:
    sinks, scale = arrays["sinks"], arrays["scale"]
    _check_scalars_and_sinks(sinks, scale, sizes)
    mask, score = _resolve(mask, score, sizes)
    return Call(
        query=jnp.asarray(arrays["query"]),
        key=jnp.asarray(arrays["key"]),
        value=jnp.asarray(arrays["value"]),
        mask=mask,
        score=score,
        sinks=sinks,
        scale=jnp.asarray(scale).astype(accumulation_dtype(arrays["query"].dtype)),
        seed=seed,
    )


def _resolve(
    mask: Mask | None, score: tuple[Score, ...], sizes: Sizes
) -> tuple[Mask | None, tuple[Score, ...]]:
    """Mask and scores with offsets known, and their arrays checked and at full rank."""
    T, S, N = sizes.T, sizes.S, sizes.N
    if isinstance(mask, masks.Dense):
        check_broadcastable("mask", mask.array.shape, sizes)
    if mask is not None:
        mask = full_rank(mask.resolve(T, S, N), sizes, "mask")
    return mask, tuple(full_rank(x.resolve(T, S, N), sizes, "score") for x in score)


def _nothing_to_see(sizes: Sizes) -> bool:
    return 0 in sizes.B or sizes.T == 0 or sizes.S == 0


def _unseen(call: Call, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """No queries, no keys or no examples: what rows give that see nothing."""
    shape = (*sizes.B, sizes.T, sizes.N)
    dtype = accumulation_dtype(call.query.dtype)
    lse = jnp.asarray(-np.inf, dtype) if call.sinks is None else call.sinks.astype(dtype)
    return jnp.zeros((*shape, sizes.D), call.query.dtype), jnp.broadcast_to(lse, shape)


def _as_mask(mask: Any) -> Mask | None:
    if mask is None or isinstance(mask, Mask):
        return mask
    if is_array(mask):
        if mask.dtype != np.bool_:
            raise TypeError(
                f"mask must be a Mask or a bool array (True = visible), got dtype {mask.dtype}; a "
                f"bias on the logits is score=scores.bias(array)"
            )
        return masks.dense(mask)
    raise TypeError(f"mask must be a Mask, a bool array or None, got {type(mask).__name__}")


def _as_scores(score: Any) -> tuple[Score, ...]:
    scores = (score,) if isinstance(score, Score) else score
    if not isinstance(scores, (tuple, list)) or not all(isinstance(x, Score) for x in scores):
        got = type(score).__name__
        if isinstance(scores, (tuple, list)):
            got += " of " + ", ".join(type(x).__name__ for x in scores)
        raise TypeError(
            f"score must be a Score or a sequence of them, got {got}; a bias is scores.bias(array)"
        )
    return tuple(scores)


def _check_types(arrays: dict[str, Any]) -> None:
    """What must be known before tracing: that everything is an array or a number."""
    for name, x in arrays.items():
        if x is None and name in ("sinks", "scale"):
            continue
        if name == "scale" and _is_number(x):
            continue
        check_float_array(name, x)
        if isinstance(x, jax.ShapeDtypeStruct):
            raise TypeError(f"{name} must be an array, got ShapeDtypeStruct: only explain takes it")


def _check_flag(name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r}")


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _scale(scale: Any, query: Any) -> tuple[Any, float | None]:
    """The scale, and the number that it is where that is known; None is ``1 / sqrt(H)``."""
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1] or 1) if query.shape else 1.0
    return (float(scale), float(scale)) if _is_number(scale) else (scale, None)


def _check_scalars_and_sinks(sinks: Any, scale: Any, sizes: Sizes) -> None:
    if sinks is not None:
        check_float_array("sinks", sinks)
        if sinks.shape != (sizes.N,):
            raise ValueError(
                f"sinks has shape {tuple(sinks.shape)}, expected [N] = ({sizes.N},), one per query "
                f"head"
            )
    if scale is not None:
        if not _is_number(scale):
            check_float_array("scale", scale)
        if np.ndim(scale) != 0:
            raise ValueError(f"scale must be a number, got shape {np.shape(scale)}")
