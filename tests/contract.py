"""The suite that every implementation must pass: the checker's catalogue, and who is checked.

``IMPLEMENTATIONS`` are functions with the signature of ``attention``; a new backend adds itself
there, and its share of the catalogue to ``CHECKS``. The blockwise backend runs in small blocks
besides its own, or every small case would be one tile.
"""

import functools

import pytest
from quick import as_users

import attention_jax
from attention_jax import testing
from attention_jax.backends import Blockwise, PallasGPU, Splash
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
    "auto": implementation(None),
}

PROMISES = [case for case in testing.cases() if not case.name[:3].isdigit()]
PAIRS = testing.cases()[len(PROMISES) :]
LOOPED = [case for i, case in enumerate(PAIRS) if i % 3]
TINY = [case for case in LOOPED if case.sizes.T * case.sizes.S < 2000][::3]

# Every implementation keeps every promise. The pairs are shared out, as masks, scores and dropout
# are common to all: all of them for one implementation is `testing.check(fn)`.
CHECKS = {
    "xla": [*PROMISES, *PAIRS[::3]],
    "blockwise": PROMISES[2::4],
    "blockwise 16x32": [*PROMISES, *(case for case in LOOPED if case not in TINY)],
    "blockwise 7x5": TINY,
    # Compiled as users' programs are; all other tests' are compiled fast.
    "auto": PROMISES[3::8],
}


def mostly_slow(cases, quick):
    """The cases as parameters of a test; a default run has time for those named in ``quick``."""
    return [
        pytest.param(c, id=c.name, marks=[] if c.name in quick else [pytest.mark.slow])
        for c in cases
    ]


@functools.lru_cache(maxsize=8)
def prepared(case):
    return testing.trial(case)


def assert_right(name, case):
    report = testing.check(
        IMPLEMENTATIONS[name],
        cases=[prepared(case)],
        compiler_options=as_users() if name == "auto" else None,
    )
    wrong = [row for row in report.rows if row.verdict != "ok"]  # a refusal is wrong here
    assert not wrong, f"{name}: {case}\n{report}"
