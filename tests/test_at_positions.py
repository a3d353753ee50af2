"""Masks at positions: the rule, and block maps that are sound."""

import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attention, block_map, masks, reference
from attention_jax.masks.at_positions import mask_at_positions
from attention_jax.testing import rules

T, S = 6, 11
MASKS = {
    "causal": masks.causal(),
    "window": masks.window(3, 1),
    "chunked": masks.chunked(3),
    "dilated": masks.dilated(2),
    "lengths": masks.lengths(query=9, key=7),
    "combined": ~(masks.causal(1) & masks.window(2, None)) | masks.prefix(2),
    "function": masks.mask_fn(lambda b, n, q, k: (q * k) % 3 == 0, evaluate=True),
    "blocks": masks.block_sparse(np.eye(6, dtype=bool)[:, ::-1], 2),
}


def random_positions(seed):
    """Queries in order, with gaps; keys shuffled, some masked."""
    rng = np.random.default_rng(seed)
    queries = np.sort(rng.choice(12, T, replace=False)).astype(np.int32)
    keys = rng.permutation(12)[:S].astype(np.int32)
    keys[rng.random(S) < 0.3] = -1
    if seed % 2:  # sorted but for where a cache wraps around: whole blocks are empty, or full
        keys = np.roll(np.sort(np.abs(keys)), seed)
    return queries, keys


def expected_mask(name, queries, keys):
    whole = np.asarray(MASKS[name].to_dense(12, 12))
    return whole[queries[:, None], np.maximum(keys, 0)[None]] & (keys >= 0)[None]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MASKS)
def test_rule_and_block_map(name, seed):
    queries, keys = random_positions(seed)
    mask, expected = (
        mask_at_positions(MASKS[name], queries, keys),
        expected_mask(name, queries, keys),
    )
    np.testing.assert_array_equal(mask.to_dense(T, S), expected)
    found = np.asarray(block_map(mask, T, S, block_q=2, block_k=3).kinds).reshape(3, 4)
    for i in range(3):
        for j in range(4):
            block = expected[2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
            assert found[i, j] or not block.any()  # empty: nothing visible
            assert found[i, j] != 2 or block.all()  # full: all of it


def test_blocks_are_skipped():
    """In a cache that wraps around, blocks of keys outside the window are not visited."""
    keys = np.roll(np.arange(64, dtype=np.int32), 16)
    mask = mask_at_positions(masks.window(7, 0), np.array([20], np.int32), keys)
    kinds = np.asarray(block_map(mask, 1, 64, block_q=1, block_k=8).kinds)
    assert (kinds != 0).sum() == 2


@pytest.mark.parametrize("implementation", ["xla", "blockwise"])
def test_attention_with_positions_per_example(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 2, 4)).astype(np.float32) for n in (T, S, S))
    places = [random_positions(seed) for seed in (0, 1)]
    queries, keys = (np.stack(x) for x in zip(*places, strict=True))
    k[keys < 0], v[keys < 0] = np.nan, np.nan
    mask = mask_at_positions(masks.window(4, 0), jnp.asarray(queries), jnp.asarray(keys))
    dense = np.stack([expected_window(*x) for x in places])[:, None]
    expected = reference.attention(
        q, np.nan_to_num(k), np.nan_to_num(v), mask=np.broadcast_to(dense, (2, 2, T, S))
    )
    out = attention(q, k, v, mask=mask, implementation=implementation)
    np.testing.assert_allclose(out, getattr(expected, "out", expected), atol=1e-5)


def expected_window(queries, keys):
    return rules.band(queries[:, None], keys, 4, 0) & (keys >= 0)


def test_numbers_of_heads_are_added_to_positions():

    at = np.arange(4, dtype=np.int32)
    once = mask_at_positions(masks.causal(), at, at)
    twice = mask_at_positions(once, None, None, head_numbers=np.arange(2))
    assert twice.mask_ is once.mask_
    assert twice.query_positions is at
    assert twice.head_numbers is not None
