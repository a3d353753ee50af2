"""The library under JAX's stricter settings, and with other kinds of random keys.

Each call below runs under each setting. Rank promotion shows while tracing, so those tests do not
compile; the rest run, and a default run has time for one call of each kind.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import mostly_slow, normal
from jax.experimental import checkify

import attention_jax as aj
from attention_jax import cache, masks, mechanisms, nn, positions, scores
from attention_jax.models import (
    Classifier,
    ClassifierConfig,
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    Layers,
    Relative,
    Sampling,
    VisionConfig,
    VisionTransformer,
    beam_search,
    generate,
)
from attention_jax.positions import Rotary

B, T, N, K, H, D = 2, 6, 4, 2, 4, 3
rng = np.random.default_rng(0)
Q, KEY, VALUE = (
    rng.normal(size=(B, T, n, w)).astype(np.float32) for n, w in ((N, H), (K, H), (K, D))
)
FLAGS = np.array([[True] * 4 + [False] * 2, [False] + [True] * 5])
SEGMENTS = np.array([[0, 0, 0, 1, 1, -1], [-1, 0, 0, 0, 0, 1]], np.int32)
TOKENS = rng.integers(1, 11, (B, T)).astype(np.int32)
POSITIONS = np.arange(T, dtype=np.int32)


# --- Attention.

MASKS = {
    "causal": masks.causal(),
    "causal at the end": masks.causal(align="end"),
    "offsets": masks.causal(offset=np.array([-2, 1], np.int32)),  # some queries have no visible key
    "window": masks.window(2, 1) & masks.lengths(query=np.array([3, 0]), key=np.array([5, 0])),
    "segments": masks.segments(SEGMENTS) & masks.padding(FLAGS),
    "prefix": masks.prefix(np.array([2, 4])) | masks.causal(),
    "chunked": masks.chunked(2) | masks.dilated(3),
    "global": masks.global_tokens(FLAGS) | masks.window(1, 1),
    "neighborhood": masks.neighborhood((2, 3), (1, 3)),
    "block_sparse": masks.block_sparse(np.array([[True, False], [False, True]]), 3),
    "dense": masks.dense(np.broadcast_to(FLAGS[:, None, None], (B, 1, T, T))),
    "mask_fn": masks.mask_fn(lambda b, n, q, k: (q + k + n) % 2 == 0),
    "none": None,
}
SCORES = {
    "softcap": scores.softcap(5.0),
    "alibi": scores.alibi(offset=np.array([0, 3], np.int32)),
    "bias": scores.bias(normal(1, B, N, T, T)),
    "-inf bias": scores.bias(np.where(FLAGS, 0, -np.inf).astype(np.float32)[:, None, None]),
    "bias of heads": scores.bias(normal(1, N, 1, T)),
    "relative_bias": scores.relative_bias(normal(1, 8, N), max_distance=4),
    "relative_embedding": scores.relative_embedding(Q, normal(1, 5, N, H)),
    "score_fn": scores.score_fn(
        lambda s, b, n, q, k, x: s + x[n] * (q - k).astype(s.dtype), normal(1, N)
    ),
}


def attend(mask=None, score=(), implementation="xla", rate=0.0, key=None):
    """Output, lse and the gradients of query, key, value, sinks and the arrays of scores."""

    def total(q, k, v, sinks, score):
        options = {"mask": mask, "score": score, "dropout_rate": rate, "dropout_key": key}
        out, lse = aj.attention(
            q, k, v, sinks=sinks, implementation=implementation, return_lse=True, **options
        )
        return (out**2).sum() + lse.sum(), (out, lse)

    grad = jax.grad(total, argnums=(0, 1, 2, 3, 4), allow_int=True, has_aux=True)
    return grad(Q, KEY, VALUE, normal(1, N), score)


def without_sinks(mask=None, implementation="xla"):
    """Queries without a visible key have lse -inf, which gets no gradient."""

    def total(q, k, v):
        return (aj.attention(q, k, v, mask=mask, implementation=implementation) ** 2).sum()

    return jax.value_and_grad(total, argnums=(0, 1, 2))(Q, KEY, VALUE)


# --- The rest of the library.


def all_positions(_):
    turned = [
        Rotary(width=2, interleaved=True)(Q, POSITIONS),
        Rotary(scaling=positions.DynamicNTK(2.0, 4))(Q, jnp.broadcast_to(POSITIONS, (B, T))),
        Rotary(scaling=positions.YaRN(2.0, 4))(Q, POSITIONS),
    ]
    vectors = [
        positions.sinusoidal(POSITIONS, 6),
        positions.sinusoidal(TOKENS, 6, interleaved=False),
        positions.learned(normal(1, 12, 3), TOKENS),
    ]
    query, score = positions.transformer_xl(
        Q, normal(1, 5, N, H), content_bias=normal(1, N, H), position_bias=normal(1, N, H)
    )
    return turned, vectors, aj.attention(query, KEY, VALUE, score=score)


def caching(_):
    outs = []
    for rolling in (False, True):
        cached = cache.init(
            (B,), capacity=8, num_kv_heads=K, head_dim=H, value_dim=D, rolling=rolling
        )
        for chunk in (slice(0, 4), slice(4, 5)):
            count = None if chunk.start else np.array([4, 2], np.int32)
            out, cached = cache.attend(
                cached,
                *(x[:, chunk] for x in (Q, KEY, VALUE)),
                mask=masks.window(3, 0),
                count=count,
            )
            outs.append(out)
        outs.append((cached.positions(), cached.overflowed))
    return outs


def maps_and_drawings(_):
    """Block maps and dense masks."""
    some_masks = [mask for mask in MASKS.values() if mask is not None]
    blocks = [aj.block_map(x, T, T, block_q=2, block_k=3, B=B, N=N).kinds for x in some_masks]
    return blocks, [x.to_dense(T, T, B=B, N=N) for x in some_masks]


def drop_ins(key):
    bias, heads = normal(1, N, T, T)[None], np.repeat(KEY, 2, axis=2)
    options = {"mask": FLAGS[:, None, None], "dropout_rng": key, "dropout_rate": 0.2}
    values = normal(1, B, T, N, D)
    return [
        nn.dot_product_attention(
            Q, KEY, VALUE, bias[:, :, :1], key_value_seq_lengths=np.array([3, 6]), is_causal=True
        ),
        nn.attention_fn(Q, heads, values, bias=bias, deterministic=False, **options),
        nn.pooling.mean(Q[:, :, 0], FLAGS),
    ]


def linear_mechanisms(key):
    causal = masks.causal() & masks.padding(FLAGS)
    features = mechanisms.performer_features(key, H, 8)
    gates, beta = -np.abs(normal(1, B, T, K, H)), np.abs(normal(1, B, T, K))
    calls = {
        "linear": lambda q, k, v: mechanisms.linear_attention(q, k, v, mask=masks.padding(FLAGS)),
        "performer": lambda q, k, v: mechanisms.linear_attention(
            q, k, v, mask=causal, features=features
        ),
        "gated": lambda q, k, v: mechanisms.gated_linear_attention(q, k, v, gates, mask=causal),
        "retention": lambda q, k, v: mechanisms.retention(q, k, v, mask=causal),
        "delta": lambda q, k, v: mechanisms.delta_rule(q, k, v, beta, mask=causal),
    }
    return _gradients(calls)


def dense_mechanisms(_):
    causal, padding = masks.causal(offset=np.array([-1, 0])), masks.padding(FLAGS)
    mixing, centroids = normal(1, 3, T), normal(1, K, 2, H)
    calls = {
        "topk": lambda q, k, v: mechanisms.topk_attention(q, k, v, k=2, mask=causal),
        "inverted": lambda q, k, v: mechanisms.inverted_attention(q, k, v, mask=causal),
        "slot": lambda q, k, v: mechanisms.slot_attention(q, k, v, mask=causal),
        "linformer": lambda q, k, v: mechanisms.linformer_attention(
            q, k, v, mixing, mixing, mask=padding
        ),
        "routing": lambda q, k, v: mechanisms.routing_attention(
            q, k, v, centroids, mask=masks.causal() & padding
        ),
        "differential": lambda q, k, v: mechanisms.differential_attention(
            q, k, v[:, :, :1], normal(1, 2), mask=causal
        ),
        "additive": lambda q, k, v: mechanisms.additive_attention(
            q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2), normal(1, N, H), mask=FLAGS[0]
        ),
        "latent": lambda q, k, v: mechanisms.absorbed_latent_attention(
            q, q[..., :2], k[:, :, 0], k[:, :, 1, :2], normal(1, H, N, H), normal(1, H, N, D)
        ),
    }
    moved = mechanisms.update_centroids(centroids, Q, KEY, mask=padding)
    weight = mechanisms.differential_weight(
        **{x: normal(1, N, H) for x in ("query_1", "key_1", "query_2", "key_2")}, layer=1
    )
    return _gradients(calls), moved, weight


def _gradients(calls):
    return {
        name: jax.value_and_grad(lambda *x, call=call: (call(*x) ** 2).sum(), (0, 1, 2))(
            Q, KEY, VALUE
        )
        for name, call in calls.items()
    }


def layers(**more):
    return Layers(features=8, num_layers=1, num_heads=2, dropout_rate=0.1, **more)


def train(model, *args, **options):
    """A model's result and the gradient of its parameters."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def total(parameters):
        out = nnx.merge(graph, parameters, rest, copy=True)(*args, **options)
        return (out.astype(jnp.float32) ** 2).mean()

    return jax.value_and_grad(total)(parameters)


