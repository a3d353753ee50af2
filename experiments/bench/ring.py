"""Ring attention over 8 forced host devices against one device: time, memory, collectives.

    python -m experiments.bench.ring [--length 32768] [--implementation blockwise]

The devices share this machine's cores, so that the ring's wall time is that of its total work.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

DEVICES = 8
COLLECTIVES = r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("


def measure(name: str, fn: Callable[..., Any], arrays: Any, repeats: int) -> tuple[float, ...]:
    """Prints and returns the median seconds of a compiled call, and MiB per device.

    First all of them, with arguments and results, then the temporary ones.
    """
    import jax

    compiled = jax.jit(fn).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        seconds.append(time.perf_counter() - start)
    analysis: Any = compiled.memory_analysis()
    temporary = analysis.temp_size_in_bytes / 2**20
    memory = temporary + (analysis.argument_size_in_bytes + analysis.output_size_in_bytes) / 2**20
    sent = dict(collections.Counter(re.findall(COLLECTIVES, compiled.as_text() or "")))
    took = statistics.median(seconds)
    print(f"{name:24} {took:7.2f} s  {memory:7.1f} MiB, {temporary:7.1f} temporary  {sent}")
    return took, memory, temporary


def main() -> None:
    """Measures the forward pass and the gradient, in the order of the sequence and in zigzag."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--implementation", default="native")
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"

    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from attention_jax import attention, masks, parallel

    mesh = jax.make_mesh((DEVICES,), ("seq",), axis_types=(AxisType.Auto,))
    split = PartitionSpec(None, "seq")
    T, N = options.length, options.heads
    arrays = [jax.random.normal(jax.random.key(i), (1, T, N, 64)) for i in range(3)]
    options_of_both = {"mask": masks.causal(), "implementation": options.implementation}
    one = functools.partial(attention, **options_of_both)
    order = parallel.zigzag(T, DEVICES)

    def ring(query: Any, key: Any, value: Any, positions: Any) -> Any:
        call = functools.partial(
            parallel.attention, axis_name="seq", strategy="ring", **options_of_both
        )
        return call(query, key, value, query_positions=positions, key_positions=positions)

    placed = PartitionSpec("seq")
    zigzag = jax.shard_map(ring, mesh=mesh, in_specs=(split,) * 3 + (placed,), out_specs=split)

    def in_order(query: Any, key: Any, value: Any) -> Any:
        call = functools.partial(ring, positions=None)
        return jax.shard_map(call, mesh=mesh, in_specs=split, out_specs=split)(query, key, value)

    def gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda *xs: (fn(*xs) ** 2).sum(), argnums=(0, 1, 2))

    def shard(x: Any, spec: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, spec))

    shards = [shard(x, split) for x in arrays]
    mixed = [shard(x[:, order.permutation], split) for x in arrays]
    mixed.append(shard(order.permutation, placed))
    print(f"{options.implementation}, T = {T}, N = {N}")
    for name, of in (("forward", lambda fn: fn), ("gradient", gradient)):
        whole = measure(f"{name}, one device", of(one), arrays, options.repeats)
        for label, fn, given in (("ring", in_order, shards), ("ring, zigzag", zigzag, mixed)):
            found = measure(f"{name}, {label}", of(fn), given, options.repeats)
            time_, memory, temporary = (a / b for a, b in zip(found, whole, strict=True))
            print(
                f"{'':24} of one device: {time_:.2f} of the time, {memory:.2f} of the memory, "
                f"{temporary:.2f} of the temporary memory"
            )


if __name__ == "__main__":
    main()
