"""The suite that every implementation must pass: the checker's catalogue, and the implementations.

``IMPLEMENTATIONS`` are functions with the signature of ``attention``; add a new backend
there, and the cases it must pass to ``CHECKS``. The blockwise and native backends also run with
small blocks: with their own, a small case is a single tile.

The tests run a share of the catalogue. To check one function on all of it, call
``testing.check(fn)``; ``python -m experiments compare`` does so for every backend and other
libraries.
"""

import functools
import itertools

import pytest
from compiling import default_options

import attention_jax
from attention_jax import testing
from attention_jax.backends import Blockwise, Native, PallasGPU, Splash
from attention_jax.backends.native import library
from attention_jax.backends.pallas_gpu.launch import Tiles


def implementation(value):
    return functools.partial(attention_jax.attention, implementation=value)


# Small tiles, so that short sequences have several; in Pallas's interpreter.
TILES = Tiles(32, 16, 4, 2), Tiles(16, 32, 4, 2)

IMPLEMENTATIONS = {
    "splash interpreted": implementation(Splash(interpret=True)),
    "pallas_gpu interpreted": implementation(PallasGPU(*TILES, interpret=True)),
    "xla": implementation("xla"),
    "blockwise": implementation("blockwise"),
    # A loop over heads compiles in less than half of the time of heads that are batched together.
    "blockwise 16x32": implementation(Blockwise(16, 32, batch_pairs=1)),
    "blockwise 7x5": implementation(Blockwise(7, 5)),
    "native": implementation("native"),
    "native 96": implementation(Native(block_k=96, few_queries=0)),
    # On a processor that has better ones, which "native" takes.
    "native avx512": implementation(Native(instructions="avx512")),
    "native avx2": implementation(Native(instructions="avx2")),
    "auto": implementation(None),
}

# Without the narrow ones, which repeat others for functions that support little else.
PROMISES = tuple(x for x in testing.cases(tag="promise") if "narrow" not in x.tags)
PAIRS = testing.cases(tag="pair")


def values(case):
    """The value of every option of a case."""
    z = case.sizes
    lengths = "T == 1" if z.T == 1 else f"T - S > 0: {z.T > z.S}, < 0: {z.T < z.S}"
    sizes = {"lengths": lengths, "heads": (z.K, z.G), "batch": z.B, "widths": (z.H, z.D)}
    options = ("mask", "score", "dtype", "scale", "sinks", "dropout_rate", "magnitude", "lse")
    named = sizes | {name: getattr(case, name) for name in options}
    return set(named.items()) | {("long", "long" in case.tags)}


def pairs_of_values(case):
    """Every two values, except mask and score, which are applied in turn; the axes of a bias."""
    every = itertools.combinations(sorted(values(case), key=str), 2)
    pairs = {pair for pair in every if {name for name, _ in pair} != {"mask", "score"}}
    return pairs | ({("bias", case.bias)} if "bias" in case.score.split(", ") else set())


def covering(cases, has, first=()):
    """Few of these cases, found greedily, that with ``first`` have what all of them have."""
    found = {case: has(case) for case in cases}
    missing = set().union(*found.values()).difference(*map(has, first))
    chosen = set()
    while missing:
        best = max(cases, key=lambda case: len(found[case] & missing))
        missing -= found[best]
        chosen.add(best)
    return tuple(case for case in cases if case in chosen)


def by_native(cases):
    """Those that the native kernel supports; test_native.py has what it refuses."""
    refused = ("score_fn", "relative_embedding")
    return [
        case
        for case in cases
        if case.dtype != "float64"
        and not any(score in case.score for score in refused)
        and case.mask != "nothing"  # which comes with relative_embedding
        and not (case.positions and case.dropout_rate)
    ]


# Every implementation is checked on every promise. Every two values of two options are checked on
# blockwise (long sequences), the native kernel, which compiles in a fifth of the time and has all
# pairs that it supports, or xla (what is left), since masks, scores and dropout are shared.
CORE = [case for case in PROMISES if "core" in case.tags]
QUICK = [case for case in CORE if case.name != "everything"]  # which takes five times as long
QUICK_PAIRS = covering(PAIRS, values, QUICK)
NATIVE = by_native(PAIRS)
LONG = [x for x in covering(PAIRS, pairs_of_values, QUICK_PAIRS) + QUICK_PAIRS if "long" in x.tags]
SMALL = [x for x in PAIRS if "small" in x.tags and x not in QUICK_PAIRS]
REST = covering(SMALL, pairs_of_values, [*LONG, *NATIVE])
SHORT = {*REST, *covering(SMALL, values, REST), *QUICK_PAIRS}.difference(LONG)
CHECKS = {
    "xla": [*PROMISES, *SHORT],
    "blockwise": [x for x in CORE if x.tags & {"numerics", "padded"}],
    "blockwise 16x32": [*PROMISES, *LONG],
    # Heads are batched together, which compiles slowly: every value but those of masks.
    "blockwise 7x5": covering(SMALL, lambda case: {x for x in values(case) if x[0] != "mask"}),
    "native": [*by_native(PROMISES), *(x for x in NATIVE if "small" in x.tags)],
    "native 96": [*by_native(CORE), *(x for x in NATIVE if "long" in x.tags)],
    "native avx512": [x for x in by_native(PROMISES) if x.dtype == "bfloat16"],
    "native avx2": by_native(PROMISES),
    # Compiled with XLA's default options; all other tests are compiled fast.
    "auto": testing.cases(tag="numerics"),
}


# Without a compiler the package installs without the native kernel.
needs_native = pytest.mark.skipif(library.load().why_not is not None, reason="no native kernel")


def needs(name):
    """Marks of the tests of an implementation."""
    if not name.startswith("native"):
        return []
    others = library.load().instructions[1:]
    missing = [x for x in library.INSTRUCTIONS if x in name.split() and x not in others]
    reason = f"no better instructions than {missing}"
    return [needs_native, pytest.mark.skipif(bool(missing), reason=reason)]


def by_default(name, case):
    """Whether a default run checks this case; the rest is slow.

    Each implementation on the smoke tests; the core promises in blocks of 16 x 32 and on the native
    kernel; and each value of each option once.
    """
    if case in QUICK:
        return "smoke" in case.tags or name in ("blockwise 16x32", "native")
    return case in QUICK_PAIRS and name in ("xla", "blockwise 16x32", "native")


def parameters(name, cases, tag=None):
    """``(name, case)`` as parameters of a test; ``tag`` selects those of a default run."""
    return [
        pytest.param(
            name,
            c,
            id=f"{c.name}-{name}",
            marks=needs(name) if quick else [*needs(name), pytest.mark.slow],
        )
        for c in cases
        for quick in [tag in c.tags if tag else by_default(name, c)]
    ]


@functools.lru_cache(maxsize=64)
def prepared(case):
    """The oracle's results and the tolerances, shared by all implementations checked on a case."""
    return testing.trial(case)


def assert_right(name, case):
    report = testing.check(
        IMPLEMENTATIONS[name],
        cases=[prepared(case)],
        compiler_options=default_options() if name == "auto" else None,
    )
    wrong = [row for row in report.rows if row.verdict != "ok"]  # a refusal fails as well
    assert not wrong, f"{name}: {case}\n{report}"
