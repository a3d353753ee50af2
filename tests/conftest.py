"""Settings of all tests: eight devices, a fast compiler, strict dtypes.

Eight host devices are what ``shard_map`` is tested on. They must be asked for before JAX starts:
hence the order below. With CHECK_ANNOTATIONS=1, as in the gate, every call of the package also
checks its arguments and results against their annotations, which takes a seventh of the time.
"""

import os

import compiling

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        *compiling.flags(),
        "--xla_force_host_platform_device_count=8",
    ]
)

import gc
import importlib.util
import pkgutil

import hypothesis
import jax
import jaxtyping
import pytest
from _pytest import doctest

# A separate program, without doctests to collect.
collect_ignore = ["ahead_for_tpu.py"]

jax.config.update("jax_numpy_dtype_promotion", "strict")


def check_annotations():
    """Must run before the package is imported."""
    package = importlib.util.find_spec("attention_jax")
    jaxtyping.install_import_hook(
        # The reference is left out: it is plain NumPy and checks its own arguments.
        [
            f"attention_jax.{module.name}"
            for module in pkgutil.iter_modules(package.submodule_search_locations)
            if module.name != "reference"
        ],
        # An int may stand where a float is expected; beartype cannot check Self outside a class.
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, "
        "hint_overrides=beartype.FrozenDict({beartype.typing.Self: object})))",
    )


if os.environ.get("CHECK_ANNOTATIONS"):
    check_annotations()

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # the first example of a shape compiles
    derandomize=True,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items):
    """Examples in docstrings run as pasted: without the names of their module, and with JAX's
    default promotion of dtypes."""
    for item in items:
        if isinstance(item, doctest.DoctestItem):
            item.dtest.globs.clear()
            item.dtest.globs["__name__"] = "__main__"
            item.runtest = with_standard_promotion(item.runtest)


def with_standard_promotion(run):
    def runtest():
        with jax.numpy_dtype_promotion("standard"):
            run()

    return runtest


def pytest_collection_finish():
    """Freezes all imported objects, so that the garbage collector does not scan them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    """float64 and int64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """JAX's default dtype promotion, which other libraries rely on."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def small_blocks():
    """Blockwise attention in blocks of 3 x 4: short sequences have several, the last one partial.

    Heads are computed two at a time.
    """
    from attention_jax import backends  # after the import hook

    small = backends.Blockwise(3, 4, batch_pairs=2 * 3 * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.IMPLEMENTATIONS, "blockwise", small)
        jax.clear_caches()  # compiled programs have other block sizes
        yield
    jax.clear_caches()
