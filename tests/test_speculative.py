"""Speculative decoding: tokens, distribution and caches are those of the model alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, mostly_slow, randomized

from attention_jax.models import (
    Decoder,
    DecoderConfig,
    Layers,
    Relative,
    Sampling,
    generate,
    sampling,
    speculate,
)
from attention_jax.models.draft_trees import Tree
from attention_jax.models.rejection import redrawn, stays
from attention_jax.positions import Rotary

V, NEW = 7, 9
PROMPT = np.array([[3, 1, 4], [5, 6, 2], [2, 2, 1]])
REAL = np.array([[True] * 3, [False, True, True], [True, False, False]])
ROTARY = {"rotary": Rotary(), "num_kv_heads": 1}
LEARNED = {"positions": "learned", "max_length": 3 + NEW - 1}  # no position is left over


@functools.cache
def model(vocabulary=V, positions=None, max_length=None, **layers):
    stack = Layers(features=8, num_layers=1, num_heads=2, hidden=8, **(layers or ROTARY))
    config = DecoderConfig(vocabulary, stack, positions, max_length, tied=False)
    return randomized(Decoder(config, rngs=nnx.Rngs(2)), 2)


@functools.cache
def draft(seed=4, **options):
    """A model that is sometimes right about ``model``, which it is a disturbed copy of."""
    return randomized(nnx.clone(model(**options)), seed)


def same_result(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.count, expected.count)
    close(found.log_probability, expected.log_probability, 1e-4)
    for ours, theirs in zip(found.caches, expected.caches, strict=True):
        np.testing.assert_array_equal(ours.length, theirs.length)
        in_use = np.asarray(theirs.positions() >= 0)
        C = in_use.shape[1]
        close(ours.key[:, :C][in_use], theirs.key[in_use], 1e-4)
        close(ours.value[:, :C][in_use], theirs.value[in_use], 1e-4)


# --- Greedy.

SHAPES = [(1, 1), (4, 1), (3, (3, 2, 1)), (2, 2), (20, 1), (4, (1, 1, 3, 1))]


@pytest.mark.parametrize("shape", mostly_slow(SHAPES, SHAPES[1:3]))
def test_greedy_tokens_are_those_of_generate(shape):
    ahead, branches = shape
    options = {"real": REAL, "max_new_tokens": NEW, "stop": 0, "pad_token": -5}
    expected = generate(model(), PROMPT, **options)
    assert len(set(expected.count.tolist())) > 1, "rows should end at different lengths"
    found = speculate(model(), draft(), PROMPT, ahead=ahead, branches=branches, **options)
    same_result(found, expected)
    np.testing.assert_array_equal(found.draft_caches[0].length, found.caches[0].length)


VARIANTS = {
    "learned positions": LEARNED,
    "window": {**ROTARY, "windows": (3,)},
    "ALiBi": {"alibi": True},
    "relative": {"relative": Relative(4, 8)},
    "sinusoidal": {"positions": "sinusoidal"},
}


@pytest.mark.parametrize("name", mostly_slow(list(VARIANTS), ["window"]))
def test_any_decoder_can_be_model_and_draft(name):
    large, small = model(**VARIANTS[name]), draft(**VARIANTS[name])
    expected = generate(large, PROMPT, real=REAL, max_new_tokens=NEW)
    found = speculate(large, small, PROMPT, real=REAL, max_new_tokens=NEW, ahead=3)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    close(found.log_probability, expected.log_probability, 1e-4)


@pytest.mark.slow
def test_a_tree_needs_no_position_beyond_those_of_the_row():
    large, small = model(**LEARNED), draft(**LEARNED)
    found = speculate(large, small, PROMPT, max_new_tokens=NEW, ahead=3, branches=3)
    same_result(found, generate(large, PROMPT, max_new_tokens=NEW))


def test_a_draft_like_the_model_is_always_right():
    found = speculate(model(), model(), PROMPT, real=REAL, max_new_tokens=NEW, ahead=3)
    # The first token is the prompt's; then two rounds of three proposals and one more token.
    assert found.proposed.tolist() == found.accepted.tolist() == [6, 6, 6]


@pytest.mark.slow
def test_more_candidates_are_right_more_often():
    run = functools.partial(speculate, model(), draft(), PROMPT, max_new_tokens=40, ahead=2)
    chain, tree = run(), run(branches=3)
    assert tree.proposed.sum() < chain.proposed.sum()
    np.testing.assert_array_equal(tree.tokens, chain.tokens)
    every = run(branches=V)  # one of all tokens is always right
    np.testing.assert_array_equal(every.accepted, every.proposed)


@pytest.mark.slow
@pytest.mark.parametrize("branches", [1, (2, 1, 1)])
def test_processors_apply_to_both_models(branches):
    def forbid_repeats(tokens, logits):
        last = tokens[jnp.max(jnp.where(tokens >= 0, jnp.arange(len(tokens)), 0))]
        return logits.at[last].set(-jnp.inf)

    choice = sampling.likeliest(forbid_repeats, sampling.repetition_penalty(1.5))
    options = {"real": REAL, "max_new_tokens": NEW, "sampling": choice}
    found = speculate(model(), model(), PROMPT, ahead=3, branches=branches, **options)
    same_result(found, generate(model(), PROMPT, **options))
    np.testing.assert_array_equal(found.accepted, found.proposed)


@pytest.mark.parametrize("branches", mostly_slow([1, 2], [1]))
def test_it_resumes_from_its_caches(branches):
    run = functools.partial(speculate, model(), draft(), ahead=2, branches=branches)
    room = [x.init_caches((3,), 30) for x in (model(), draft())]
    first = run(PROMPT, real=REAL, max_new_tokens=4, caches=room[0], draft_caches=room[1])
    second = run(
        first.tokens[:, -1:],
        max_new_tokens=NEW - 4,
        caches=first.caches,
        draft_caches=first.draft_caches,
    )
    expected = generate(model(), PROMPT, real=REAL, max_new_tokens=NEW)
    np.testing.assert_array_equal(np.hstack([first.tokens, second.tokens]), expected.tokens)


def test_one_new_token_needs_no_draft():
    found = speculate(model(), draft(), PROMPT, max_new_tokens=1)
    same_result(found, generate(model(), PROMPT, max_new_tokens=1))
    assert found.proposed.tolist() == [0, 0, 0]


def test_an_empty_batch_gives_an_empty_result():
    found = speculate(model(), draft(), np.zeros((0, 3), int), max_new_tokens=NEW)
    assert found.tokens.shape == (0, NEW)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"page_size": 4}, {"quantize": "int8"}], ids=str)
def test_caches_may_be_paged_or_int8(options):
    def caches(of):
        return of.init_caches((3,), 20, **options)

    given = {"real": REAL, "max_new_tokens": NEW}
    expected = generate(model(), PROMPT, caches=caches(model()), **given)
    run = functools.partial(speculate, model(), draft(), PROMPT, **given)
    found = run(caches=caches(model()), draft_caches=caches(draft()))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    with pytest.raises(NotImplementedError, match="branches must be 1 with caches that are paged"):
        run(branches=2, caches=caches(model()), draft_caches=caches(draft()))


# --- NaN.


def poisoned(healthy, token):
    """A model whose logits are NaN once it has read the token."""
    poisoned = nnx.clone(healthy)
    table = poisoned.embed.tokens
    table[...] = table[...].at[token].set(jnp.nan)
    return poisoned


@pytest.mark.parametrize("branches", mostly_slow([1, 2], [1]))
def test_a_row_ends_where_logits_are_nan(branches):
    bad = poisoned(model(), 5)
    expected = generate(bad, PROMPT, max_new_tokens=NEW, pad_token=6)
    assert set(expected.count.tolist()) - {0, NEW}, "a row should end on the way"
    found = speculate(bad, draft(), PROMPT, max_new_tokens=NEW, pad_token=6, branches=branches)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_array_equal(
        np.isnan(found.log_probability), np.isnan(expected.log_probability)
    )
    np.testing.assert_array_equal(found.caches[0].length, expected.caches[0].length)


@pytest.mark.parametrize("draws", mostly_slow([False, True], [True]))
def test_a_draft_with_nan_logits_only_costs_time(draws):
    options = {"max_new_tokens": NEW, "ahead": 3}
    if draws:
        options |= {"sampling": Sampling(), "key": jax.random.key(0)}
    found = speculate(model(), poisoned(draft(), 5), PROMPT, **options)
    assert (np.asarray(found.tokens) >= 0).all()
    assert np.isfinite(found.log_probability).all()


@pytest.mark.slow
def test_under_jit_tokens_outside_the_vocabulary_end_only_their_row():
    bad = PROMPT.copy()
    bad[1, 0] = V
    run = jax.jit(lambda x: speculate(model(), draft(), x, max_new_tokens=NEW, pad_token=6))
    found, expected = run(bad), run(PROMPT)
    np.testing.assert_array_equal(found.tokens[::2], expected.tokens[::2])
    assert found.tokens[1].tolist() == [-1] + [6] * (NEW - 1)


# --- Draws.


def exact(decoder, prompt, new, processors):
    """The probability of every continuation of a prompt, in NumPy, from the model's logits."""
    found = {}
    for tokens in itertools.product(range(decoder.vocabulary), repeat=new):
        found[tokens] = 1.0
    rows = np.array([[*prompt, *tokens] for tokens in found])
    logits = np.asarray(jax.jit(lambda x: decoder(x))(rows))
    apply = jax.jit(jax.vmap(sampling.chain(*processors)))
    places = np.arange(rows.shape[1])
    for i in range(new):
        end = len(prompt) + i
        left = np.asarray(apply(np.where(places < end, rows, -1), logits[:, end - 1]))
        p = np.asarray(jax.nn.softmax(left.astype(np.float64), axis=-1))
        for row, tokens in enumerate(found):
            found[tokens] *= p[row, tokens[i]]
    assert abs(sum(found.values()) - 1) < 1e-5
    return found


