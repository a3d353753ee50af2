"""Dropout: the hash against NumPy, its statistics, and the same pairs everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attention, masks
from attention_jax.backends import Blockwise
from attention_jax.core import dropout

WORD = 2**32


def mixed(x):
    """MurmurHash3's finalizer in Python's unbounded integers."""
    x = (x ^ x >> 16) * 0x85EBCA6B % WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 % WORD
    return x ^ x >> 16


def keep_one(words, b, n, q, k, rate):
    """The definition, for one pair: words of the key, then the four indices, are mixed in turn."""
    h = 0
    for word in words:
        h = (mixed(h ^ word) + 0x27D4EB2F) % WORD
    for index, odd in ((b, 0x9E3779B1), (n, 0x85EBCA77), (q, 0xC2B2AE3D)):
        h = mixed(h ^ index * odd % WORD)
    return mixed(h ^ k * 0x27D4EB2F % WORD) < min(round((1 - rate) * WORD), WORD - 1)


def words_of(key):
    return [int(w) for w in jax.random.key_data(key)]


def keep_all(key, shape, rate, start=(0, 0, 0, 0)):
    index = np.meshgrid(
        *(s + np.arange(n) for s, n in zip(start, shape, strict=True)), indexing="ij"
    )
    return np.asarray(dropout.keep(dropout.seed(key), *index, threshold=dropout.threshold(rate)))


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 0.99])
def test_keep_is_the_hash_in_unbounded_integers(rate):
    key, shape, start = jax.random.key(7), (2, 3, 4, 5), (0, 5, 1000, 70000)
    got = keep_all(key, shape, rate, start)
    words = words_of(key)
    for place in np.ndindex(*shape):
        at = [s + p for s, p in zip(start, place, strict=True)]
        assert got[place] == keep_one(words, *at, rate)


def test_the_dropout_hash_spreads_over_all_32_bits():
    x = np.arange(1 << 12, dtype=np.uint32) << np.uint32(9)
    got = np.asarray(dropout.mix(jnp.asarray(x)))
    assert got.tolist() == [mixed(int(v)) for v in x]
    assert len(set(got.tolist())) == len(x)


def test_typed_and_raw_keys_are_one_key():
    typed, raw = jax.random.key(3), jax.random.PRNGKey(3)
    assert dropout.seed(typed) == dropout.seed(raw)
    q = jnp.ones((4, 1, 3))
    options = {"dropout_rate": 0.5, "mask": masks.causal()}
    np.testing.assert_array_equal(
        attention(q, q, q, dropout_key=typed, **options),
        attention(q, q, q, dropout_key=raw, **options),
    )


def test_dropout_depends_on_every_word_of_the_key():
    seeds = [dropout.seed(np.array(w, np.uint32)) for w in ([0, 0], [0, 1], [1, 0], [1, 1], [0])]
    assert len({int(s) for s in seeds}) == 5
    assert len({int(dropout.seed(jax.random.key(i, impl="rbg"))) for i in range(5)}) == 5


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_dropped_share_is_the_rate(rate):
    keep = keep_all(jax.random.key(1), (2, 3, 128, 128), rate)
    deviation = (rate * (1 - rate) / keep.size) ** 0.5
    assert abs(keep.mean() - (1 - rate)) < 4 * deviation
    for axis in range(4):  # no row, column, head or example stands out
        others = tuple(a for a in range(4) if a != axis)
        worst = abs(keep.mean(others) - (1 - rate)).max()
        assert worst < 5 * (rate * (1 - rate) / (keep.size / keep.shape[axis])) ** 0.5


def correlation(a, b):
    """In standard deviations of what independent bits give."""
    return abs(np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1]) * a.size**0.5


def test_examples_heads_queries_keys_and_seeds_are_independent():
    keep = keep_all(jax.random.key(1), (3, 3, 64, 65), 0.5)
    for axis in range(4):
        for step in (1, 2):
            first = np.take(keep, range(keep.shape[axis] - step), axis)
            second = np.take(keep, range(step, keep.shape[axis]), axis)
            assert correlation(first, second) < 5
    square = keep[..., :64]
    assert correlation(square, np.swapaxes(square, 2, 3)) < 5  # (q, k) and (k, q)
    pairs = [0, 0, 1], [1, 2, 2]
    assert correlation(keep[pairs], keep[pairs[::-1]]) < 5  # (b, n) and (n, b)
    assert correlation(keep, keep_all(jax.random.key(2), keep.shape, 0.5)) < 5


def test_every_implementation_and_block_size_drops_the_same_pairs():
    B, T, S, K, N, rate = 2, 7, 11, 2, 4, 0.4
    key = jax.random.key(5)
    # Equal logits and unit vectors as values: the output is the kept probabilities themselves.
    query, keys = jnp.zeros((B, T, N, 3)), jnp.zeros((B, S, K, 3))
    value = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, K, S))
    expected = keep_all(key, (B, N, T, S), rate) / (1 - rate) / S
    expected = np.moveaxis(expected, 1, 2)
    for implementation in ("xla", "blockwise"):
        out = attention(
            query, keys, value, dropout_rate=rate, dropout_key=key, implementation=implementation
        )
        np.testing.assert_allclose(out, expected, rtol=1e-6)
    for block in ((3, 4), (2, 11)):
        out, lse = attention(
            query,
            keys,
            value,
            dropout_rate=rate,
            dropout_key=key,
            implementation=Blockwise(*block),
            return_lse=True,
        )
        np.testing.assert_allclose(out, expected, rtol=1e-6)
        np.testing.assert_allclose(lse, np.log(S), rtol=1e-6)


def test_dropout_keeps_the_mean():
    q = jnp.zeros((64, 8, 4))
    v = jnp.broadcast_to(jnp.float32(1), (256, 8, 4))
    k = jnp.zeros((256, 8, 4))
    out = attention(q, k, v, dropout_rate=0.3, dropout_key=jax.random.key(0))
    assert abs(out.mean() - 1) < 4 * (0.3 / 0.7 / (64 * 8 * 256)) ** 0.5