def classifier(key):
    post = layers(order="post", attention_dropout_rate=0.1, fused=True, windows=(3,))
    config = EncoderConfig(11, post, max_length=T, types=2, embedding_norm=True, pooler=True)
    model = Classifier(ClassifierConfig(config, ("a", "b", "c"), 0.1), rngs=nnx.Rngs(key))
    return train(model, TOKENS, real=FLAGS, types=TOKENS % 2)


def tagger(key):
    config = EncoderConfig(11, layers(alibi=True), head="tokens", positions="sinusoidal")
    return train(Encoder(config, rngs=nnx.Rngs(key)), TOKENS, real=FLAGS)


def vision(key, **more):
    config = VisionConfig(image=(4, 4), patch=2, layers=layers(norm="rms"), classes=3, **more)
    return train(VisionTransformer(config, rngs=nnx.Rngs(key)), normal(1, B, 4, 4, 3))


def decoder(key):
    config = DecoderConfig(
        11,
        layers(
            rotary=Rotary(),
            num_kv_heads=1,
            gated=True,
            norm="one_plus_rms",
            order="both",
            query_key_norm=True,
            sinks=True,
            gate=True,
            softcap=9.0,
            windows=(2,),
        ),
        logits_softcap=9.0,
        tied=False,
    )
    return Decoder(config, rngs=nnx.Rngs(key))


