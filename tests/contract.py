"""The suite that every implementation must pass: the checker's catalogue, and the implementations.

``IMPLEMENTATIONS`` are functions with the signature of ``attention``; add a new backend
there, and the cases it must pass to ``CHECKS``. The blockwise and native backends also run with
small blocks: with their own, a small case is a single tile.
"""

import functools

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
    "auto": implementation(None),
}

PROMISES = testing.cases(tag="promise")
PAIRS = testing.cases(tag="pair")


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


# Every implementation is checked on every promise. Each pair of options is checked on at least one
# of them, since masks, scores and dropout are shared; ``testing.check(fn)`` checks them all.
CHECKS = {
    "xla": PROMISES + testing.cases(tag="small"),
    "blockwise": testing.cases(tag="numerics") + testing.cases(tag="padded"),
    "blockwise 16x32": PROMISES + testing.cases(tag="long"),
    "blockwise 7x5": [case for case in testing.cases(tag="small") if "core" in case.tags],
    "native": by_native(PROMISES + testing.cases(tag="small")),
    "native 96": by_native(
        testing.cases(tag="long") + tuple(case for case in PROMISES if "core" in case.tags)
    ),
    # Compiled with XLA's default options; all other tests are compiled fast.
    "auto": testing.cases(tag="numerics"),
}


# Without a compiler the package installs without the native kernel.
needs_native = pytest.mark.skipif(library.load().why_not is not None, reason="no native kernel")


def by_default(name, case):
    """Whether a default run checks this case; the rest is slow.

    The blockwise backend in blocks of 16 x 32 runs all its core cases. ``xla``, the plain formula,
    runs those that are pairs, empty rows or smoke tests. The others share code with these two.
    """
    if name in ("blockwise", "blockwise 7x5", "native 96", "auto"):
        return "smoke" in case.tags and case.name != "everything"
    if name == "xla" and not case.tags & {"pair", "empty", "smoke"}:
        return False
    return "core" in case.tags


def parameters(name, cases, tag=None):
    """``(name, case)`` as parameters of a test; ``tag`` selects those of a default run."""
    needs = [needs_native] if name.startswith("native") else []
    return [
        pytest.param(
            name,
            c,
            id=f"{c.name}-{name}",
            marks=needs if quick else [*needs, pytest.mark.slow],
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
