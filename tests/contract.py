"""The suite that every implementation must pass: the checker's catalogue, and the implementations.

``IMPLEMENTATIONS`` are functions with the signature of ``attention``; add a new backend
there, and the cases it must pass to ``CHECKS``. The blockwise backend also runs with small blocks:
with its own, a small case is a single tile.
"""

import functools

import pytest
from compiling import default_options

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

PROMISES = testing.cases(tag="promise")
PAIRS = testing.cases(tag="pair")

# Every implementation is checked on every promise. Each pair of options is checked on at least one
# of them, since masks, scores and dropout are shared; ``testing.check(fn)`` checks them all.
CHECKS = {
    "xla": PROMISES + testing.cases(tag="small"),
    "blockwise": testing.cases(tag="numerics") + testing.cases(tag="padded"),
    "blockwise 16x32": PROMISES + testing.cases(tag="long"),
    "blockwise 7x5": [case for case in testing.cases(tag="small") if "core" in case.tags],
    # Compiled with XLA's default options; all other tests are compiled fast.
    "auto": testing.cases(tag="numerics"),
}


def by_default(name, case):
    """Whether a default run checks this case; the rest is slow.

    The blockwise backend in small blocks runs all core cases. ``xla``, the plain formula, runs the
    core cases that are pairs, empty rows or smoke tests. The others share code with these two.
    """
    if name in ("blockwise", "blockwise 7x5", "auto"):
        return "smoke" in case.tags and case.name != "everything"
    if name == "xla" and not case.tags & {"pair", "empty", "smoke"}:
        return False
    return "core" in case.tags


def parameters(name, cases, tag=None):
    """``(name, case)`` as parameters of a test; ``tag`` selects those of a default run."""
    return [
        pytest.param(name, c, id=f"{c.name}-{name}", marks=[] if quick else [pytest.mark.slow])
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
