"""How tests are compiled: most of their time is the compiler's, and XLA has a faster way.

XLA's newer way to make machine code of fused operations ("fusion emitters") takes a third of the
time of many tests; the older one gives programs as good. ``python tests/quick.py`` prints the flag.
"""

import os
import subprocess
import sys

OPTION = "xla_cpu_use_fusion_emitters"
FLAG = f"--{OPTION}=false"


def flags():
    """For ``XLA_FLAGS``: none where it is there, or where this XLA would stop at it."""
    if OPTION in os.environ.get("XLA_FLAGS", ""):
        return []
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    tried = subprocess.run(start, env=os.environ | {"XLA_FLAGS": FLAG}, capture_output=True)
    return [] if tried.returncode else [FLAG]


def as_users():
    """``compiler_options`` of a program that is compiled as users' programs are."""
    return {OPTION: True} if FLAG in os.environ["XLA_FLAGS"] else {}


if __name__ == "__main__":
    print(*flags())
