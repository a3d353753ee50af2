"""Every mask and every score means the same with a cache as over the whole sequence, or is refused.

What is expected is attention without a cache over all tokens at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, mostly_slow, slow

from attention_jax import attention, cache, masks, scores

B, T, N, K, H = 2, 6, 4, 2, 3
WINDOW = 3
RNG = np.random.default_rng(7)
IDS = np.array([[0, 0, 1, 1, 1, 1], [3, 3, 3, -1, 5, 5]], np.int32)
FLAGS = np.array([[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]], bool)
ARRAY = RNG.random((B, N, T, T)) < 0.7
LAYOUT = np.array([[1, 0, 1], [1, 1, 1], [0, 1, 1]], bool)
CAUSAL = masks.causal()
BOTH = masks.prefix(3) | CAUSAL

MASKS = {  # causal masks, or a prefix in the first call
    "causal": CAUSAL,
    "causal, end": masks.causal(align="end"),
    "causal, offset": masks.causal(-1),
    "causal, offsets": masks.causal(np.array([0, -2], np.int32)),
    "window": masks.window(2, 0),
    "window, end": masks.window(2, None, align="end") & CAUSAL,
    "prefix": BOTH,
    "prefixes": masks.prefix(np.array([3, 1], np.int32)) | CAUSAL,
    "prefix, no more": masks.prefix(2),
    "prefix, window": BOTH & masks.window(2, None),
    "lengths": masks.lengths(query=5, key=4) & CAUSAL,
    "segments": masks.segments(IDS) & CAUSAL,
    "padding": masks.padding(IDS >= 0) & CAUSAL,
    "chunked": masks.chunked(3) & CAUSAL,
    "dilated": masks.dilated(2) & CAUSAL,
    "global": (masks.global_tokens(FLAGS) | masks.window(1, 1)) & CAUSAL,
    "neighborhood": masks.neighborhood((2, 3), 1) & CAUSAL,
    "neighborhood, prefix": masks.neighborhood((2, 3), (1, 3)) & BOTH,
    "block_sparse": masks.block_sparse(LAYOUT, 2) & CAUSAL,
    "block_sparse, data": masks.block_sparse(jnp.asarray(LAYOUT), 2) & CAUSAL,
    "dense": masks.dense(ARRAY) & CAUSAL,
    "dense, keys": masks.dense(ARRAY[:, :1, :1]) & CAUSAL,
    "dense, shared": masks.dense(ARRAY[0, 0]) & CAUSAL,
    "mask_fn": masks.mask_fn(lambda b, n, q, k: (2 * q + k + n) % 3 != 0) & CAUSAL,
    "mask_fn, arrays": masks.mask_fn(lambda b, n, q, k, x: x[b, q] == x[b, k], IDS) & CAUSAL,
    "not": ~masks.dilated(2) & CAUSAL,
}
# One of each kind, for a default run.
KINDS = {"causal", "window", "prefix", "lengths", "segments", "chunked", "dilated", "global"}
KINDS |= {"neighborhood", "block_sparse", "dense", "mask_fn", "not"}
LOOK_AHEAD = {
    "all": masks.window(None, None),
    "window": masks.window(1, 1),
    "offset": masks.causal(1),
    "offsets": masks.causal(np.array([0, 1], np.int32)),
    "chunked": masks.chunked(3),
    "dilated": masks.dilated(2),
    "segments": masks.segments(IDS),
    "global": masks.global_tokens(FLAGS) | CAUSAL,
    "neighborhood": masks.neighborhood((2, 3), 1),
    "block_sparse": masks.block_sparse(LAYOUT, 2),
    "dense": masks.dense(ARRAY),
    "mask_fn": masks.mask_fn(lambda b, n, q, k: k <= q),
    "not": ~CAUSAL,
    "prefix or all": masks.prefix(2) | masks.lengths(query=4),
}
TABLE = RNG.normal(size=(8, N)).astype(np.float32)
BIAS = RNG.normal(size=(B, N, T, T)).astype(np.float32)
SCORES = {
    "softcap": scores.softcap(0.7),
    "alibi": scores.alibi(),
    "alibi, end, offset": scores.alibi(offset=2, align="end"),
    "relative_bias": scores.relative_bias(TABLE, max_distance=6),
    "relative_bias, end": scores.relative_bias(
        TABLE, bidirectional=False, max_distance=9, align="end"
    ),
    "bias": scores.bias(BIAS),
    "bias, keys": scores.bias(BIAS[:, :, :1]),
    "bias, shared, hides": scores.bias(np.where(BIAS[0] > -1, BIAS[0], -np.inf)),
    "score_fn": scores.score_fn(lambda s, b, n, q, k: s + 0.3 * ((q * k + n) % 5).astype(s.dtype)),
    "score_fn, arrays": scores.score_fn(lambda s, b, n, q, k, x: s + x[q, k], BIAS[0, 0]),
    "several": (scores.alibi(), scores.softcap(1.0), scores.bias(BIAS)),
}


def tokens(numbers=False):
    """Query, key and value; with ``numbers``, values say which token it is."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K))
    if numbers:
        value = np.broadcast_to(np.arange(T, dtype=np.float32)[:, None, None], value.shape)
    return query, key, value


