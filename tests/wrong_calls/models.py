"""Wrong calls of models and generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wrong_calls import B, f, i


def wrong_models():
    """Of models and decoding, likewise."""
    from flax import nnx

    from attention_jax import models, nn
    from attention_jax.models import Layers, Sampling, beam_search, generate, speculate

    value, type_ = "ValueError", "TypeError"
    nan = float("nan")
    stack = functools.partial(Layers, num_layers=1, num_heads=2)
    small = stack(features=8)
    config = models.DecoderConfig(10, small, positions="learned", max_length=6)
    decoder = models.Decoder(config, rngs=nnx.Rngs(0))
    both = models.EncoderDecoder(models.EncoderDecoderConfig(10, small, small), rngs=nnx.Rngs(0))
    images = models.VisionTransformer(
        models.VisionConfig((4, 4), 2, small, channels=1), rngs=nnx.Rngs(0)
    )
    prompt, real = np.array([[3, 1, 4]] * B), np.array([[True] * 3, [False] * 3])
    go = functools.partial(generate, decoder, prompt=prompt, max_new_tokens=2)
    ahead = functools.partial(speculate, decoder, decoder, prompt, max_new_tokens=2)
    other = models.DecoderConfig(10, small)
    encoder = models.Encoder(models.EncoderConfig(10, small, head="tokens"), rngs=nnx.Rngs(0))
    plain = models.EncoderConfig(10, small)
    fresh = functools.partial(models.classifier, rngs=nnx.Rngs(0))
    free = models.Decoder(other, rngs=nnx.Rngs(0))
    one_row, tokens = real[:1], "real must be bool of the tokens' shape (2, 3)"
    vectors, rngs = f(B, 3, 8), nnx.Rngs(0)
    return [
        (
            lambda: models.Encoder(plain, embed=nn.Embeddings(9, 8, rngs=rngs), rngs=rngs),
            value,
            "embed must have a table of the shape (vocabulary, features) (10, 8)",
            "(9, 8)",
        ),
        (lambda: encoder(prompt, real=one_row), value, tokens, "(1, 3)"),
        (lambda: encoder.pooled(vectors, one_row), value, tokens, "(1, 3)"),
        (lambda: encoder.stack(vectors, real=one_row), value, tokens, "(1, 3)"),
        (lambda: encoder.embed(prompt, real=one_row[0]), value, tokens, "(3,)"),
        (lambda: decoder(prompt, real=one_row), value, tokens, "(1, 3)"),
        (
            lambda: both(prompt, prompt, source_real=one_row),
            value,
            "source_real must be bool of the source's shape (2, 3)",
            "(1, 3)",
        ),
        (
            lambda: both(prompt, prompt, target_real=one_row),
            value,
            "target_real must be bool of the target's shape (2, 3)",
            "(1, 3)",
        ),
        (
            lambda: models.log_mel(np.zeros(900, np.int16)),
            type_,
            "waveform must be floats between -1 and 1",
            "int16",
        ),
        (
            lambda: stack(features=9),
            value,
            "features must be a multiple of num_heads",
            "9 and 2",
        ),
        (
            lambda: Layers(features=8, num_layers=0, num_heads=2),
            value,
            "num_layers must be at least 1",
            "0",
        ),
        (
            lambda: stack(features=8, norm="batch"),
            value,
            "norm must be one of",
            "'batch'",
        ),
        (
            lambda: stack(features=8, windows=()),
            value,
            "windows must have an entry",
        ),
        (
            lambda: stack(features=8, windows=(0,)),
            value,
            "windows must be at least 1",
            "0",
        ),
        (
            lambda: stack(features=8, windows=4),
            type_,
            "windows must be a tuple",
            "windows=(4,)",
        ),
        (
            lambda: stack(features=8, experts=models.Experts(4, 2)),
            value,
            "experts needs gated=True and feed_forward_bias=False",
        ),
        (lambda: models.Experts(0, 1), value, "number must be at least 1", "0"),
        (lambda: models.Experts(2, 3), value, "per_token must be at most number", "3 and 2"),
        (lambda: stack(features=8, query_key_norm="all"), value, "query_key_norm must be", "'all'"),
        (lambda: stack(features=8, residual_scale=nan), value, "residual_scale must be finite"),
        (lambda: stack(features=8, rotary=()), value, "rotary must have an entry"),
        (
            lambda: stack(features=8, rotary=(None, 1e4)),
            type_,
            "rotary must be a Rotary, None, or a tuple of them",
            "float",
        ),
        (lambda: stack(features=8, scale=nan), value, "scale must be finite", "nan"),
        (lambda: stack(features=8, softcap=0.0), value, "softcap must be positive", "0.0"),
        (
            lambda: models.DecoderConfig(10, small, logits_softcap=nan),
            value,
            "logits_softcap must be positive and finite",
            "nan",
        ),
        (
            lambda: models.DecoderConfig(10, small, embedding_scale=nan),
            value,
            "embedding_scale must be finite",
            "nan",
        ),
        (
            lambda: stack(features=8, feed_forward_dropout_rate=1.0),
            value,
            "feed_forward_dropout_rate must be in [0, 1)",
        ),
        (lambda: models.EncoderConfig(10, small, head="words"), value, "head must be one of"),
        (
            lambda: models.EncoderConfig(10, small, pool="max"),
            value,
            "pool must be one of",
            "'max'",
        ),
        (lambda: fresh(decoder, ["a"]), type_, "encoder must be an Encoder, got Decoder"),
        (
            lambda: fresh(fresh(encoder, ["a"]), ["b"]),
            type_,
            "encoder must be an Encoder, got Classifier: pass its encoder",
        ),
        (
            lambda: fresh(encoder, "ab"),
            type_,
            "labels must be a list or tuple of strings, got 'ab'",
        ),
        (
            lambda: fresh(encoder, []),
            value,
            "labels must not be empty, and no name may occur twice",
        ),
        (
            lambda: fresh(encoder, ["a", "a"]),
            value,
            "labels must not be empty, and no name may occur twice",
        ),
        (lambda: fresh(encoder, ["a"], pool="max"), value, "pool must be one of", "'max'"),
        (
            lambda: models.ReaderConfig(encoder.config),
            value,
            "encoder must have no head of its own, got head='tokens'",
        ),
        (lambda: models.ReaderConfig(other), type_, "encoder must be an EncoderConfig"),
        (
            lambda: models.Reader(models.ReaderConfig(plain), encoder=encoder, rngs=nnx.Rngs(0)),
            value,
            "encoder must have the configuration config.encoder",
        ),
        (
            lambda: models.EncoderDecoderConfig(10, small, stack(features=4)),
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
        (lambda: go(key=jax.random.key(0)), value, "key must be None without a draw", "Sampling"),
        (
            lambda: go(real=np.array([[True, False, True]] * B)),
            value,
            "real must be True for one run",
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
        (
            lambda: speculate(encoder, decoder, prompt, max_new_tokens=1),
            type_,
            "model must be a Decoder",
            "Encoder",
        ),
        (
            lambda: speculate(decoder, 3, prompt, max_new_tokens=1),
            type_,
            "draft must be a Decoder",
            "int",
        ),
        (lambda: ahead(ahead=2.0), type_, "ahead must be an int", "2.0"),
        (lambda: ahead(branches="2222"), type_, "branches must be an int", "'2222'"),
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
