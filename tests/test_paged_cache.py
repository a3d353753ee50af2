"""Paged caches: the results of plain caches, and no row changes the tokens of another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, mostly_slow, normal, randomized, slow
from hypothesis import given
from hypothesis import strategies as st
from test_models import DECODERS

from attention_jax import attention, cache, masks, models, scores

R, T, N, K, H, D = 3, 9, 4, 2, 3, 5
SIZES = {"num_kv_heads": K, "head_dim": H, "value_dim": D}
CALLS = ((0, 4, [4, 3, 2]), (4, 5, [1, 0, 1]), (5, 9, [3, 4, 4]))  # tokens, and how many are real


def paged(rows=R, capacity=12, page_size=4, **options):
    return cache.init_paged(rows, capacity=capacity, page_size=page_size, **{**SIZES, **options})


def plain(rows=R, capacity=12, **options):
    return cache.init((rows,), capacity=capacity, **SIZES, **options)


def inputs():
    return [normal(i, R, T, n, w) for i, (n, w) in enumerate([(N, H), (K, H), (K, D)])]


# --- Pages, against a model in Python: a row is a list of numbers, one for each token.

ROWS, PAGE, PAGES, CAPACITY, MOST = 3, 3, 7, 11, 5

step = {
    "append": jax.jit(lambda c, x, count: c.append(x, x, count), donate_argnums=0),
    "free": jax.jit(lambda c, row: c.free(row), donate_argnums=0),
    "share": jax.jit(lambda c, *args: c.share(*args), donate_argnums=0),
    "rollback": jax.jit(lambda c, length: c.rollback(length), donate_argnums=0),
}
row = st.integers(0, ROWS - 1)
operations = st.one_of(
    st.tuples(st.just("append"), st.lists(st.integers(0, MOST), min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("append"), st.lists(st.integers(0, 1), min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("free"), row),
    st.tuples(st.just("share"), row, row, st.integers(0, CAPACITY)),
    st.tuples(st.just("rollback"), st.lists(st.integers(0, MOST), min_size=ROWS, max_size=ROWS)),
)


def contents(cached):
    """The number of each token of each row, read through its table."""
    keys, table = np.asarray(cached.key)[:, 0, 0], np.asarray(cached.table)
    return [
        [float(keys[table[r, p // PAGE] * PAGE + p % PAGE]) for p in range(length)]
        for r, length in enumerate(cached.length.tolist())
    ]


@given(st.lists(operations, max_size=12))
def test_any_operations_leave_each_row_its_own_tokens(sequence):
    cached = cache.init_paged(
        ROWS, capacity=CAPACITY, page_size=PAGE, pages=PAGES, num_kv_heads=1, head_dim=1
    )
    rows, lost, number = [[] for _ in range(ROWS)], set(), 0
    for name, *args in sequence:
        if name == "append":
            x = np.arange(number, number + ROWS * MOST, dtype=np.float32).reshape(ROWS, MOST)
            number += ROWS * MOST
            count = np.array(args[0])
            cached = step["append"](cached, x[:, :, None, None], count)
            rows = [old + new[:n].tolist() for old, new, n in zip(rows, x, count, strict=True)]
        elif name == "free":
            cached = step["free"](cached, args[0])
            rows[args[0]] = []
            lost.discard(args[0])
        elif name == "share":
            source, target, length = args
            cached = step["share"](cached, source, target, length)
            rows[target] = rows[source][:length]
            lost = lost - {target} if source not in lost else lost | {target}
        else:
            length = [max(0, len(x) - n) for x, n in zip(rows, args[0], strict=True)]
            cached = step["rollback"](cached, np.array(length))
            rows = [x[:n] for x, n in zip(rows, length, strict=True)]
        table = np.asarray(cached.table)
        used = np.bincount(table[table >= 0], minlength=PAGES)
        np.testing.assert_array_equal(cached.references, used)
        flagged = set(np.flatnonzero(cached.overflowed))
        if name == "append" and flagged - lost:  # pages, or places in the row, ran out
            full = int(cached.free_pages) == 0 or any(len(rows[r]) > CAPACITY for r in flagged)
            assert full
        assert all(len(rows[r]) <= CAPACITY for r in set(range(ROWS)) - flagged)
        lost = flagged
        assert cached.length.tolist() == [len(x) for x in rows]
        sound = [r for r in range(ROWS) if r not in flagged]
        found = contents(cached)
        assert [found[r] for r in sound] == [rows[r] for r in sound]


def test_a_row_that_continues_a_shared_page_gets_a_copy():
    cached = paged(rows=3, pages=4)
    x = normal(0, 3, 6, K, H), normal(1, 3, 6, K, D)
    append = jax.jit(lambda c, x, count: c.append(*x, count))
    cached = append(cached, x, np.array([6, 0, 0])).share(0, 1, 6).share(1, 2, 4)
    assert cached.references.tolist() == [3, 2, 0, 0]
    new = [y[:, :1] for y in x]
    cached = append(cached, new, np.array([0, 1, 0]))
    assert cached.table.tolist() == [[0, 1, -1], [0, 2, -1], [0, -1, -1]]
    cached = append(cached, new, np.array([1, 0, 0]))  # now the page is its own
    assert cached.table[0].tolist() == [0, 1, -1]
    np.testing.assert_array_equal(cached.key[4:6], x[0][0, 4:6])
    np.testing.assert_array_equal(cached.key[8:10], x[0][0, 4:6])
    np.testing.assert_array_equal(cached.value[10], x[1][1, 0])
    assert cached.free(0).references.tolist() == [2, 0, 1, 0]


def test_a_row_shared_with_itself_is_rolled_back():
    x = normal(0, R, 7, K, H), normal(1, R, 7, K, D)
    cached = jax.jit(lambda: paged().append(*x))()
    shared, rolled = cached.share(1, 1, 5), cached.rollback(np.array([7, 5, 7]))
    jax.tree.map(np.testing.assert_array_equal, shared, rolled)


def test_pages_that_run_out_are_an_error_or_a_flag():
    cached = paged(pages=4)
    x = normal(0, R, 8, K, H), normal(1, R, 8, K, D)
    cached = cached.append(*x, count=np.array([8, 3, 0]))
    with pytest.raises(ValueError, match="4 pages of 4 tokens, of which 1 are free"):
        cached.append(*x, count=np.array([1, 2, 0]))
    with pytest.raises(ValueError, match="capacity 12, but a row would hold 16"):
        cached.append(*x, count=np.array([8, 0, 0]))
    after = jax.jit(lambda c: c.append(*x, count=np.array([1, 5, 5])))(cached)
    assert after.overflowed.tolist() == [False, True, True]
    np.testing.assert_array_equal(after.key[:8], x[0][0])
    assert after.rollback(np.array([9, 4, 0])).overflowed.tolist() == [False] * 3
    # The lost token is not forgotten when there are pages again.
    later = jax.jit(lambda c: c.free(0).append(*x, count=np.array([0, 1, 0])))(after)
    assert later.overflowed.tolist() == [False, True, True]


# --- Attention: as with a plain cache.

MASKS = {
    "none": (None, ()),
    "window, ALiBi": (masks.window(3, 0), scores.alibi()),
    "segments": (masks.segments(np.array([[0] * 5 + [1] * 11] * R)) & masks.causal(), ()),
    "function of the example": (
        masks.mask_fn(lambda b, n, q, k: (q + k + b + n) % 3 != 0) & masks.causal(),
        scores.softcap(3.0),
    ),
    "lengths": (masks.lengths(key=np.array([3, 9, 5])) & masks.causal(), ()),
    "one length": (masks.lengths(key=np.array([4])) & masks.causal(), ()),
    "bias": (None, scores.bias(normal(5, N, 16, 16))),
    "relative bias": (
        None,
        scores.relative_bias(normal(6, 8, N), bidirectional=False, max_distance=6),
    ),
}


QUICK = "none", "function of the example", "bias"


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        *[(name, None) for name in QUICK],
        ("none", "int8"),
        *[slow(name, None) for name in MASKS if name not in QUICK],
        *[slow(name, "int8") for name in MASKS if name != "none"],
    ],
)
def test_attention_is_that_with_a_plain_cache(name, quantize):
    mask, score = MASKS[name]
    arrays, caches = inputs(), [plain(quantize=quantize), paged(pages=8, quantize=quantize)]
    call = jax.jit(functools.partial(cache.attend, mask=mask, score=score, return_lse=True))
    for begin, end, count in CALLS:
        results = []
        for i, cached in enumerate(caches):
            result, caches[i] = call(
                cached, *(x[:, begin:end] for x in arrays), count=np.array(count)
            )
            results.append(result)
        for r, real in enumerate(count):
            close(*(jax.tree.map(lambda x, r=r, n=real: x[r, :n], x) for x in results))
    assert not caches[1].overflowed.any()


def test_other_rows_and_their_nan_do_not_matter():
    arrays, call = inputs(), jax.jit(cache.attend)
    spoilt = [np.array(x) for x in arrays]
    for x in spoilt:
        x[1:] = np.nan
    found = [call(paged(), *x)[0][0] for x in (arrays, spoilt)]
    close(*found)
    assert np.isfinite(found[1]).all()


def test_dropout_is_that_with_a_plain_cache():
    arrays = inputs()
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(0)}
    call = jax.jit(functools.partial(cache.attend, **options))
    close(*(call(empty, *arrays)[0] for empty in (plain(), paged())))


@pytest.mark.parametrize("name", ["segments", slow("bias")])
def test_extend_gathers_the_pages_of_each_row(name):
    mask, score = MASKS[name]
    query, *new = inputs()
    first, count = [x[:, :5] for x in new], np.array([5, 2, 4])
    cached = paged().append(*first, count=count)
    keys, values, visible, after = cache.extend(cached, *(x[:, 5:7] for x in new), mask=mask)
    assert keys.shape == (R, 12, K, H)
    placed = cache.placed_scores(cached, score, 2)
    found = attention(query[:, 5:7], keys, values, mask=visible, score=placed)
    call = jax.jit(functools.partial(cache.attend, mask=mask, score=score))
    expected, _ = call(cached, query[:, 5:7], *(x[:, 5:7] for x in new))
    close(found, expected)
    np.testing.assert_array_equal(after.length, count + 2)


def test_scan_updates_the_pool_in_place():
    arrays = inputs()

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(cached, arrays):
        def step(cached, token):
            out, cached = cache.attend(cached, *(x[:, None] for x in token))
            return cached, out[:, 0]

        return jax.lax.scan(step, cached, arrays)

    empty = paged(capacity=4096, page_size=32)
    size = empty.key.nbytes
    tokens = tuple(jnp.swapaxes(jnp.asarray(x), 0, 1) for x in arrays)
    program = decode.lower(empty, tokens).compile()
    assert program.memory_analysis().temp_size_in_bytes < size  # no copy of keys or values
    after, out = program(empty, tokens)
    close(jnp.swapaxes(out, 0, 1), attention(*arrays, mask=masks.causal()))
    assert after.length.tolist() == [T] * R


# --- Models.


@pytest.mark.parametrize("name", mostly_slow(DECODERS, ["rotary, windows"]))
def test_a_decoder_with_paged_caches(name):
    model = randomized(models.Decoder(DECODERS[name], rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 13, (2, T))
    run = nnx.jit(lambda model, tokens, caches: model(tokens, caches=caches))
    logits = []
    for options in ({}, {"page_size": 4, "pages": 6}):
        caches, parts = model.init_caches((2,), T, **options), []
        for part in (tokens[:, :6], tokens[:, 6:]):
            part, caches = run(model, part, caches)
            parts.append(part)
        logits.append(jnp.concatenate(parts, 1))
    close(*logits, tolerance=1e-4)


def test_generate_continues_paged_caches():
    model = randomized(models.Decoder(DECODERS["learned"], rngs=nnx.Rngs(0)))
    prompt = np.array([[3, 1, 4], [1, 5, 9]])
    expected = models.generate(model, prompt, max_new_tokens=4).tokens
    caches = model.init_caches((2,), 6, page_size=2)
    found = models.generate(model, prompt, max_new_tokens=4, caches=caches)
    np.testing.assert_array_equal(found.tokens, expected)
    assert not found.caches[0].overflowed.any()
    few = model.init_caches((2,), 6, page_size=2, pages=5)
    with pytest.raises(ValueError, match="6 pages, but only 5 are free"):
        models.generate(model, prompt, max_new_tokens=4, caches=few)


def test_weights_of_a_module_with_a_paged_cache():
    from attention_jax.nn import MultiHeadAttention

    module = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    x = normal(0, 2, 3, 8)
    run = nnx.jit(lambda module, cached: module(x, cache=cached, return_weights=True))
    out, weights, _ = run(module, module.init_cache((2,), 4, page_size=2))
    expected, of_plain, _ = run(module, module.init_cache((2,), 4))
    close([out, weights], [expected, of_plain])


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_row_without_a_page_attends_to_no_other_rows_tokens(quantize):
    x = jnp.ones((2, 4, 1, 4))
    start = cache.init_paged(
        2, capacity=4, num_kv_heads=1, head_dim=4, page_size=2, pages=2, quantize=quantize
    )
    step = jax.jit(lambda c, x, count: cache.attend(c, x, x, x, count=count))
    _, full = step(start, x, jnp.array([4, 0]))
    out, after = step(full, x[:, :1], jnp.array([0, 1]))
    assert after.overflowed.tolist() == [False, True]
    assert not out[1].any()


def test_the_first_of_all_users_of_a_page_keeps_it():
    x = jnp.arange(16.0).reshape(2, 2, 1, 4)
    start = cache.init_paged(2, capacity=4, num_kv_heads=1, head_dim=4, page_size=4, pages=2)
    both = start.append(x, x, count=np.array([2, 0])).share(0, 1, 2)
    after = both.append(10 * x[:, :1], 10 * x[:, :1])  # both continue the page, and one is free
    assert after.table.tolist() == [[0], [1]]
    assert after.pages.references.tolist() == [1, 1]
    keys, _ = after.gathered()
    assert keys[:, :3, 0, 0].tolist() == [[0, 4, 0], [0, 4, 80]]
