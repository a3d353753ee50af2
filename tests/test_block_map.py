"""Random compositions of masks: their pairs and block maps, checked pair by pair."""

from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow
from hypothesis import given, settings

from attention_jax import Mask, block_map, masks
from attention_jax.core.axes import Sizes
from attention_jax.masks.block_map import EMPTY, FULL, PARTIAL, schedule
from attention_jax.masks.grid import Grid
from attention_jax.testing import Case, rules

B, N = 3, 2

# --- Masks, each with its visible pairs in NumPy.


class Known(NamedTuple):
    mask: Mask
    visible: np.ndarray  # bool, broadcasts to [B N T S]
    tight: bool  # its block map is exact

    def __repr__(self):
        return repr(self.mask)


def positions(T, S):
    return np.arange(T)[:, None], np.arange(S)[None, :]


def number(rng, low, high, least=None):
    """An int, or one int per example, and the same as an array that broadcasts.

    Args:
      least: of an int; entries of an array go down to ``low``.
    """
    x = rng.integers(low, high, B).astype(np.int32)
    if rng.random() < 0.5:
        one = x[0] if least is None else max(x[0], np.int32(least))
        return int(one), one
    return x, x[:, None, None, None]


def band(rng, T, S):
    i, j = positions(T, S)
    left, right = (int(x) if x >= 0 else None for x in rng.integers(-2, 9, 2))
    offset, o = number(rng, -S, S)
    align = ["start", "end"][rng.integers(2)]
    pairs = rules.band(i, j, left, right, o + (S - T if align == "end" else 0))
    return Known(masks.window(left, right, offset=offset, align=align), pairs, True)


def some_lengths(rng, T, S):
    i, j = positions(T, S)
    (query, q), (key, k) = number(rng, -1, T + 2, least=0), number(rng, -1, S + 2, least=0)
    return Known(masks.lengths(query=query, key=key), (i < q) & (j < k), True)


def some_prefix(rng, T, S):
    length, n = number(rng, -1, S + 2, least=0)
    return Known(masks.prefix(length), positions(T, S)[1] < n, True)


def chunks(rng, T, S):
    i, j = positions(T, S)
    size = int(rng.integers(1, 9))
    return Known(masks.chunked(size), rules.same_chunk(i, j, size), True)


def strides(rng, T, S):
    i, j = positions(T, S)
    stride = int(rng.integers(1, 6))
    return Known(masks.dilated(stride), rules.strided(i, j, stride), True)


def documents(rng, T, S):
    """Sorted and contiguous with padding last, as packing makes them."""
    q, k = (np.cumsum(rng.random((B, n)) < 0.3, axis=1) for n in (T, S))
    q, k = (
        np.where(np.arange(T) < T - rng.integers(0, 3), q, -1),
        np.where(rng.random() < 0.9, k, -1),
    )
    pairs = rules.same_segment(q[:, None, :, None], k[:, None, None, :])
    return Known(masks.segments(q, k), pairs, True)


def unsorted_segments(rng, T, S):
    q, k = (rng.integers(-2, 4, (B, n)) for n in (T, S))
    pairs = rules.same_segment(q[:, None, :, None], k[:, None, None, :])
    return Known(masks.segments(q, k), pairs, False)


