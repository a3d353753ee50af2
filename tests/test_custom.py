"""User-defined masks and scores: nothing relies on properties that they do not declare."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import IMPLEMENTATIONS

from attention_jax import Mask, Score, attention, block_map, cache, explain, masks, scores
from attention_jax.masks.at_positions import mask_at_positions
from attention_jax.masks.block_map import EMPTY, FULL, PARTIAL
from attention_jax.scores import Masking
from attention_jax.scores.at_positions import score_at_positions

T, S, N, H = 6, 12, 2, 4
RNG = np.random.default_rng(0)
QUERY_POSITIONS = np.array([0, 3, 4, 7, 8, 11], np.int32)
KEY_POSITIONS = np.array([5, 0, 7, 2, 9, 4, 11, 6, -1, 8, 1, 10], np.int32)


class Checkers(Mask):
    """Squares of 2 x 3 pairs; its block rule knows grids of just these squares."""

    def rule(self, b, n, q, k):
        return (q // 2 + k // 3) % 2 == 0

    def block(self, grid, b, n):
        if (grid.block_q, grid.block_k) != (2, 3):
            return True, False
        visible = self.rule(b, n, grid.q0, grid.k0)
        return visible, visible


class Kinds(Mask):
    """Equal kinds, by arrays of the whole sequence; the block rule asks for each key block."""

    AXES = {"query_kinds": "*B T", "key_kinds": "*B S"}
    BY_INTERVALS = True
    query_kinds: object
    key_kinds: object

    def rule(self, b, n, q, k):
        return self.query_kinds == self.key_kinds

    def block(self, grid, b, n):
        q, k = jnp.asarray(self.query_kinds), jnp.asarray(self.key_kinds)
        low = grid.over_keys(jnp.min, k) == grid.over_queries(jnp.max, q)
        high = grid.over_keys(jnp.max, k) == grid.over_queries(jnp.min, q)
        return True, low & high


class AnyOf(Mask):
    """Visible where one of several masks is."""

    BY_INTERVALS = True
    masks: tuple[Mask, ...]

    def rule(self, b, n, q, k):
        return sum(jnp.asarray(mask.rule(b, n, q, k)).astype(int) for mask in self.masks) > 0

    def block(self, grid, b, n):
        some, every = zip(*(mask.block(grid, b, n) for mask in self.masks), strict=True)
        return sum(map(np.asarray, some)) > 0, sum(map(np.asarray, every)) > 0


class Nothing(Mask):
    """No pair; the block rule returns Python bools."""

    def rule(self, b, n, q, k):
        return (q == q) & (k != k)

    def block(self, grid, b, n):
        return False, False


class HeadByHead(Mask):
    """Keys from ``n`` on."""

    def rule(self, b, n, q, k):
        return (k >= n) & (q == q)

    def block(self, grid, b, n):
        return (grid.k1 >= n) & (grid.q0 == grid.q0), (grid.k0 >= n) & (grid.q0 == grid.q0)


class LastThird(Mask):
    """The last third of the keys, however many there are."""

    keys: int | None = None

    def resolve(self, T, S, N):
        return LastThird(S)

    def rule(self, b, n, q, k):
        return (3 * k >= 2 * self.keys) & (q == q)


class Gate(Score):
    """-inf for every third distance, and nothing declared."""

    def rule(self, s, b, n, q, k):
        return jnp.where((q - k) % 3 == 0, -jnp.inf, s + jnp.asarray(n).astype(s.dtype))


class Boost(Score):
    """``s + gain[n]`` for keys of the query's kind."""

    AXES = {"gain": "N", "query_kinds": "*B T", "key_kinds": "*B S"}
    MASKING = Masking.NEVER
    gain: object
    query_kinds: object
    key_kinds: object

    def rule(self, s, b, n, q, k):
        return jnp.where(self.query_kinds == self.key_kinds, s + self.gain, s)


COMPOSITIONS = {
    "alone": Checkers(),
    "and": Checkers() & masks.causal(),
    "or": masks.causal() | Checkers(),
    "not": ~Checkers(),
    "tuple": AnyOf((Checkers(), masks.window(1, 0))),
    "nothing": Nothing() | masks.window(2, 1),
    "not nothing": ~Nothing() & masks.causal(),
}


