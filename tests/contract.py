"""The suite that every implementation must pass: the checker's catalogue, and who is checked.

``IMPLEMENTATIONS`` are functions with the signature of ``attention``; a new backend adds itself
there, and its share of the catalogue to ``CHECKS``. The blockwise backend runs in small blocks
besides its own, or every small case would be one tile.
"""

import functools
import sys
from unittest import mock

import pytest
from quick import as_users

import attention_jax
from attention_jax import backends, testing
from attention_jax.backends import blockwise, pallas_gpu, splash

# The module, which the function of the same name hides.
_module = sys.modules["attention_jax.api"]


def implementation(name):
    return functools.partial(attention_jax.attention, implementation=name)


def in_blocks(block_q, block_k):
    """The blockwise backend with blocks of this size, or of the whole length if that is less."""

    def attention(query, key, value, **options):
        run = blockwise.run

        def with_block(call, sizes, **rest):
            block = min(block_q, sizes.T), min(block_k, sizes.S)
            return run(call, sizes, **{**rest, "block": block})

        # Not through the jitted function: what it has traced before, with other blocks, it keeps.
        with (
            mock.patch.object(_module, "_attention", _module._attention.__wrapped__),
            mock.patch.object(blockwise, "run", with_block),
        ):
            return attention_jax.attention(query, key, value, **options, implementation="blockwise")

    return attention


def in_table(name, entry, platform):
    """A kernel's interpreter under a name that only tests have, as on the kernel's platform."""

    def attention(query, key, value, **options):
        with (
            mock.patch.dict(backends.IMPLEMENTATIONS, {name: entry}),
            mock.patch.object(backends, "platform", return_value=platform),
        ):
            return attention_jax.attention(query, key, value, **options, implementation=name)

    return attention


# Small tiles, so that short sequences have several; in the interpreter of kernels.
_TILES = pallas_gpu.Tiles(32, 16, 4, 2), pallas_gpu.Tiles(16, 32, 4, 2)
PALLAS_GPU = backends.Implementation(
    why_unsupported=pallas_gpu.why_unsupported,
    run=lambda call, spec: pallas_gpu.run(call, spec, tiles=_TILES, interpret=True),
    extra_bytes=pallas_gpu.extra_bytes,
)
SPLASH = backends.Implementation(
    why_unsupported=splash.why_unsupported,
    run=lambda call, spec: splash.run(call, spec, interpret=True),
    extra_bytes=splash.extra_bytes,
)

IMPLEMENTATIONS = {
    "splash interpreted": in_table("splash interpreted", SPLASH, "tpu"),
    "pallas_gpu interpreted": in_table("pallas_gpu interpreted", PALLAS_GPU, "gpu"),
    "xla": implementation("xla"),
    "blockwise": implementation("blockwise"),
    "blockwise 16x32": in_blocks(16, 32),
    "blockwise 7x5": in_blocks(7, 5),
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
