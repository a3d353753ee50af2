"""Wrong calls of modules."""

import functools

import numpy as np

from wrong_calls import B, S, T, b, f, i


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
    mixture = functools.partial(nn.MixtureOfExperts, 8, 8, experts=4, per_token=2, rngs=rngs)
    return [
        (lambda: nn.MultiHeadAttention(9, 2, rngs=rngs), value, "multiple of num_heads", "9 and 2"),
        (lambda: nn.MultiHeadAttention(8, 0, rngs=rngs), value, "num_heads must be at least 1"),
        (lambda: new(num_kv_heads=3), value, "multiple of num_kv_heads", "2 and 3"),
        (lambda: new(head_dim=0), value, "head_dim must be at least 1", "0"),
        (lambda: new(value_dim=2.5), type_, "value_dim must be an int", "2.5"),
        (lambda: new(bias=("query", "keys")), value, "bias must name some of", "keys"),
        (
            lambda: nn.MixtureOfExperts(8, 8, experts=2, per_token=3, rngs=nnx.Rngs(0)),
            value,
            "per_token must be at most experts",
            "3 and 2",
        ),
        (lambda: mixture(groups=3), value, "groups must divide experts", "3 and 4"),
        (lambda: mixture(groups=2, groups_per_token=3), value, "groups_per_token must be at most"),
        (lambda: mixture(groups=4), value, "per_token must be at most the experts of", "2 and 1"),
        (
            lambda: mixture(gating="sigmoid", groups=4, groups_per_token=4),
            value,
            "groups must have at least 2 experts each",
            "4 experts in 4 groups",
        ),
        (lambda: mixture(gating="tanh"), value, "gating must be one of", "'tanh'"),
        (lambda: mixture(scale=0.0), value, "scale must be positive", "0.0"),
        (lambda: mixture(shared=0), value, "hidden must be at least 1", "0"),
        (lambda: new(bias=("query",), fused=True), value, "bias must be the same for", "fused"),
        (lambda: new(scale=float("inf")), value, "scale must be finite", "inf"),
        (lambda: new(scale="big"), type_, "scale must be a number", "'big'"),
        (lambda: embed(scale=float("nan")), value, "scale must be finite", "nan"),
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
        (
            lambda: own(x, cache=own.init_cache((3,), 9)),
            value,
            "key must have shape [*B T K H] with *B = (3,)",
        ),
        (
            lambda: own(x, cache=own.init_cache((B,), 9, dtype="float16")),
            type_,
            "cache's dtype float16",
            "float32",
        ),
        (
            lambda: own(x, cache=own.init_cache((B,), 9), mask=np.ones((T, T), bool)),
            type_,
            "mask must be a Mask when there is a cache",
            "array of dtype bool",
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
    """Arguments of another type or rank, or that could be mistaken for something else."""
    from attention_jax import masks, mechanisms, nn
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
        (lambda: own(x, cache=3), type_, "cache must be a KVCache, a PagedCache or None", "int"),
        (lambda: own.init_cache(B, 9), type_, "batch must be a tuple", "int 2", "(2,)"),
        (lambda: own(x, count=3), value, "count must be None without a cache"),
        (lambda: own(x, return_weights=1), type_, "return_weights must be True or False", "1"),
        (lambda: dropping(x, deterministic="no"), type_, "deterministic must be", "'no'"),
        (lambda: dropping(x, rngs=3), type_, "rngs must be nnx.Rngs", "int"),
        (lambda: new(dropout_rate="x"), type_, "dropout_rate must be a float in [0, 1)", "str"),
        (lambda: new(context_features=0), value, "context_features must be at least 1", "0"),
        (lambda: new(out_features=0), value, "out_features must be at least 1", "0"),
        (lambda: new(rotary=3), type_, "rotary must be a Rotary", "int"),
        (lambda: new(rngs=0), type_, "rngs must be nnx.Rngs, got int 0: use nnx.Rngs(0)"),
        (lambda: nn.FeedForward(8, 16, rngs=3), type_, "nnx.Rngs(3)"),
        (
            lambda: new(attention=mechanisms.linear_attention),
            type_,
            "linear_attention does not take score, sinks, scale",
            "mechanisms.as_attention(linear_attention)",
        ),
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
        (
            lambda: pool(x, b(B, 3)),
            value,
            "real must have the tokens' shape [*B T] = (2, 5)",
            "(2, 3)",
        ),
        (
            lambda: pool(x, real[None]),
            value,
            "real must have the tokens' shape [*B T]",
            "(1, 2, 5)",
        ),
        (lambda: nn.AttentionPooling(8, 2, queries=0, rngs=rngs), value, "queries must be at"),
        (lambda: pooling.mean(i(B, T, 8)), type_, "x must have a floating dtype", "int32"),
        (lambda: pooling.mean(f(8)), value, "x must have shape [*B T E]", "(8,)"),
        (lambda: pooling.mean(x, i(B, T)), type_, "real must be a bool array", "int32"),
        (lambda: pool(x, real[:1]), value, "real must have the tokens' shape [*B T]", "(1, 5)"),
        (lambda: pooling.mean(x, real[:1]), value, "real must have the tokens' shape", "(1, 5)"),
        (lambda: pooling.first(x, real[:1]), value, "real must have the tokens' shape", "(1, 5)"),
        (lambda: pooling.mean(x, b(3)), value, "real must have the tokens' shape [*B T]", "(3,)"),
        (lambda: token(f(8)), value, "x must have shape [*B T E] with E = 8", "(8,)"),
        (lambda: token(f(B, T, 7)), value, "x must have shape [*B T E] with E = 8", "(2, 5, 7)"),
        (lambda: norm(f(B, 7)), value, "x must have shape [... E] with E = 8", "(2, 7)"),
    ]
