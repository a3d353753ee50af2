"""Arguments of generation: tokens, stop tokens, padding, processors of logits. And streams."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomized, softmax
from test_models import SEQUENCES, V

from attention_jax import models
from attention_jax.models import Sampling, beam_search, generate, sampling, stream
from attention_jax.models.prompts import as_stop

NEW = 4
PROMPT = np.array([[3, 1, 4], [5, 9, 2], [7, 7, 8]])
REAL = np.array([[True] * 3, [False, True, True], [False, False, True]])


@functools.cache
def decoder():
    layers = models.Layers(features=8, num_layers=1, num_heads=2, hidden=8)
    config = models.DecoderConfig(V, layers, positions="learned", max_length=9)
    return randomized(models.Decoder(config, rngs=nnx.Rngs(0)))


@functools.cache
def both_sides():
    return randomized(models.EncoderDecoder(SEQUENCES["Vaswani"], rngs=nnx.Rngs(0)))


# --- Tokens.


@pytest.mark.parametrize("token", [-1, V, 2**32 + 3, -(2**40)])
@pytest.mark.parametrize("decode", [generate, functools.partial(beam_search, beams=2), stream])
def test_tokens_outside_the_vocabulary_raise(decode, token):
    message = rf"must hold tokens from 0 to {V - 1}, the vocabulary, got .*{token}"
    with pytest.raises(ValueError, match=rf"prompt {message}"):
        decode(decoder(), np.array([[3, token, 1]]), max_new_tokens=1)
    start = np.zeros((1, 1), int)
    with pytest.raises(ValueError, match=rf"source {message}"):
        decode(both_sides(), start, source=np.array([[3, token]]), max_new_tokens=1)
    with pytest.raises(ValueError, match=rf"stop must be tokens from 0 to {V - 1}.*{token}"):
        decode(decoder(), PROMPT, max_new_tokens=1, stop=token)


@pytest.mark.slow
def test_padding_may_hold_anything():
    model, junk = decoder(), np.where(REAL, PROMPT, -7)
    expected = generate(model, np.where(REAL, PROMPT, 0), real=REAL, max_new_tokens=NEW)
    got = generate(model, junk, real=REAL.tolist(), max_new_tokens=NEW)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


@pytest.mark.slow
def test_padding_after_the_count_may_hold_anything():
    model = decoder()
    logits, _ = model(
        np.array([[3, 1, -7], [5, -7, 99]]),
        caches=model.init_caches((2,), 4),
        count=np.array([2, 1]),
    )
    np.testing.assert_allclose(logits[0, :2], model(np.array([[3, 1]]))[0], atol=1e-4)


def test_under_jit_tokens_outside_the_vocabulary_end_only_their_row():
    """Under ``jit`` ids are not known: no token comes of such a row, and NaN says why."""
    model = decoder()
    bad = PROMPT.copy()
    bad[1, 0], bad[2, 2] = -1, V

    @jax.jit
    def run(prompt):
        return generate(model, prompt, max_new_tokens=NEW, pad_token=6)

    found, expected = run(bad), run(PROMPT)
    np.testing.assert_array_equal(found.tokens[0], expected.tokens[0])
    assert found.tokens[1:].tolist() == [[-1, 6, 6, 6]] * 2
    assert found.count.tolist() == [NEW, 0, 0]
    assert np.isnan(found.log_probability).tolist() == [False, True, True]


@pytest.mark.slow
def test_under_jit_beams_of_such_a_row_are_invalid():
    bad = PROMPT.copy()
    bad[1, 0], bad[2, 2] = -1, V
    run = jax.jit(lambda x: beam_search(decoder(), x, max_new_tokens=2, beams=2))
    beams, best = run(bad), run(PROMPT)
    np.testing.assert_array_equal(beams.tokens[0], best.tokens[0])
    assert (np.asarray(beams.tokens[1:]) == -1).all()
    assert beams.count.tolist() == [[2, 2], [0, 0], [0, 0]]
    assert np.isnan(beams.score).tolist() == [[False] * 2, [True] * 2, [True] * 2]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32, np.int64])
def test_tokens_may_be_any_integers(dtype):
    got = generate(decoder(), PROMPT.astype(dtype), max_new_tokens=2)
    expected = generate(decoder(), PROMPT.tolist(), max_new_tokens=2)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert got.tokens.dtype == jnp.int32


@pytest.mark.parametrize(
    "stop", [2, np.int64(2), np.array(2), jnp.array(2), [2], (2,), {2}, np.array([2]), range(2, 3)]
)
def test_stop_may_be_given_in_many_ways(stop):
    assert as_stop(stop, V) == (2,)


def test_no_stop():
    assert as_stop(None, V) == as_stop((), V) == as_stop(np.zeros(0, int), V) == ()


@pytest.mark.parametrize("stop", [2.0, True, "2", [2.0], [[2]], np.array([[2]]), jnp.array(2.0)])
def test_stop_must_be_integers(stop):
    with pytest.raises(TypeError, match="stop must be an int"):
        as_stop(stop, V)


def test_an_empty_batch_gives_an_empty_result():
    prompt = np.zeros((0, 3), int)
    found = generate(decoder(), prompt, max_new_tokens=NEW)
    assert found.tokens.shape == (0, NEW)
    assert beam_search(decoder(), prompt, max_new_tokens=NEW, beams=2).score.shape == (0, 2)
    assert [x.shape for x in stream(decoder(), prompt, max_new_tokens=NEW)] == [(0,)]


def test_rolling_caches_are_limited_by_learned_positions():
    layers = models.Layers(features=8, num_layers=1, num_heads=2, windows=(2,))
    config = models.DecoderConfig(V, layers, positions="learned", max_length=6)
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    (cache,) = model.init_caches((3,), capacity=6)
    assert cache.rolling
    full = (dataclasses.replace(cache, length=jnp.array([4, 2, 3])),)
    with pytest.raises(ValueError, match="has 6 learned positions"):
        generate(model, PROMPT[:, :1], max_new_tokens=3, caches=full)


# --- Processors.

LOGITS = np.random.default_rng(0).normal(size=17).astype(np.float32) * 2
SO_FAR = np.array([3, 0, 16, 3, -1, -1], np.int32)


def nucleus(x, p):
    order = np.argsort(-x)
    kept = order[: np.searchsorted(np.cumsum(softmax(x)[order]), p) + 1]
    return np.where(np.isin(np.arange(x.size), kept), x, -np.inf)


def penalized(x, penalty):
    seen = np.isin(np.arange(x.size), SO_FAR[SO_FAR >= 0])
    return np.where(seen, np.where(x < 0, x * penalty, x / penalty), x)


FORMULAS = {
    "temperature": (sampling.temperature(0.7), LOGITS / 0.7),
    "top_k": (sampling.top_k(5), np.where(np.argsort(np.argsort(-LOGITS)) < 5, LOGITS, -np.inf)),
    "top_k of all": (sampling.top_k(99), LOGITS),
    "top_p": (sampling.top_p(0.8), nucleus(LOGITS, 0.8)),
    "top_p, one": (
        sampling.top_p(1e-6),
        np.where(np.arange(17) == LOGITS.argmax(), LOGITS, -np.inf),
    ),
    "min_p": (
        sampling.min_p(0.1),
        np.where(softmax(LOGITS) >= 0.1 * softmax(LOGITS).max(), LOGITS, -np.inf),
    ),
    "min_p of all": (sampling.min_p(0), LOGITS),
    "repetition_penalty": (sampling.repetition_penalty(1.3), penalized(LOGITS, 1.3)),
    "chain": (
        sampling.chain(sampling.repetition_penalty(1.3), sampling.top_p(0.6)),
        nucleus(penalized(LOGITS, 1.3), 0.6),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_processors_match_their_formulas(name):
    processor, expected = FORMULAS[name]
    got = processor(jnp.asarray(SO_FAR), jnp.asarray(LOGITS))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert hash(processor) == hash(eval(repr(processor), vars(sampling)))


def test_sampling_equals_its_processors():
    how = Sampling(0.7, 5, 0.8, min_p=0.1, repetition_penalty=1.3)
    assert how.processors == (
        sampling.repetition_penalty(1.3),
        sampling.temperature(0.7),
        sampling.top_k(5),
        sampling.top_p(0.8),
        sampling.min_p(0.1),
    )
    *first, last = how.processors
    assert sampling.chain(sampling.chain(*first), last) == sampling.chain(*how.processors)
    options = {"max_new_tokens": NEW, "key": jax.random.key(0)}
    a = generate(decoder(), PROMPT, sampling=how, **options)
    b = generate(decoder(), PROMPT, sampling=how.processors, **options)
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_equal_processors_compile_once():
    run = models.generation._run
    generate(decoder(), PROMPT, max_new_tokens=2, sampling=sampling.likeliest(sampling.top_k(3)))
    before = run._cache_size()
    generate(decoder(), PROMPT, max_new_tokens=2, sampling=sampling.likeliest(sampling.top_k(3)))
    assert run._cache_size() == before


def counting(tokens, logits):
    """The sum of the tokens so far and their number must come next."""
    seen = tokens >= 0
    total = jnp.where(seen, tokens, 0).sum() + seen.sum()
    return jnp.where(jnp.arange(logits.shape[-1]) == total % V, logits, -jnp.inf)


def test_processors_get_prompt_and_generated_tokens():
    got = generate(
        decoder(), PROMPT, real=REAL, max_new_tokens=NEW, sampling=sampling.likeliest(counting)
    )
    for prompt, real, row in zip(PROMPT, REAL, got.tokens.tolist(), strict=True):
        tokens = prompt[real].tolist()
        for token in row:
            assert token == (sum(tokens) + len(tokens)) % V
            tokens.append(token)


def test_a_huge_penalty_prevents_repetition():
    how = sampling.likeliest(lambda _, logits: logits - 1e3, sampling.repetition_penalty(1e6))
    got = generate(decoder(), PROMPT, max_new_tokens=NEW, sampling=how)
    for prompt, row in zip(PROMPT.tolist(), got.tokens.tolist(), strict=True):
        assert len(set(row) - set(prompt)) == NEW


def test_without_possible_tokens_a_row_ends():
    how = sampling.likeliest(lambda _, logits: jnp.full_like(logits, -jnp.inf))
    got = generate(decoder(), PROMPT, max_new_tokens=2, sampling=how)
    assert got.tokens.tolist() == [[-1, 0]] * 3
    assert not got.count.any()
    assert np.isnan(got.log_probability).all()


def test_processors_must_keep_the_shape():
    with pytest.raises(ValueError, match=rf"keep the shape of the logits \({V},\), got \(3,\)"):
        generate(decoder(), PROMPT, max_new_tokens=1, sampling=sampling.likeliest(shorter))


def shorter(_, logits):
    return logits[:3]


# --- Streams.


@pytest.mark.parametrize(
    "how", [None, pytest.param(Sampling(0.9, top_p=0.9), marks=pytest.mark.slow)]
)
def test_stream_equals_generate(how):
    options = {"real": REAL, "max_new_tokens": NEW, "sampling": how}
    if sampling.as_choice(how).draws:
        options["key"] = jax.random.key(1)
    free = generate(decoder(), PROMPT, **options).tokens
    options |= {"stop": [int(free[0, 1]), int(free[1, 0])], "pad_token": 7}
    expected = generate(decoder(), PROMPT, **options)
    steps = stream(decoder(), PROMPT, **options)
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            found = end.value
            break
    got = np.stack(seen, axis=1)  # all are still alive, though caches are donated
    n = int(expected.count.max())
    np.testing.assert_array_equal(got, expected.tokens[:, :n])
    for a, b in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(found.log_probability, expected.log_probability, rtol=1e-5)
    np.testing.assert_array_equal(found.caches[0].length, expected.caches[0].length)


@pytest.mark.slow
def test_stream_of_an_encoder_decoder():
    start, source = np.zeros((3, 1), int), PROMPT
    options = {"source": source, "source_real": REAL, "max_new_tokens": 3}
    expected = generate(both_sides(), start, **options).tokens
    np.testing.assert_array_equal(np.stack([*stream(both_sides(), start, **options)], 1), expected)


def test_stream_raises_under_jit():
    with pytest.raises(TypeError, match="under jit use generate"):
        jax.jit(lambda x: stream(decoder(), x, max_new_tokens=1))(PROMPT)