def blocks_of(mask, T, S, block_q=2, block_k=3):
    """The kinds of blocks, after a check that empty and full blocks are so."""
    dense = np.asarray(mask.to_dense(T, S))
    kinds = np.asarray(block_map(mask, T, S, block_q=block_q, block_k=block_k).kinds)
    kinds = kinds.reshape(kinds.shape[-2:])
    for i, j in np.ndindex(kinds.shape):
        block = dense[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        assert kinds[i, j] != EMPTY or not block.any()
        assert kinds[i, j] != FULL or block.all()
    return kinds


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_blocks_are_right_at_indices_and_at_positions(name):
    mask = COMPOSITIONS[name]
    kinds = blocks_of(mask, 12, 12)
    assert name not in ("alone", "not") or set(kinds.flat) == {EMPTY, FULL}
    at_positions = mask_at_positions(mask, QUERY_POSITIONS, KEY_POSITIONS)
    whole = np.asarray(mask.to_dense(12, 12))
    expected = whole[QUERY_POSITIONS][:, KEY_POSITIONS] & (KEY_POSITIONS >= 0)
    np.testing.assert_array_equal(at_positions.to_dense(T, S), expected)
    kinds = blocks_of(at_positions, T, S)
    if "othing" not in name:
        assert (kinds == PARTIAL).all()  # no block rule that is known to hold with gaps


def test_a_block_rule_of_arrays_holds_at_positions():
    kinds = np.repeat([0, 1, 2, 2], 3)
    mask = Kinds(kinds[:T], kinds) & masks.causal()
    at_positions = mask_at_positions(mask, QUERY_POSITIONS, np.arange(S, dtype=np.int32))
    assert (blocks_of(at_positions, T, S) == EMPTY).any()


def test_a_subclass_with_its_own_block_rule_must_declare_gaps_again():
    class Blocks(type(masks.causal())):
        def block(self, grid, b, n):
            return np.True_, np.False_

    assert type(masks.causal()).BY_INTERVALS
    assert not Blocks.BY_INTERVALS


@pytest.mark.parametrize("of", [masks.causal(), Checkers(), scores.alibi()])
def test_a_subclass_cannot_change_the_rule(of):
    with pytest.raises(TypeError, match=rf"must not change the rule of {type(of).__name__}"):
        type("Changed", (type(of),), {"rule": lambda *args: True})


def test_at_positions_a_mask_of_lengths_must_define_resolve_in_sequence():
    np.testing.assert_array_equal(LastThird().to_dense(2, 6)[0], [0, 0, 0, 0, 1, 1])
    at_positions = mask_at_positions(LastThird(), QUERY_POSITIONS, KEY_POSITIONS)
    with pytest.raises(NotImplementedError, match=r"LastThird .* define resolve_in_sequence\(N\)"):
        at_positions.to_dense(T, S)

    class OfTwelve(LastThird):
        def resolve_in_sequence(self, N):
            return OfTwelve(12)

    at_positions = mask_at_positions(OfTwelve(), QUERY_POSITIONS, KEY_POSITIONS)
    np.testing.assert_array_equal(at_positions.to_dense(T, S)[0], KEY_POSITIONS >= 8)


def test_block_maps_of_rules_that_use_the_head():
    kinds = block_map(HeadByHead(), 2, 4, block_q=2, block_k=2, N=4).kinds
    assert np.asarray(kinds)[0, :, 0].tolist() == [[2, 2], [1, 2], [0, 2], [0, 1]]


# --- In attention.


def inputs(T=24, S=24):
    return [RNG.normal(size=(2, n, N, H)).astype(np.float32) for n in (T, S, S)]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("and", "xla"),
        ("and", "blockwise"),
        ("not", "blockwise"),
        ("nothing", "blockwise"),
        ("not", "pallas_gpu interpreted"),
        ("nothing", "pallas_gpu interpreted"),
    ],
)
def test_attention_with_a_mask_equals_that_with_the_dense_one(name, implementation):
    q, k, v = inputs()
    expected = attention(q, k, v, mask=COMPOSITIONS[name].to_dense(24, 24), implementation="xla")
    out = IMPLEMENTATIONS[implementation](q, k, v, mask=COMPOSITIONS[name])
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "blockwise", "pallas_gpu interpreted"])
def test_keys_masked_by_a_score_may_hold_nan_even_if_undeclared(implementation):
    q, k, v = inputs(T=1)
    k[:, ::3], v[:, ::3] = np.nan, np.nan
    dense = np.arange(24) % 3 != 0
    expected = attention(q, k, v, mask=dense[None], score=scores.softcap(2.0), implementation="xla")
    score = (scores.softcap(2.0), Gate())
    out = IMPLEMENTATIONS[implementation](q, np.nan_to_num(k), v, score=score)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "blockwise", "pallas_gpu interpreted"])
def test_a_score_of_arrays_and_its_gradient(implementation):
    q, k, v = inputs()
    kinds, gain = RNG.integers(0, 3, (2, 24)), np.array([0.5, 2.0], np.float32)
    same = kinds[:, None, :, None] == kinds[:, None, None, :]

    def run(fn, score):
        loss = lambda gain: (fn(q, k, v, score=score(gain)) ** 2).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(gain)

    expected = run(attention, lambda g: scores.bias(jnp.where(same, g[:, None, None], 0.0)))
    found = run(IMPLEMENTATIONS[implementation], lambda g: Boost(g, kinds, kinds))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)