PROCESSORS = {
    "none": (),
    "temperature and top_p": (sampling.temperature(1.3), sampling.top_p(0.8)),
    "top_k and penalty": (sampling.repetition_penalty(3.0), sampling.top_k(2)),
}


@pytest.mark.parametrize("ahead", mostly_slow([1, 2, 4], [2]))
@pytest.mark.parametrize("name", mostly_slow(list(PROCESSORS), ["temperature and top_p"]))
def test_draws_have_the_distribution_of_the_model(name, ahead):
    """Weissman et al. 2003: of n draws from p over K outcomes, with probability 1 - d the L1
    distance of frequencies and p is at most sqrt(2 (K log 2 - log d) / n)."""
    small, new, n = 3, 3, 30_000
    large, little = model(vocabulary=small), draft(vocabulary=small)
    processors = PROCESSORS[name] or (sampling.temperature(1.0),)
    p = exact(large, [1, 2], new, processors)
    q = exact(little, [1, 2], new, processors)
    bound = np.sqrt(2 * (len(p) * np.log(2) - np.log(1e-9)) / n)
    assert sum(abs(p[x] - q[x]) for x in p) > 5 * bound, "the draft should differ from the model"
    prompt = np.tile([[1, 2]], (n, 1))
    found = speculate(
        large,
        little,
        prompt,
        max_new_tokens=new,
        ahead=ahead,
        sampling=processors,
        key=jax.random.key(7),
    )
    outcome, times = np.unique(np.asarray(found.tokens), axis=0, return_counts=True)
    frequency = dict(zip(map(tuple, outcome.tolist()), times / n, strict=True))
    assert not frequency.keys() - {x for x in p if p[x] > 0}
    assert sum(abs(frequency.get(x, 0) - p[x]) for x in p) < bound
    assert 0 < found.accepted.sum() < found.proposed.sum()


