"""Decoding with a cache equals attention over the whole sequence, in any split into calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, normal, slow

from attention_jax import attention, cache, masks, scores

B, T, N, K, H, D = 2, 9, 4, 2, 3, 5
WINDOW = 4
MASKS = {
    "none": None,
    "window": masks.window(WINDOW - 1, 0),
    "chunked": masks.chunked(3) & masks.causal(),
    "function": masks.mask_fn(lambda b, n, q, k: (q + k) % 3 != 0) & masks.causal(),
}
CUTS = {"at once": [9], "chunks": [4, 1, 3, 1], "one by one": [1] * 9}


def inputs(T=T, batch=(B,)):
    return [normal(i, *batch, T, n, w) for i, (n, w) in enumerate([(N, H), (K, H), (K, D)])]


def empty(capacity=T, rolling=False, batch=(B,)):
    return cache.init(
        batch, capacity=capacity, num_kv_heads=K, head_dim=H, value_dim=D, rolling=rolling
    )


def cut(arrays, lengths):
    ends = np.cumsum(lengths)
    return [[x[:, a:b] for x in arrays] for a, b in zip(ends - lengths, ends, strict=True)]


def whole(arrays, mask, **options):
    return attention(*arrays, mask=masks.causal() if mask is None else mask, **options)


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("none", "chunks"),
        ("window", "chunks"),
        slow("none", "at once"),
        slow("window", "one by one"),
        slow("chunked", "chunks"),
        slow("function", "chunks"),
    ],
)
def test_any_split_into_calls_equals_the_whole(name, cuts):
    arrays, cached, mask = inputs(), empty(capacity=T + 2), MASKS[name]
    step = jax.jit(functools.partial(cache.attend, mask=mask, return_lse=True))
    parts = []
    for part in cut(arrays, CUTS[cuts]):
        result, cached = step(cached, *part)
        parts.append(result)
    got = [jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)]
    close(got, list(whole(arrays, mask, return_lse=True)))
    np.testing.assert_array_equal(cached.length, [T] * B)


@pytest.mark.parametrize(
    ("cuts", "capacity"),
    [
        ("at once", WINDOW),
        ("chunks", WINDOW),
        ("one by one", WINDOW + 1),
        slow("chunks", 2 * T),
    ],
)
def test_a_rolling_cache_equals_a_window(cuts, capacity):
    arrays, cached = inputs(), empty(capacity, rolling=True)
    parts = []
    step = jax.jit(functools.partial(cache.attend, mask=MASKS["window"]))
    for part in cut(arrays, CUTS[cuts]):
        out, cached = step(cached, *part)
        parts.append(out)
    close(jnp.concatenate(parts, axis=1), whole(arrays, MASKS["window"]))
    assert cached.key.shape == (B, capacity, K, H)
    assert not cached.overflowed.any()


@pytest.mark.parametrize("cuts", ["at once", slow("chunks")])
def test_a_rolling_cache_without_a_mask_is_a_window_of_its_capacity(cuts):
    arrays, cached, parts = inputs(), empty(WINDOW, rolling=True), []
    for part in cut(arrays, CUTS[cuts]):
        out, cached = cache.attend(cached, *part)
        parts.append(out)
    close(jnp.concatenate(parts, axis=1), whole(arrays, MASKS["window"]))


@pytest.mark.parametrize("rolling", [slow(False), True])
def test_rows_of_different_lengths(rolling):
    """Prompts padded on the right, then one token each; padding holds NaN."""
    arrays, count = inputs(T=6), np.array([5, 2])
    spoilt = [np.array(x) for x in arrays]
    for x in spoilt:
        x[1, 2:] = np.nan
    cached = empty(capacity=8, rolling=rolling)
    step = jax.jit(cache.attend)
    prompt, cached = step(cached, *(x[:, :5] for x in spoilt), count=count)
    last = [np.stack([x[0, 5:6], x[1, 2:3]]) for x in arrays]
    token, cached = step(cached, *last)
    expected = whole(arrays, None)
    close(prompt[0], expected[0, :5])
    close(prompt[1, :2], expected[1, :2])
    close(token[:, 0], jnp.stack([expected[0, 5], expected[1, 2]]))
    np.testing.assert_array_equal(cached.length, count + 1)


def test_scan_and_vmap():
    arrays = inputs()

    def decode(arrays):
        def step(cached, token):
            out, cached = cache.attend(cached, *(x[None] for x in token))
            return cached, out[0]

        return jax.lax.scan(step, empty(batch=()), arrays)[1]

    close(jax.jit(jax.vmap(decode))(tuple(map(jnp.asarray, arrays))), whole(arrays, None))


def test_a_score_with_rows_of_different_lengths():
    arrays, count = inputs(T=6), np.array([5, 2])
    cached = empty(capacity=8).append(*(x[:, :5] for x in arrays[1:]), count=count)
    last = [np.stack([x[0, 5:6], x[1, 2:3]]) for x in arrays]
    out, _ = jax.jit(functools.partial(cache.attend, score=scores.alibi()))(cached, *last)
    expected = whole(arrays, None, score=scores.alibi())
    close(out[:, 0], jnp.stack([expected[0, 5], expected[1, 2]]))


def test_a_donated_cache_is_updated_in_place():
    cached = empty(capacity=512, batch=(1,))
    token = [x[:1, :1] for x in inputs()]
    step = jax.jit(lambda cached, k, v: cached.append(k, v), donate_argnums=0)
    compiled = step.lower(cached, *token[1:]).compile()
    memory = compiled.memory_analysis()
    size = cached.key.nbytes + cached.value.nbytes
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4


def test_traced_overflow_overwrites_nothing():
    _, k, v = inputs(T=3)
    step = jax.jit(lambda cached, k, v: cached.append(k, v))
    cached = step(empty(capacity=4), k, v)
    full = step(cached, 2 * k, 2 * v)
    np.testing.assert_array_equal(full.key[:, :3], k)
    np.testing.assert_array_equal(full.key[:, 3], 2 * k[:, 0])
    assert not cached.overflowed.any()
    assert full.overflowed.all()


def test_appending_more_than_a_rolling_cache_holds_keeps_the_last():
    _, k, v = inputs()
    cached = empty(capacity=4, rolling=True).append(k, v)
    for slot, position in enumerate(np.asarray(cached.positions())[0]):
        np.testing.assert_array_equal(cached.value[:, slot], v[:, position])
    assert sorted(np.asarray(cached.positions())[0]) == [5, 6, 7, 8]


def test_padding_takes_no_slot_in_a_rolling_cache():
    _, k, v = inputs()
    cached = empty(capacity=4, rolling=True).append(k[:, :4], v[:, :4])
    cached = cached.append(k[:, 4:8], v[:, 4:8], count=np.array([1, 0]))
    np.testing.assert_array_equal(cached.positions(), [[4, 1, 2, 3], [0, 1, 2, 3]])
    for b, positions in enumerate(np.asarray(cached.positions())):
        np.testing.assert_array_equal(cached.key[b], k[b, positions])


def test_a_dtype_of_its_own():
    cached = cache.init((B,), capacity=4, num_kv_heads=K, head_dim=H, dtype=jnp.bfloat16)
    assert cached.key.dtype == cached.value.dtype == jnp.bfloat16


# --- Rollback: as if the dropped tokens had never been appended.


def leaves_close(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("rolling", [slow(False), True])
def test_appending_other_tokens_after_a_rollback(rolling):
    """With a window of 4 in a rolling cache of 6 slots, up to 3 tokens can be dropped."""
    arrays, tried, mask = inputs(), inputs(T=3, batch=(B,)), MASKS["window"]
    keep = np.array([6, 5])
    cached = empty(capacity=6 if rolling else 12, rolling=rolling)
    cached = cached.append(*(x[:, :7] for x in arrays[1:]), count=np.array([7, 5]))
    tried[1] += 5  # other tokens than those that come
    cached = cached.append(*(x[:, :1] for x in tried[1:])).rollback(keep)
    assert cached.intact(WINDOW).all()
    np.testing.assert_array_equal(cached.length, keep)
    rest = [np.stack([x[0, 6:9], x[1, 5:8]]) for x in arrays]
    step, parts = jax.jit(functools.partial(cache.attend, mask=mask)), []
    for part in cut(rest, [1, 2]):
        out, cached = step(cached, *part)
        parts.append(out)
    expected = whole(arrays, mask)
    close(jnp.concatenate(parts, 1), jnp.stack([expected[0, 6:9], expected[1, 5:8]]))


def test_a_rollback_of_nothing_and_of_everything():
    _, k, v = inputs()
    for rolling in (False, True):
        start = empty(capacity=T, rolling=rolling)
        cached = start.append(k, v)
        leaves_close(cached.rollback(T), cached)
        leaves_close(cached.rollback(0).positions(), start.positions())
        leaves_close(
            jax.jit(lambda cached: cached.rollback(cached.length - 2))(cached).length, [T - 2] * B
        )


def test_a_rollback_to_overwritten_tokens_is_refused():
    _, k, v = inputs()
    cached = empty(capacity=WINDOW, rolling=True).append(k, v)  # holds 5, 6, 7, 8
    with pytest.raises(ValueError, match=r"length must be at least .*overwritten"):
        cached.rollback(np.array([5, 4]))
    with pytest.raises(ValueError, match="from 0 to the cache's length"):
        cached.rollback(T + 1)
    with pytest.raises(TypeError, match="length must be integers"):
        cached.rollback(3.0)
    again = cached.rollback(np.array([T - 1, T - 2]))
    np.testing.assert_array_equal(again.positions(), [[-1, 5, 6, 7], [-1, 5, 6, -1]])
    np.testing.assert_array_equal(again.intact(WINDOW), [True, False])  # row 1 lacks token 4
    new = [x[:, :1] for x in (k, v)]
    with pytest.raises(ValueError, match="overwritten before the cache was rolled back"):
        cache.extend(again, *new, mask=MASKS["window"])
    cache.extend(again, *new, mask=masks.window(WINDOW - 2, 0))


def test_a_rollback_clears_overflow():
    _, k, v = inputs(T=3)
    full = jax.jit(lambda cached: cached.append(k, v).append(k, v))(empty(capacity=4))
    assert full.overflowed.all()
    back = full.rollback(3)
    assert not back.overflowed.any()
    leaves_close(back.append(k[:, :1], v[:, :1]).key[:, 3], k[:, 0])


def test_a_cache_prints_on_one_line():
    kept = empty(capacity=512)
    assert repr(kept).startswith("KVCache(key=float32[2, 512,")
    assert repr(kept).endswith("length=[0 0], rolling=False)")
    donated = jax.jit(lambda kept: kept.rollback(0), donate_argnums=0)(kept)
    assert len(repr(kept)) < 200
    assert len(repr(donated)) < 200
    assert "Traced" not in str(jax.eval_shape(lambda: donated))
