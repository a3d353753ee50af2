"""The suite that every implementation must pass: the checker's catalogue, and who is checked.

``IMPLEMENTATIONS`` are functions with the signature of ``attention``; a new backend adds itself
there, and its share of the catalogue to ``CHECKS``. The blockwise and native backends run in small
blocks besides their own, or every small case would be one tile.
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
    "blockwise 16x32": implementation(Blockwise(16, 32)),
    "blockwise 7x5": implementation(Blockwise(7, 5)),
    "native": implementation("native"),
    "native 96": implementation(Native(block_k=96, few_queries=0)),
    "auto": implementation(None),
}

PROMISES = testing.cases(tag="promise")
PAIRS = testing.cases(tag="pair")


def by_native(cases):
    """Those that the native kernel takes: it refuses what test_native.py says."""
    refused = ("score_fn", "relative_embedding")
    return [
        case
        for case in cases
        if case.dtype != "float64"
        and not any(score in case.score for score in refused)
        and case.mask != "nothing"  # which comes with relative_embedding
    ]


# Every implementation keeps every promise. Every pair goes to at least one of them, as masks,
# scores and dropout are common to all: all pairs for one implementation is ``testing.check(fn)``.
CHECKS = {
    "xla": PROMISES + testing.cases(tag="small"),
    "blockwise": testing.cases(tag="numerics") + testing.cases(tag="padded"),
    "blockwise 16x32": PROMISES + testing.cases(tag="long"),
    "blockwise 7x5": [case for case in testing.cases(tag="small") if "core" in case.tags],
    "native": by_native(PROMISES + testing.cases(tag="small")),
    "native 96": by_native(testing.cases(tag="long") + PROMISES),
    # Compiled with XLA's default options; all other tests are compiled fast.
    "auto": testing.cases(tag="numerics"),
}


# What a default run checks of each; the rest is slow.
DEFAULT_TAGS = {
    "blockwise": "smoke",
    "blockwise 7x5": "smoke",
    "native 96": "smoke",
    "auto": "smoke",
}

# Without a compiler the package installs without the native kernel.
needs_native = pytest.mark.skipif(library.load().why_not is not None, reason="no native kernel")


def parameters(name, cases, tag=None):
    """``(name, case)`` as parameters of a test; without the tag they are slow tests."""
    tag = tag or DEFAULT_TAGS.get(name, "core")
    needs = [needs_native] if name.startswith("native") else []
    return [
        pytest.param(
            name,
            c,
            id=f"{c.name}-{name}",
            marks=needs + ([] if tag in c.tags else [pytest.mark.slow]),
        )
        for c in cases
    ]


@functools.lru_cache(maxsize=64)
def prepared(case):
    """The oracle's answer and the tolerances, shared by all that are checked on one case."""
    return testing.trial(case)


def assert_right(name, case):
    report = testing.check(
        IMPLEMENTATIONS[name],
        cases=[prepared(case)],
        compiler_options=default_options() if name == "auto" else None,
    )
    wrong = [row for row in report.rows if row.verdict != "ok"]  # a refusal is wrong here
    assert not wrong, f"{name}: {case}\n{report}"