def empty(rolling=False):
    capacity = WINDOW if rolling else T
    return cache.init((B,), capacity=capacity, num_kv_heads=K, head_dim=H, rolling=rolling)


def calls(lengths):
    start = 0
    for n in lengths:
        yield slice(start, start + n)
        start += n


def attend_in_calls(cached, lengths, **options):
    """Attention of all tokens, in calls of these lengths."""
    parts = []
    for part in calls(lengths):
        out, cached = cache.attend(cached, *(x[:, part] for x in tokens()), **options)
        parts.append(out)
    return jnp.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def pairs_of(mask, T, S):
    """The visible pairs, ``[B N T S]``."""
    return mask.to_dense(T, S, B=B, N=N)


def visible(mask, cached, lengths):
    """Which tokens each token attends to, ``[B N T T]``, in calls of these lengths."""
    found = np.zeros((B, N, T, T), bool)
    for part in calls(lengths):
        new = [x[:, part] for x in tokens(numbers=True)[1:]]
        _, values, now, cached = cache.extend(cached, *new, mask=mask)
        pairs = np.asarray(pairs_of(now, part.stop - part.start, values.shape[1]))
        for b, n, t, slot in zip(*np.nonzero(pairs), strict=True):
            found[b, n, part.start + t, int(values[b, slot, 0, 0])] = True
    return found


def logits_of(score, cached, lengths, mask):
    """Logits of 0, ``[B N T T]``, after the scores, in such calls; 0 where masked."""
    logits = np.zeros((B, N, T, T), np.float32)
    for part in calls(lengths):
        new = [x[:, part] for x in tokens(numbers=True)[1:]]
        size = part.stop - part.start
        now_scores = cache.placed_scores(cached, score, size)
        _, values, now, cached = cache.extend(cached, *new, mask=mask)
        S = values.shape[1]
        pairs, s = np.asarray(pairs_of(now, size, S)), each_logit(now_scores, size, S)
        for b, n, t, slot in zip(*np.nonzero(pairs), strict=True):
            logits[b, n, part.start + t, int(values[b, slot, 0, 0])] = s[b, n, t, slot]
    return logits


def each_logit(score, T, S):
    """``[B N T S]``, by the rules, pair by pair."""
    q, k = jnp.arange(T)[:, None], jnp.arange(S)[None, :]

    def one(b, n):
        s = jnp.zeros((T, S), np.float32)
        for each in score if isinstance(score, tuple) else (score,):
            s = each.resolve(T, S, N).score(s, b, n, q, k)
        return s

    fn = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
    return np.asarray(jax.jit(fn)(jnp.arange(B), jnp.arange(N)))


# Attention follows from these pairs and logits: one test of it is enough.


