"""Wrong arguments of ``attention``, and of the constructors of masks and scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wrong_calls import B, D, H, K, N, S, T, b, f, good, i

FULL = "[*B N T S] with *B = (2,), N = 4, T = 5, S = 7"
BATCH = "[*B] with *B = (2,)"


WRITE = ("write & | ~", "jnp.where for if", "jnp.maximum for max")


def own_mask():
    from attention_jax import masks

    class Near(masks.Mask):
        def rule(self, b, n, q, k):
            return (k <= q) and (q - k < 3)

    return Near()


def own_score():
    from attention_jax import scores

    class Clipped(scores.Score):
        def rule(self, s, b, n, q, k):
            return max(s, 0.0)

    return Clipped()


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
        (
            {"key": f(B, S, 0, H), "value": f(B, S, 0, D)},
            value,
            "key has 0 heads (K)",
            "4 (N): K must",
        ),
        (
            {"query": f(B, T, 0, H), "key": f(B, S, 0, H), "value": f(B, S, 0, D)},
            value,
            "key has 0 heads (K) but query has 0 (N): K must be at least 1",
        ),
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
        ({"mask": "causal"}, type_, "mask", "Mask", "str 'causal': call masks.causal(...)"),
        ({"mask": masks.causal}, type_, "the function causal: call masks.causal(...)"),
        ({"mask": any}, type_, "the function any: wrap it, masks.mask_fn(fn)"),
        ({"score": scores.softcap}, type_, "the function softcap: call scores.softcap(...)"),
        ({"score": max}, type_, "the function max: wrap it, scores.score_fn(fn)"),
        (
            {"mask": scores.softcap(1.0)},
            type_,
            "mask",
            "Mask",
            "scores.softcap(...): pass it as score=",
        ),
        ({"mask": True}, type_, "mask must be a Mask", "bool True", "pass None", "masks.causal()"),
        ({"mask": 1}, type_, "mask must be a Mask", "int 1: pass None", "masks.causal()"),
        ({"mask": b(3)}, value, "mask", "(3,)", FULL, "[T S], [N T S] or [*B N T S]"),
        ({"mask": b(B, T, S)}, value, "mask", "(2, 5, 7)", FULL, "mask[..., None, :, :]"),
        ({"mask": b(B, S)}, value, "mask", "(2, 7)", FULL, "mask[..., None, None, :]"),
        (
            {"mask": masks.causal() & masks.dense(b(B, T, S))},
            value,
            "array of masks.dense",
            "(2, 5, 7)",
            "array[..., None, :, :]",
        ),
        *(
            ({"mask": masks.mask_fn(fn)}, type_, "mask_fn: fn is traced by JAX", *WRITE)
            for fn in (
                lambda b, n, q, k: (k <= q) and (k > 2),
                lambda b, n, q, k: (k <= q) or (k > 2),
                lambda b, n, q, k: not (k <= q),
                lambda b, n, q, k: 0 <= q - k < 3,
                lambda b, n, q, k: (k <= q) if n > 1 else (k > q),
                lambda b, n, q, k: max(q, k) > 3,
                lambda b, n, q, k: np.abs(q - k) < 3,
                lambda b, n, q, k: k <= q + int(n),
                lambda b, n, q, k: k <= sum(range(n)),
                lambda b, n, q, k: [True, False][k],
            )
        ),
        *(
            ({"score": scores.score_fn(fn)}, type_, "score_fn: fn is traced by JAX", *WRITE)
            for fn in (
                lambda s, b, n, q, k: s if k <= q else -s,
                lambda s, b, n, q, k: max(s, 0.0),
                lambda s, b, n, q, k: np.tanh(s),
                lambda s, b, n, q, k: s * ((k <= q) and (k > 2)),
            )
        ),
        ({"mask": b(1, B, N, T, S)}, value, "mask", "(1, 2, 4, 5, 7)", FULL),
        ({"mask": masks.causal() & masks.dense(b(3, S))}, value, "mask", "(3, 7)", FULL),
        ({"mask": masks.lengths(key=i(3))}, value, "mask: key of masks.lengths", "(3,)", BATCH),
        ({"mask": masks.causal(i(B, 1))}, value, "mask: offset of masks.causal", "(2, 1)", BATCH),
        ({"mask": masks.segments(i(B, T), i(B, T))}, value, "key_ids", "(2, 5)", "(2,), S = 7"),
        (
            {"mask": masks.segments(i(B, S))},
            value,
            "query_ids",
            "(2, 7)",
            "[*B T] with *B = (2,), T = 5",
        ),
        (
            {"mask": masks.global_tokens(b(T))},
            value,
            "flags of masks.global_tokens",
            "(5,)",
            "S = 7",
        ),
        ({"mask": masks.neighborhood((3, 4), 3)}, value, "mask", "(3, 4)", "12 cells", "(T)"),
        ({"mask": masks.block_sparse(b(2, 3), 2)}, value, "layout", "(2, 3)", "T = 5", "S = 7"),
        ({"score": f(T, S)}, type_, "score", "a sequence of them", "scores.bias(array)"),
        ({"score": None}, type_, "score", "Score", "NoneType"),
        (
            {"score": [scores.softcap(1.0), f(S)]},
            type_,
            "score",
            "a sequence with an array of dtype float32",
        ),
        ({"score": masks.causal()}, type_, "score", "Score", "masks.causal(...): pass it as mask="),
        ({"score": scores.bias(f(T, 6))}, value, "score", "bias", "(5, 6)", FULL),
        (
            {"score": scores.bias(f(B, T, S))},
            value,
            "score: array of scores.bias",
            "(2, 5, 7)",
            FULL,
            "array[..., None, :, :]",
        ),
        ({"score": scores.alibi(f(3))}, value, "slopes of scores.alibi", "(3,)", "[N] with N = 4"),
        ({"score": scores.alibi(offset=i(3))}, value, "offset of scores.alibi", "(3,)", BATCH),
        (
            {"score": scores.relative_bias(f(8, 3))},
            value,
            "table of scores.relative_bias",
            "(8, 3)",
            "N = 4",
        ),
        (
            {"score": scores.relative_embedding(f(B, T, 3, H), f(5, H))},
            value,
            "query of scores.relative_embedding",
            "(2, 5, 3, 3)",
            "[*B T N H]",
        ),
        ({"sinks": f(3)}, value, "sinks", "(3,)", "[N] = (4,)"),
        ({"sinks": f()}, value, "sinks", "()", "[N] = (4,)"),
        ({"sinks": i(N)}, type_, "sinks", "floating", "int32"),
        ({"sinks": [0.0] * N}, type_, "sinks", "array", "list"),
        ({"scale": f(N)}, value, "scale", "number", "(4,)"),
        ({"scale": "big"}, type_, "scale must be a number, a floating array of shape []", "'big'"),
        ({"scale": [1.0]}, type_, "scale must be a number", "shape [] or None, got list"),
        ({"scale": 1j}, type_, "scale must be a number", "got complex"),
        ({"scale": True}, type_, "scale", "bool"),
        ({"scale": i()}, type_, "scale", "floating", "int32"),
        ({"scale": float("nan")}, value, "scale must be finite", "nan"),
        ({"scale": -np.inf}, value, "scale must be finite", "-inf"),
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
        (
            {"mask": [masks.causal()]},
            type_,
            "mask must be one Mask, got a list",
            "join them with & or |",
        ),
        ({"query_positions": f(T)}, type_, "query_positions", "int32 array", "float32"),
        ({"key_positions": list(range(S))}, type_, "key_positions", "int32 array", "list"),
        ({"key_positions": np.ones(S, np.uint32)}, type_, "key_positions", "int32", "uint32"),
        ({"query_positions": i(S)}, value, "query_positions has shape (7,)", "[T] or [*B T] with"),
        ({"query_positions": i(3, T)}, value, "query_positions", "(3, 5)", "*B = (2,), T = 5"),
        ({"key_positions": i(B, T)}, value, "key_positions", "(2, 5)", "[*B S]", "S = 7"),
        ({"key_positions": i()}, value, "key_positions", "()", "[S] or [*B S]"),
        ({"implementation": "flash"}, value, "implementation", "blockwise, xla", "'flash'"),
        ({"implementation": ["xla", "flash"]}, value, "implementation", "'flash'"),
        ({"implementation": []}, value, "implementation", "at least one", "empty"),
        ({"implementation": 3}, type_, "implementation", "name", "int"),
        ({"return_lse": 1}, type_, "return_lse", "True or False", "1"),
    ]


def wrong_constructions():
    from attention_jax import attention, block_map, explain, masks, scores
    from attention_jax.backends import Blockwise, PallasGPU

    value, type_ = "ValueError", "TypeError"
    explain = functools.partial(explain, **good())
    attend = functools.partial(attention, **good())
    either = masks.mask_fn(lambda b, n, q, k: (k <= q) or (k > 2))
    return [
        (lambda: attend(mask=own_mask()), type_, "the rule of Near is traced by JAX", *WRITE),
        (lambda: attend(score=own_score()), type_, "the rule of Clipped is traced by JAX", *WRITE),
        (lambda: str(either), type_, "mask_fn: fn is traced by JAX", *WRITE),
        (lambda: either.to_dense(T, S), type_, "mask_fn: fn is traced by JAX", *WRITE),
        (lambda: str(masks.mask_fn(lambda q, k: k <= q)), type_, "fn(b, n, q, k, *arrays)"),
        (lambda: masks.causal(1.5), type_, "offset", "integer", "float"),
        (lambda: masks.causal(True), type_, "offset", "integer", "bool"),
        (lambda: masks.causal(f(B)), type_, "offset", "integer", "float32"),
        (lambda: masks.causal(np.ones(B, np.uint8)), type_, "offset", "signed", "uint8"),
        (lambda: masks.causal(align="bottom"), value, "align", '"start" or "end"', "'bottom'"),
        (lambda: masks.window(-1, 0), value, "left", "at least 0", "-1"),
        (lambda: masks.window(0, -2), value, "right", "at least 0", "-2"),
        (lambda: masks.window(1.5, 0), type_, "left", "int", "1.5"),
        (lambda: masks.window(0, i()), type_, "right", "int", "array of dtype int32"),
        (lambda: masks.window(1, 1, align=None), value, "align", "None"),
        (lambda: masks.dilated(0), value, "stride", "at least 1", "0"),
        (lambda: masks.dilated(2.0), type_, "stride", "int", "2.0"),
        (lambda: masks.lengths(i(B)), type_, "lengths() takes 0 positional arguments"),
        (lambda: masks.padding(b(T), T), type_, "padding() takes 1 positional argument"),
        (lambda: masks.prefix(-1), value, "length must be at least 0", "-1"),
        (lambda: masks.prefix(np.int32(-2)), value, "length must be at least 0", "-2"),
        (lambda: masks.lengths(query=-1), value, "query must be at least 0", "-1"),
        (lambda: masks.lengths(key=-3), value, "key must be at least 0", "-3"),
        (lambda: masks.prefix(1.5), type_, "length", "integer", "float"),
        (lambda: masks.lengths(key=1.5), type_, "key", "integer", "float"),
        (lambda: masks.lengths(query=b(B)), type_, "query", "integer", "bool"),
        (lambda: masks.segments([0, 0, 1]), type_, "query_ids", "integer array", "list"),
        (lambda: masks.segments(f(T)), type_, "query_ids", "integer array", "float32"),
        (lambda: masks.segments(i()), value, "query_ids", "at least 1 axis", "()"),
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
        (lambda: masks.mask_fn(b(T, S)), type_, "fn", "function of (b, n, q, k", "dtype bool"),
        (lambda: masks.mask_fn(max, [1]), type_, "arrays", "list"),
        (
            lambda: masks.causal() & b(T, S),
            type_,
            "&",
            "mask",
            "array of dtype bool",
            "masks.dense",
        ),
        (lambda: masks.causal() | None, type_, "|", "mask", "NoneType"),
        (lambda: scores.softcap(0), value, "cap", "positive and finite", "0"),
        (lambda: scores.softcap(-1.0), value, "cap", "positive", "-1.0"),
        (lambda: scores.softcap(np.inf), value, "cap", "finite", "inf"),
        (lambda: scores.softcap(np.nan), value, "cap", "finite", "nan"),
        (lambda: scores.softcap("50"), type_, "cap", "number", "str"),
        (lambda: scores.alibi(f(2, N)), value, "slopes", "1 axis", "(2, 4)"),
        (lambda: scores.alibi(i(N)), type_, "slopes", "floating array", "int32"),
        (lambda: scores.alibi(offset=0.5), type_, "offset", "int", "0.5"),
        (lambda: scores.alibi(align="left"), value, "align", '"start" or "end"', "'left'"),
        (lambda: scores.bias(b(T, S)), type_, "array", "floating array", "bool"),
        (lambda: scores.bias([0.0]), type_, "array", "floating array", "list"),
        (lambda: scores.relative_bias(f(8)), value, "table", "2 axes", "(8,)"),
        (lambda: scores.relative_bias(f(7, N)), value, "table", "even number", "(7, 4)"),
        (lambda: scores.relative_bias(f(32, N), max_distance=8), value, "max_distance", "8"),
        (lambda: scores.relative_bias(f(8, N), max_distance=9.5), type_, "max_distance", "9.5"),
        (lambda: scores.alibi_slopes(0), value, "num_heads must be at least 1", "0"),
        (lambda: scores.relative_embedding(f(T, N), f(5, H)), value, "query", "[*B T N H]"),
        (lambda: scores.relative_embedding(f(T, N, H), f(5, 4)), value, "table", "4 (H)", "3"),
        (lambda: scores.relative_embedding(f(T, N, H), f(4, H)), value, "table", "odd", "(4, 3)"),
        (lambda: scores.score_fn("tanh"), type_, "fn", "function of (s, b, n, q, k", "str"),
        (lambda: scores.score_fn(max, 3), type_, "arrays", "int"),
        (lambda: explain(platform="cuda"), value, "platform", '"gpu"', "'cuda'"),
        (lambda: explain(implementation="flash"), value, "implementation", "'flash'"),
        (lambda: Blockwise(block_k=16.0), type_, "block_k must be an int", "16.0"),
        (lambda: Blockwise(True), type_, "block_q must be an int", "True"),
        (lambda: PallasGPU((16, 16, 2, 1)), type_, "forward must be Tiles or None", "tuple"),
        (lambda: explain(sinks=f(3)), value, "sinks", "(3,)", "[N] = (4,)"),
        (lambda: explain(dropout_rate=0.1), value, "dropout_rate", "dropout_key is None"),
        (lambda: explain(dropout_rate=-0.5), value, "dropout_rate", "[0, 1)", "-0.5"),
        (lambda: explain(scale="big"), type_, "scale", "str"),
        (lambda: explain(return_lse=1), type_, "return_lse", "1"),
        (lambda: block_map(b(T, S), T, S), type_, "mask", "array of dtype bool"),
        (lambda: block_map(masks.causal(), T, S, block_q=0), value, "block_q", "0"),
        (lambda: block_map(masks.causal(), -1, S), value, "T must be at least 0", "-1"),
        (lambda: masks.causal().to_dense(T, -2), value, "S must be at least 0", "-2"),
    ]