def test_a_token_stays_with_probability_p_over_q():
    p, q = jnp.array([0.1, 0.9, 0.0]), jnp.array([0.4, 0.5, 0.1])
    uniform = jnp.arange(1000) / 1000
    rate = [float(jnp.mean(jax.vmap(lambda u, t=t: stays(p, q, t, u))(uniform))) for t in range(3)]
    np.testing.assert_allclose(rate, [0.25, 1, 0], atol=2e-3)
    assert not stays(p, q, -1, 0.0)
    np.testing.assert_allclose(redrawn(p, q), [0, 1, 0])
    np.testing.assert_allclose(redrawn(p, p), p)  # rounding may ask for it


def test_rows_are_drawn_independently_of_each_other():
    keys = jax.random.split(jax.random.key(2), 3)
    run = functools.partial(speculate, model(), draft(), max_new_tokens=NEW, sampling=Sampling())
    all_rows = run(PROMPT, real=REAL, key=keys)
    last = run(PROMPT[2:, :1], key=keys[2:])
    np.testing.assert_array_equal(all_rows.tokens[2], last.tokens[0])


# --- Trees.


def test_the_longest_match_in_a_tree():
    tree = Tree((2, 2))  # 0; 1, 2; 3, 4 of 1; 5, 6 of 2
    nodes = jnp.array([9, 1, 2, 1, 2, 5, 6])
    path, end = tree.longest_match(nodes, jnp.array([2, 1, 6, 0, 0, 0, 3]))
    assert (path.tolist(), int(end)) == ([0, 2, 6], 2)
    path, end = tree.longest_match(nodes, jnp.array([1, 7, 6, 0, 0, 0, 3]))
    assert (path[:2].tolist(), int(end)) == ([0, 1], 1)
    _, end = tree.longest_match(nodes, jnp.array([7, 1, 6, 0, 0, 0, 3]))
    assert int(end) == 0