@pytest.mark.parametrize("name", mostly_slow(MASKS, KINDS))
def test_the_same_tokens_are_visible(name):
    whole = np.asarray(pairs_of(MASKS[name], T, T))
    cuts = [4, 1, 1] if name in KINDS else [3, 3]
    np.testing.assert_array_equal(visible(MASKS[name], empty(), cuts), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_the_same_tokens_are_visible_in_a_rolling_cache(name):
    near = MASKS[name] & masks.window(WINDOW - 1, None)
    whole = np.asarray(pairs_of(near, T, T))
    cuts = [3, 3] if name in KINDS else [4, 1, 1]
    np.testing.assert_array_equal(visible(near, empty(rolling=True), cuts), whole)


@pytest.mark.parametrize(("rolling", "cuts"), [(True, [4, 1, 1]), slow(False, [3, 3])])
@pytest.mark.parametrize("name", SCORES)
def test_a_score_gives_the_same_logits_with_a_cache(name, rolling, cuts):
    near = masks.window(WINDOW - 1, 0)
    found, whole = np.asarray(pairs_of(near, T, T)), each_logit(SCORES[name], T, T)
    got = logits_of(SCORES[name], empty(rolling), cuts, near)
    close(got, np.where(found, whole, 0), 1e-5)


@pytest.mark.parametrize(("rolling", "implementation"), [slow(False, "xla"), (True, "blockwise")])
def test_attention_with_a_cache_equals_the_whole_sequence(rolling, implementation):
    mask, score = BOTH & masks.window(2, None), (SCORES["relative_bias"], *SCORES["several"])
    expected = attention(*tokens(), mask=mask, score=score)
    options = {"mask": mask, "score": score, "implementation": implementation}
    close(attend_in_calls(empty(rolling), [4, 1, 1], **options), expected, 1e-5)


@pytest.mark.parametrize("name", LOOK_AHEAD)
def test_a_mask_that_looks_ahead_is_refused(name):
    with pytest.raises(ValueError, match=r"mask may let a query attend to later.*masks\.causal"):
        attend_in_calls(empty(), [T], mask=LOOK_AHEAD[name])


@pytest.mark.parametrize("cuts", [[1] * T, [2, 4]])
def test_a_prefix_in_more_than_one_call_is_refused(cuts):
    with pytest.raises(ValueError, match="they must come in one call"):
        attend_in_calls(empty(), cuts, mask=BOTH)


def test_a_rolling_cache_refuses_masks_beyond_its_capacity():
    for mask in (CAUSAL, masks.window(3, 0), BOTH, masks.segments(IDS) & CAUSAL):
        with pytest.raises(ValueError, match=r"mask may look back.*masks\.window\(2, None\)"):
            attend_in_calls(empty(rolling=True), [T], mask=mask)


@pytest.mark.parametrize("name", ["segments", "dense", "neighborhood", "block_sparse", "global"])
def test_arrays_shorter_than_the_sequence_are_refused(name):
    longer = cache.init((B,), capacity=T + 4, num_kv_heads=K, head_dim=H)
    new = [np.ones((B, T + 1, K, H), np.float32)] * 2
    with pytest.raises(ValueError, match=r"mask: .*has entries for 6 positions.*may have 7"):
        cache.extend(longer, *new, mask=MASKS[name])
    with pytest.raises(ValueError, match="may have 10"):  # lengths are traced: it could be so
        jax.eval_shape(lambda cached: cache.extend(cached, *new, mask=MASKS[name]), longer)


def test_scores_with_short_arrays_or_offset_arrays_are_refused():
    longer = cache.init((B,), capacity=T + 4, num_kv_heads=K, head_dim=H)
    with pytest.raises(
        ValueError, match=r"score: array of scores\.bias has entries for 6 positions"
    ):
        cache.placed_scores(longer, scores.bias(BIAS), T + 1)
    with pytest.raises(ValueError, match=r"leave out offset=cache\.length"):
        cache.placed_scores(longer, scores.alibi(offset=longer.length), 1)
    rolling = empty(rolling=True)
    with pytest.raises(NotImplementedError, match=r"array of scores\.bias .* rolling cache"):
        jax.eval_shape(lambda cached: cache.placed_scores(cached, scores.bias(BIAS), 1), rolling)


def test_relative_embeddings_hold_the_query_of_the_call():
    query, table = tokens()[0], RNG.normal(size=(5, H)).astype(np.float32)
    expected = attention(*tokens(), mask=CAUSAL, score=scores.relative_embedding(query, table))
    cached, parts = empty(), []
    for part in calls([4, 1, 1]):
        new = [x[:, part] for x in tokens()]
        score = scores.relative_embedding(new[0], table)
        out, cached = cache.attend(cached, *new, score=score)
        parts.append(out)
    close(jnp.concatenate(parts, axis=1), expected, 1e-5)
