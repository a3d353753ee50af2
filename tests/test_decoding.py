"""Generation matches its formula, token by token, whatever else is in the batch."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomized
from test_models import DECODERS, SEQUENCES

from attention_jax import models
from attention_jax.models import Sampling, beam_search, generate

V, NEW = 13, 4
PROMPTS = [[3, 1, 4, 1], [5, 9], [2, 6, 5]]
LONGEST = max(map(len, PROMPTS))
call = nnx.jit(lambda model, *args: model(*args))
log_probabilities = nnx.jit(lambda model, x: jax.nn.log_softmax(model(x)))


def padded(side, prompts=PROMPTS, width=LONGEST):
    tokens, real = np.zeros((2, len(prompts), width), int)
    for row, p in enumerate(prompts):
        part = slice(0, len(p)) if side == "right" else slice(width - len(p), width)
        tokens[row, part], real[row, part] = p, 1
    return tokens, real.astype(bool)


def decoder(name="learned"):
    return randomized(models.Decoder(DECODERS[name], rngs=nnx.Rngs(0)))


def by_hand(model, prompt, new=NEW):
    """Greedy, without a cache: the whole sequence again for each token."""
    tokens = list(prompt)
    for _ in range(new):
        filled = np.array([tokens + [0] * (LONGEST + NEW - len(tokens))])
        logits = call(model, filled)[0, len(tokens) - 1]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotary, windows", "relative, a window"])
def test_greedy_takes_the_likeliest_token(name):
    model = decoder(name)
    expected = [by_hand(model, p) for p in PROMPTS]
    for side in ("left", "right"):
        tokens, real = padded(side)
        got = generate(model, tokens, real=real, max_new_tokens=NEW)
        assert got.tokens.tolist() == expected
        assert got.count.tolist() == [NEW] * 3
    alone = generate(model, np.array([PROMPTS[1]]), max_new_tokens=NEW)
    assert alone.tokens.tolist() == [expected[1]]


@pytest.mark.slow
def test_log_probability_of_the_generated_tokens():
    model = decoder()
    tokens, real = padded("left")
    got = generate(model, tokens, real=real, max_new_tokens=NEW)
    for prompt, row, log_p in zip(PROMPTS, got.tokens, got.log_probability, strict=True):
        whole = np.array([[*prompt, *row.tolist()] + [0] * (LONGEST - len(prompt))])
        each = np.asarray(log_probabilities(model, whole))[0, len(prompt) - 1 :]
        expected = sum(each[i, t] for i, t in enumerate(row.tolist()))
        np.testing.assert_allclose(log_p, expected, atol=1e-4)


@pytest.mark.slow
def test_a_prefix_lm_attends_to_the_whole_prompt():
    layers = dataclasses.replace(DECODERS["learned"].layers, prefix_lm=True)
    config = dataclasses.replace(DECODERS["learned"], layers=layers)
    model = randomized(models.Decoder(config, rngs=nnx.Rngs(0)))
    tokens, real = padded("left")
    got = generate(model, tokens, real=real, max_new_tokens=NEW)
    run = nnx.jit(lambda model, x, prefix: model(x, prefix=prefix).argmax(-1))
    for prompt, row in zip(PROMPTS, got.tokens.tolist(), strict=True):
        whole = np.array([[*prompt, *row] + [0] * (LONGEST - len(prompt))])
        likeliest = run(model, whole, np.array([len(prompt)]))[0].tolist()
        assert likeliest[len(prompt) - 1 : len(prompt) - 1 + NEW] == row


@pytest.mark.slow
def test_a_stop_token_ends_only_its_row():
    model = decoder()
    tokens, real = padded("right")
    free = generate(model, tokens, real=real, max_new_tokens=NEW).tokens
    stop = int(free[0, 1])
    got = generate(model, tokens, real=real, max_new_tokens=NEW, stop=stop, pad_token=7)
    for row, before, count in zip(got.tokens.tolist(), free.tolist(), got.count, strict=True):
        n = before.index(stop) + 1 if stop in before else NEW
        assert count == n
        assert row == before[:n] + [7] * (NEW - n)
    either = generate(model, tokens, real=real, max_new_tokens=NEW, stop=np.array([stop, stop]))
    assert either.count.tolist() == got.count.tolist()


@pytest.mark.slow
def test_resuming_from_caches():
    model = decoder("rotary, windows")
    tokens, real = padded("left")
    whole = generate(model, tokens, real=real, max_new_tokens=NEW).tokens
    caches = model.init_caches((3,), LONGEST + NEW)
    first = generate(model, tokens, real=real, max_new_tokens=2, caches=caches)
    more = generate(model, first.tokens[:, -1:], max_new_tokens=NEW - 2, caches=first.caches)
    np.testing.assert_array_equal(jnp.concatenate([first.tokens, more.tokens], 1), whole)


@pytest.mark.slow
def test_sampling_depends_on_key_and_row_only():
    model, prompt = decoder(), np.array([[3, 1]] * 40)
    options = {"max_new_tokens": NEW, "sampling": Sampling()}
    a = generate(model, prompt, key=jax.random.key(0), **options).tokens
    np.testing.assert_array_equal(
        a, generate(model, prompt, key=jax.random.key(0), **options).tokens
    )
    assert (a != generate(model, prompt, key=jax.random.key(1), **options).tokens).any()
    assert len({tuple(row.tolist()) for row in a}) > 20
    fewer = generate(model, prompt[:5], key=jax.random.key(0), **options).tokens
    np.testing.assert_array_equal(fewer, a[:5])  # whatever else is in the batch
    old = generate(model, prompt[:5], key=jax.random.PRNGKey(0), **options).tokens
    np.testing.assert_array_equal(old, fewer)  # keys of both kinds
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(40))
    own = generate(model, prompt[3:9], key=keys[3:9], **options).tokens
    np.testing.assert_array_equal(own, a[3:9])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.2, 0.3, 0.4]),
        (Sampling(temperature=0.5), np.array([1, 4, 9, 16]) / 30),
        (Sampling(top_k=2), [0, 0, 3 / 7, 4 / 7]),
        (Sampling(top_p=0.71), [0, 2 / 9, 3 / 9, 4 / 9]),
        (Sampling(top_p=0.7), [0, 0, 3 / 7, 4 / 7]),
        (Sampling(top_k=3, top_p=0.4), [0, 0, 0, 1]),
        (Sampling(top_k=99, top_p=1.0), [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_the_distribution_drawn_from(sampling, expected):
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])) + 3.0
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda k: sampling.draw(logits, k))(keys)
    counts = np.bincount(drawn, minlength=4) / len(keys)
    np.testing.assert_allclose(counts, expected, atol=0.03)
    assert not counts[np.asarray(expected) == 0].any()


@pytest.mark.slow
def test_encoder_decoder():
    model = randomized(models.EncoderDecoder(SEQUENCES["T5"], rngs=nnx.Rngs(0)))
    source, real = padded("right")
    got = generate(
        model, np.zeros((3, 1), int), source=source, source_real=real, max_new_tokens=NEW
    ).tokens
    run = nnx.jit(lambda model, *args, real: model(*args, source_real=real))
    tokens = np.zeros((3, NEW + 1), int)
    for i in range(NEW):
        tokens[:, i + 1] = run(model, source, tokens, real=real)[:, i].argmax(-1)
    np.testing.assert_array_equal(got, tokens[:, 1:])


# --- Beams.


def scores(model, prompt, new):
    """The log-probability of every continuation of a prompt, by the whole model."""
    every = np.array(list(itertools.product(range(V), repeat=new)))
    whole = np.concatenate([np.broadcast_to(prompt, (len(every), len(prompt))), every], axis=1)
    log_p = log_probabilities(model, whole[:, :-1])[:, len(prompt) - 1 :]
    each = np.take_along_axis(np.asarray(log_p), every[..., None], axis=-1)[..., 0]
    return every, each


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "penalty"), [((), 1.0), ((3,), 0.0), ((3, 8), 2.0)])
def test_enough_beams_find_the_best_continuation(stop, penalty):
    model, new, found = decoder(), 2, 6
    tokens, real = padded("left")
    options = {"beams": V, "length_penalty": penalty, "stop": stop, "pad_token": 0}
    got = beam_search(model, tokens, real=real, max_new_tokens=new, **options)
    for row, prompt in enumerate(PROMPTS):
        every, each = scores(model, prompt, new)
        ended = {}
        for continuation, log_p in zip(every.tolist(), each, strict=True):
            n = next((i + 1 for i, t in enumerate(continuation) if t in stop), new)
            key = tuple(continuation[:n] + [0] * (new - n)), n
            ended[key] = log_p[:n].sum() / n**penalty
        best = sorted(ended.items(), key=lambda x: -x[1])[:found]
        np.testing.assert_allclose(got.score[row, :found], [s for _, s in best], atol=1e-4)
        assert [
            (tuple(t), n)
            for t, n in zip(got.tokens[row].tolist(), got.count[row].tolist(), strict=True)
        ][:found] == [key for key, _ in best]


@pytest.mark.slow
def test_one_beam_is_greedy():
    model = decoder("rotary, windows")
    tokens, real = padded("left")
    greedy = generate(model, tokens, real=real, max_new_tokens=NEW)
    beams = beam_search(model, tokens, real=real, max_new_tokens=NEW, beams=1, length_penalty=0)
    np.testing.assert_array_equal(beams.tokens[:, 0], greedy.tokens)
    chex.assert_trees_all_close(beams.score[:, 0], greedy.log_probability, atol=1e-4)


@pytest.mark.slow
def test_beams_do_not_depend_on_other_rows():
    model = decoder("relative, a window")
    tokens, real = padded("left")
    options = {"max_new_tokens": NEW, "beams": 3, "stop": 4}
    together = beam_search(model, tokens, real=real, **options)
    alone = beam_search(model, np.array([PROMPTS[1]]), **options)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])
    chex.assert_trees_all_close(alone.score[0], together.score[1], atol=1e-4)


@pytest.mark.slow
def test_beams_of_an_encoder_decoder():
    model = randomized(models.EncoderDecoder(SEQUENCES["Vaswani"], rngs=nnx.Rngs(0)))
    source, real = padded("right")
    start = np.zeros((3, 1), int)
    options = {"source": source, "source_real": real, "max_new_tokens": NEW}
    greedy = generate(model, start, **options)
    beams = beam_search(model, start, beams=4, length_penalty=0, **options)
    assert (np.asarray(beams.score[:, 0]) >= np.asarray(greedy.log_probability) - 1e-4).all()
    one = beam_search(model, start, beams=1, **options)
    np.testing.assert_array_equal(one.tokens[:, 0], greedy.tokens)


def test_the_loop_compiles_once():
    model = decoder()
    chex.clear_trace_counter()
    before = models.generation._run._cache_size()
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, V, (2, 3))
        generate(model, prompt, max_new_tokens=NEW)
    assert models.generation._run._cache_size() == before + 1
