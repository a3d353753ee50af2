"""Memory of one call beside its arguments and results, measured in a process of its own.

    python -m experiments.bench.memory 65536 --backward

Prints one JSON line: seconds; MiB that the compiler plans for temporaries; MiB by which the count
of resident pages grew (Linux; too low where the call reuses pages freed before it).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp

import attention_jax as aj


def status(field: str) -> float:
    """MiB, from /proc/self/status."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of one causal call of attention.")
    parser.add_argument("tokens", type=int)
    parser.add_argument("--window", type=int, help="keys that a query sees, itself included")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    options = parser.parse_args()

    mask = aj.masks.causal() if options.window is None else aj.masks.window(options.window - 1, 0)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, options.tokens, 1, 64)) for key in keys)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return aj.attention(q, k, v, mask=mask)

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(attend, q, k, v)
        return pull(jnp.ones_like(out))

    compiled = jax.jit(both if options.backward else attend).lower(q, k, v).compile()
    jax.block_until_ready((q, k, v))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
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
