"""The suite that every implementation must pass: the checker's catalogue, and who is checked.

``IMPLEMENTATIONS`` are functions with the signature of ``attention``; a new backend adds itself
there, and its share of the catalogue to ``CHECKS``. The blockwise backend runs in small blocks
besides its own, or every small case would be one tile.
"""

import functools
import sys
from unittest import mock

import pytest
from compiling import default_options

import attention_jax
from attention_jax import backends, testing
from attention_jax.backends import blockwise, pallas_gpu, splash

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

PROMISES = testing.cases(tag="promise")
PAIRS = testing.cases(tag="pair")

# Every implementation keeps every promise. Every pair goes to at least one of them, as masks,
# scores and dropout are common to all: all pairs for one implementation is ``testing.check(fn)``.
CHECKS = {
    "xla": PROMISES + testing.cases(tag="small"),
    "blockwise": testing.cases(tag="numerics") + testing.cases(tag="padded"),
    "blockwise 16x32": PROMISES + testing.cases(tag="long"),
    "blockwise 7x5": [case for case in testing.cases(tag="small") if "core" in case.tags],
    # Compiled with XLA's default options; all other tests are compiled fast.
    "auto": testing.cases(tag="numerics"),
}


def parameters(name, cases, tag="core"):
    """``(name, case)`` as parameters of a test; without the tag they are slow tests."""
    return [
        pytest.param(
            name, c, id=f"{c.name}-{name}", marks=[] if tag in c.tags else [pytest.mark.slow]
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