def layouts(rng, T, S):
    i, j = positions(T, S)
    size = int(rng.integers(1, 6))
    layout = rng.random((-(-T // size), -(-S // size))) < rng.choice([0.2, 0.8])
    known = rng.random() < 0.5
    mask = masks.block_sparse(layout if known else jnp.asarray(layout), size)
    return Known(mask, rules.in_layout(i, j, layout, size), True)


def arrays(rng, T, S):
    shape = [n if rng.random() < 0.6 else 1 for n in (B, N, T, S)][rng.integers(3) :]
    array = rng.random(shape) < rng.choice([0.1, 0.5, 0.95])
    return Known(masks.dense(array), array, True)


def functions(rng, T, S):
    i, j = positions(T, S)
    evaluate = bool(rng.integers(2))
    mask = masks.mask_fn(lambda b, n, q, k: (q + 2 * k) % 5 < 3, evaluate=evaluate)
    return Known(mask, (i + 2 * j) % 5 < 3, evaluate)


def flags(rng, T, S):
    x = rng.random((B, 1, T)) < rng.choice([0.1, 0.9])
    return Known(masks.global_tokens(x[:, 0]), x[..., None] | x[..., None, :], True)


def boxes(rng, T, S):
    i, j = positions(T, S)
    width = int(rng.choice([n for n in range(1, T + 1) if T % n == 0]))
    shape = (T // width, width)
    size = tuple(int(rng.choice(range(1, n + 1, 2))) for n in shape)
    return Known(masks.neighborhood(shape, size), rules.neighbors(i, j, shape, size), False)


ATOMS = [band, some_lengths, some_prefix, chunks, strides, documents, unsorted_segments]
ATOMS += [layouts, arrays, functions]
SQUARE_ATOMS = [flags, boxes]


class Problem(NamedTuple):
    lengths: tuple[int, int]  # T and S: few values, since each compiles anew
    block: tuple[int, int]
    tree: tuple  # (builder, seed), ("&", tree, tree), ("|", tree, tree) or ("~", tree)

    def known(self):
        return build(self.tree, *self.lengths)

    def kinds(self, mask):
        (T, S), (block_q, block_k) = self.lengths, self.block
        return block_map(mask, T, S, block_q=block_q, block_k=block_k, B=B, N=N).kinds


def build(tree, T, S):
    head, *rest = tree
    if head not in ("&", "|", "~"):
        return head(np.random.default_rng(*rest), T, S)
    parts = [build(part, T, S) for part in rest]
    if head == "~":
        return Known(~parts[0].mask, ~parts[0].visible, parts[0].tight)
    (a, x, _), (b, y, _) = parts
    return Known(a & b, x & y, False) if head == "&" else Known(a | b, x | y, False)


def atoms(builders):
    return st.tuples(st.sampled_from(builders), st.integers(0, 2**32 - 1))


def compositions(builders):
    return st.recursive(
        atoms(builders),
        lambda x: st.tuples(st.sampled_from("&|"), x, x) | st.tuples(st.just("~"), x),
        max_leaves=4,
    )


@st.composite
def problems(draw, trees=compositions, builders=None):
    T, S = draw(st.sampled_from([(12, 12), (11, 13)]))
    block = draw(st.sampled_from([(3, 4), (5, 16)]))
    square = SQUARE_ATOMS if T == S else []
    return Problem((T, S), block, draw(trees(builders or ATOMS + square)))


@pytest.mark.slow
@settings(max_examples=20)
@given(problems())
def test_compositions_combine_their_parts(p):
    mask, visible, _ = p.known()
    dense = mask.to_dense(*p.lengths, B=B, N=N)
    np.testing.assert_array_equal(dense, np.broadcast_to(visible, dense.shape))


# --- Block maps.


def counted(visible, block_q, block_k):
    """The kinds ``[B N rows columns]``, from every pair."""
    *lead, T, S = visible.shape
    kinds = np.full((*lead, -(-T // block_q), -(-S // block_k)), PARTIAL)
    for r, c in np.ndindex(kinds.shape[-2:]):
        part = visible[..., r * block_q : (r + 1) * block_q, c * block_k : (c + 1) * block_k]
        kinds[..., r, c][part.all((-2, -1))] = FULL
        kinds[..., r, c][~part.any((-2, -1))] = EMPTY
    return kinds


def check_sound(p, visible, kinds):
    exact = counted(np.broadcast_to(visible, (B, N, *p.lengths)), *p.block)
    kinds = np.broadcast_to(kinds, exact.shape)
    assert (exact[kinds == EMPTY] == EMPTY).all()
    assert (exact[kinds == FULL] == FULL).all()
    return exact


@pytest.mark.parametrize("examples", [12, slow(40)])
def test_block_maps_are_sound(examples):
    @settings(max_examples=examples)
    @given(problems())
    def check(p):
        mask, visible, _ = p.known()
        check_sound(p, visible, p.kinds(mask))

    check()


@pytest.mark.parametrize("examples", [6, slow(20)])
def test_block_maps_of_traced_masks_are_sound(examples):
    @settings(max_examples=examples)
    @given(problems())
    def check(p):
        mask, visible, _ = p.known()
        traced = jax.jit(lambda mask: jnp.asarray(p.kinds(mask)))(mask)
        check_sound(p, visible, traced)
        np.testing.assert_array_equal(traced, p.kinds(mask))

    check()


@pytest.mark.slow  # single masks are checked more thoroughly below; this one needs no builder
@pytest.mark.parametrize("name", [name for name in rules.MASKS if name != "none"])
def test_block_maps_of_the_checkers_masks_are_sound(name):
    p = Problem((35, 35), (8, 5), ())
    sizes = Sizes(B=(B,), T=35, S=35, K=1, G=N, H=1, D=1)
    mask, visible = rules.MASKS[name](Case(name, sizes), np.random.default_rng(0))
    check_sound(p, visible, p.kinds(mask))
    check_sound(p, ~visible, p.kinds(~mask))


@pytest.mark.parametrize("examples", [4, slow(12)])
@pytest.mark.parametrize("builder", ATOMS + SQUARE_ATOMS, ids=lambda f: f.__name__)
def test_single_masks_have_exact_block_maps(builder, examples):
    @settings(max_examples=examples)
    @given(problems(trees=atoms, builders=[builder]))
    def check(p):
        if builder in SQUARE_ATOMS:
            p = p._replace(lengths=(12, 12))
        mask, visible, tight = p.known()
        for known in (Known(mask, visible, tight), Known(~mask, ~visible, tight)):
            kinds = p.kinds(known.mask)
            exact = check_sound(p, known.visible, kinds)
            if known.tight:
                np.testing.assert_array_equal(np.broadcast_to(kinds, exact.shape), exact)

    check()


@settings(max_examples=20)
@given(problems(builders=[band, some_lengths, some_prefix, chunks, strides, layouts]))
def test_masks_without_arrays_answer_in_numpy_while_tracing(p):
    mask, types = p.known().mask, []

    @jax.jit
    def trace(mask):
        kinds = p.kinds(mask)
        types.append(type(kinds))
        return jnp.asarray(kinds)

    trace.eval_shape(mask)
    assert jax.tree.leaves(mask) or types == [np.ndarray]


def test_no_mask_is_full_and_a_function_partial_unless_evaluated():
    def diagonal(b, n, q, k):
        return q == k

    assert (block_map(None, 5, 7, block_q=2, block_k=2).kinds == FULL).all()
    assert (block_map(masks.mask_fn(diagonal), 6, 6, block_q=2, block_k=2).kinds == PARTIAL).all()
    evaluated = block_map(masks.mask_fn(diagonal, evaluate=True), 6, 6, block_q=2, block_k=2)
    np.testing.assert_array_equal(evaluated.kinds, np.eye(3))


@given(st.sampled_from([(8, 8), (7, 9), (1, 2)]), st.integers(0, 2**32 - 1))
def test_visits_are_the_full_blocks_then_the_partial_ones(lengths, seed):
    T, S = lengths
    grid = Grid(T, S, block_q=2, block_k=2)
    kinds = np.random.default_rng(seed).integers(0, 3, (grid.rows, grid.columns)).astype(np.int8)
    index, full, visited = schedule(kinds, grid)
    for r, row in enumerate(kinds):
        # A last block that reaches beyond the arrays does not count as full.
        whole = [c for c in range(len(row)) if 2 * r + 2 <= T and 2 * c + 2 <= S]
        fulls = [c for c in whole if row[c] == FULL]
        others = [c for c in range(len(row)) if row[c] != EMPTY and c not in fulls]
        assert full[r] == len(fulls)
        assert visited[r] == len(fulls) + len(others)
        assert index[r, : visited[r]].tolist() == fulls + others
    assert index.shape[1] == max(1, visited.max())
    in_jax = schedule(jnp.asarray(kinds), grid)
    np.testing.assert_array_equal(in_jax.index[:, : index.shape[1]], index)
    np.testing.assert_array_equal(in_jax.full, full)
    np.testing.assert_array_equal(in_jax.visited, visited)


def test_a_picture_of_many_positions_has_16_rows():
    i, j = np.arange(400)[:, None], np.arange(400)[None, :]
    exact = counted(((j <= i) & (j >= i - 100))[None, None], 25, 25)[0, 0]
    picture = "\n".join("".join("·▒█"[kind] for kind in row) for row in exact)
    assert str(masks.window(100, 0)) == picture
    assert str(block_map(masks.window(100, 0), 400, 400, block_q=25, block_k=25)) == picture
