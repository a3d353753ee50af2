"""XLA options for short-lived programs: fast to compile, slow to run.

Tests spend most of their time compiling. Results of different shapes may differ in their last bits;
where that matters, a test compiles with ``default_options()``. ``python tests/compiling.py`` prints
the flags.
"""

import importlib.metadata
import os

# The fast value and XLA's default.
OPTIONS = {
    "xla_backend_optimization_level": (0, 3),
    "xla_llvm_disable_expensive_passes": (True, False),
    # Modules in parallel pay for large programs only, and the workers keep the cores busy.
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}
# XLA aborts on a flag it does not know: by version, not by trying.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    OPTIONS["xla_cpu_use_fusion_emitters"] = (False, True)


def flags():
    """For ``XLA_FLAGS``, without those already set there."""
    given = os.environ.get("XLA_FLAGS", "")
    return [f"--{x}={str(fast).lower()}" for x, (fast, _) in OPTIONS.items() if x not in given]


def flags_of_one_device():
    """``XLA_FLAGS`` of the tests, for a program of one device."""
    return " ".join(x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x)


def default_options():
    """``compiler_options`` of a program that is compiled with XLA's default options."""
    return {x: default for x, (_, default) in OPTIONS.items()}


if __name__ == "__main__":
    print(*flags())
