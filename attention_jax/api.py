"""The public functions: check the arguments, choose a backend and run it, or explain the choice."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attention_jax import backends
from attention_jax.backends import Backend, sequence, xla
from attention_jax.backends.arguments import MaskLike, Scale, ScoreLike, Sinks, bind, check_flag
from attention_jax.backends.call import Call, Spec, complete, spec_of
from attention_jax.backends.explanation import Explanation
from attention_jax.core.axes import (
    AnyArray,
    Key,
    Normalizer,
    Output,
    Query,
    Sizes,
    Value,
    accumulation_dtype,
)
from attention_jax.core.compat import no_mesh
from attention_jax.core.positions import Contiguous
from attention_jax.masks import block_map

Implementation = str | Backend | Sequence[str | Backend] | None
Positions = Int[AnyArray, "..."] | Contiguous | None


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
    """Scaled dot-product attention with masks, scores, sinks and dropout.

    For each query ``i`` of each head of each example::

        s_ij  = scale * query_i . key_j     then scores, in the given order, then the mask
        lse_i = log(sum_j exp s_ij + exp sink)
        out_i = sum_j dropout(exp(s_ij - lse_i)) value_j

    A query that attends to no key has output 0, lse ``-inf`` (with sinks: the sink) and zero
    gradients. Keys and values that no query may attend to do not affect the result, even if they
    hold NaN.

    Args:
      query: ``[*B T N H]``, any floating dtype; sums are accumulated in float32 or wider.
      key: ``[*B S K H]``; ``N`` is a multiple of ``K``, and query head ``n`` reads key head
        ``n // (N // K)``.
      value: ``[*B S K D]``.
      mask: which keys each query may attend to: a ``Mask`` from ``attention_jax.masks``, or a bool
        array broadcastable to ``[*B N T S]``, True where visible. An array per example needs the
        head axis: ``[*B 1 T S]``.
      score: changes to the logits: a ``Score`` from ``attention_jax.scores``, or a sequence.
      sinks: ``[N]``, an extra logit per head that absorbs probability and contributes no value.
      scale: the factor of ``query . key``; None is ``1 / sqrt(H)``. May be traced.
      dropout_rate: the fraction of attention probabilities to drop, in [0, 1); the others are
        divided by ``1 - dropout_rate``.
      dropout_key: a JAX random key. The dropout mask is a hash of it and ``(b, n, i, j)``.
      query_positions, key_positions: int32 ``[*B T]`` or ``[T]``, ``[*B S]`` or ``[S]``: what the
        rules of masks, scores and dropout take for ``i`` and ``j``; None: 0, 1, 2, ... For queries
        and keys that are some of a sequence's, in any order. Keys at negative positions are masked.
        Arrays of masks and scores stay in the order of the call's queries and keys, and
        ``align="end"`` is ``align="start"``: the positions are those of one sequence.
      implementation: a name, a configured ``Backend`` such as ``backends.Blockwise(block_q=128)``,
        a sequence of these to try in order, or None to choose.
      return_lse: also return the natural-log normalizer.

    Returns:
      The output ``[*B T N D]`` in the query's dtype; with ``return_lse`` also the lse
      ``[*B T N]`` in float32 or wider. Both are differentiable. For policies of
      ``jax.checkpoint`` they are named ``"attention_out"`` and ``"attention_lse"``: if both are
      saved, the backward pass of ``blockwise``, ``native`` and ``pallas_gpu`` does not repeat the
      forward pass.

    Python numbers in masks (offsets, windows, lengths) are constants of the compiled program,
    because they determine which blocks to compute: a new value compiles again. To compile once for
    many values, pass an array, such as ``masks.causal(offset=jnp.asarray(i))``. On a CPU, a new
    ``scale``, ``dropout_rate``, ``softcap`` or offset of a score does not compile again, unless
    ``implementation`` includes a configured kernel.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: the named implementation cannot do this; the message says which can.

    >>> import jax, attention_jax as aj
    >>> q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 4, 8)) for i in range(3))
    >>> aj.attention(q, k, v, mask=aj.masks.causal(), score=aj.scores.softcap(30.0)).shape
    (2, 5, 4, 8)

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
    """
    check_flag("return_lse", return_lse)
    asked = backends.as_backends(implementation)
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
        query_positions=query_positions,
        key_positions=key_positions,
        static_numbers=static_numbers(asked, backends.platform()),
    )
    out, lse = run(call, asked, return_lse=return_lse)
    return (out, lse) if return_lse else out


def run(
    call: Call, asked: tuple[str | Backend, ...] | None, *, return_lse: bool
) -> tuple[jax.Array, jax.Array]:
    """Output and lse of a call from ``bind``."""
    platform = backends.platform()
    constant = static_numbers(asked, platform) and isinstance(call.scale, float)
    found: tuple[jax.Array, jax.Array] = _attention(
        call,
        scale=call.scale if constant else None,
        asked=asked,
        return_lse=return_lse,
        platform=platform,
        partitioned=backends.partitioned(),
    )
    return found


@functools.partial(
    jax.jit, static_argnames=("scale", "asked", "return_lse", "platform", "partitioned")
)
def _attention(
    call: Call, *, asked: tuple[str | Backend, ...] | None, **known: Any
) -> tuple[jax.Array, jax.Array]:
    """Chooses and runs a backend. The choice is made while tracing, once per shape."""
    run = functools.partial(_on_one_device, asked, known)
    if names := sequence.axes_of_queries(call):
        return sequence.over_queries(run, *complete(call), names)
    return run(call)


def _on_one_device(
    asked: tuple[str | Backend, ...] | None, known: dict[str, Any], call: Call
) -> tuple[jax.Array, jax.Array]:
    call, sizes = complete(call)
    spec = spec_of(call, sizes, **known)
    backend = backends.choose(asked, spec).backend
    return _nothing_visible(call, sizes) if _no_pairs(sizes) else backend.run(call, spec)


def static_numbers(asked: tuple[str | Backend, ...] | None, platform: str) -> bool:
    """Whether Python numbers must be constants of the program, as some kernels require.

    On a CPU they are arguments, so that a new value does not compile again.
    """
    kernels = (x for x in asked or () if isinstance(x, Backend) and x.STATIC_NUMBERS)
    return platform != "cpu" or any(kernels)


def attention_weights(
    query: Query,
    key: Key,
    *,
    mask: MaskLike = None,
    score: ScoreLike = (),
    sinks: Sinks = None,
    scale: Scale = None,
    query_positions: Positions = None,
    key_positions: Positions = None,
) -> Float[Array, "*B N T S"]:
    """The attention probabilities, for inspection: ``p_ij = exp(s_ij - lse_i)``.

    Args:
      query, key, mask, score, sinks, scale, query_positions, key_positions: as for ``attention``.

    Returns:
      ``[*B N T S]`` in float32 or wider; fully masked rows are 0, and with sinks a row sums to less
      than 1.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> import jax.numpy as jnp, attention_jax as aj
    >>> q = jnp.zeros((3, 1, 2))
    >>> aj.attention_weights(q, q, mask=aj.masks.causal())[0, 1].tolist()
    [0.5, 0.5, 0.0]
    """
    call = bind(
        query,
        key,
        key,
        mask=mask,
        score=score,
        sinks=sinks,
        scale=scale,
        query_positions=query_positions,
        key_positions=key_positions,
    )
    return _weights(call)


@jax.jit
def _weights(call: Call) -> jax.Array:
    call, sizes = complete(call)
    if _no_pairs(sizes):
        dtype = accumulation_dtype(call.query.dtype)
        return jnp.zeros((*sizes.B, sizes.N, sizes.T, sizes.S), dtype)
    return xla.attention_weights(call, sizes)


def _no_pairs(sizes: Sizes) -> bool:
    return 0 in sizes.B or sizes.T == 0 or sizes.S == 0


def _nothing_visible(call: Call, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """The result of a call without queries, keys or examples: as if every row were fully masked."""
    shape = (*sizes.B, sizes.T, sizes.N)
    dtype = accumulation_dtype(call.query.dtype)
    lse = jnp.asarray(-np.inf, dtype) if call.sinks is None else call.sinks.astype(dtype)
    return jnp.zeros((*shape, sizes.D), call.query.dtype), jnp.broadcast_to(lse, shape)


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
    query_positions: Positions | jax.ShapeDtypeStruct = None,
    key_positions: Positions | jax.ShapeDtypeStruct = None,
    implementation: Implementation = None,
    return_lse: bool = False,
    platform: str | None = None,
) -> Explanation:
    """Which implementation a call of ``attention`` runs, why, and what it costs.

    Args:
      query, key, value: arrays or ``jax.ShapeDtypeStruct``: only shapes, dtypes and explicit
        shardings matter.
      mask, score, ...: as for ``attention``; positions may be ``jax.ShapeDtypeStruct`` too, which
        leaves the blocks uncounted.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``; None is the one in use.

    Returns:
      A value that prints as a table.

    Raises:
      TypeError, ValueError: as ``attention``.

    >>> import jax, attention_jax as aj
    >>> x = jax.ShapeDtypeStruct((1, 2048, 8, 64), "float32")
    >>> print(aj.explain(x, x, x, mask=aj.masks.window(255, 0), platform="tpu").chosen)
    splash
    """
    check_flag("return_lse", return_lse)
    platform = platform or backends.platform()
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f'platform must be "cpu", "gpu" or "tpu", got {platform!r}')
    asked = backends.as_backends(implementation)
    constants = static_numbers(asked, platform)
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
        query_positions=query_positions,
        key_positions=key_positions,
        static_numbers=constants,
        abstract=True,
    )
    known_scale = call.scale if constants and isinstance(call.scale, float) else None
    query, key, value = (
        jax.ShapeDtypeStruct(
            x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=_explicit_sharding(x)
        )
        for x in call[:3]
    )
    call, sizes = complete(call._replace(query=query, key=key, value=value))
    if sizes.symbolic_batch or sizes.symbolic_lengths:
        raise ValueError(f"explain needs sizes that are numbers, got query of shape {query.shape}")
    spec = spec_of(
        call,
        sizes,
        scale=known_scale,
        return_lse=return_lse,
        platform=platform,
        partitioned=backends.partitioned(),
    )
    choice = backends.choose(asked, sequence.spec_of_one_device(spec, call))
    return Explanation(
        chosen=choice.name,
        platform=platform,
        reasons=choice.reasons,
        extra_bytes={
            name: 0 if _no_pairs(sizes) else backend.extra_bytes(spec)
            for name, backend in choice.backends.items()
        },
        split=sequence.split(call, sizes),
        **_cost(None if choice.name is None else choice.backend, spec),
    )


def _explicit_sharding(x: Any) -> Any:
    sharding = jax.typeof(x).sharding
    return sharding if sharding.mesh.explicit_axes else None


def _cost(chosen: Backend | None, spec: Spec) -> dict[str, Any]:
    """Block counts and FLOPs of the chosen backend, for ``Explanation``."""
    sizes, mask = spec.sizes, spec.mask
    batch = math.prod(sizes.B)
    dense = 2 * batch * sizes.N * sizes.T * sizes.S * (sizes.H + sizes.D)
    cost: dict[str, Any] = {"blocks": None, "flops": None, "dense_flops": dense}
    if chosen is None:
        return cost
    if _no_pairs(sizes) or (block := chosen.block(spec)) is None:
        return {**cost, "flops": dense}
    arrays = jax.tree.leaves(mask)
    if any(isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct)) for x in arrays):
        return cost
    block_q, block_k = block
    with no_mesh():  # its devices may be absent, or the mask's arrays sharded over them
        mask = jax.tree.map(jnp.asarray, jax.device_get(mask))
        blocks = block_map.count(
            mask, sizes.T, sizes.S, block_q=block_q, block_k=block_k, B=batch, N=sizes.N
        )
    pairs = blocks.visited * block_q * block_k
    return {
        **cost,
        "blocks": {"block_q": block_q, "block_k": block_k, **blocks._asdict()},
        "flops": min(dense, 2 * pairs * (sizes.H + sizes.D)),
    }
