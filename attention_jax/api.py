"""The public functions: ``attention``, ``attention_weights``, ``explain``.

They check arguments, bring them into one form, choose an implementation and run it. The formulas
are in ``backends/xla.py`` (readable) and ``backends/blockwise.py`` (fast), and before those, in
NumPy, in ``reference.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attention_jax import backends
from attention_jax.backends import Spec, xla
from attention_jax.backends.call import (
    Call,
    MaskLike,
    Scale,
    ScoreLike,
    Sinks,
    as_mask,
    as_scores,
    call_of,
    check_flag,
    check_scalars_and_sinks,
    check_types,
    hoisted,
    resolve,
    scale_of,
)
from attention_jax.core import dropout
from attention_jax.core.axes import (
    Key,
    Normaliser,
    Output,
    Query,
    Sizes,
    Value,
    accumulation_dtype,
    check_query_key_value,
)
from attention_jax.explanation import Explanation, explain_blocks
from attention_jax.masks import Mask
from attention_jax.scores import Score

__all__ = ["attention", "attention_weights", "explain"]

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
      ``[*B T N]`` in float32 or wider. Both are differentiable. Policies of ``jax.checkpoint``
      know them as ``"attention_out"`` and ``"attention_lse"``: where both are saved, the backward
      pass of ``blockwise`` and ``pallas_gpu`` does not run the forward pass again.

    A Python number is part of the program, and another value compiles again, where the blocks to
    compute depend on it: offsets of masks, windows, lengths. To compile once for many values pass
    an array, such as ``masks.causal(offset=jnp.asarray(i))``. ``scale``, ``dropout_rate``,
    ``softcap`` and the offsets of scores compile once on a CPU.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: the named implementation cannot do this; the message says which can.

    >>> import jax, attention_jax as aj
    >>> q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 4, 8)) for i in range(3))
    >>> aj.attention(q, k, v, mask=aj.masks.causal(), score=aj.scores.softcap(30.0)).shape
    (2, 5, 4, 8)

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
    """
    mask, score = as_mask(mask), as_scores(score)
    arrays = {"query": query, "key": key, "value": value, "sinks": sinks, "scale": scale}
    check_types(arrays)
    dropout.check(dropout_rate, dropout_key)
    check_flag("return_lse", return_lse)
    platform = backends.platform()
    arrays["scale"], number = scale_of(scale, query)
    # Numbers are part of the program where kernels need them so; on a CPU another number is not
    # traced again.
    mask, score = hoisted(mask, score, (query, key, value), numbers=platform == "cpu")
    out, lse = _attention(
        arrays,
        mask,
        score,
        dropout.of_rate(dropout_rate, dropout_key, accumulation_dtype(query.dtype)),
        scale=None if platform == "cpu" else number,
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
    mask, score = as_mask(mask), as_scores(score)
    arrays = {"query": query, "key": key, "sinks": sinks, "scale": scale}
    check_types(arrays)
    arrays["scale"], _ = scale_of(scale, query)
    mask, score = hoisted(mask, score, (query, key))
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
    mask, score = as_mask(mask), as_scores(score)
    sizes = check_query_key_value(query, key, value)
    check_scalars_and_sinks(sinks, scale, sizes)
    if dropout_rate:
        dropout.check(dropout_rate, dropout_key)
    check_flag("return_lse", return_lse)
    platform = platform or backends.platform()
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f'platform must be "cpu", "gpu" or "tpu", got {platform!r}')
    mask, score = hoisted(mask, score, (query, key, value), numbers=platform == "cpu")
    mask, score = resolve(mask, score, sizes)
    spec = Spec(
        sizes=sizes,
        dtype=query.dtype,
        mask=mask,
        score=score,
        scale=scale_of(scale, query)[1],
        sinks=sinks is not None,
        dropout=dropout_rate > 0.0,
        return_lse=return_lse,
        platform=platform,
        partitioned=backends.partitioned(),
    )
    names = backends.check_names(implementation)
    try:
        chosen, reasons = backends.choose(names, spec)
    except NotImplementedError:
        chosen = None
        reasons = {
            name: f"cannot: {reason}" if reason is not None else "not asked for"
            for name in backends.IMPLEMENTATIONS
            for reason in [backends.why_unsupported(name, spec)]
        }
    return Explanation(
        chosen=chosen,
        platform=platform,
        reasons=reasons,
        extra_bytes={
            name: 0 if _nothing_to_see(sizes) else i.extra_bytes(spec)
            for name, i in backends.IMPLEMENTATIONS.items()
        },
        **explain_blocks(
            mask, sizes, None if chosen is None else backends.IMPLEMENTATIONS[chosen].block(spec)
        ),
    )


# --- What follows runs while tracing, once per shape.


@functools.partial(
    jax.jit,
    static_argnames=(
        "scale",
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
    drop: dropout.Dropout | None,
    *,
    scale: float | None,
    implementation: str | tuple[str, ...] | None,
    return_lse: bool,
    platform: str,
    partitioned: bool,
) -> tuple[jax.Array, jax.Array]:
    sizes = check_query_key_value(arrays["query"], arrays["key"], arrays["value"])
    call = call_of(arrays, mask, score, drop, sizes)
    spec = Spec(
        sizes=sizes,
        dtype=call.query.dtype,
        mask=call.mask,
        score=call.score,
        scale=scale,
        sinks=call.sinks is not None,
        dropout=call.dropout is not None,
        return_lse=return_lse,
        platform=platform,
        partitioned=partitioned,
    )
    chosen, _ = backends.choose(implementation, spec)
    if _nothing_to_see(sizes):
        return _unseen(call, sizes)
    return backends.IMPLEMENTATIONS[chosen].run(call, spec)


@jax.jit
def _weights(arrays: dict[str, Any], mask: Mask | None, score: tuple[Score, ...]) -> jax.Array:
    arrays = {**arrays, "value": arrays["key"]}
    sizes = check_query_key_value(arrays["query"], arrays["key"], arrays["value"])
    call = call_of(arrays, mask, score, None, sizes)
    if _nothing_to_see(sizes):
        dtype = accumulation_dtype(call.query.dtype)
        return jnp.zeros((*sizes.B, sizes.N, sizes.T, sizes.S), dtype)
    return xla.attention_weights(call, sizes)


def _nothing_to_see(sizes: Sizes) -> bool:
    return 0 in sizes.B or sizes.T == 0 or sizes.S == 0


def _unseen(call: Call, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """No queries, no keys or no examples: what rows give that see nothing."""
    shape = (*sizes.B, sizes.T, sizes.N)
    dtype = accumulation_dtype(call.query.dtype)
    lse = jnp.asarray(-np.inf, dtype) if call.sinks is None else call.sinks.astype(dtype)
    return jnp.zeros((*shape, sizes.D), call.query.dtype), jnp.broadcast_to(lse, shape)
