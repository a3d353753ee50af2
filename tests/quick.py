"""XLA's options for programs that run for an instant: they compile fast and run slowly.

Most of a test's time is the compiler's. Results of different shapes may differ in their last bits;
where that matters, a test's program is compiled ``as_users()``. ``python tests/quick.py`` prints
the options.
"""

import os
import subprocess
import sys

# With what XLA has by itself, which users run.
OPTIONS = {"xla_backend_optimization_level": (0, 3), "xla_cpu_use_fusion_emitters": (False, True)}


def flags():
    """For ``XLA_FLAGS``; without those there, and without those that this XLA would stop at."""
    given = os.environ.get("XLA_FLAGS", "")
    wanted = [f"--{x}={str(quick).lower()}" for x, (quick, _) in OPTIONS.items() if x not in given]
    if not wanted or _starts(wanted):
        return wanted
    return [flag for flag in wanted if _starts([flag])]


def _starts(some):
    return not subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": " ".join(some)},
        capture_output=True,
    ).returncode


def as_users():
    """``compiler_options`` of a program that is compiled as users' programs are."""
    return {x: usual for x, (_, usual) in OPTIONS.items() if x in os.environ["XLA_FLAGS"]}


if __name__ == "__main__":
    print(*flags())
