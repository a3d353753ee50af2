"""Memory of one call in addition to its arguments and results, measured in its own process.

    python -m experiments.bench.memory "causal 65536" --backward

Prints one JSON line: seconds; MiB that the compiler plans for temporaries; MiB by which resident
memory grew (Linux only; too low where the call reuses pages that were freed before it).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp

import attention_jax as aj
from experiments.bench.shapes import SHAPES


def status(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of one call of attention.")
    parser.add_argument("shape", choices=SHAPES, help="a named shape")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    options = parser.parse_args()

    shape = SHAPES[options.shape]
    mask = shape.mask
    q, k, v = shape.arrays()

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return aj.attention(q, k, v, mask=mask)

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(attend, q, k, v)
        return pull(jnp.ones_like(out))

    compiled = jax.jit(both if options.backward else attend).lower(q, k, v).compile()
    jax.block_until_ready((q, k, v))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = status("VmRSS"), time.perf_counter()
    results = jax.block_until_ready(compiled(q, k, v))
    seconds = time.perf_counter() - start
    returned = sum(x.nbytes for x in jax.tree.leaves(results)) / 2**20
    analysis = compiled.memory_analysis()
    planned = 0.0 if analysis is None else analysis.temp_size_in_bytes / 2**20
    resident = status("VmHWM") - before - returned
    print(json.dumps({"seconds": seconds, "planned_mib": planned, "resident_mib": resident}))


if __name__ == "__main__":
    main()
