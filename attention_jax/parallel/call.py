"""``parallel.attention``: arguments in, a strategy chosen and run."""

from __future__ import annotations

from typing import Any, Literal, overload

from attention_jax import api, backends
from attention_jax.api import Implementation, Positions
from attention_jax.backends.arguments import MaskLike, Scale, ScoreLike, Sinks, bind, check_flag
from attention_jax.core.axes import Key, Normalizer, Output, Query, Value
from attention_jax.parallel import gather, ring
from attention_jax.parallel.shards import AxisName, local, shard_of

STRATEGIES = ("gather", "ring", "heads")
Strategy = Literal["gather", "ring", "heads"]


@overload
def attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    axis_name: AxisName,
    strategy: Strategy = ...,
    mask: MaskLike = ...,
    score: ScoreLike = ...,
    sinks: Sinks = ...,
    scale: Scale = ...,
    dropout_rate: float = ...,
    dropout_key: Any = ...,
    query_positions: Positions = ...,
    key_positions: Positions = ...,
    implementation: Implementation = ...,
    return_lse: Literal[False] = ...,
) -> Output: ...
@overload
def attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    axis_name: AxisName,
    strategy: Strategy = ...,
    mask: MaskLike = ...,
    score: ScoreLike = ...,
    sinks: Sinks = ...,
    scale: Scale = ...,
    dropout_rate: float = ...,
    dropout_key: Any = ...,
    query_positions: Positions = ...,
    key_positions: Positions = ...,
    implementation: Implementation = ...,
    return_lse: Literal[True],
) -> tuple[Output, Normalizer]: ...
def attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    axis_name: AxisName,
    strategy: Strategy = "gather",
    mask: MaskLike = None,
    score: ScoreLike = (),
    sinks: Sinks = None,
    scale: Scale = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    query_positions: Positions = None,
    key_positions: Positions = None,
    implementation: Implementation = None,
    return_lse: bool = False,
) -> Output | tuple[Output, Normalizer]:
    """``attention`` inside ``shard_map``, over a mesh axis that splits the sequence.

    Every query attends to the keys of all devices along the axis. The result is that of one device
    with the whole sequence::

        attention(all queries, all keys, all values, ...)[this device's queries]

    Args:
      query: ``[*B T N H]``, this device's queries.
      key: ``[*B S K H]``, this device's keys.
      value: ``[*B S K D]``.
      axis_name: the mesh axis, or a tuple of axes, that splits the sequence.
      strategy: ``"gather"``, ``"ring"`` or ``"heads"``, which the docstring of ``parallel``
        compares.
      mask, score: as for ``attention``. Their arrays along queries are this device's. Arrays along
        keys alone are this device's too, or those of all devices in order; arrays along both
        (``masks.dense``, ``scores.bias``) have a row for each of its queries and a column for
        every key.
      sinks, scale, dropout_rate, dropout_key: as for ``attention``, the same on all devices.
      query_positions, key_positions: int32 ``[*B T]`` or ``[T]``, ``[*B S]`` or ``[S]``, the
        positions of this device's queries and keys; None: one device's follow those of the device
        before it. Any order is right, ``zigzag`` balances causal work.
      implementation: as for ``attention``; ``"ring"`` takes ``blockwise``, ``native``,
        ``pallas_gpu`` and ``xla``.
      return_lse: also return the natural-log normalizer.

    Returns:
      The output ``[*B T N D]`` of this device's queries; with ``return_lse`` also the lse
      ``[*B T N]``. ``"ring"`` has first derivatives in reverse mode only.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: the named implementation cannot do this.

    >>> import functools
    >>> import jax
    >>> import numpy as np
    >>> import attention_jax as aj
    >>> from jax.sharding import PartitionSpec as P
    >>> auto = (jax.sharding.AxisType.Auto,)
    >>> mesh = jax.make_mesh((jax.device_count(),), ("seq",), axis_types=auto)
    >>> q, k, v = (jax.random.normal(jax.random.key(i), (2, 64, 4, 8)) for i in range(3))
    >>> ring = functools.partial(
    ...     aj.parallel.attention, axis_name="seq", strategy="ring", mask=aj.masks.causal()
    ... )
    >>> split = P(None, "seq")
    >>> attend = jax.jit(jax.shard_map(ring, mesh=mesh, in_specs=split, out_specs=split))
    >>> out = attend(q, k, v)
    >>> whole = aj.attention(q, k, v, mask=aj.masks.causal())
    >>> np.allclose(out, whole, atol=1e-5)
    True

    Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context";
    Jacobs et al. 2023, "DeepSpeed Ulysses" (heads).
    """
    check_flag("return_lse", return_lse)
    if strategy not in STRATEGIES:
        known = ", ".join(f'"{name}"' for name in STRATEGIES)
        raise ValueError(f"strategy must be one of {known}, got {strategy!r}")
    asked, platform = backends.as_backends(implementation), backends.platform()
    constants = api.static_numbers(asked, platform)
    with local("TS", axis_name):
        call = bind(
            query,
            key,
            value,
            mask=mask,
            score=score,
            sinks=sinks,
            scale=scale,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            static_numbers=constants,
        )
        shard = shard_of(call, query_positions, key_positions, axis_name=axis_name)
    if strategy == "ring" and shard.sizes.T * shard.sizes.S and 0 not in shard.sizes.B:
        spec = {
            "platform": platform,
            "scale": call.scale if constants and isinstance(call.scale, float) else None,
            "return_lse": True,
            "partitioned": backends.partitioned(),
        }
        with local("TS", axis_name):
            out, lse = ring.attend(shard, asked, spec)
    elif strategy == "heads":
        results = api.run(gather.with_own_heads(shard), asked, return_lse=return_lse)
        out, lse = gather.own_queries(shard, *results)
    else:
        with local("T", axis_name):
            out, lse = api.run(gather.gathered(shard), asked, return_lse=return_lse)
    return (out, lse) if return_lse else out