def translator(key):
    relative = layers(relative=Relative(4, 8), norm="rms", bias=False)
    config = EncoderDecoderConfig(11, relative, relative, positions=None)
    return EncoderDecoder(config, rngs=nnx.Rngs(key))


def recorded(key):
    return nn.record_weights(decoder(key), TOKENS)[1]


def adapted(key):
    return train(nn.low_rank(decoder(key), rank=1, rngs=nnx.Rngs(key)), TOKENS)


def sampled(key):
    model, sampling = decoder(key), Sampling(temperature=0.8, top_k=5, top_p=0.9)
    model.eval()
    return generate(model, TOKENS, max_new_tokens=3, real=FLAGS, sampling=sampling, key=key).tokens


def searched(key):
    """Greedily and with beams."""
    model, pair = decoder(key), translator(key)
    model.eval()
    pair.eval()
    return [
        generate(pair, TOKENS[:, :1], source=TOKENS, max_new_tokens=3, stop=1).tokens,
        beam_search(model, TOKENS, max_new_tokens=2, beams=2).tokens,
    ]


def dropout(key, implementation):
    return attend(masks.causal(), implementation=implementation, rate=0.3, key=key)


CALLS = {
    **{
        f"{implementation}, {name}": lambda _, m=mask, i=implementation: attend(m, implementation=i)
        for implementation in ("xla", "blockwise")
        for name, mask in MASKS.items()
    },
    **{
        f"{implementation}, {name}": lambda _, s=score, i=implementation: attend(
            masks.causal(offset=np.array([-2, 1], np.int32)), (s,), i
        )
        for implementation in ("xla", "blockwise")
        for name, score in SCORES.items()
    },
    **{
        f"{implementation}, {what}": call
        for implementation in ("xla", "blockwise")
        for what, call in {
            "dropout": functools.partial(dropout, implementation=implementation),
            "without sinks": lambda _, i=implementation: without_sinks(MASKS["offsets"], i),
        }.items()
    },
    "weights": lambda _: aj.attention_weights(Q, KEY, mask=MASKS["offsets"]),
    "positions": all_positions,
    "cache": caching,
    "maps and drawings": maps_and_drawings,
    "drop-ins": drop_ins,
    "linear mechanisms": linear_mechanisms,
    "dense mechanisms": dense_mechanisms,
    "classifier": classifier,
    "tagger": tagger,
    "vision": vision,
    "vision, pooled by attention": functools.partial(vision, pool="attention"),
    "decoder": lambda key: train(decoder(key), TOKENS, real=FLAGS),
    "translator": lambda key: train(translator(key), TOKENS, TOKENS[:, :3], source_real=FLAGS),
    "weights of a model": recorded,
    "adapters": adapted,
    "sampled tokens": sampled,
    "searched tokens": searched,
}

