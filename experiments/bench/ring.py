"""Ring attention over 8 forced host devices against one device: time, memory, collectives.

    python -m experiments.bench.ring [--length 32768] [--implementation blockwise]

The devices share this machine's cores, so that the ring's wall time is that of its total work.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attention_jax import attention, masks, parallel
from experiments.programs import counts

DEVICES = 8
WIDTH = 64
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured: causal attention over one sequence, in float32."""

    length: int = 32768
    heads: int = 2
    kv_heads: int = 2
    implementation: str = "native"
    repeats: int = 1
    """Timed runs; 0 compiles only."""


class Row(NamedTuple):
    """A compiled program."""

    kind: str
    """``forward`` or ``gradient``."""
    name: str
    seconds: float | None
    """Median; None if it did not run."""
    memory: float
    """MiB per device: arguments, results and temporary."""
    temporary: float
    """MiB per device."""
    buffers: float | None
    """MiB of the ring's arrays, see ``buffers``; None on one device."""
    sent: dict[str, int]
    """Collectives, by kind."""


def buffers(options: Options, kind: str) -> float:
    """MiB that a device needs besides arguments and results.

    Keys and values are held while the next ones arrive. In addition there is the output of a chunk;
    or, for a gradient, the output of all, its cotangent, and the gradients from a chunk. The sums
    over chunks are in the memory of the results.
    """
    of_head = options.length // DEVICES * WIDTH * 4 / MIB
    query, key = options.heads * of_head, options.kv_heads * of_head
    return 4 * key + (query if kind == "forward" else 3 * query + 2 * key)


def measure(kind: str, name: str, fn: Callable[..., Any], arrays: Any, options: Options) -> Row:
    """Compiles and times a call of arrays, or of their shapes if there are no repeats."""
    compiled = jax.jit(fn).lower(*arrays).compile()
    seconds = []
    for i in range(options.repeats + 1 if options.repeats else 0):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        seconds += [time.perf_counter() - start] if i else []
    analysis: Any = compiled.memory_analysis()
    temporary = analysis.temp_size_in_bytes / MIB
    memory = temporary + (analysis.argument_size_in_bytes + analysis.output_size_in_bytes) / MIB
    needed = None if name == "one device" else buffers(options, kind)
    took = statistics.median(seconds) if seconds else None
    return Row(kind, name, took, memory, temporary, needed, dict(counts(compiled.as_text() or "")))


def rows(options: Options) -> list[Row]:
    """The forward pass and the gradient: on one device, in a ring, and in zigzag order."""
    mesh = jax.make_mesh((DEVICES,), ("seq",), axis_types=(AxisType.Auto,))
    split, placed = PartitionSpec(None, "seq"), PartitionSpec("seq")
    T = options.length
    both: Any = {"mask": masks.causal(), "implementation": options.implementation}
    order = parallel.zigzag(T, DEVICES)

    def ring(query: Any, key: Any, value: Any, positions: Any) -> Any:
        call = functools.partial(parallel.attention, axis_name="seq", strategy="ring", **both)
        return call(query, key, value, query_positions=positions, key_positions=positions)

    zigzag = jax.shard_map(ring, mesh=mesh, in_specs=(split,) * 3 + (placed,), out_specs=split)

    def in_order(query: Any, key: Any, value: Any) -> Any:
        call = functools.partial(ring, positions=None)
        return jax.shard_map(call, mesh=mesh, in_specs=split, out_specs=split)(query, key, value)

    def gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda *xs: (fn(*xs) ** 2).sum(), argnums=(0, 1, 2))

    def shard(x: Any, spec: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    heads = (options.heads, options.kv_heads, options.kv_heads)
    arrays: list[Any] = [jax.ShapeDtypeStruct((1, T, n, WIDTH), jnp.float32) for n in heads]
    mixed = arrays
    positions: Any = jax.ShapeDtypeStruct((T,), jnp.int32)
    if options.repeats:
        arrays = [
            jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(arrays)
        ]
        mixed, positions = [x[:, order.permutation] for x in arrays], order.permutation
    shards = [shard(x, split) for x in arrays]
    mixed = [*(shard(x, split) for x in mixed), shard(positions, placed)]
    contenders: list[tuple[str, Callable[..., Any], Any]] = [
        ("one device", functools.partial(attention, **both), arrays),
        ("ring", in_order, shards),
        ("ring, zigzag", zigzag, mixed),
    ]
    return [
        measure(kind, name, of(fn), given, options)
        for kind, of in (("forward", lambda fn: fn), ("gradient", gradient))
        for name, fn, given in contenders
    ]


def table(options: Options, found: list[Row]) -> list[str]:
    """The lines of a Markdown table; in parentheses, relative to one device."""
    lines = [
        f"{options.heads} query heads, {options.kv_heads} key-value heads, T = {options.length:,}, "
        f"`{options.implementation}`:",
        "",
        "| pass | program | time | memory | temporary | buffers | collectives |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    one = {row.kind: row for row in found if row.name == "one device"}

    for row in found:
        whole = one[row.kind]

        def relative(x: float, y: float, text: str, alone: bool = row is whole) -> str:
            return text if alone or not y else f"{text} ({x / y:.2f})"

        time_ = "" if row.seconds is None else f"{row.seconds:.2f} s"
        if row.seconds is not None and whole.seconds is not None:
            time_ = relative(row.seconds, whole.seconds, time_)
        sizes = [
            relative(x, y, f"{x:,.1f} MiB")
            for x, y in ((row.memory, whole.memory), (row.temporary, whole.temporary))
        ]
        sizes.append("" if row.buffers is None else f"{row.buffers:,.1f} MiB")
        sent = ", ".join(f"{n} {kind}" for kind, n in row.sent.items()) or "none"
        lines.append(f"| {' | '.join([row.kind, row.name, time_, *sizes, sent])} |")
    return lines


def force_devices() -> None:
    """Makes JAX start with ``DEVICES`` host devices; it must not have started."""
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    )


def main() -> None:
    """Measures one shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for field in dataclasses.fields(Options):
        name = field.name.replace("_", "-")
        parser.add_argument(f"--{name}", type=type(field.default), default=field.default)
    options = Options(**vars(parser.parse_args()))
    force_devices()
    print("\n".join(table(options, rows(options))))


if __name__ == "__main__":
    main()
