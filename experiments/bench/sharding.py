"""What sharded programs send between 8 forced host devices, and what sharding costs.

    python -m experiments.bench.sharding        # 5 minutes; writes experiments/results/SHARDING.md

The devices share this machine's cores: times compare programs, not numbers of devices.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attention_jax import attention, masks
from attention_jax.models import Decoder, DecoderConfig, Layers, sharding
from experiments.bench import ring
from experiments.bench.contenders import in_turns
from experiments.bench.ring import DEVICES
from experiments.bench.tables import machine
from experiments.programs import counts

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "SHARDING.md"
KINDS = {"Explicit": AxisType.Explicit, "Auto": AxisType.Auto}


def mesh_of(kind: str = "Auto", **axes: int) -> Mesh:
    """A mesh with these axes."""
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(KINDS[kind],) * len(axes))


def in_words(found: dict[str, int]) -> str:
    """Numbers of collectives.

    >>> in_words({"all-gather": 2})
    '2 all-gather'
    """
    return ", ".join(f"{n} {kind}" for kind, n in sorted(found.items())) or "0"


# --- Attention.

SHAPE = (8, 1024, 8, 64)
SPLITS = {"batch": ("x",), "heads": (None, None, "x"), "sequence": (None, "x")}


def jax_nn(query: Any, key: Any, value: Any) -> jax.Array:
    """``jax.nn``'s causal attention."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="xla")


def ours(implementation: str) -> Callable[..., jax.Array]:
    """Our causal attention."""
    return functools.partial(attention, mask=masks.causal(), implementation=implementation)


CONTENDERS = {name: ours(name) for name in ("native", "blockwise", "xla")} | {"jax.nn": jax_nn}


def collectives_of(fn: Callable[..., Any], *arrays: Any, may_raise: bool = False) -> str:
    """Numbers of collectives in a compiled program; if it may, the error that it raises."""
    try:
        program = jax.jit(fn).lower(*arrays).compile().as_text()
    except Exception as problem:
        if not may_raise:
            raise
        return f"raises {type(problem).__name__}"
    return in_words(counts(program or ""))


def gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of the sum of squares by query, key and value."""
    return jax.grad(lambda *xs: (fn(*xs) ** 2).sum(), argnums=(0, 1, 2))


def attention_table(shape: tuple[int, ...] = SHAPE) -> list[str]:
    """Collectives of each implementation, by kind of mesh axis and what is split."""
    lines = [
        "| axes | implementation | pass | batch | heads | sequence |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        mesh = mesh_of(kind, x=DEVICES)
        for name, fn in CONTENDERS.items():
            for label, run in (("forward", fn), ("gradient", gradient(fn))):
                cells = []
                for spec in SPLITS.values():
                    split = NamedSharding(mesh, PartitionSpec(*spec))
                    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
                    with jax.set_mesh(mesh):
                        cells.append(collectives_of(run, x, x, x, may_raise=name == "jax.nn"))
                lines.append(f"| {' | '.join([kind, name, label, *cells])} |")
    return lines


def overhead_table(repeats: int) -> list[str]:
    """The time of the batch-sharded forward pass, relative to a hand-written ``shard_map``."""
    lines = [
        "| implementation | `shard_map` | Explicit | Auto |",
        "| --- | ---: | ---: | ---: |",
    ]
    split = PartitionSpec("x")
    for name in ("native", "blockwise"):
        contenders = {}
        for kind in KINDS:
            mesh = mesh_of(kind, x=DEVICES)
            placed = NamedSharding(mesh, split)
            arrays = [
                jax.device_put(jax.random.normal(jax.random.key(i), SHAPE), placed)
                for i in range(3)
            ]
            contenders[kind] = timed(CONTENDERS[name], arrays)
        mapped = jax.shard_map(CONTENDERS[name], mesh=mesh, in_specs=split, out_specs=split)
        contenders["shard_map"] = timed(mapped, arrays)  # of the mesh with Auto axes
        seconds = in_turns(contenders, repeats)
        by_hand = seconds["shard_map"]
        cells = [f"{1e3 * seconds[kind]:.1f} ms ({seconds[kind] / by_hand:.2f})" for kind in KINDS]
        lines.append(f"| {name} | {1e3 * by_hand:.1f} ms | {' | '.join(cells)} |")
    return lines


def timed(fn: Callable[..., Any], arrays: list[Any]) -> Callable[[], Any]:
    """A function that runs a program to completion."""
    compiled = jax.jit(fn).lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


# --- The training step of a decoder.

# The ideal number of collectives for ``decoder``: two layers with six kernels each, a tied table
# and learned positions. A collective of several arrays counts as one. XLA on a CPU has no
# reduce-scatter: it reduces, then slices.
#   data    the gradients, all at once
#   fsdp    each kernel and the positions once, the table as table and as head; the gradients
#   model   each layer two forward and two backward; the look-up; the head's maximum, sum and
#           gradient
# A combination needs the collectives of each.
WAYS: dict[str, tuple[dict[str, int], bool, dict[str, int]]] = {
    "data": ({"data": 8}, False, {"all-reduce": 1}),
    "fsdp": ({"data": 8}, True, {"all-gather": 15, "all-reduce": 1}),
    "model": ({"model": 8}, False, {"all-reduce": 12}),
    "data and model": ({"data": 4, "model": 2}, False, {"all-reduce": 13}),
    "fsdp and model": (
        {"data": 4, "model": 2},
        True,
        {"all-gather": 15, "all-reduce": 13},
    ),
}
BATCH, LENGTH, VOCABULARY = 8, 16, 64


def decoder() -> Decoder:
    """A decoder of two layers."""
    layers = Layers(features=32, num_layers=2, num_heads=8, hidden=64)
    config = DecoderConfig(VOCABULARY, layers, positions="learned", max_length=LENGTH)
    return Decoder(config, rngs=nnx.Rngs(0))


def rules_of(name: str) -> sharding.Rules:
    """The sharding rules of one of ``WAYS``."""
    axes, fsdp, _ = WAYS[name]
    return sharding.rules(**{axis: axis for axis in axes}, fsdp=fsdp)


def step_collectives(mesh: Mesh, rules: sharding.Rules) -> dict[str, int]:
    """The collectives in the compiled training step of the decoder."""
    graph, state = nnx.split(sharding.create(decoder, mesh, rules))
    placed = sharding.shardings(state, mesh, rules)

    def step(state: Any, tokens: Any) -> Any:
        def total(state: Any) -> Any:
            logits = nnx.merge(graph, state)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradient = jax.value_and_grad(total)(state)
        return value, jax.lax.with_sharding_constraint(gradient, placed)

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.int32)
    given = jax.device_put(tokens, sharding.of_batch(mesh, rules))
    with jax.set_mesh(mesh):
        return counts(jax.jit(step).lower(state, given).compile().as_text() or "")


def decoder_table(ways: Iterable[str] = tuple(WAYS)) -> list[str]:
    """Collectives of the training step, and how many are needed."""
    lines = ["| split | mesh | collectives | needed |", "| --- | --- | --- | --- |"]
    for name in ways:
        axes, _, needed = WAYS[name]
        found = step_collectives(mesh_of("Auto", **axes), rules_of(name))
        mesh = ", ".join(f"{axis}={size}" for axis, size in axes.items())
        lines.append(f"| {name} | {mesh} | {in_words(found)} | {in_words(needed)} |")
    return lines


# --- The page.

RINGS = (
    ring.Options(),
    ring.Options(heads=32, kv_heads=8, repeats=0),
    ring.Options(heads=32, kv_heads=2, repeats=0),
)


def page() -> str:
    """Measures everything; the page in Markdown."""
    of = machine()
    B, T, N, H = SHAPE
    parts = [
        "# Sharding",
        "What sharded programs send between devices, and what sharding costs. Written by "
        "`python -m experiments.bench.sharding`, which measures anew.",
        f"{time.strftime('%Y-%m-%d')}, {DEVICES} forced host devices on {of['cores']} cores of "
        f"{of['cpu']}, jax {jax.__version__}. The devices share the cores: times compare programs "
        "that do the same work.",
        "## Attention",
        f"Collectives in the compiled program of causal attention, batch {B}, T = {T:,}, {N} heads "
        f"of width {H}, float32, split over the {DEVICES} devices along one axis. The gradient is "
        "that by query, key and value. Over a split sequence, keys and values must be gathered.",
        "\n".join(attention_table()),
        "The forward pass of the same, split over the batch. In parentheses, relative to "
        "`shard_map` written by hand.",
        "\n".join(overhead_table(repeats=9)),
        "## Training step of a decoder",
        "Gradient of the loss of a decoder with two layers, over Auto axes. XLA on a CPU has no "
        "reduce-scatter and sends all-reduces instead.",
        "\n".join(decoder_table()),
        "## Ring attention",
        "`parallel.attention(strategy='ring')` over one sequence, causal, width 64, float32. "
        "Memory is per device, as the compiler plans it; *temporary* is what is neither argument "
        "nor result. *Buffers* are the part of it that the ring needs: keys and values twice, held "
        "and received, and the output of a chunk, or for a gradient the output, its cotangent and "
        "the gradients of a chunk. In parentheses, relative to one device. Rows without a time "
        "were compiled only.",
        "With as many key-value heads as query heads, the keys and values held and received alone "
        "are a quarter of one device's temporary memory for a gradient, which is the output and "
        "its cotangent. The forward pass of `native` on one device needs almost none.",
    ]
    parts += ["\n".join(ring.table(options, ring.rows(options))) for options in RINGS]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="the page to write")
    options = parser.parse_args()
    ring.force_devices()
    text = page()
    options.out.write_text(text)
    print(f"{text}\nwrote {options.out}")


if __name__ == "__main__":
    main()