def test_a_node_attends_to_its_ancestors_and_the_row():
    mask = Tree((2, 1)).mask(jnp.array([2])).to_dense(6, 7).astype(int)
    assert mask[2:].tolist() == [
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 0, 1, 0],
    ]


# --- Bad input.


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "vocabulary of the model, 7 tokens, got 3", {"draft": lambda: model(3)}),
        (ValueError, "ahead must be at least 1, got 0", {"ahead": 0}),
        (ValueError, "branches must be one int or ahead = 4 of them", {"branches": (2, 1)}),
        (ValueError, "branches must be at least 1, got 0", {"branches": (2, 1, 0, 1)}),
        (ValueError, "branches must be at most 7, the vocabulary, got 8", {"branches": 8}),
        (
            ValueError,
            "branches must be 1 with draws",
            {"branches": 2, "sampling": Sampling(), "key": jax.random.key(0)},
        ),
        (
            NotImplementedError,
            "branches must be 1 for this draft.*as alibi would",
            {"branches": 2, "draft": lambda: model(alibi=True)},
        ),
        (ValueError, "key must be given with sampling", {"sampling": Sampling()}),
        (ValueError, "key must be None without a draw", {"key": jax.random.key(0)}),
        (ValueError, "caches and draft_caches must be given together", {"caches": ()}),
        (ValueError, "prompt must hold tokens from 0 to 6", {"prompt": [[9]]}),
        (ValueError, "capacity must be at least 5", {"capacity": 4}),
        (ValueError, "max_new_tokens must be at least 1", {"max_new_tokens": 0}),
    ],
)
def test_bad_arguments_raise(error, message, change):
    arguments = {"model": model, "draft": draft, "prompt": PROMPT, "max_new_tokens": 3, **change}
    made = {k: x() if k in ("model", "draft") and callable(x) else x for k, x in arguments.items()}
    with pytest.raises(error, match=message):
        speculate(made.pop("model"), made.pop("draft"), made.pop("prompt"), **made)


def test_a_rolling_cache_must_hold_what_is_rejected():
    windowed = model(**ROTARY, windows=(3,))
    caches, drafts = windowed.init_caches((3,), 20), draft().init_caches((3,), 20)
    with pytest.raises(ValueError, match=r"caches must hold 6 tokens.*spare=4"):
        speculate(windowed, draft(), PROMPT, max_new_tokens=3, caches=caches, draft_caches=drafts)
