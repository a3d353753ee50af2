"""Linear attention: feature maps replace the exponential, so keys and values are summed once::

out_i = sum_j f(q_i) . f(k_j) v_j / sum_j f(q_i) . f(k_j)
      = f(q_i) S / f(q_i) z          S = sum_j f(k_j) v_j^T,   z = sum_j f(k_j)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention_jax.backends.arguments import MaskLike, check_types
from attention_jax.backends.heads import lift
from attention_jax.core.axes import (
    Key,
    Query,
    Sizes,
    Value,
    accumulation_dtype,
    check_query_key_value,
)
from attention_jax.core.softmax import product
from attention_jax.mechanisms.causal_padding import (
    CausalPadding,
    as_causal_padding,
    keep_rows,
    zero_padding,
)
from attention_jax.mechanisms.chunkwise import run_causal, scan_chunks
from attention_jax.mechanisms.packing import PackedState, documents_of

CHUNK = 64  # tokens, causal
CHUNK_OF_ALL = 1024  # tokens, not causal


class Features(NamedTuple):
    """The feature maps of queries and keys, ``[t H]`` to ``[t M]``, at least 0.

    Attributes:
      query: of queries.
      key: of keys.
    """

    query: Callable[[jax.Array], jax.Array]
    key: Callable[[jax.Array], jax.Array]


def _elu_plus_1(x: jax.Array) -> jax.Array:
    return jax.nn.elu(x) + 1


ELU_PLUS_1 = Features(_elu_plus_1, _elu_plus_1)

# A column of ones is appended to the values, v = [value, 1], so that sum_j f(k_j) v_j^T holds both
# S and z. It is passed as a separate array, so that padding is zeroed in it too.


def linear_head(
    features: Features,
    M: int,
    q: Float[Array, "T H"],
    k: Float[Array, "S H"],
    value: Float[Array, "S D"],
    ones: Float[Array, "S 1"],
) -> Float[Array, "T D"]:
    """``f(Q) S / f(Q) z`` for one head, not causal, in chunks that fit into a CPU cache."""

    def add(S: jax.Array, k: jax.Array, *v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return k[:, :0], S + product(features.key(k), jnp.concatenate(v, axis=1), 0, 0)

    def read(S: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _normalized(product(features.query(q), S, 1, 0)), S

    S = jnp.zeros((M, value.shape[1] + 1), value.dtype)
    _, S = scan_chunks(add, S, (k, value, ones), CHUNK_OF_ALL)
    return scan_chunks(read, S, (q,), CHUNK_OF_ALL)[0]


def causal_linear_chunk(
    features: Features,
    state: Float[Array, "M D1"],
    q: Float[Array, "C H"],
    k: Float[Array, "C H"],
    value: Float[Array, "C D"],
    ones: Float[Array, "C 1"],
) -> tuple[Float[Array, "C D"], Float[Array, "M D1"]]:
    """``out = tril(f(Q) f(K)^T) V + f(Q) S``, ``S' = S + f(K)^T V`` for a chunk of one head."""
    q, k, v = features.query(q), features.key(k), jnp.concatenate([value, ones], axis=1)
    pairs = jnp.tril(product(q, k, 1, 1))
    out = product(pairs, v, 1, 0) + product(q, state, 1, 0)
    return _normalized(out), state + product(k, v, 0, 0)


def packed_linear_chunk(
    features: Features,
    state: Float[Array, "M D1"],
    q: Float[Array, "C H"],
    starts: Float[Array, "C 1"],
    k: Float[Array, "C H"],
    value: Float[Array, "C D"],
    ones: Float[Array, "C 1"],
) -> tuple[Float[Array, "C D"], Float[Array, "M D1"]]:
    """``causal_linear_chunk`` with the state reset where a document starts."""
    documents = documents_of(starts)
    q, k, v = features.query(q), features.key(k), jnp.concatenate([value, ones], axis=1)
    pairs = jnp.tril(jnp.where(documents.same, product(q, k, 1, 1), 0))
    out = product(pairs, v, 1, 0) + product(keep_rows(documents.first, q), state, 1, 0)
    state = documents.carry(state) + product(keep_rows(documents.last, k), v, 0, 0)
    return _normalized(out), state