# --- Settings.


@contextlib.contextmanager
def typed_keys(setting):
    with setting:
        yield jax.random.key(0)


@contextlib.contextmanager
def raw_keys(implementation):
    """Keys as arrays of uint32, which is what ``jax.random.PRNGKey`` makes."""
    with jax.default_prng_impl(implementation), jax.enable_custom_prng(False):
        yield jax.random.PRNGKey(0)


SETTINGS = {
    "nans": lambda: typed_keys(jax.debug_nans(True)),
    "checks": lambda: typed_keys(jax.enable_checks(True)),
    "raw keys": lambda: raw_keys("threefry2x32"),
    "rbg": lambda: typed_keys(jax.default_prng_impl("rbg")),
    "raw rbg": lambda: raw_keys("rbg"),
}
# Queries without a visible key, where a NaN would arise.
HIDING = ["offsets", "window", "segments", "-inf bias", "without sinks"]
HIDING = [f"{implementation}, {x}" for implementation in ("xla", "blockwise") for x in HIDING]
OTHERS = ["weights", "positions", "cache", "linear mechanisms", "dense mechanisms", "tagger"]
KEYED = ["xla, dropout", "blockwise, dropout"]
OF_SETTING = {
    "nans": [*HIDING, *OTHERS, "decoder", "sampled tokens", "searched tokens"],
    # What has primitives or derivatives of its own.
    "checks": ["xla, segments", "blockwise, offsets", "linear mechanisms", "cache", *KEYED],
    "raw keys": [*KEYED, "drop-ins", "linear mechanisms", "classifier", "sampled tokens"],
    "rbg": KEYED,
    "raw rbg": ["xla, dropout", "drop-ins"],
}
RUNS = [(setting, call) for setting, calls in OF_SETTING.items() for call in calls]
QUICK_RUNS = [
    ("nans", "xla, without sinks"),
    ("checks", "blockwise, offsets"),
    ("raw keys", "blockwise, dropout"),
    ("rbg", "xla, dropout"),
    ("raw rbg", "drop-ins"),
]
QUICK_TRACES = ["xla, segments", "blockwise, window", "blockwise, dropout", "blockwise, bias"]
QUICK_TRACES += ["positions", "cache", "drop-ins", "tagger"]


@pytest.mark.parametrize("name", mostly_slow(CALLS, QUICK_TRACES))
def test_no_rank_is_promoted(name):
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(CALLS[name], jax.random.key(0))


@pytest.mark.parametrize("run", mostly_slow(RUNS, QUICK_RUNS), ids=", ".join)
def test_runs_under_each_setting(run):
    setting, name = run
    with SETTINGS[setting]() as key:
        result = jax.jit(CALLS[name])(key)
    for x in jax.tree.leaves(result):
        assert x.dtype == jax.dtypes.float0 or not np.isnan(x).any()


@pytest.mark.parametrize("name", mostly_slow(HIDING[:5], ["xla, without sinks"]))
def test_no_intermediate_nan(name):
    """Not even one that is replaced later, as ``-inf - -inf`` in a masked row would be."""
    error, _ = checkify.checkify(CALLS[name], errors=checkify.nan_checks)(jax.random.key(0))
    assert error.get() is None
