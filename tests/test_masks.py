"""Masks against the checker's rules in NumPy; masks as values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import masks
from attention_jax.testing import rules
from attention_jax.testing.rules import band

B, N, T, S = 3, 2, 11, 13
SQUARE = 12  # T and S of masks that want them equal
RNG = np.random.default_rng(0)
OFFSETS = np.array([-3, 0, 4], np.int32)
LENGTHS = np.array([0, 5, 13], np.int32)
QUERY_IDS = np.array([0, 0, 2, 2, -1, 1, 1, -2, 3, 0, -1])
KEY_IDS = np.array([-1, 0, 2, 2, 5, 1, 1, -2, 3, 0, -1, 1, 2])
IDS = RNG.integers(-2, 4, (B, T + S))
LAYOUT = RNG.random((4, 5)) < 0.5
DENSE = RNG.random((B, N, T, S)) < 0.5
FLAGS = RNG.random((B, SQUARE)) < 0.3
TABLE = RNG.random((B, N, T + S)) < 0.5


def looked_up(b, n, q, k, table):
    return jnp.asarray(table)[b, n, q + k]


# The mask, and for each example b and head n its rule on queries i [T 1] and keys j [1 S].
RULES = {
    "causal": (masks.causal(), lambda b, n, i, j: band(i, j, right=0)),
    "causal offset": (masks.causal(3), lambda b, n, i, j: band(i, j, right=3)),
    "causal negative offset": (masks.causal(-2), lambda b, n, i, j: band(i, j, right=-2)),
    "causal offsets": (masks.causal(OFFSETS), lambda b, n, i, j: band(i, j, right=OFFSETS[b])),
    "causal end": (masks.causal(align="end"), lambda b, n, i, j: band(i, j, right=S - T)),
    "causal offsets end": (
        masks.causal(OFFSETS, align="end"),
        lambda b, n, i, j: band(i, j, right=OFFSETS[b] + (S - T)),
    ),
    "window": (masks.window(2, 1), lambda b, n, i, j: band(i, j, 2, 1)),
    "window no left": (masks.window(None, 1), lambda b, n, i, j: band(i, j, None, 1)),
    "window no right": (masks.window(2, None), lambda b, n, i, j: band(i, j, 2, None)),
    "window no bound": (masks.window(None, None), lambda b, n, i, j: True),
    "window of self": (masks.window(0, 0), lambda b, n, i, j: band(i, j, 0, 0)),
    "window offset": (
        masks.window(2, 1, offset=3),
        lambda b, n, i, j: band(i, j, 2, 1, offset=3),
    ),
    "window offsets end": (
        masks.window(3, 0, offset=OFFSETS, align="end"),
        lambda b, n, i, j: band(i, j, 3, 0, offset=OFFSETS[b] + S - T),
    ),
    "dilated": (masks.dilated(3), lambda b, n, i, j: rules.strided(i, j, 3)),
    "dilated by 1": (masks.dilated(1), lambda b, n, i, j: True),
    "prefix": (masks.prefix(5), lambda b, n, i, j: j < 5),
    "prefix of nothing": (masks.prefix(0), lambda b, n, i, j: False),
    "prefix lengths": (masks.prefix(LENGTHS), lambda b, n, i, j: j < LENGTHS[b]),
    "lengths": (masks.lengths(query=7, key=9), lambda b, n, i, j: (i < 7) & (j < 9)),
    "lengths of queries": (masks.lengths(query=7), lambda b, n, i, j: i < 7),
    "lengths of keys": (masks.lengths(key=LENGTHS), lambda b, n, i, j: j < LENGTHS[b]),
    "lengths of both": (
        masks.lengths(query=LENGTHS[::-1].copy(), key=LENGTHS),
        lambda b, n, i, j: (i < LENGTHS[B - 1 - b]) & (j < LENGTHS[b]),
    ),
    "no lengths": (masks.lengths(), lambda b, n, i, j: True),
    "segments": (
        masks.segments(QUERY_IDS, KEY_IDS),
        lambda b, n, i, j: rules.same_segment(QUERY_IDS[i], KEY_IDS[j]),
    ),
    "segments batched": (
        masks.segments(IDS[:, :T], IDS[:, T:]),
        lambda b, n, i, j: rules.same_segment(IDS[b, i], IDS[b, T + j]),
    ),
    "chunked": (masks.chunked(4), lambda b, n, i, j: rules.same_chunk(i, j, 4)),
    "block_sparse": (
        masks.block_sparse(LAYOUT, 3),
        lambda b, n, i, j: rules.in_layout(i, j, LAYOUT, 3),
    ),
    "block_sparse data": (
        masks.block_sparse(jnp.asarray(LAYOUT), 3),
        lambda b, n, i, j: rules.in_layout(i, j, LAYOUT, 3),
    ),
    "dense": (masks.dense(DENSE), lambda b, n, i, j: DENSE[b, n, i, j]),
    "dense TS": (masks.dense(DENSE[0, 1]), lambda b, n, i, j: DENSE[0, 1, i, j]),
    "dense N1S": (masks.dense(DENSE[0, :, 2:3]), lambda b, n, i, j: DENSE[0, n, 2, j]),
    "dense B1T1": (masks.dense(DENSE[:, :1, :, :1]), lambda b, n, i, j: DENSE[b, 0, i, 0]),
    "mask_fn": (
        masks.mask_fn(lambda b, n, q, k: (q + n) * k % 3 <= b),
        lambda b, n, i, j: (i + n) * j % 3 <= b,
    ),
    "mask_fn arrays": (masks.mask_fn(looked_up, TABLE), lambda b, n, i, j: TABLE[b, n, i + j]),
    "and or not": (
        masks.causal() & ~masks.segments(QUERY_IDS, KEY_IDS) | masks.prefix(LENGTHS),
        lambda b, n, i, j: (
            (band(i, j, right=0) & ~rules.same_segment(QUERY_IDS[i], KEY_IDS[j])) | (j < LENGTHS[b])
        ),
    ),
}
SQUARE_RULES = {
    "segments of self": (
        masks.segments(IDS[:, :SQUARE]),
        lambda b, n, i, j: rules.same_segment(IDS[b, i], IDS[b, j]),
    ),
    "global_tokens": (masks.global_tokens(FLAGS), lambda b, n, i, j: FLAGS[b, i] | FLAGS[b, j]),
    "neighborhood 1d": (
        masks.neighborhood((12,), 5),
        lambda b, n, i, j: rules.neighbors(i, j, (12,), (5,)),
    ),
    "neighborhood 2d": (
        masks.neighborhood((3, 4), 3),
        lambda b, n, i, j: rules.neighbors(i, j, (3, 4), (3, 3)),
    ),
    "neighborhood 3d": (
        masks.neighborhood((2, 3, 2), (1, 3, 1)),
        lambda b, n, i, j: rules.neighbors(i, j, (2, 3, 2), (1, 3, 1)),
    ),
}
ALL = [(*case, T, S) for case in RULES.values()] + [
    (*case, SQUARE, SQUARE) for case in SQUARE_RULES.values()
]
each_rule = pytest.mark.parametrize(("mask", "rule", "T", "S"), ALL, ids=[*RULES, *SQUARE_RULES])


def written_out(rule, T, S):
    """bool [B N T S]."""
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    heads = [np.broadcast_to(rule(b, n, i, j), (T, S)) for b in range(B) for n in range(N)]
    return np.reshape(heads, (B, N, T, S))


@each_rule
def test_every_mask_follows_its_rule(mask, rule, T, S):
    expected = written_out(rule, T, S)
    np.testing.assert_array_equal(mask.to_dense(T, S, B=B, N=N), expected)


def test_the_first_example_and_head_unless_more_are_given():
    for name in ("causal offsets", "dense", "mask_fn"):
        mask, rule = RULES[name]
        np.testing.assert_array_equal(mask.to_dense(T, S), written_out(rule, T, S)[0, 0])


@each_rule
def test_mask_at_scattered_pairs(mask, rule, T, S):
    expected, rng = written_out(rule, T, S), np.random.default_rng(1)
    q, k = rng.integers(0, T, 20), rng.integers(0, S, 20)
    got = np.broadcast_to(mask.resolve(T, S, N).mask(2, 1, q, k), 20)
    np.testing.assert_array_equal(got, expected[2, 1, q, k])
    assert bool(mask.resolve(T, S, N).mask(1, 0, 4, 3)) == expected[1, 0, 4, 3]


def test_examples_count_over_all_batch_axes():
    offsets = np.array([[-3, 0, 1], [2, 5, 40]], np.int32)
    dense = masks.causal(offsets).to_dense(T, S, B=6)
    for b, offset in enumerate(offsets.reshape(-1)):
        np.testing.assert_array_equal(dense[b], masks.causal(int(offset)).to_dense(T, S))


def test_align_end_raises_before_lengths_are_known():
    with pytest.raises(ValueError, match=r"once T and S are known"):
        masks.causal(align="end").mask(0, 0, 1, 1)


# --- Values: equality, trees, tracing, printing.

BUILD = {
    "causal": masks.causal,
    "causal(1)": lambda: masks.causal(1),
    "causal(array)": lambda: masks.causal(OFFSETS.copy()),
    "window": lambda: masks.window(2, 1),
    "dilated": lambda: masks.dilated(2),
    "chunked": lambda: masks.chunked(2),
    "lengths": lambda: masks.lengths(key=LENGTHS.copy()),
    "segments": lambda: masks.segments(QUERY_IDS.copy()),
    "neighborhood": lambda: masks.neighborhood((3, 4), 3),
    "block_sparse": lambda: masks.block_sparse(LAYOUT.copy(), 3),
    "block_sparse other": lambda: masks.block_sparse(~LAYOUT, 3),
    "dense": lambda: masks.dense(DENSE.copy()),
    "mask_fn": lambda: masks.mask_fn(looked_up, TABLE.copy()),
    "and": lambda: masks.causal() & masks.chunked(2),
    "or": lambda: masks.causal() | masks.chunked(2),
    "not": lambda: ~masks.causal(),
}


@pytest.mark.parametrize("name", BUILD)
def test_equal_masks_hash_alike_and_share_one_compilation(name):
    build, traces = BUILD[name], []

    @jax.jit
    def first_pair(mask):
        traces.append(mask)
        return mask.mask(0, 0, 0, 0)

    first_pair(build())
    first_pair(build())
    assert len(traces) == 1
    assert build() == build()
    assert hash(build()) == hash(build())
    assert [other for other in BUILD if BUILD[other]() == build()] == [name]


def test_masks_with_different_arrays_are_unequal_but_share_a_compilation():
    a, b = masks.lengths(key=LENGTHS), masks.lengths(key=LENGTHS + 1)
    assert a != b
    assert hash(a) == hash(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert masks.prefix(3) != masks.prefix(4)
    assert jax.tree.structure(masks.prefix(3)) != jax.tree.structure(masks.prefix(4))
    assert a != object()


@each_rule
def test_a_mask_is_a_pytree_and_can_be_traced(mask, rule, T, S):
    leaves, structure = jax.tree.flatten(mask)
    assert jax.tree.unflatten(structure, leaves) == mask
    traced = jax.jit(lambda m: m.to_dense(T, S, B=B, N=N))(mask)
    np.testing.assert_array_equal(traced, written_out(rule, T, S))


def test_leaves_have_names():
    paths = jax.tree_util.tree_leaves_with_path(masks.causal(OFFSETS) & masks.prefix(LENGTHS))
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [".left.offset", ".right.key"]


def test_vmap_over_the_arrays_of_a_mask():
    mask = masks.causal(OFFSETS) & masks.lengths(key=LENGTHS) | masks.segments(
        IDS[:, :T], IDS[:, T:]
    )
    mapped = jax.vmap(lambda m: m.to_dense(T, S))(mask)
    np.testing.assert_array_equal(mapped, mask.to_dense(T, S, B=B))
    axes = jax.tree.map(lambda x: 0 if x.ndim == 1 else 1, mask)
    moved = jax.tree.map(lambda x: x if x.ndim == 1 else x.T, mask)
    mapped = jax.vmap(lambda m: m.to_dense(T, S), in_axes=(axes,))(moved)
    np.testing.assert_array_equal(mapped, mask.to_dense(T, S, B=B))


def test_to_dense_uses_what_a_function_closes_over_now():
    width = np.array(1)
    mask = masks.mask_fn(lambda b, n, q, k: k < width)
    assert mask.to_dense(1, 4).sum() == 1
    width[...] = 3
    assert mask.to_dense(1, 4).sum() == 3
    numbers = [1]
    mask = masks.mask_fn(lambda b, n, q, k: k < numbers[0])
    assert mask.to_dense(1, 4).sum() == 1
    numbers[0] = 3
    assert mask.to_dense(1, 4).sum() == 3


@each_rule
def test_printing_draws_a_picture(mask, rule, T, S):
    lines = str(mask).splitlines()
    assert set("".join(lines)) <= set("█▒·")
    assert len({len(line) for line in lines}) == 1


def test_repr_shows_fields():
    assert repr(masks.window(2, None)) == "masks.window(left=2, right=None)"
    assert repr(~(masks.causal() | masks.prefix(3))) == "~(masks.causal() | masks.prefix(length=3))"
    assert (
        repr(masks.causal(2) & masks.lengths(key=3))
        == "masks.causal(offset=2) & masks.lengths(key=3)"
    )
    assert "offset=[-3, 0, 4]" in repr(masks.causal(OFFSETS))
    assert "float32" not in repr(~masks.dense(DENSE))
    assert "bool[3, 2, 11, 13]" in repr(~masks.dense(DENSE))


def test_masks_are_combined_by_operators_alone():
    with pytest.raises(TypeError, match="a mask has no truth value: combine masks with"):
        masks.causal() and masks.prefix(2)
    for combine in (lambda: masks.causal & masks.prefix(2), lambda: masks.prefix(2) | masks.causal):
        with pytest.raises(TypeError, match=r"call masks.causal\(\.\.\.\)"):
            combine()
    array = np.ones((3, 3), bool)
    for combine in (lambda: array & masks.causal(), lambda: jnp.asarray(array) | masks.causal()):
        with pytest.raises(TypeError, match=r"wrap a bool array in masks.dense\(array\)"):
            combine()
