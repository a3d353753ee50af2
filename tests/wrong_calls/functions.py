"""Wrong calls of the drop-ins, positions, caches and mechanisms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wrong_calls import B, D, H, K, N, S, T, b, f, good, i


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
        ({"mask": b(B, 3, T, S)}, value, "mask has shape (2, 3, 5, 7)", "N = 4, T = 5, S = 7"),
        ({"mask": b(T)}, value, "mask has shape (5,)", "[*B N T S]"),
        ({"mask": b(1, B, N, T, S)}, value, "mask has shape (1, 2, 4, 5, 7)", "[*B N T S]"),
        ({"mask": masks.causal()}, type_, "mask must be an array", "Band"),
        ({"bias": f(3, N, T, S)}, value, "bias has shape (3, 4, 5, 7)", "N = 4, T = 5, S = 7"),
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
        ({"scale": np.float32("nan")}, value, "scale must be finite", "nan"),
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
    from attention_jax import attention, cache, parallel, positions
    from attention_jax.core.positions import Contiguous

    value, type_, cannot = "ValueError", "TypeError", "NotImplementedError"
    x, at = f(B, T, N, H), np.arange(T)
    rotary = functools.partial(positions.rotary, f(B, T, N, 12), at)
    k, v = f(B, 3, K, H), f(B, 3, K, D)

    def empty(batch=(B,), capacity=8, **sizes):
        sizes = {"num_kv_heads": K, "head_dim": H, "value_dim": D, **sizes}
        return cache.init(batch, capacity=capacity, **sizes)

    def local(**options):
        """Inside ``shard_map`` over an axis ``x``."""
        mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
        call = functools.partial(parallel.attention, **({"axis_name": "x"} | options))
        p = jax.sharding.PartitionSpec()
        mapped = jax.shard_map(call, mesh=mesh, in_specs=p, out_specs=p)
        return functools.partial(jax.eval_shape, mapped, *good().values())

    return [
        (lambda: rotary(width=3), value, "width must be even", "3"),
        (lambda: rotary(width=14), value, "width must be at most 12", "14"),
        (lambda: rotary(theta=0.0), value, "theta must be positive", "0"),
        (lambda: rotary(theta=np.inf), value, "theta must be positive and finite", "inf"),
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
        (lambda: positions.YaRN(np.inf, 8), value, "factor must be positive and finite", "inf"),
        (
            lambda: rotary(scaling=positions.LongRoPE((1.0,), (1.0,), 8), length=4),
            value,
            "short and long must have",
            "got 1",
        ),
        (lambda: positions.LongRoPE((1.0,), (), 8), value, "the same length", "1 and 0"),
        (lambda: positions.LongRoPE((0.0,), (1.0,), 8), value, "short must be positive", "0.0"),
        (lambda: positions.DynamicNTK(2.0, 0), value, "original must be positive", "0"),
        (lambda: positions.Llama3(low=4.0, high=1.0), value, "low must be less", "4.0 and 1.0"),
        (lambda: empty(capacity=2).append(k, v), value, "capacity 2", "3 tokens", "larger"),
        (
            lambda: empty().append(x[:, :3], v),
            value,
            "key must have shape [*B T K H] with *B = (2,), K = 2, H = 3",
        ),
        (
            lambda: empty().append(k, k),
            value,
            "value must have shape [*B T K D] with *B = (2,), K = 2, D = 6",
        ),
        (lambda: empty((3,)).append(k, v), value, "key must have shape", "(2, 3, 2, 3)"),
        (lambda: empty().append(k[0], v), value, "key must have shape", "(3, 2, 3)"),
        (lambda: empty().append(k.astype("float16"), v), type_, "key", "float32", "float16"),
        (lambda: empty().append(k.astype(int), v), type_, "key", "floating dtype", "int64"),
        (lambda: empty().append(k[:, :2], v), value, "key has 2 tokens", "value has 3"),
        (lambda: empty().append(k, v, 4), value, "count must be from 0 to T = 3", "4"),
        (lambda: empty().append(k, v, 1.5), type_, "count must be integers", "float64"),
        (lambda: cache.attend(empty(), x, k, v), value, "query has 5 tokens", "key has 3"),
        (
            lambda: attention(**good(), key_positions=np.full(S, 2**40)),  # not seen under jit
            value,
            "key_positions must be within int32",
            "1099511627776",
        ),
        (
            lambda: cache.attend(empty(), k, k, v, query_positions=i(3)),
            type_,
            "query_positions is not an option of attend",
            "the cache determines it",
        ),
        (lambda: empty(capacity=0), value, "capacity must be at least 1", "0"),
        (lambda: empty(head_dim=1.5), type_, "head_dim must be an int", "1.5"),
        (
            lambda: parallel.attention(**good(), axis_name="x", strategy="rings"),
            value,
            'strategy must be one of "gather", "ring", "heads"',
            "'rings'",
        ),
        (
            lambda: parallel.attention(**good(), axis_name="x"),
            value,
            "axis_name is 'x'",
            "its axes are none",
        ),
        (
            lambda: attention(**good(), query_positions=jax.ShapeDtypeStruct((T,), "int32")),
            type_,
            "query_positions must be an array",
            "only explain takes it",
        ),
        (local(axis_name="y"), value, "axis_name is 'y'", "its axes are 'x'"),
        (local(axis_name=("x", "y")), value, "axis_name is ('x', 'y')", "its axes are 'x'"),
        (local(query_positions=f(T)), type_, "query_positions", "int32 array", "float32"),
        (
            local(query_positions=Contiguous(3)),
            type_,
            "query_positions must be an int32 array here",
            "jnp.arange",
        ),
        (local(key_positions=[0] * S), type_, "key_positions", "int32 array", "list"),
        (local(key_positions=i(T)), value, "key_positions has shape (5,)", "[S] or [*B S]"),
        (local(strategy=None), value, "strategy must be one of", "None"),
        (local(strategy="ring", mask=f(T, S)), type_, "mask", "bool array", "float32"),
        (local(strategy="ring", return_lse=1), type_, "return_lse must be True or False", "1"),
        (
            local(strategy="ring", implementation=["cudnn", "splash"]),
            cannot,
            'strategy "ring" needs an implementation',
            "cudnn, splash cannot",
        ),
        (lambda: parallel.zigzag(8.0, 2), type_, "T must be an int", "8.0"),
        (lambda: parallel.striped(9, 2), value, "T must be a multiple of n = 2", "9"),
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
    yield lambda: m.additive_attention(q[0, 0], q, v, vector), value, "query must have at least 3"
    yield lambda: m.additive_weights(q, q, i(N, H)), type_, "vector must have a floating dtype"
    call = functools.partial(m.additive_weights, q, q, vector, mask=masks.causal())
    yield call, type_, "mask.to_dense(T, S)"
    yield lambda: m.additive_weights(q, q, vector, mask=b(3)), value, "mask has shape (3,)", "T = 5"
    yield (
        lambda: m.as_attention(m.topk_attention),
        type_,
        "functools.partial(topk_attention, k=...)",
    )
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
    yield (
        lambda: gated(x, x, x, x[..., :2]),
        value,
        "log_gate must have shape [*B S K H] with *B = (2,), S = 5, K = 2, H = 3 or H = 1",
    )
    yield (
        lambda: gated(x, x, x, square, mask=masks.window(3, 0)),
        cannot,
        "masks.window(left=3, right=0)",
    )
    yield (
        lambda: m.delta_rule(x, x, x, square[:, :2, :, 0]),
        value,
        "beta must have shape [*B S K]",
        "(2, 2, 2)",
    )
    yield lambda: m.linformer_attention(q, k, v, mixing, f(3, S)), value, "value_mixing must have"
    causal = masks.causal()
    call = functools.partial(m.linformer_attention, x, x, x, f(4, T), f(4, T), mask=causal)
    yield call, cannot, "cannot be causal"
    yield lambda: m.routing_attention(q, k, v, centroids[0]), value, "centroids must have shape"
    yield lambda: m.update_centroids(centroids, q, k, decay=2.0), value, "decay must be in [0, 1]"
    yield lambda: m.differential_attention(q[:, :, :3], k, v, 0.5), value, "even number of heads"
    yield lambda: m.differential_attention(q, k, v, 0.5), value, "key must have twice the heads"
    yield lambda: m.differential_attention(q, k, v[0, 0], 0.5), value, "value must have at least 3"
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
