"""Wrong calls: each an error that names the argument, what was expected and what came.

Under the tests' import hook a wrong call fails at the annotations, before the library's own
checks. What a user sees is asked of one process without it: this file, run as a script.
"""

import ast
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

B, T, S, N, K, H, D = 2, 5, 7, 4, 2, 3, 6
ROOT = pathlib.Path(__file__).parent.parent


def f(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def i(*shape):
    return np.ones(shape, np.int32)


def b(*shape):
    return np.ones(shape, np.bool_)


def good():
    return {"query": f(B, T, N, H), "key": f(B, S, K, H), "value": f(B, S, K, D)}


def wrong_arguments():
    """Of ``attention``: what is wrong, the error, and what its message says."""
    from attention_jax import masks, scores

    value, type_ = "ValueError", "TypeError"
    key = jax.random.key(0)
    struct = jax.ShapeDtypeStruct((B, T, N, H), "float32")
    return [
        ({"query": f(T, H)}, value, "query", "at least 3 axes [*B T N H]", "(5, 3)"),
        ({"key": f(H)}, value, "key", "[*B S K H]", "(3,)"),
        ({"value": f()}, value, "value", "[*B S K D]", "()"),
        ({"key": f(3, S, K, H)}, value, "key has batch axes (3,) (*B)", "query has (2,)"),
        ({"value": f(S, K, D)}, value, "value has batch axes () (*B)", "query has (2,)"),
        ({"key": f(B, S, K, 4)}, value, "key has width 4 (H)", "query has 3"),
        ({"value": f(B, 6, K, D)}, value, "value has length 6 (S)", "key has 7"),
        ({"value": f(B, S, 1, D)}, value, "value has 1 heads (K)", "key has 2"),
        (
            {"key": f(B, S, 3, H), "value": f(B, S, 3, D)},
            value,
            "key has 3 heads (K)",
            "query has 4 (N): N must be a multiple of K",
        ),
        ({"key": f(B, S, 0, H), "value": f(B, S, 0, D)}, value, "key has 0 heads (K)", "4 (N)"),
        ({"query": f(B, T, N, 0), "key": f(B, S, K, 0)}, value, "query has width 0 (H)"),
        ({"query": i(B, T, N, H)}, type_, "query", "floating dtype", "int32"),
        ({"key": i(B, S, K, H)}, type_, "key", "floating dtype", "int32"),
        ({"value": b(B, S, K, D)}, type_, "value", "floating dtype", "bool"),
        ({"value": f(B, S, K, D, dtype=np.complex64)}, type_, "value", "floating", "complex64"),
        ({"key": f(B, S, K, H, dtype=np.float16)}, type_, "one dtype", "key float16"),
        ({"query": good()["query"].tolist()}, type_, "query", "array", "list"),
        ({"key": None}, type_, "key", "array", "NoneType"),
        ({"value": 1.0}, type_, "value", "array", "float"),
        ({"query": struct}, type_, "query", "ShapeDtypeStruct", "explain"),
        ({"mask": f(T, S)}, type_, "mask", "bool array", "float32", "scores.bias"),
        ({"mask": i(T, S)}, type_, "mask", "bool array", "int32"),
        ({"mask": b(T, S).tolist()}, type_, "mask", "bool array", "list"),
        ({"mask": "causal"}, type_, "mask", "Mask", "str"),
        ({"mask": scores.softcap(1.0)}, type_, "mask", "Mask", "Softcap"),
        ({"mask": b(3)}, value, "mask", "(3,)", "[*B N T S] = (2, 4, 5, 7)"),
        ({"mask": b(1, B, N, T, S)}, value, "mask", "(1, 2, 4, 5, 7)", "= (2, 4, 5, 7)"),
        ({"mask": masks.causal() & masks.dense(b(3, S))}, value, "mask", "(3, 7)", "5, 7)"),
        ({"mask": masks.lengths(key=i(3))}, value, "mask: key of lengths", "(3,)", "[*B] = (2)"),
        ({"mask": masks.causal(i(B, 1))}, value, "mask: offset of", "(2, 1)", "[*B] = (2)"),
        ({"mask": masks.segments(i(B, T), i(B, T))}, value, "key_ids", "(2, 5)", "(2, 7)"),
        ({"mask": masks.segments(i(B, S))}, value, "query_ids", "(2, 7)", "[*B T] = (2, 5)"),
        ({"mask": masks.global_tokens(b(T))}, value, "flags", "(5,)", "7)"),
        ({"mask": masks.neighborhood((3, 4), 3)}, value, "mask", "(3, 4)", "12 cells", "(T)"),
        ({"mask": masks.block_sparse(b(2, 3), 2)}, value, "layout", "(2, 3)", "T = 5", "S = 7"),
        ({"score": f(T, S)}, type_, "score", "a sequence of them", "scores.bias(array)"),
        ({"score": None}, type_, "score", "Score", "NoneType"),
        ({"score": [scores.softcap(1.0), f(S)]}, type_, "score", "list of Softcap, ndarray"),
        ({"score": masks.causal()}, type_, "score", "Score", "Band"),
        ({"score": scores.bias(f(T, 6))}, value, "score", "bias", "(5, 6)", "(2, 4, 5, 7)"),
        ({"score": scores.alibi(f(3))}, value, "score: slopes of alibi", "(3,)", "[N] = (4)"),
        ({"score": scores.alibi(offset=i(3))}, value, "offset of alibi", "(3,)", "[*B] = (2)"),
        ({"score": scores.relative_bias(f(8, 3))}, value, "table of relativebias", "(8, 3)", "4)"),
        (
            {"score": scores.relative_embedding(f(B, T, 3, H), f(5, H))},
            value,
            "query of relativeembedding",
            "(2, 5, 3, 3)",
            "[*B T N H]",
        ),
        ({"sinks": f(3)}, value, "sinks", "(3,)", "[N] = (4,)"),
        ({"sinks": f()}, value, "sinks", "()", "[N] = (4,)"),
        ({"sinks": i(N)}, type_, "sinks", "floating", "int32"),
        ({"sinks": [0.0] * N}, type_, "sinks", "array", "list"),
        ({"scale": f(N)}, value, "scale", "number", "(4,)"),
        ({"scale": "big"}, type_, "scale", "str"),
        ({"scale": True}, type_, "scale", "bool"),
        ({"scale": i()}, type_, "scale", "floating", "int32"),
        ({"dropout_rate": 1.0, "dropout_key": key}, value, "dropout_rate", "[0, 1)", "1.0"),
        ({"dropout_rate": -0.1, "dropout_key": key}, value, "dropout_rate", "[0, 1)", "-0.1"),
        ({"dropout_rate": np.nan, "dropout_key": key}, value, "dropout_rate", "[0, 1)", "nan"),
        ({"dropout_rate": 0.1}, value, "dropout_rate is 0.1", "dropout_key is None"),
        ({"dropout_rate": "0.1"}, type_, "dropout_rate", "float in [0, 1)", "str"),
        ({"dropout_rate": jnp.float32(0.1), "dropout_key": key}, type_, "dropout_rate", "traced"),
        ({"dropout_rate": 0.1, "dropout_key": 3}, type_, "dropout_key", "random key", "int"),
        ({"dropout_rate": 0.1, "dropout_key": f(2)}, type_, "dropout_key", "key", "float32"),
        (
            {"dropout_rate": 0.1, "dropout_key": jax.random.split(key)},
            value,
            "dropout_key",
            "one key",
            "(2,)",
        ),
        ({"implementation": "flash"}, value, "implementation", "blockwise, xla", "'flash'"),
        ({"implementation": ["xla", "flash"]}, value, "implementation", "'flash'"),
        ({"implementation": []}, value, "implementation", "at least one", "empty"),
        ({"implementation": 3}, type_, "implementation", "name", "int"),
        ({"return_lse": 1}, type_, "return_lse", "True or False", "1"),
    ]


def wrong_constructions():
    from attention_jax import block_map, explain, masks, scores

    value, type_ = "ValueError", "TypeError"
    explain = functools.partial(explain, **good())
    return [
        (lambda: masks.causal(1.5), type_, "offset", "integer", "float"),
        (lambda: masks.causal(True), type_, "offset", "integer", "bool"),
        (lambda: masks.causal(f(B)), type_, "offset", "integer", "float32"),
        (lambda: masks.causal(np.ones(B, np.uint8)), type_, "offset", "signed", "uint8"),
        (lambda: masks.causal(align="bottom"), value, "align", '"start" or "end"', "'bottom'"),
        (lambda: masks.window(-1, 0), value, "left", "at least 0", "-1"),
        (lambda: masks.window(0, -2), value, "right", "at least 0", "-2"),
        (lambda: masks.window(1.5, 0), type_, "left", "int", "1.5"),
        (lambda: masks.window(0, i()), type_, "right", "int", "ndarray"),
        (lambda: masks.window(1, 1, align=None), value, "align", "None"),
        (lambda: masks.dilated(0), value, "stride", "at least 1", "0"),
        (lambda: masks.dilated(2.0), type_, "stride", "int", "2.0"),
        (lambda: masks.prefix(1.5), type_, "length", "integer", "float"),
        (lambda: masks.lengths(key=1.5), type_, "key", "integer", "float"),
        (lambda: masks.lengths(query=b(B)), type_, "query", "integer", "bool"),
        (lambda: masks.segments([0, 0, 1]), type_, "query_ids", "integer array", "list"),
        (lambda: masks.segments(f(T)), type_, "query_ids", "integer array", "float32"),
        (lambda: masks.segments(i()), value, "query_ids", "at least 1 axes", "()"),
        (lambda: masks.segments(i(T), f(S)), type_, "key_ids", "integer array", "float32"),
        (lambda: masks.segments(i(T), np.ones(S, np.int8)), type_, "one dtype", "int8"),
        (lambda: masks.chunked(0), value, "size", "at least 1", "0"),
        (lambda: masks.global_tokens(i(T)), type_, "flags", "bool array", "int32"),
        (lambda: masks.neighborhood((4,), 2), value, "size", "odd", "(4,)", "(2,)"),
        (lambda: masks.neighborhood((4,), 5), value, "size", "at most", "(4,)", "(5,)"),
        (lambda: masks.neighborhood((2, 4), (1,)), value, "size", "per axis", "(1,)"),
        (lambda: masks.neighborhood((0, 4), 1), value, "shape", "at least 1", "0"),
        (lambda: masks.block_sparse(f(2, 2), 2), type_, "layout", "bool array", "float32"),
        (lambda: masks.block_sparse(b(2, 2, 2), 2), value, "layout", "2 axes", "(2, 2, 2)"),
        (lambda: masks.block_sparse(b(2, 2), 0), value, "block", "at least 1", "0"),
        (lambda: masks.dense(f(T, S)), type_, "array", "bool array", "float32"),
        (lambda: masks.dense([[True]]), type_, "array", "bool array", "list"),
        (lambda: masks.mask_fn(b(T, S)), type_, "fn", "function of (b, n, q, k", "ndarray"),
        (lambda: masks.mask_fn(max, [1]), type_, "arrays", "list"),
        (lambda: masks.causal() & b(T, S), type_, "&", "mask", "ndarray", "masks.dense"),
        (lambda: masks.causal() | None, type_, "|", "mask", "NoneType"),
        (lambda: scores.softcap(0), value, "cap", "positive and finite", "0"),
        (lambda: scores.softcap(-1.0), value, "cap", "positive", "-1.0"),
        (lambda: scores.softcap(np.inf), value, "cap", "finite", "inf"),
        (lambda: scores.softcap("50"), type_, "cap", "number", "str"),
        (lambda: scores.alibi(f(2, N)), value, "slopes", "1 axes", "(2, 4)"),
        (lambda: scores.alibi(i(N)), type_, "slopes", "floating array", "int32"),
        (lambda: scores.alibi(offset=0.5), type_, "offset", "int", "0.5"),
        (lambda: scores.alibi(align="left"), value, "align", '"start" or "end"', "'left'"),
        (lambda: scores.bias(b(T, S)), type_, "array", "floating array", "bool"),
        (lambda: scores.bias([0.0]), type_, "array", "floating array", "list"),
        (lambda: scores.relative_bias(f(8)), value, "table", "2 axes", "(8,)"),
        (lambda: scores.relative_bias(f(7, N)), value, "table", "even number", "(7, 4)"),
        (lambda: scores.relative_bias(f(32, N), max_distance=8), value, "max_distance", "8"),
        (lambda: scores.relative_embedding(f(T, N), f(5, H)), value, "query", "[*B T N H]"),
        (lambda: scores.relative_embedding(f(T, N, H), f(5, 4)), value, "table", "4 (H)", "3"),
        (lambda: scores.relative_embedding(f(T, N, H), f(4, H)), value, "table", "odd", "(4, 3)"),
        (lambda: scores.score_fn("tanh"), type_, "fn", "function of (s, b, n, q, k", "str"),
        (lambda: scores.score_fn(max, 3), type_, "arrays", "int"),
        (lambda: explain(platform="cuda"), value, "platform", '"gpu"', "'cuda'"),
        (lambda: explain(implementation="flash"), value, "implementation", "'flash'"),
        (lambda: explain(sinks=f(3)), value, "sinks", "(3,)", "[N] = (4,)"),
        (lambda: explain(dropout_rate=0.1), value, "dropout_rate", "dropout_key is None"),
        (lambda: explain(dropout_rate=-0.5), value, "dropout_rate", "[0, 1)", "-0.5"),
        (lambda: explain(scale="big"), type_, "scale", "str"),
        (lambda: explain(return_lse=1), type_, "return_lse", "1"),
        (lambda: block_map(b(T, S), T, S), type_, "mask", "ndarray"),
        (lambda: block_map(masks.causal(), T, S, block_q=0), value, "block_q", "0"),
    ]


def wrong_modules():
    """Of modules, likewise."""
    from flax import nnx

    from attention_jax import masks, nn, positions

    value, type_ = "ValueError", "TypeError"
    rngs, x, c = nnx.Rngs(0), f(B, T, 8), f(B, S, 6)
    new = functools.partial(nn.MultiHeadAttention, 8, 2, rngs=rngs)
    feed = functools.partial(nn.FeedForward, 8, 16, rngs=rngs)
    embed = functools.partial(nn.Embeddings, 10, 8, rngs=rngs)
    norm = functools.partial(nnx.LayerNorm, 8, rngs=rngs)
    cross, own, fused = new(context_features=6), new(), new(fused=True)
    turned = new(rotary=positions.Rotary())
    dynamic = new(rotary=positions.Rotary(scaling=positions.DynamicNTK(2.0, 4)))
    return [
        (lambda: nn.MultiHeadAttention(9, 2, rngs=rngs), value, "multiple of num_heads", "9 and 2"),
        (lambda: nn.MultiHeadAttention(8, 0, rngs=rngs), value, "num_heads must be at least 1"),
        (lambda: new(num_kv_heads=3), value, "multiple of num_kv_heads", "2 and 3"),
        (lambda: new(head_dim=0), value, "head_dim must be at least 1", "0"),
        (lambda: new(value_dim=2.5), type_, "value_dim must be an int", "2.5"),
        (lambda: new(bias=("query", "keys")), value, "bias must name some of", "keys"),
        (lambda: new(bias=("query",), fused=True), value, "bias must be the same for", "fused"),
        (lambda: new(dropout_rate=1.0), value, "dropout_rate must be in [0, 1)", "1.0"),
        (
            lambda: new(context_features=6, rotary=positions.Rotary()),
            value,
            "rotary must be None with context_features",
        ),
        (lambda: own(f(B, T, 7)), value, "x must have shape [*B T E] with E = 8", "(2, 5, 7)"),
        (lambda: cross(x), value, "context must be given", "width 6"),
        (lambda: cross(x, f(B, S, 8)), value, "C = 6", "(2, 7, 8)"),
        (lambda: own(x, c), value, "C = 8", "(2, 7, 6)"),
        (lambda: fused(x, f(B, S, 8)), value, "context must be None if", "fused"),
        (lambda: fused.keys_values(f(B, S, 8)), value, "fused"),
        (lambda: turned(x, f(B, S, 8)), value, "context must be None with rotary"),
        (lambda: cross(x, c, cache=cross.init_cache((B,), 9)), value, "cache must be None"),
        (lambda: own(x, cache=own.init_cache((B,), 3)), value, "capacity 3", "5 tokens"),
        (lambda: own(x, cache=own.init_cache((3,), 9)), value, "key must have shape (3,"),
        (
            lambda: own(x, cache=own.init_cache((B,), 9, dtype="float16")),
            type_,
            "cache's dtype float16",
            "float32",
        ),
        (
            lambda: own(x, cache=own.init_cache((B,), 9), mask=np.ones((T, T), bool)),
            type_,
            "mask must be a Mask of positions",
            "ndarray",
        ),
        (
            lambda: dynamic(x, cache=dynamic.init_cache((B,), 9)),
            "NotImplementedError",
            "DynamicNTK",
            "4 original tokens",
        ),
        (lambda: turned(x, positions=i(3)), value, "positions must broadcast", "(3,)"),
        (lambda: feed(activation="swish"), value, "activation must be one of", "'swish'"),
        (lambda: nn.FeedForward(8, 0, rngs=rngs), value, "hidden must be at least 1"),
        (lambda: nn.Residual(feed(), norm, order="mid"), value, "order must be one of", "'mid'"),
        (
            lambda: nn.Block(own, feed(), norm=norm)(x, c),
            value,
            "context must be given if and only if",
            "no cross-attention",
        ),
        (
            lambda: nn.Block(own, feed(), norm=norm, cross_attention=cross)(x),
            value,
            "context must be given if and only if",
            "got no context",
        ),
        (lambda: embed(positions="fixed"), value, "positions must be one of", "'fixed'"),
        (lambda: embed(positions="learned"), value, "max_length must be given"),
        (lambda: embed()(i(B, T) + 9), value, "tokens must be from 0 to 9", "10 to 10"),
        (lambda: embed()(-i(B, T)), value, "tokens must be from 0 to 9", "-1 to -1"),
        (lambda: embed()(x[..., 0]), type_, "tokens must be integers", "float32"),
        (
            lambda: embed(positions="learned", max_length=4)(i(B, T)),
            value,
            "positions must be from 0 to 3",
            "0 to 4",
        ),
        (lambda: embed()(i(B, T), types=i(B, T)), value, "types must be None"),
        (
            lambda: nn.AttentionPooling(8, 3, rngs=rngs),
            value,
            "features must be a multiple of num_heads",
        ),
        (lambda: own(x, mask=masks.causal(), score=(1.0,)), type_, "score", "float"),
        *wrong_ranks_and_types_of_modules(rngs),
    ]


def wrong_ranks_and_types_of_modules(rngs):
    """What is no array, or has other axes, or would be taken for something else."""
    from attention_jax import masks, nn
    from attention_jax.nn import pooling

    value, type_ = "ValueError", "TypeError"
    x, c, real = f(B, T, 8), f(B, S, 6), b(B, T)
    new = functools.partial(nn.MultiHeadAttention, 8, 2, rngs=rngs)
    embed = functools.partial(nn.Embeddings, 10, 8, rngs=rngs)
    own, cross, feed = new(), new(context_features=6), nn.FeedForward(8, 16, rngs=rngs)
    masked, dropping = new(mask=masks.causal()), new(dropout_rate=0.5)
    pool = nn.AttentionPooling(8, 2, rngs=rngs)
    token, norm = nn.ClassToken(8, rngs=rngs), nn.OnePlusRMSNorm(8, rngs=rngs)
    sinusoidal, typed = embed(positions="sinusoidal"), embed(types=2)
    other_heads = nn.KeysValues(f(B, S, 3, 4), f(B, S, 3, 4))
    return [
        (lambda: own(f(8)), value, "x must have shape [*B T E] with E = 8", "(8,)"),
        (lambda: own(i(B, T, 8)), type_, "x must have a floating dtype", "int32"),
        (lambda: own(x.tolist()), type_, "x must be a JAX or NumPy array", "list"),
        (lambda: cross(x, f(6)), value, "context must have shape [*B S C] with C = 6", "(6,)"),
        (lambda: cross(x, f(3, S, 6)), value, "context has batch axes (3,)", "x has (2,)"),
        (lambda: cross(x, f(S, 6)), value, "context has batch axes ()", "x has (2,)"),
        (lambda: cross(x, i(B, S, 6)), type_, "context must have a floating dtype", "int32"),
        (lambda: cross(x, c.tolist()), type_, "context must be a JAX or NumPy array", "list"),
        (lambda: cross(x, other_heads), value, "key has 3 heads (K)"),
        (lambda: cross.keys_values(f(6)), value, "context must have shape [*B S C]", "(6,)"),
        (lambda: cross.keys_values(other_heads), type_, "context must be an array", "KeysValues"),
        (lambda: masked(x, mask=i(T, T)), type_, "mask must be a Mask or a bool", "int32"),
        (lambda: masked(x, mask="causal"), type_, "mask must be a Mask", "str"),
        (lambda: new(mask="causal"), type_, "mask must be a Mask", "str"),
        (lambda: new(score=3.0), type_, "score must be a Score", "float"),
        (lambda: own(x, score=3.0), type_, "score must be a Score", "float"),
        (lambda: own(x, score=None), type_, "score must be a Score", "NoneType"),
        (lambda: own(x, cache=3), type_, "cache must be a KVCache or None", "int"),
        (lambda: own(x, count=3), value, "count must be None without a cache"),
        (lambda: own(x, return_weights=1), type_, "return_weights must be True or False", "1"),
        (lambda: dropping(x, deterministic="no"), type_, "deterministic must be", "'no'"),
        (lambda: dropping(x, rngs=3), type_, "rngs must be nnx.Rngs", "int"),
        (lambda: new(dropout_rate="x"), type_, "dropout_rate must be a float in [0, 1)", "str"),
        (lambda: new(context_features=0), value, "context_features must be at least 1", "0"),
        (lambda: new(out_features=0), value, "out_features must be at least 1", "0"),
        (lambda: new(rotary=3), type_, "rotary must be a Rotary", "int"),
        (lambda: new(attention=None), type_, "attention must be a function", "NoneType"),
        (lambda: feed(f()), value, "x must have shape [... E] with E = 8", "()"),
        (lambda: feed(f(B, T, 7)), value, "x must have shape [... E] with E = 8", "(2, 5, 7)"),
        (lambda: feed(i(B, T, 8)), type_, "x must have a floating dtype", "int32"),
        (lambda: nn.FeedForward(8, 16, activation=3, rngs=rngs), type_, "activation must", "3"),
        (lambda: nn.FeedForward(8, 16, dropout_rate=1.5, rngs=rngs), value, "dropout_rate", "1.5"),
        (lambda: nn.Residual(feed, lambda: norm, dropout_rate=2.0), value, "dropout_rate", "2.0"),
        (lambda: embed(dropout_rate=-1), value, "dropout_rate must be in [0, 1)", "-1"),
        (lambda: embed(types=-1), value, "types must be at least 0", "-1"),
        (lambda: embed(positions="learned", max_length=0), value, "max_length must be at least 1"),
        (lambda: embed().logits(f(B, T, 7)), value, "x must have shape [... E] with E = 8"),
        (lambda: embed().logits(i(B, T, 8)), type_, "x must have a floating dtype", "int32"),
        (lambda: embed()(i()), value, "tokens must have shape [*B T]", "()"),
        (lambda: typed(i(B, T), types=i(3)), value, "types must broadcast to [*B T]", "(3,)"),
        (lambda: sinusoidal(i(B, T), positions=i(3)), value, "positions must broadcast", "(3,)"),
        (lambda: embed()(i(B, T), positions=i(3)), value, "positions must broadcast", "(3,)"),
        (lambda: pool(f(8)), value, "x must have shape [*B T E] with E = 8", "(8,)"),
        (lambda: pool(f(B, T, 7)), value, "x must have shape [*B T E] with E = 8", "(2, 5, 7)"),
        (lambda: pool(x, i(B, T)), type_, "real must be a bool array", "int32"),
        (lambda: pool(x, b(B, 3)), value, "real must broadcast to [*B T] = (2, 5)", "(2, 3)"),
        (lambda: pool(x, real[None]), value, "real must broadcast to [*B T]", "(1, 2, 5)"),
        (lambda: nn.AttentionPooling(8, 2, queries=0, rngs=rngs), value, "queries must be at"),
        (lambda: pooling.mean(i(B, T, 8)), type_, "x must have a floating dtype", "int32"),
        (lambda: pooling.mean(f(8)), value, "x must have shape [*B T E]", "(8,)"),
        (lambda: pooling.mean(x, i(B, T)), type_, "real must be a bool array", "int32"),
        (lambda: pooling.mean(x, b(3)), value, "real must broadcast to [*B T]", "(3,)"),
        (lambda: token(f(8)), value, "x must have shape [*B T E] with E = 8", "(8,)"),
        (lambda: token(f(B, T, 7)), value, "x must have shape [*B T E] with E = 8", "(2, 5, 7)"),
        (lambda: norm(f(B, 7)), value, "x must have shape [... E] with E = 8", "(2, 7)"),
    ]


def wrong_models():
    """Of models and decoding, likewise."""
    from flax import nnx

    from attention_jax import models
    from attention_jax.models import Layers, Sampling, beam_search, generate

    value, type_ = "ValueError", "TypeError"
    small = Layers(8, 1, 2)
    config = models.DecoderConfig(10, small, positions="learned", max_length=6)
    decoder = models.Decoder(config, rngs=nnx.Rngs(0))
    both = models.EncoderDecoder(models.EncoderDecoderConfig(10, small, small), rngs=nnx.Rngs(0))
    images = models.VisionTransformer(
        models.VisionConfig((4, 4), 2, small, channels=1), rngs=nnx.Rngs(0)
    )
    prompt, real = np.array([[3, 1, 4]] * B), np.array([[True] * 3, [False] * 3])
    go = functools.partial(generate, decoder, prompt=prompt, max_new_tokens=2)
    other = models.DecoderConfig(10, small)
    free = models.Decoder(other, rngs=nnx.Rngs(0))
    return [
        (lambda: Layers(9, 1, 2), value, "features must be a multiple of num_heads", "9 and 2"),
        (lambda: Layers(8, 0, 2), value, "num_layers must be at least 1", "0"),
        (lambda: Layers(8, 1, 2, norm="batch"), value, "norm must be one of", "'batch'"),
        (lambda: Layers(8, 1, 2, windows=()), value, "windows must have an entry"),
        (lambda: Layers(8, 1, 2, windows=(0,)), value, "windows must be at least 1", "0"),
        (lambda: models.EncoderConfig(10, small, head="words"), value, "head must be one of"),
        (lambda: models.EncoderConfig(10, small, head="classes"), value, "classes must be given"),
        (
            lambda: models.EncoderConfig(10, small, pool="max"),
            value,
            "pool must be one of",
            "'max'",
        ),
        (
            lambda: models.EncoderDecoderConfig(10, small, Layers(4, 1, 2)),
            value,
            "the same width",
            "8 and 4",
        ),
        (lambda: models.VisionConfig((4, 6), 4, small), value, "patch must divide", "4"),
        (lambda: models.VisionConfig((4, 4), 2, small, pool="all"), value, "pool must be one of"),
        (lambda: images(f(B, 4, 4, 3)), value, "images must have shape", "(4, 4, 1)"),
        (lambda: decoder(i(B, 7)), value, "positions must be from 0 to 5", "0 to 6"),
        (lambda: decoder.init_caches((B,), 7), value, "capacity must be at most 6", "7"),
        (
            lambda: decoder(prompt, real=real, caches=decoder.init_caches((B,), 4)),
            value,
            "real must be None with caches",
        ),
        (lambda: go(max_new_tokens=0), value, "max_new_tokens must be at least 1", "0"),
        (lambda: go(max_new_tokens=9), value, "capacity must be at most 6", "11"),
        (lambda: go(capacity=3), value, "capacity must be at least 4", "got 3"),
        (lambda: go(real=real), value, "real must be True somewhere in every row"),
        (lambda: go(real=real[:1]), value, "real must be bool of the prompt's shape", "(1, 3)"),
        (lambda: go(real=real.astype(int)), value, "real must be bool", "int64"),
        (lambda: go(sampling=Sampling()), value, "key must be given with sampling"),
        (lambda: go(sampling=Sampling(), key=3), type_, "key must be a key of jax.random", "int"),
        (
            lambda: go(sampling=Sampling(), key=jax.random.split(jax.random.key(0), 3)),
            value,
            "key must be one key or one for each of 2 rows",
            "(3,)",
        ),
        (lambda: go(sampling="greedy"), type_, "sampling must be functions", "'greedy'"),
        (lambda: go(sampling=[0.7]), type_, "sampling must be functions", "float 0.7"),
        (lambda: go(prompt=[[1, 2], [3]]), value, "prompt must have rows of one length", "pad"),
        (lambda: go(prompt=prompt - 2), value, "prompt must hold tokens from 0 to 9", "-1 to 2"),
        (lambda: go(stop=10), value, "stop must be tokens from 0 to 9", "got 10", "None"),
        (lambda: go(stop=2.5), type_, "stop must be an int", "float 2.5"),
        (lambda: go(stop="end"), type_, "stop must be an int", "str 'end'"),
        (lambda: go(pad_token=None), type_, "pad_token must be an int", "NoneType"),
        (lambda: go(pad_token=2**31), value, "pad_token must fit into int32"),
        (lambda: go(capacity=4.5), type_, "capacity must be an int", "4.5"),
        (lambda: go(source=prompt), value, "source must be None for a Decoder"),
        (
            lambda: go(caches=decoder.init_caches((B,), 3)),
            value,
            "caches have capacity 3",
            "4 tokens",
        ),
        (lambda: go(caches=decoder.init_caches((5,), 6)), value, "caches must be of 2 rows", "5"),
        (
            lambda: go(caches=decoder.init_caches((B,), 6), capacity=6),
            value,
            "capacity must be None with caches",
        ),
        (
            lambda: generate(
                free,
                prompt,
                real=np.array([[True] * 3, [True, False, False]]),
                max_new_tokens=3,
                capacity=4,
            ),
            value,
            "capacity must be at least 5",
            "got 4",
        ),
        (
            lambda: generate(decoder, prompt[0], max_new_tokens=1),
            value,
            "prompt must have shape [B T]",
            "(3,)",
        ),
        (
            lambda: generate(decoder, prompt / 2, max_new_tokens=1),
            type_,
            "prompt must be integers",
            "float64",
        ),
        (lambda: generate(both, prompt, max_new_tokens=1), value, "source must be given"),
        (
            lambda: generate(both, prompt, source=prompt[:1], max_new_tokens=1),
            value,
            "source must have 2 rows, as the prompt",
            "(1, 3)",
        ),
        (
            lambda: generate(both, prompt, source=prompt, source_real=real.T, max_new_tokens=1),
            value,
            "source_real must be bool of the source's shape (2, 3)",
            "(3, 2)",
        ),
        (lambda: models.sampling.min_p(1.5), value, "min_p must be in [0, 1]", "1.5"),
        (lambda: models.sampling.min_p("a"), type_, "min_p must be a number", "str 'a'"),
        (lambda: models.sampling.repetition_penalty(0), value, "repetition_penalty", "positive"),
        (
            lambda: models.sampling.temperature(jnp.float32(0.7)),
            type_,
            "temperature must be a number",
        ),
        (lambda: models.sampling.chain([]), type_, "processors must be functions", "list"),
        (
            lambda: beam_search(
                decoder, prompt, max_new_tokens=1, beams=2, early_stopping="always"
            ),
            value,
            'early_stopping must be None, True, False or "never"',
            "'always'",
        ),
        (lambda: generate(images, prompt, max_new_tokens=1), type_, "VisionTransformer"),
        (lambda: Sampling(temperature=0.0), value, "temperature must be positive", "greedy"),
        (lambda: Sampling(top_k=0), value, "top_k must be at least 1", "0"),
        (lambda: Sampling(top_p=1.5), value, "top_p must be in (0, 1]", "1.5"),
        (
            lambda: beam_search(decoder, prompt, max_new_tokens=1, beams=0),
            value,
            "beams must be at least 1",
        ),
        (
            lambda: beam_search(decoder, prompt, max_new_tokens=1, beams=2, length_penalty=-1.0),
            value,
            "length_penalty must not be negative",
        ),
    ]


def wrong_drop_ins():
    """Of the functions that stand in for those of Flax and ``jax.nn``, under the names there."""
    from attention_jax import masks
    from attention_jax.nn import attention_fn, dot_product_attention

    value, type_ = "ValueError", "TypeError"
    key = jax.random.key(0)
    of_both = [
        ({"query": f(T, H)}, value, "query", "at least 3 axes [*B T N H]", "(5, 3)"),
        ({"query": f()}, value, "query", "[*B T N H]", "()"),
        ({"key": f(3, S, K, H)}, value, "key has batch axes (3,) (*B)", "query has (2,)"),
        ({"value": f(S, K, D)}, value, "value has batch axes () (*B)", "query has (2,)"),
        ({"key": f(B, S, 3, H)}, value, "value has 2 heads (K)", "key has 3"),
        ({"query": f(B, T, 3, H)}, value, "key has 2 heads (K)", "query has 3 (N)"),
        ({"key": f(B, S, K, 4)}, value, "key has width 4 (H)", "query has 3"),
        ({"value": f(B, 6, K, D)}, value, "value has length 6 (S)", "key has 7"),
        ({"query": None}, type_, "query must be an array", "NoneType"),
        ({"value": "v"}, type_, "value must be an array", "str"),
        ({"mask": b(B, 3, T, S)}, value, "mask has shape (2, 3, 5, 7)", "= (2, 4, 5, 7)"),
        ({"mask": b(T)}, value, "mask has shape (5,)", "[*B N T S]"),
        ({"mask": b(1, B, N, T, S)}, value, "mask has shape (1, 2, 4, 5, 7)", "[*B N T S]"),
        ({"mask": masks.causal()}, type_, "mask must be an array", "Band"),
        ({"bias": f(3, N, T, S)}, value, "bias has shape (3, 4, 5, 7)", "= (2, 4, 5, 7)"),
        ({"bias": i(T, S)}, type_, "bias must have a floating dtype", "int32", "mask"),
        ({"bias": b(T, S)}, type_, "bias must have a floating dtype", "bool", "mask"),
        ({"bias": masks.causal()}, type_, "bias must be an array", "Band"),
        ({"is_causal": "no"}, type_, "is_causal must be True or False", "'no'"),
        ({"is_causal": None}, type_, "is_causal must be True or False", "None"),
    ]
    of_flax = [
        ({"dropout_rng": None}, value, "dropout_rate is 0.5 but dropout_rng is None"),
        ({"dropout_rng": 3}, type_, "dropout_rng must be a JAX random key", "int"),
        ({"dropout_rng": jax.random.split(key)}, value, "dropout_rng must be one key", "(2,)"),
        ({"dropout_rate": 1.0}, value, "dropout_rate must be in [0, 1)", "1.0"),
        ({"dropout_rate": 1.5, "deterministic": True}, value, "dropout_rate must be in", "1.5"),
        ({"dropout_rate": "0.5"}, type_, "dropout_rate must be a float in [0, 1)", "str"),
        ({"deterministic": None}, type_, "deterministic must be True or False", "None"),
        ({"broadcast_dropout": 1}, type_, "broadcast_dropout must be True or False", "1"),
        ({"force_fp32_for_softmax": 1}, type_, "force_fp32_for_softmax must be", "1"),
        ({"dtype": jnp.int32}, type_, "dtype must be floating", "int32"),
        ({"dtype": "real"}, type_, "dtype must be floating", "'real'"),
        ({"precision": "best"}, value, "precision must be None", "'best'"),
        ({"precision": ("highest", 3)}, value, "precision must be None", "3"),
        ({"promote_dtype": "float32"}, type_, "promote_dtype must be a function", "'float32'"),
        ({"module": "self"}, type_, "module must be a Flax module", "str"),
        (
            {"query": i(B, T, N, H), "dtype": None, "key": i(B, S, K, H), "value": i(B, S, K, D)},
            type_,
            "query must have a floating dtype",
            "int32",
        ),
    ]
    of_jax = [
        ({"key": f(B, S, K, H, dtype=np.float16)}, type_, "one dtype", "key float16"),
        ({"query": i(B, T, N, H)}, type_, "query must have a floating dtype", "int32"),
        ({"mask": i(T, S)}, type_, "mask must be bool", "int32", "bias"),
        ({"mask": f(T, S)}, type_, "mask must be bool", "float32", "bias"),
        ({"scale": f(B)}, value, "scale must be a number", "(2,)"),
        ({"scale": [1.0]}, type_, "scale", "list"),
        ({"scale": True}, type_, "scale", "bool"),
        ({"scale": b()}, type_, "scale", "bool"),
        ({"scale": 1j}, type_, "scale", "complex"),
        ({"query_seq_lengths": f(B)}, type_, "query_seq_lengths must be integers", "float32"),
        ({"query_seq_lengths": [1.5, 2]}, type_, "query_seq_lengths must be integers", "float32"),
        ({"query_seq_lengths": b(B)}, type_, "query_seq_lengths must be integers", "bool"),
        ({"query_seq_lengths": "all"}, type_, "query_seq_lengths must be", "str"),
        ({"key_value_seq_lengths": i(1)}, value, "key_value_seq_lengths has shape (1,)", "(2,)"),
        ({"key_value_seq_lengths": 3}, value, "key_value_seq_lengths has shape ()", "[B] = (2,)"),
        ({"key_value_seq_lengths": i(B, 1)}, value, "key_value_seq_lengths has shape (2, 1)"),
        ({"key_value_seq_lengths": -i(B)}, value, "key_value_seq_lengths must not be negative"),
        ({"key_value_seq_lengths": [3, -2]}, value, "key_value_seq_lengths must not be neg", "-2"),
        ({"local_window_size": 2.0}, type_, "local_window_size must be an int or a pair", "2.0"),
        ({"local_window_size": (1.0, 2)}, type_, "local_window_size must be", "(1.0, 2)"),
        ({"local_window_size": (-1, 2)}, value, "local_window_size", "at least 0", "(-1, 2)"),
        ({"local_window_size": -1}, value, "local_window_size must be", "at least 0", "got -1"),
        ({"local_window_size": (1, 2, 3)}, value, "local_window_size must be", "(1, 2, 3)"),
        ({"local_window_size": True}, type_, "local_window_size must be", "True"),
        ({"local_window_size": (None, 0)}, type_, "local_window_size must be", "(None, 0)"),
        ({"local_window_size": "ab"}, type_, "local_window_size must be", "'ab'"),
        ({"return_residual": 1}, type_, "return_residual must be True or False", "1"),
        ({"implementation": "flash"}, value, "implementation must be one of", "'flash'"),
        ({"implementation": "cudnn"}, "NotImplementedError", "'cudnn' cannot"),
    ]
    flax = {**good(), "dtype": jnp.float32}
    dropping = {**flax, "dropout_rate": 0.5, "dropout_rng": key}
    every_head = {**dropping, "broadcast_dropout": False}
    for function, usual, wrong_ones in (
        (attention_fn, flax, of_both),
        (attention_fn, dropping, of_both + of_flax),
        (attention_fn, every_head, of_both),
        (dot_product_attention, good(), of_both + of_jax),
    ):
        for wrong, error, *parts in wrong_ones:
            yield functools.partial(function, **{**usual, **wrong}), error, *parts


def wrong_positions():
    """Of positions and caches, likewise."""
    from attention_jax import cache, masks, positions

    value, type_ = "ValueError", "TypeError"
    x, at = f(B, T, N, H), np.arange(T)
    rotary = functools.partial(positions.rotary, f(B, T, N, 12), at)
    k, v = f(B, 3, K, H), f(B, 3, K, D)

    def empty(batch=(B,), capacity=8, **sizes):
        sizes = {"num_kv_heads": K, "head_dim": H, "value_dim": D, **sizes}
        return cache.init(batch, capacity=capacity, **sizes)

    return [
        (lambda: rotary(width=3), value, "width must be even", "3"),
        (lambda: rotary(width=14), value, "width must be at most 12", "14"),
        (lambda: rotary(theta=0.0), value, "theta must be positive", "0"),
        (lambda: rotary(scaling=2.0), type_, "scaling must be a Scaling", "float"),
        (lambda: rotary(scaling=positions.DynamicNTK(2.0, 8)), value, "length must be given"),
        (
            lambda: positions.rotary(x, i(T + 1)),
            value,
            "positions must broadcast",
            "(2, 5)",
            "(6,)",
        ),
        (lambda: positions.rotary(x, i(3, B, T)), value, "positions must broadcast", "(3, 2, 5)"),
        (lambda: positions.rotary(x, at / 2), type_, "positions must be integers", "float64"),
        (lambda: positions.sinusoidal([0.5], 4), type_, "positions must be integers", "float64"),
        (lambda: positions.sinusoidal(at, 0), value, "width must be even and positive", "0"),
        (lambda: positions.learned(f(3, 2), i(1) * 3), value, "positions", "0 to 2", "3 to 3"),
        (lambda: positions.learned(f(3, 2), -i(1)), value, "positions", "0 to 2", "-1 to -1"),
        (lambda: positions.Linear(0.0), value, "factor must be positive", "0.0"),
        (lambda: positions.DynamicNTK(2.0, 0), value, "original must be positive", "0"),
        (lambda: positions.Llama3(low=4.0, high=1.0), value, "low must be less", "4.0 and 1.0"),
        (lambda: empty(capacity=2).append(k, v), value, "capacity 2", "3 tokens", "larger"),
        (lambda: empty().append(x[:, :3], v), value, "key must have shape (2, 'T', 2, 3)"),
        (lambda: empty().append(k, k), value, "value must have shape (2, 'T', 2, 6)"),
        (lambda: empty((3,)).append(k, v), value, "key must have shape", "(2, 3, 2, 3)"),
        (lambda: empty().append(k[0], v), value, "key must have shape", "(3, 2, 3)"),
        (lambda: empty().append(k.astype("float16"), v), type_, "key", "float32", "float16"),
        (lambda: empty().append(k.astype(int), v), type_, "key", "floating dtype", "int64"),
        (lambda: empty().append(k[:, :2], v), value, "key has 2 tokens", "value has 3"),
        (lambda: empty().append(k, v, 4), value, "count must be from 0 to T = 3", "4"),
        (lambda: empty().append(k, v, 1.5), type_, "count must be integers", "float64"),
        (lambda: cache.attend(empty(), x, k, v), value, "query has 5 tokens", "key has 3"),
        (lambda: empty(capacity=0), value, "capacity must be at least 1", "0"),
        (lambda: empty(head_dim=1.5), type_, "head_dim must be an int", "1.5"),
        (lambda: masks.at_positions(None, at, at), type_, "mask must be a Mask", "NoneType"),
        (
            lambda: masks.at_positions(masks.causal(), f(T), i(S)),
            type_,
            "query_positions must be a signed integer array",
            "float32",
        ),
        (
            lambda: masks.at_positions(masks.causal(), at, i(S)),
            type_,
            "one dtype",
            "int64 and int32",
        ),
    ]


def wrong_mechanisms():
    """What is called, the error, parts of its message."""
    import functools

    from attention_jax import masks, scores
    from attention_jax import mechanisms as m

    value, type_, cannot = "ValueError", "TypeError", "NotImplementedError"
    q, k, v = good().values()
    x, square = f(B, T, K, H), f(B, T, K, 1)  # one length, for the causal ones
    mixing, centroids, vector = f(4, S), f(K, 3, H), f(N, H)
    plain = {
        "inverted": m.inverted_attention,
        "slot": m.slot_attention,
        "topk": functools.partial(m.topk_attention, k=3),
        "linear": m.linear_attention,
        "linformer": lambda *a: m.linformer_attention(*a, mixing, mixing),
        "routing": lambda *a: m.routing_attention(*a, centroids),
        "retention": m.retention,
        "gated": lambda *a: m.gated_linear_attention(*a, square),
        "delta": lambda *a: m.delta_rule(*a, square[..., 0]),
    }
    for call in plain.values():
        yield functools.partial(call, q, k[..., :2], v), value, "key has width 2 (H)"
        yield functools.partial(call, q, k, v[:, :2]), value, "value has length 2 (S)"
        yield functools.partial(call, q, i(B, S, K, H), v), type_, "key", "floating dtype"
    yield lambda: m.additive_attention(q, k, v, vector), value, "key must have shape [*B S N H]"
    yield lambda: m.additive_attention(q, q, v, vector), value, "value must have shape"
    yield lambda: m.additive_weights(q, q, vector[:, :2]), value, "vector must have shape"
    yield lambda: m.topk_attention(q, k, v, k=0), value, "k must be at least 1"
    yield lambda: m.topk_attention(q, k, v, k=2.0), type_, "k must be an int"
    for mask in (masks.window(2, 0), masks.causal(1), masks.causal(), b(T, S)):
        call = functools.partial(m.linear_attention, q, k, v, mask=mask)
        yield call, cannot, "linear_attention supports", "use attention"
    yield lambda: m.linear_attention(x, x, x, return_state=True), value, "mask=masks.causal()"
    yield lambda: m.performer_features(jax.random.key(0), 0, 4), value, "H must be at least 1"
    yield lambda: m.retention(x, x, x, mask=None), value, "retention is causal"
    yield lambda: m.retention(x, x, x, decay=f(3)), value, "decay has shape (3,)", "[K] = (2,)"
    yield lambda: m.retention(x, x, x, state=x), value, "state must have shape [*B K M D]"
    yield lambda: m.retention(x, x, x, return_state=1), type_, "return_state must be True or False"
    gated = m.gated_linear_attention
    yield lambda: gated(x, x, x, x[..., :2]), value, "log_gate must have shape"
    yield lambda: gated(x, x, x, square, mask=masks.window(3, 0)), cannot, "mask Band"
    yield lambda: m.delta_rule(x, x, x, square[:, :2, :, 0]), value, "beta must have shape"
    yield lambda: m.linformer_attention(q, k, v, mixing, f(3, S)), value, "value_mixing must have"
    causal = masks.causal()
    call = functools.partial(m.linformer_attention, x, x, x, f(4, T), f(4, T), mask=causal)
    yield call, cannot, "cannot be causal"
    yield lambda: m.routing_attention(q, k, v, centroids[0]), value, "centroids must have shape"
    yield lambda: m.update_centroids(centroids, q, k, decay=2.0), value, "decay must be in [0, 1]"
    yield lambda: m.differential_attention(q[:, :, :3], k, v, 0.5), value, "even number of heads"
    yield lambda: m.differential_attention(q, k, v[:, :, :1], f(3)), value, "weight must be"
    latents = [f(B, T, N, H), f(B, T, N, 2), f(B, T, 5), f(B, T, 2), f(5, N, H), f(5, N, D)]
    names = ("query_rotary", "key_rotary", "key_up", "value_up")
    for place, name in zip((1, 3, 4, 5), names, strict=True):
        wrong = [*latents]
        wrong[place] = wrong[place][:1]
        yield functools.partial(m.latent_attention, *wrong), value, f"{name} must have shape"
    call = functools.partial(m.absorbed_latent_attention, *latents, return_lse=True)
    yield call, cannot, "use latent_attention"
    linear = m.NAMED["linear"]
    yield (
        lambda: linear(x, x, x, score=scores.softcap(3.0)),
        cannot,
        "linear_attention takes mask, not score",
    )
    yield lambda: linear(x, x, x, dropout_rate=0.1), cannot, "not dropout_rate"


def wrong_calls():
    """Name, function, error, parts of its message: every wrong call there is."""
    from attention_jax import Mask, Score, attention, attention_weights, explain

    def jitted(arguments):
        traced = {
            n: x
            for n, x in arguments.items()
            if isinstance(x, (np.ndarray, jax.Array, Mask, Score))
        }
        rest = {n: x for n, x in arguments.items() if n not in traced}
        return jax.jit(lambda traced: attention(**traced, **rest))(traced)

    def struct(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, np.ndarray) else x

    for wrong, error, *parts in wrong_arguments():
        arguments = {**good(), **wrong}
        name = f"{', '.join(wrong)}: {parts[-1]}"
        yield f"attention {name}", functools.partial(attention, **arguments), error, parts
        yield f"under jit {name}", functools.partial(jitted, arguments), error, parts
        if "ShapeDtypeStruct" not in parts:
            yield f"explain {name}", functools.partial(explain, **arguments), error, parts
            three = {n: struct(x) if n in good() else x for n, x in arguments.items()}
            yield f"explain shapes {name}", functools.partial(explain, **three), error, parts
        if not wrong.keys() & {"value", "dropout_rate", "implementation", "return_lse"}:
            del arguments["value"]
            yield f"weights {name}", functools.partial(attention_weights, **arguments), error, parts
    wrong = [*wrong_constructions(), *wrong_positions(), *wrong_modules(), *wrong_models()]
    wrong += [*wrong_mechanisms(), *wrong_drop_ins()]
    for number, (call, error, *parts) in enumerate(wrong):
        yield f"construction {number} {parts[:3]}", call, error, parts


def outcome(call):
    try:
        call()
    except Exception as e:  # noqa: BLE001  whatever it is, it is what we report
        return type(e).__name__, str(e)
    return None, "no error"


def report():
    rows = [[name, *outcome(call), error, parts] for name, call, error, parts in wrong_calls()]
    json.dump(rows, sys.stdout)


@functools.cache
def outcomes():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_wrong_calls_raise_errors_that_say_what_is_wrong():
    assert len(outcomes()) > 300
    failures = [
        f"{name}\n    expected {error} with {parts}\n    got {got}: {message}"
        for name, got, message, error, parts in outcomes()
        if got != error or not all(part in message for part in parts)
    ]
    assert not failures, f"{len(failures)} of {len(outcomes())}:\n" + "\n".join(failures)


SOURCES = sorted((ROOT / "attention_jax").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_bare_assert_and_no_blind_except(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise ValueError instead"
        if isinstance(node, ast.ExceptHandler):
            if path.parent.name == "testing":  # runs what is not ours, and reports how it fails
                continue
            caught = ast.unparse(node.type) if node.type else "everything"
            blind = {"everything", "Exception", "BaseException"} & set(
                caught.strip("()").split(", ")
            )
            assert not blind, f"line {node.lineno}: says what it expects, not {caught}"


if __name__ == "__main__":
    report()
