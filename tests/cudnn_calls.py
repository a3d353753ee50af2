"""The adapter to cuDNN without a card: a stand-in for the kernel, and calls that it supports.

The stand-in is ``jax.nn``'s own formula in float32, made harsher: rows that cuDNN does not define
are NaN, and so is every gradient that flows through them, even from a cotangent of 0.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from helpers import jax_normal

from attention_jax import masks, scores
from attention_jax.backends import XLA, CuDNN
from attention_jax.backends.arguments import bind
from attention_jax.backends.call import complete, spec_of

dot_product_attention = jax.nn.dot_product_attention

B, T, K, G, H = (2, 3), 10, 2, 3, 8
N = K * G
BF16, F32 = jnp.bfloat16, jnp.float32


normal = functools.partial(jax_normal, dtype=BF16)


CUDNN = CuDNN()


def inputs(T=T, S=None, B=B, dtype=BF16, H=H, D=None):
    S, D = T if S is None else S, H if D is None else D
    return (
        normal(0, *B, T, N, H, dtype=dtype),
        normal(1, *B, S, K, H, dtype=dtype),
        normal(2, *B, S, K, D, dtype=dtype),
    )


def prepared(query, key, value, mask=None, score=(), scale=0.3, sinks=None, **options):
    """``Call`` and ``Spec``, as ``attention`` makes them."""
    call = bind(
        query,
        key,
        value,
        mask=mask,
        score=score,
        sinks=sinks,
        scale=scale,
        static_numbers=True,
    )
    call, sizes = complete(call)
    known = scale if isinstance(scale, float) else None
    return call, spec_of(call, sizes, scale=known, platform="gpu")._replace(**options)


def output(query, key, value, **options):
    call, spec = prepared(query, key, value, **options)
    assert CUDNN.why_unsupported(spec) is None
    out, lse = CUDNN.run(call, spec)
    assert out.shape == query.shape
    assert out.dtype == query.dtype
    assert lse.shape == query.shape[:-1]
    assert lse.dtype == jnp.float32
    return out


def by_xla(query, key, value, **options):
    call, spec = prepared(query, key, value, **options)
    return XLA().run(call, spec)[0]


def calls():
    """The kernel's stand-in; the arguments that it was called with."""
    made = []

    def stand_in(query, key, value, bias=None, **options):
        made.append({"query": query, "key": key, "value": value, "bias": bias, **options})
        assert options.pop("implementation") == "cudnn"
        wide = [None if x is None else x.astype(F32) for x in (query, key, value, bias)]
        out = dot_product_attention(*wide, **options, implementation="xla").astype(query.dtype)
        undefined = jnp.zeros(query.shape[:2], bool)
        if options["query_seq_lengths"] is not None:
            i, last = jnp.arange(query.shape[1]), options["query_seq_lengths"][:, None]
            keys = options["key_value_seq_lengths"][:, None]
            window = options["local_window_size"]
            reach = keys if window is None else keys + window[0]
            undefined = (
                (i >= last)
                | (keys == 0)
                | (options["is_causal"] & (i >= reach) & (window is not None))
            )
        # Multiply instead of selecting, so that gradients are NaN as well.
        return out * jnp.where(undefined, jnp.nan, 1.0)[..., None, None].astype(out.dtype)

    with mock.patch.object(jax.nn, "dot_product_attention", stand_in):
        yield made


lengths = np.array([[10, 7, 4], [1, 9, 10]], np.int32)
other_lengths = np.array([[3, 10, 5], [8, 1, 10]], np.int32)
shared_bias = normal(4, N, T, T)
own_bias = normal(5, *B, 1, T, T)

SUPPORTED = {
    "plain": {},
    "causal": {"mask": masks.causal()},
    "causal, aligned at the end of equal lengths": {"mask": masks.causal(align="end")},
    "window": {"mask": masks.window(3, 0)},
    "window of self alone": {"mask": masks.window(0, 0)},
    "window and causal": {"mask": masks.causal() & masks.window(4, None)},
    "least of two windows": {"mask": masks.window(5, 2) & masks.causal() & masks.window(2, 7)},
    "key lengths": {"mask": masks.lengths(key=lengths)},
    "both lengths": {"mask": masks.lengths(query=lengths, key=other_lengths)},
    "lengths of one axis": {
        "mask": masks.lengths(key=lengths[:1]) & masks.lengths(query=lengths[:, :1])
    },
    "least of two lengths": {"mask": masks.lengths(key=lengths) & masks.prefix(other_lengths)},
    "causal and lengths": {
        "mask": masks.causal() & masks.lengths(query=other_lengths, key=lengths)
    },
    "window and query lengths": {"mask": masks.window(2, 0) & masks.lengths(query=lengths)},
    "bias": {"score": scores.bias(shared_bias)},
    "bias per example": {"score": scores.bias(own_bias), "mask": masks.causal()},
    "bias and lengths": {
        "score": scores.bias(shared_bias[:1]),
        "mask": masks.lengths(query=lengths, key=other_lengths) & masks.causal(),
    },
}
