"""The checker can fail: wrong implementations fail where they should, and only there."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import prepared
from helpers import slow

import attention_jax
from attention_jax import masks, testing
from attention_jax.core import dropout
from attention_jax.core.axes import Sizes
from attention_jax.testing import problems, rules
from attention_jax.testing.cases import MASKS, OPTIONS, SCORES, possible
from attention_jax.testing.pairwise import pairwise

right = functools.partial(attention_jax.attention, implementation="xla")


def failing(fn, *names, **changes):
    """The names of the results that are off, over the cases of these names."""
    cases = [
        dataclasses.replace(case, **changes) for name in names for case in testing.cases(name=name)
    ]
    assert len(cases) == len(names)
    report = testing.check(fn, cases=[prepared(case) for case in cases])
    return {row.what for row in report.failures}


def formula(query, key, value, *, mask, score, sinks, scale, dropout_rate, dropout_key, return_lse,
            hidden=-jnp.inf, drop_logits=False, repeat=jnp.repeat):  # fmt: skip
    """The formula of attention, for exactly one batch axis, with ways to go wrong."""
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    key, value = repeat(key, N // K, 2), repeat(value, N // K, 2)
    s = jnp.einsum("btnh,bsnh->bnts", query, key) * (H**-0.5 if scale is None else scale)
    if mask is not None:
        s = jnp.where(mask.to_dense(T, S, B=B, N=N), s, hidden)
    factor = jnp.ones((), s.dtype)
    if dropout_rate:
        indices = jnp.meshgrid(*map(jnp.arange, (B, N, T, S)), indexing="ij", sparse=True)
        keep = dropout.keep(
            dropout.seed(dropout_key), *indices, threshold=dropout.threshold(dropout_rate)
        )
        s = jnp.where(keep, s, -jnp.inf) if drop_logits else s
        factor = keep.astype(s.dtype) / (1 - dropout_rate)
    p = jax.nn.softmax(s, -1) * factor
    out = jnp.einsum("bnts,bsnd->btnd", p, value)
    return (out, jnp.einsum("bnt->btn", jax.nn.logsumexp(s, -1))) if return_lse else out


def with_options(**changes):
    """Attention with some arguments replaced: by a function of the argument, or by a value."""

    def fn(query, key, value, **options):
        options |= {k: v(options[k]) if callable(v) else v for k, v in changes.items()}
        return right(query, key, value, **options)

    return fn


def changed(**changes):
    """Attention with its arguments or results changed."""

    def fn(query, key, value, **options):
        arrays = {"query": query, "key": key, "value": value}
        arrays |= {k: v(arrays[k]) for k, v in changes.items() if k in arrays}
        results = right(**arrays, **options)
        if not options["return_lse"]:
            return changes.get("out", lambda x: x)(results)
        return tuple(
            changes.get(k, lambda x: x)(x) for k, x in zip(("out", "lse"), results, strict=False)
        )

    return fn


# Right ones.


@pytest.mark.parametrize("fn", [right, slow(formula)], ids=["ours", "formula"])
def test_correct_attention_passes(fn):
    assert failing(fn, "plain", "causal, T < S", "causal end, T < S") == set()
    assert failing(fn, "plain", dropout_rate=0.3, scale=0.5) == set()


# Wrong ones.

BACKWARD = {"d query", "d key", "d value"}
ALL = {"out", "lse", *BACKWARD}


@pytest.mark.parametrize("lengths", ["T < S", slow("T > S")])
def test_causal_from_the_wrong_corner(lengths):
    def top_left(mask):
        return masks.causal() if getattr(mask, "align", None) == "end" else mask

    wrong = with_options(mask=top_left)
    assert failing(wrong, f"causal, {lengths}") == set()
    assert failing(wrong, f"causal end, {lengths}") == ALL


def test_dropout_before_the_normalizer():
    wrong = functools.partial(formula, drop_logits=True)
    assert failing(wrong, "plain") == set()
    assert failing(wrong, "plain", dropout_rate=0.3) == ALL


def test_another_dropout():
    assert failing(with_options(dropout_key=jax.random.key(0)), "plain") == set()
    wrong = with_options(dropout_key=lambda key: jax.random.fold_in(key, 1))
    assert failing(wrong, "plain", dropout_rate=0.3) == {"out", *BACKWARD}


def test_empty_rows_mishandled():
    assert failing(formula, "empty rows by mask") == {"out", "d value"}
    large = functools.partial(formula, hidden=-1e9)
    assert {"out", "lse"} <= failing(large, "empty rows by mask")


@pytest.mark.slow
def test_masked_keys_that_leak():
    large = functools.partial(formula, hidden=-1e9)
    assert failing(large, "planted", planted=False, mask="causal") == set()
    assert "out" in failing(large, "planted")


@pytest.mark.slow
def test_query_heads_in_another_order():
    def repeat(x, G, axis):
        return jnp.concatenate([x] * G, axis)

    wrong = functools.partial(formula, repeat=repeat)
    assert failing(wrong, "plain") == ALL
    one = Sizes(B=(2,), T=5, S=7, K=1, G=3, H=11, D=13)
    assert failing(wrong, "plain", sizes=one) == set()


@pytest.mark.slow
def test_a_bias_without_gradient():
    wrong = with_options(score=lambda score: jax.tree.map(jax.lax.stop_gradient, score))
    assert failing(wrong, "planted, bias") == {"d bias.array"}
    assert failing(wrong, "planted, T5") == {"d relative_bias.table"}
    shaw = {"d relative_embedding.query", "d relative_embedding.table"}
    assert failing(wrong, "planted, Shaw") == shaw


def test_an_lse_without_gradient():
    wrong = changed(lse=jax.lax.stop_gradient)
    assert failing(wrong, "plain") == {"d query", "d key"}
    assert failing(wrong, "plain", lse=False) == set()


def test_a_gradient_that_stops():
    assert failing(changed(key=jax.lax.stop_gradient), "plain") == {"d key"}
    assert failing(with_options(scale=0.5), "plain", scale=0.5) == {"d scale"}


def test_scores_in_another_order():
    wrong = with_options(score=lambda score: score[::-1])
    case = {"score": "bias, softcap", "mask": "none"}
    assert failing(wrong, "plain", **case) >= ALL


def test_sinks_ignored_or_counted_twice():
    assert failing(with_options(sinks=None), "plain", sinks=True) == {*ALL, "d sinks"}
    twice = with_options(sinks=lambda sinks: sinks + np.float32(np.log(2.0)))
    assert failing(twice, "plain", sinks=True) == {*ALL, "d sinks"}


@pytest.mark.slow
def test_half_precision_intermediates():
    def rounded(x):
        return x.astype(jnp.bfloat16).astype(x.dtype)

    assert "out" in failing(changed(query=rounded), "plain")
    assert failing(changed(out=rounded), "plain", dtype="bfloat16") == set()
    assert "out" in failing(changed(value=lambda x: x.astype("float32").astype(x.dtype)), "plain",
                            dtype="float64")  # fmt: skip


def test_wrong_dtypes_and_shapes():
    report = testing.check(
        changed(out=lambda x: x.astype(jnp.float32), lse=lambda x: x.astype(jnp.bfloat16)),
        cases=testing.cases(name="planted, bfloat16"),
        gradients=False,
    )
    assert [row.verdict for row in report.rows] == [
        "wrong: dtype float32, expected bfloat16",
        "wrong: dtype bfloat16, expected float32",
    ]
    transposed = changed(lse=lambda x: jnp.moveaxis(x, -1, -2))
    report = testing.check(transposed, cases=testing.cases(name="plain"))
    verdicts = {row.what: row.verdict for row in report.rows}
    assert verdicts["out"] == "ok"
    assert verdicts["lse"] == "wrong: shape (2, 6, 23), expected (2, 23, 6)"
    assert verdicts["gradients"].startswith("error: ")


def test_refusals_and_errors():
    def refuses(*arrays, mask, **options):
        if mask is not None:
            raise NotImplementedError("no masks here\nat all")
        raise KeyError("mine")

    report = testing.check(refuses, cases=testing.cases(name="causal, T < S"))
    assert report.ok
    assert report.rows[0].verdict == "refused: no masks here"
    report = testing.check(refuses, cases=testing.cases(name="plain"))
    assert not report.ok
    assert report.rows[0].verdict == "error: KeyError: 'mine'"


def test_refusing_the_gradient_only():
    @jax.custom_vjp
    def no_gradient(x):
        return x

    def refuse(*args):
        raise NotImplementedError("no gradient")

    no_gradient.defvjp(lambda x: (x, None), refuse)
    report = testing.check(changed(out=no_gradient), cases=testing.cases(name="plain"))
    assert report.ok
    assert [(r.what, r.verdict) for r in report.rows] == [
        ("out", "ok"),
        ("lse", "ok"),
        ("gradients", "refused: no gradient"),
    ]


def test_a_report_prints_the_worst_row_and_all_that_fail():
    report = testing.Report(
        (
            testing.Row("a", "out", 1e-7, 1e-6, "ok"),
            testing.Row("a", "lse", 5e-7, 1e-6, "ok"),
            testing.Row("b", "out", 3.0, 0.25, "wrong"),
            testing.Row("b", "d query", np.inf, 0.25, "wrong"),
            testing.Row("b", "d key", 0.0, 0.25, "ok"),
            testing.Row("c", "all", np.nan, np.nan, "refused: no"),
        )
    )
    assert not report.ok
    assert [r.what for r in report.failures] == ["out", "d query"]
    assert str(report).splitlines() == [
        "case  what     error  allowed  verdict",
        "a     lse      5e-07  1e-06    ok",
        "b     out      3      0.25     wrong",
        "b     d query  inf    0.25     wrong",
        "c     all                      refused: no",
        "3 cases: 1 right, 1 refused, 1 failed",
    ]


# Peers.


PEERS = {"jax.nn": testing.jax_nn, "linen": testing.flax_linen, "nnx": testing.flax_nnx}
each_peer = pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS.keys())


def verdicts(peer, name, **changes):
    (case,) = testing.cases(name=name)
    trial = prepared(dataclasses.replace(case, **changes))
    with jax.numpy_dtype_promotion("standard"):
        report = testing.check(peer, cases=[trial])
    return {row.what: row.verdict for row in report.rows}


@each_peer
@pytest.mark.parametrize("name", ["plain", slow("causal end"), slow("bias"), slow("bfloat16")])
def test_peers_are_right_on_plain_cases(peer, name):
    found = verdicts(peer, f"{name}, narrow")
    assert set(found.values()) == {"ok"}, found


@each_peer
def test_peers_take_the_mean_of_empty_rows(peer):
    found = verdicts(peer, "empty rows by mask, narrow")
    assert found["out"] == "wrong"
    assert found["d value"] == "wrong"


@each_peer
@pytest.mark.parametrize("name", ["planted", slow("empty rows by -inf bias")])
def test_peers_give_nan_for_empty_rows_and_planted_padding(peer, name):
    found = verdicts(peer, f"{name}, narrow")
    assert found["out"] == "wrong"
    assert found["d query"] == "wrong"


@pytest.mark.slow
def test_peers_in_float64():
    found = {name: verdicts(peer, "float64, narrow")["out"] for name, peer in PEERS.items()}
    assert found == {"jax.nn": "wrong", "linen": "ok", "nnx": "wrong"}


@pytest.mark.slow
def test_the_lse_of_jax_nn_has_no_gradient_and_is_rounded():
    found = verdicts(testing.jax_nn, "plain, narrow", lse=True)
    assert {what for what, verdict in found.items() if verdict != "ok"} == {"d query", "d key"}
    found = verdicts(testing.jax_nn, "bfloat16, narrow", lse=True)
    assert found["lse"] == "wrong: dtype bfloat16, expected float32"


@each_peer
@pytest.mark.parametrize("option", [{"sinks": True}, {"dropout_rate": 0.3}, {"score": "softcap"}])
def test_peers_refuse_options_they_lack(peer, option):
    found = verdicts(peer, "plain, narrow", **option)
    assert list(found) == ["all"]
    assert found["all"].startswith("refused: ")


# The catalogue.


def test_every_two_values_of_two_options_meet():
    rows = pairwise(OPTIONS, possible)
    met = {pair for row in rows for pair in itertools.combinations(row.items(), 2)}
    for (a, xs), (b, ys) in itertools.combinations(OPTIONS.items(), 2):
        for x, y in itertools.product(xs, ys):
            assert ((a, x), (b, y)) in met or not possible({a: x, b: y}), (a, x, b, y)
    assert all(possible(row) for row in rows)
    assert len(rows) == len(MASKS) * len(SCORES)  # it cannot be done with fewer


def test_a_bias_broadcasts_in_every_pattern():
    patterns = {case.bias for case in testing.cases() if case.score in ("bias", "bias, softcap")}
    assert len(patterns) >= 14
    patterns |= {case.bias for case in testing.cases(score="-inf bias")}
    every = {" ".join(itertools.compress("BNTS", x)) for x in itertools.product((0, 1), repeat=4)}
    assert patterns >= every


def test_names_are_unique_and_cases_print():
    cases = testing.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert str(cases[0]) == (
        "no keys: float32 B=(2,) T=23 S=0 K=2 G=3 H=11 D=7 score='bias, softcap'"
    )
    with pytest.raises(TypeError, match=r"cases can be chosen by name, sizes, .*, got color"):
        testing.cases(color=1)


def test_numbers_are_the_same_each_time():
    (case,) = testing.cases(name="everything")
    first, second = (problems.problem(case) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first.planted), jax.tree.leaves(second.planted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_planted_is_used():
    for case in testing.cases(planted=True):
        p = problems.problem(case)
        for clean, planted in zip(p.clean[:3], p.planted[:3], strict=True):
            finite = np.isfinite(planted.astype(np.float32))
            np.testing.assert_array_equal(clean[finite], planted[finite])
        visible = problems.oracle(p, gradients=False)["out"]
        assert np.all(np.isfinite(visible))


# The rules and formulas in NumPy against the library's.

ONE_OF_EACH = Sizes(B=(2, 3), T=35, S=35, K=2, G=3, H=11, D=7)
each_mask = pytest.mark.parametrize("kind", rules.MASKS)
each_score = pytest.mark.parametrize("kind", rules.SCORES)


@each_mask
def test_masks_and_their_rules_agree(kind):
    case = testing.Case(kind, ONE_OF_EACH, mask=kind)
    mask, rule = rules.MASKS[kind](case, np.random.default_rng(0))
    if mask is not None:
        dense = mask.to_dense(35, 35, B=6, N=6).reshape(2, 3, 6, 35, 35)
        np.testing.assert_array_equal(dense, np.broadcast_to(rule, dense.shape))
        assert kind == "nothing" or 0 < rule.mean() < 1


@each_score
def test_scores_and_their_formulas_agree(kind):
    case = testing.Case(kind, ONE_OF_EACH, score=kind)
    p = problems.problem(case)
    q, k = jnp.arange(35)[:, None], jnp.arange(35)[None, :]
    for term in p.terms:
        leaves = jax.tree.leaves(term.build(**term.arrays))
        floating = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        assert len(floating) == len(term.arrays)
        score = term.build(**term.arrays).resolve(35, 35, 6)
        added = 0.5 * 2.5 if term.add is None else term.add(np, **term.arrays)
        added = np.broadcast_to(added, (2, 3, 6, 35, 35)).reshape(6, 6, 35, 35)
        for b, n in itertools.product((0, 4), (0, 5)):
            s = jnp.full((35, 35), 0.5, jnp.float32)
            found = score.score(s, b, n, q, k)
            expected = 0.5 + added[b, n] if term.add else 2.5 * np.tanh(0.5 / 2.5)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_dropout_hash_and_its_copy_agree():
    words = np.array([123456789, 4000000000], np.uint32)
    ours = dropout.seed(jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32"))
    (case,) = testing.cases(name="plain")
    sizes = dataclasses.replace(case.sizes, B=(2, 3), T=7, S=11)
    case = dataclasses.replace(case, sizes=sizes, dropout_rate=0.3)
    copy = problems._keep(words, case)
    indices = np.indices((6, sizes.N, 7, 11))
    keep = dropout.keep(ours, *indices, threshold=dropout.threshold(0.3))
    np.testing.assert_array_equal(keep.reshape(2, 3, sizes.N, 7, 11), copy)


@each_score
def test_gradients_of_score_arrays_are_exact(kind):
    # The plain formula is differentiated by JAX: in float64 it differs from the oracle by rounding,
    # or else the gradient written beside the formula is wrong, and with it the tolerance.
    sizes = Sizes(B=(2, 3), T=7, S=13, K=2, G=3, H=5, D=3)
    case = testing.Case(kind, sizes, score=kind, dtype="float64", mask="causal", sinks=True)
    t = testing.trial(case)
    for name, x in t.right.items():
        largest = np.max(np.abs(x), initial=0.0, where=np.isfinite(x))
        assert t.allowed[name] < 1e-12 * max(1.0, largest), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", OPTIONS["dtype"])
def test_tolerances_are_tight(dtype):
    # Outputs and gradients of zero are wrong in every row.
    def nothing(query, key, value, *, sinks, return_lse, **options):
        out = jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)
        lse = jnp.zeros(query.shape[:-1], jnp.float64 if dtype == "float64" else jnp.float32)
        return (out, lse) if return_lse else out

    changes = {"dtype": dtype, "sizes": ONE_OF_EACH}
    found = failing(nothing, "everything", **changes)
    (case,) = testing.cases(name="everything")
    assert found == set(prepared(dataclasses.replace(case, **changes)).right)
    assert len(found) == 8