# --- With a cache.


@pytest.mark.parametrize("name", ["checkers", "kinds", "tuple"])
def test_a_cache_takes_masks_and_scores_of_the_whole_sequence(name):
    kinds, gain = RNG.integers(0, 2, (2, T)), np.array([0.5, 2.0], np.float32)
    own = {"checkers": Checkers(), "kinds": Kinds(kinds, kinds), "tuple": COMPOSITIONS["tuple"]}
    mask, score = own[name] & masks.causal(), (Boost(gain, kinds, kinds), Gate())
    arrays = inputs(T, T)
    kept, chunks, start = cache.init((2,), capacity=T, num_kv_heads=N, head_dim=H), [], 0
    for size in [4, 1, 1]:
        chunk = [x[:, start : start + size] for x in arrays]
        out, kept = cache.attend(kept, *chunk, mask=mask, score=score)
        chunks.append(out)
        start += size
    expected = attention(*arrays, mask=mask, score=score)
    np.testing.assert_allclose(jnp.concatenate(chunks, 1), expected, atol=1e-5)


def test_a_cache_refuses_a_mask_that_does_not_declare_its_reach():
    kept = cache.init((2,), capacity=T, num_kv_heads=N, head_dim=H)
    with pytest.raises(ValueError, match="mask may let a query attend to later tokens"):
        cache.extend(kept, *inputs(T, T)[1:], mask=Checkers())
    rolling = cache.init((2,), capacity=T, num_kv_heads=N, head_dim=H, rolling=True)
    with pytest.raises(ValueError, match="mask may look back further"):
        cache.extend(rolling, *inputs(T, T)[1:], mask=Checkers() & masks.causal())
    mask = Kinds(np.zeros(3), np.zeros(3)) & masks.causal()
    with pytest.raises(ValueError, match="query_kinds of Kinds has entries for 3 positions"):
        cache.extend(kept, *inputs(T, T)[1:], mask=mask)


# --- What kernels take.


class Sorted(Mask):
    """Uses an operation that kernels lack."""

    def rule(self, b, n, q, k):
        return jnp.sort(q + k, axis=-1) % 2 == 0


class Closed(Score):
    """Closes over an array."""

    MASKING = Masking.NEVER

    def rule(self, s, b, n, q, k):
        return s + jnp.asarray(np.arange(1000.0, dtype=np.float32))[q]


class Summed(Score):
    """Does more with its table than look up entries."""

    MASKING = Masking.NEVER
    table: object

    def rule(self, s, b, n, q, k):
        return s + self.table.sum()


def reason(implementation, platform, **options):
    q = jax.ShapeDtypeStruct((2, 1000, 8, 64), "bfloat16")
    plan = explain(q, q, q, platform=platform, implementation=implementation, **options)
    return plan.reasons[implementation]


KINDS = np.zeros(1000, np.int32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": Checkers() & masks.causal()}, "asked for"),
        ({"mask": Kinds(KINDS, KINDS)}, "asked for"),
        ({"score": [Gate(), Boost(np.ones(8, np.float32), KINDS, KINDS)]}, "asked for"),
        ({"mask": ~(masks.causal() & Sorted())}, "mask Sorted uses sort, which a kernel does not"),
        ({"mask": AnyOf((masks.causal(), Sorted()))}, "mask Sorted uses sort"),
        ({"score": Closed()}, "score Closed closes over an array"),
        ({"score": Summed(np.ones(4, np.float32))}, "score Summed does more with its arrays"),
        ({"score": score_at_positions(Summed(np.ones(4)), KINDS, KINDS)}, "score Summed"),
    ],
)
def test_a_gpu_kernel_takes_arithmetic_on_single_entries(options, words):
    assert words in reason("pallas_gpu", "gpu", **options)


def test_a_tpu_kernel_takes_a_mask_that_is_the_same_for_all_heads():
    assert reason("splash", "tpu", mask=Checkers()) == "asked for"
    words = "mask HeadByHead may depend on the example or head"
    assert words in reason("splash", "tpu", mask=HeadByHead() & masks.causal())


def test_a_rule_must_return_bools():
    class Remainder(Mask):
        def rule(self, b, n, q, k):
            return (q - k) % 3

    x = jnp.ones((5, 1, 4))
    for mask in (Remainder(), Remainder() & masks.causal(), ~Remainder()):
        with pytest.raises(TypeError, match="rule of Remainder must return bools"):
            attention(x, x, x, mask=mask)


def test_axes_name_fields():
    with pytest.raises(TypeError, match="AXES of Typo names slope, which must be a field"):

        class Typo(Score):
            AXES = {"slope": "N"}
            slopes: object