def _normalized(sums: Float[Array, "t D1"]) -> Float[Array, "t D"]:
    """The weighted sums divided by the sum of the weights, the last column; 0 if that is 0."""
    total = sums[:, -1:]
    return jnp.where(total == 0, 0, sums[:, :-1] / jnp.where(total == 0, 1, total))


def linear_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: MaskLike = None,
    features: Features = ELU_PLUS_1,
    segments: Any = None,
    state: Float[Array, "*B K M D1"] | PackedState | None = None,
    return_state: bool = False,
) -> Any:
    """Attention whose weights are products of feature maps, in linear time.

    For each query ``i`` of each head of each example, with ``f`` the feature maps::

        out_i = sum_j f(q_i) . f(k_j) v_j / sum_j f(q_i) . f(k_j)
              = f(q_i) S / f(q_i) z        S = sum_j f(k_j) v_j^T,   z = sum_j f(k_j)

    Time and memory are ``O((T + S) M D)``. If causal, the sums run over ``j <= i``: ``S`` and ``z``
    after the last token are the state, and passing it to the next call, of one token or many,
    resumes the sequence.

    Args:
      query, key, value: as for ``attention``.
      mask: None, ``masks.causal()``, ``masks.lengths``, ``masks.padding``, joined by ``&``.
      features: feature maps of queries and keys; default ``elu(x) + 1``.
      segments: ids of packed documents, see ``gated_linear_attention``; causal only.
      state: ``[*B K M D+1]``, ``S`` and ``z`` side by side, after the previous tokens; causal only.
        With ``segments`` a ``PackedState``.
      return_state: whether to return the state after these tokens too.

    Returns:
      ``[*B T N D]`` in the query's dtype, 0 where the weights sum to 0; with ``return_state`` also
      the state, in float32 or wider.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
      NotImplementedError: any other mask.

    >>> import functools
    >>> import jax
    >>> import numpy as np
    >>> from attention_jax import masks
    >>> from attention_jax.mechanisms import linear_attention
    >>> q, v = np.zeros((3, 1, 2), np.float32), np.float32([1, 3, 8]).reshape(3, 1, 1)
    >>> attend = functools.partial(linear_attention, mask=masks.causal(), return_state=True)
    >>> attend = jax.jit(attend)
    >>> out, state = attend(q[:2], q[:2], v[:2])
    >>> out.ravel().tolist()  # running means
    [1.0, 2.0]
    >>> out, state = attend(q[2:], q[2:], v[2:], state=state)
    >>> out.item()
    4.0

    Source: Katharopoulos et al. 2020, "Transformers are RNNs".
    """
    check_types({"query": query, "key": key, "value": value})
    sizes = check_query_key_value(query, key, value)
    padding = as_causal_padding(mask, sizes, "linear_attention")
    dtype = accumulation_dtype(query.dtype)
    ones = jnp.ones((*key.shape[:-1], 1), dtype)
    M = jax.eval_shape(features.key, jax.ShapeDtypeStruct((1, sizes.H), dtype)).shape[-1]
    if padding.causal:
        return run_causal(
            functools.partial(causal_linear_chunk, features),
            functools.partial(packed_linear_chunk, features),
            query,
            (key, value, ones),
            chunk=CHUNK,
            state_shape=(M, sizes.D + 1),
            sizes=sizes,
            padding=padding,
            segments=segments,
            state=state,
            return_state=return_state,
            dtype=query.dtype,
        )
    if state is not None or return_state or segments is not None:
        raise ValueError("state, return_state and segments require mask=masks.causal()")
    head = functools.partial(linear_head, features, M)
    out = _over_heads(head, query, key, value, ones, sizes, padding)
    return zero_padding(out, padding.queries).astype(query.dtype)


def _over_heads(
    head: Callable[..., jax.Array],
    query: Query,
    key: Key,
    value: Value,
    ones: jax.Array,
    sizes: Sizes,
    padding: CausalPadding,
) -> jax.Array:
    """``linear_head`` on every head of every example."""
    dtype = accumulation_dtype(query.dtype)
    (out,) = lift(
        lambda *arrays: (head(*arrays),),
        [
            zero_padding(jnp.asarray(query, dtype), padding.queries),
            *(zero_padding(jnp.asarray(x, dtype), padding.keys) for x in (key, value, ones)),
        ],
        sizes,
        ("*B T N H", "*B S K H", "*B S K D", "*B S K D"),
        ("*B T N D",),
    )
    return out
