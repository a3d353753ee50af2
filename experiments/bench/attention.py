"""Speed, memory and first-call time, side by side with the others in one process.

    python -m experiments bench                  # everything, about 12 minutes on 2 cores
    python -m experiments bench --only decode    # one section
    python -m experiments bench --scaling        # how cost grows with length instead

Contenders run in turns, so that whatever else the machine does hits all of them; figures are
medians after warm-up. Ratios are what to compare: absolute figures differ between machines.
GFLOP/s count ``2 * B * N * T * S * (H + D)`` forward and 2.5 times that backward, both as if
dense, so a causal figure above the dense one shows the blocks skipped.

torch is optional (``pip install torch==2.13.0``); without it its columns are empty.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax

import attention_jax as aj
from attention_jax.backends import Blockwise
from attention_jax.backends.blockwise.run import SPEED
from experiments.bench import scaling
from experiments.bench.contenders import (
    Shape,
    have_torch,
    in_turns,
    jax_nn,
    jitted,
    ours,
    torch_flex,
    torch_sdpa,
)
from experiments.bench.models import (
    Decoding,
    Size,
    cache_rows,
    decode_hugging_face,
    decode_ours,
    have_transformers,
    train_flax,
    train_ours,
    train_torch,
    training_step,
)
from experiments.bench.tables import Row, print_row, write
from experiments.training.config import FLAX

Section = Literal[
    "forward",
    "train",
    "window",
    "decode",
    "vmap",
    "first",
    "memory",
    "step",
    "tasks",
    "generate",
    "cache",
    "short",
    "blocks",
]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, and where to write it."""

    only: Section | None = None
    """One section; by default all but ``short`` and ``blocks``, which tune the library's tables."""
    repeats: int = 7
    """Timed runs of each contender, after two for warm-up."""
    flex: bool = True
    """Compile torch's flex_attention for the window rows (needs a C++ compiler)."""
    scaling: bool = False
    """Measure how time and memory grow with length instead."""
    out: pathlib.Path = pathlib.Path("runs/bench")
    """Folder for bench.json, bench.md and bench.png; or scaling.json and scaling.png."""


def compare(
    section: str, shape: Shape, options: Options, targets: dict[str, float], backward: bool = False
) -> Row:
    contenders = {
        "ours": ours(shape, backward=backward),
        "jax.nn": jax_nn(shape, backward=backward),
    }
    if have_torch() and not shape.window:
        contenders["torch sdpa"] = torch_sdpa(shape, backward=backward)
    note = ""
    if have_torch() and shape.window and options.flex:
        try:
            contenders["torch flex"] = torch_flex(shape)
            contenders["torch flex"]()
        except (RuntimeError, ImportError) as error:  # no C++ compiler, say
            del contenders["torch flex"]
            note = f"torch flex: {type(error).__name__}"
    seconds = in_turns(contenders, options.repeats)
    gflops = shape.flops * (3.5 if backward else 1.0) / 1e9
    return Row(section, str(shape), seconds, gflops, targets, note)


def forward(options: Options) -> list[Row]:
    """Forward, short to long."""
    at_least = {"torch sdpa": 1.0}
    rows = [
        compare("forward", shape, options, at_least)
        for shape in (Shape(128, 128, 64), Shape(512, 512, 32), Shape(1024, 1024, 16))
    ]
    at_least = {"torch sdpa": 1.3, "jax.nn": 4.0}
    return rows + [
        compare("forward", shape, options, at_least)
        for shape in (
            Shape(2048, 2048, 8),
            Shape(2048, 2048, 8, causal=True),
            Shape(4096, 4096, 4, causal=True),
            Shape(8192, 8192, 2, causal=True),
        )
    ]


def train(options: Options) -> list[Row]:
    """Forward and backward."""
    long = {"torch sdpa": 1.1, "jax.nn": 2.0}
    return [
        compare("train", shape, options, targets, backward=True)
        for shape, targets in (
            (Shape(512, 512, 32), {"jax.nn": 2.0}),
            (Shape(1024, 1024, 16), {"jax.nn": 2.0}),
            (Shape(2048, 2048, 8), long),
            (Shape(2048, 2048, 8, causal=True), {"torch sdpa": 1.1, "jax.nn": 4.0}),
            (Shape(4096, 4096, 4, causal=True), long),
        )
    ]


def window(options: Options) -> list[Row]:
    """A window of 256 keys, self included."""
    return [
        compare("window", Shape(2048, 2048, 8, window=256), options, {}),
        compare(
            "window",
            Shape(16384, 16384, 2, window=256),
            dataclasses.replace(options, repeats=max(3, options.repeats // 2)),
            {"jax.nn": 20.0, "torch flex": 1.0},
        ),
    ]


def decode(options: Options) -> list[Row]:
    """One query; bound by reading keys and values."""
    rows = []
    for S in (2048, 8192):
        shape = Shape(1, S, N=32, K=8, H=128)
        row = compare("decode", shape, options, {"torch sdpa": 1.0})
        gigabytes = 2 * S * 8 * 128 * 4 / 1e9
        note = f"{gigabytes / row.seconds['ours']:.1f} GB/s of keys and values"
        rows.append(dataclasses.replace(row, note=note))
    return rows


def vmap(options: Options) -> list[Row]:
    """``vmap`` over examples against a batch axis."""
    rows = []
    for shape in (Shape(128, 128, 8, B=8), Shape(1024, 1024, 4, B=4, causal=True)):
        q, k, v = shape.arrays()
        mask = shape.mask
        mapped = jax.jit(jax.vmap(lambda q, k, v, mask=mask: aj.attention(q, k, v, mask=mask)))
        contenders: dict[str, Callable[[], Any]] = {
            "ours": functools.partial(lambda f, *a: jax.block_until_ready(f(*a)), mapped, q, k, v),
            "batch axis": ours(shape),
        }
        seconds = in_turns(contenders, options.repeats)
        work = f"vmap over {shape.B}, {shape}"
        rows.append(Row("vmap", work, seconds, shape.flops / 1e9, {"batch axis": 0.9}))
    return rows


def first(options: Options) -> list[Row]:
    """The first call: trace, compile, run. Median of three, caches cleared before each."""
    rows = []
    for backward in (False, True):
        shape = Shape(1024, 1024, 2, causal=True)
        seconds: dict[str, list[float]] = {"ours": [], "jax.nn": []}
        for _ in range(3):
            for name, contender in (("ours", ours), ("jax.nn", jax_nn)):
                jax.clear_caches()
                run = contender(shape, backward=backward)
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(s) for name, s in seconds.items()}
        work = f"first call, {shape}" + (", fwd+bwd" if backward else "")
        rows.append(Row("first", work, medians, shape.flops / 1e9, {"jax.nn": 0.5}))
    return rows


def memory(options: Options) -> list[Row]:
    """Memory beside arguments and results, in a process of its own: ``bench/memory.py``."""
    rows = []
    for work, arguments in (
        ("65,536 tokens, causal, fwd+bwd, one head", ["65536", "--backward"]),
        ("1,000,000 tokens, window 512, fwd, one head", ["1000000", "--window", "512"]),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "experiments.bench.memory", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{work}: {done.stderr[-2000:]}")
        measured = json.loads(done.stdout)
        note = (
            f"beside arguments and results {measured['planned_mib']:.0f} MiB planned, "
            f"{max(0.0, measured['resident_mib']):.0f} MiB seen resident"
        )
        rows.append(Row("memory", work, {"ours": measured["seconds"]}, 0.0, {}, note))
    return rows


def step(options: Options) -> list[Row]:
    """A training step of a whole decoder, with AdamW."""
    rows = []
    for T, targets in (
        (256, {"flax": 1.05, "torch": 0.9}),
        (1024, {"flax": 2.0, "torch": 1.2}),
    ):
        size = Size(T)
        contenders = {"ours": train_ours(size), "flax": train_flax(size)}
        if have_torch():
            contenders["torch"] = train_torch(size)
        seconds = in_turns(contenders, max(3, options.repeats // 2))
        note = f"{size.B * T / seconds['ours']:,.0f} tokens/s"
        rows.append(Row("step", f"training step, {size}", seconds, 0.0, targets, note))
    return rows


def tasks(options: Options) -> list[Row]:
    """A training step of our tasks, beside the same run with ``--attention flax``."""
    rows = []
    for name, changes, at_least in (
        ("shakespeare", {"context": 256}, 1.05),
        ("shakespeare", {"context": 1024, "batch_size": 8}, 1.8),
        ("multi30k", {}, 0.95),
    ):
        contenders = {
            "ours": training_step(name, **changes),
            "flax": training_step(name, attention=FLAX, **changes),
        }
        seconds = in_turns(contenders, max(5, options.repeats))
        said = ", ".join(f"{option} {x}" for option, x in changes.items())
        work = ", ".join(filter(None, (f"training step of {name}", said)))
        rows.append(Row("tasks", work, seconds, 0.0, {"flax": at_least}))
    return rows


def generate(options: Options) -> list[Row]:
    """Greedy decoding with caches: a prompt, then tokens one by one, few and many before them."""
    rows = []
    for prompt, new in ((64, 32), (64, 256), (768, 64)):
        decoding = Decoding(prompt=prompt, new=new)
        contenders = {"ours": decode_ours(decoding)}
        if have_transformers():
            contenders["transformers"] = decode_hugging_face(decoding)
        seconds = in_turns(contenders, 3)
        note = f"{seconds['ours'] / new * 1e3:.1f} ms a token"
        work = f"generate, {decoding}"
        rows.append(Row("generate", work, seconds, 0.0, {"transformers": 1.0}, note))
    return rows


def cache(options: Options) -> list[Row]:
    """Memory of the caches, counted."""
    return [Row("cache", work, {}, 0.0, {}, note) for work, note in cache_rows()]


def short(options: Options) -> list[Row]:
    """Where the materialised path ends and the blockwise one begins."""
    rows = []
    for T in (16, 32, 64, 96, 128, 192, 256):
        for backward in (False, True):
            shape = Shape(T, T, N=8, B=max(1, 2048 // T))
            contenders = {
                "ours": ours(shape, backward=backward, implementation="blockwise"),
                "xla": ours(shape, backward=backward, implementation="xla"),
                "jax.nn": jax_nn(shape, backward=backward),
            }
            if have_torch():
                contenders["torch sdpa"] = torch_sdpa(shape, backward=backward)
            gflops = shape.flops * (3.5 if backward else 1.0) / 1e9
            work = f"blockwise, batch {shape.B}, {shape}" + (", fwd+bwd" if backward else "")
            rows.append(Row("short", work, in_turns(contenders, options.repeats), gflops, {}))
    return rows


def blocks(options: Options) -> list[Row]:
    """How fast the blockwise loops run with each block size: ``SPEED`` of the blockwise backend."""
    rows = []
    for size in SPEED:
        for causal in (False, True):
            shape = Shape(4096, 4096, 4, causal=causal)
            for backward in (False, True):
                run = jitted(_with_blocks(shape, size), shape, backward)
                seconds = in_turns({"ours": run}, options.repeats)
                gflops = shape.flops * (3.5 if backward else 1.0) / 1e9
                work = f"blocks of {size}, {shape}" + (", fwd+bwd" if backward else "")
                rows.append(Row("blocks", work, seconds, gflops, {}))
    return rows


def _with_blocks(shape: Shape, size: tuple[int, int]) -> Callable[..., Any]:
    def attend(q: Any, k: Any, v: Any) -> Any:
        return aj.attention(q, k, v, mask=shape.mask, implementation=Blockwise(*size))

    return attend


SECTIONS: dict[str, Callable[[Options], list[Row]]] = {
    "forward": forward,
    "train": train,
    "window": window,
    "decode": decode,
    "vmap": vmap,
    "first": first,
    "memory": memory,
    "step": step,
    "tasks": tasks,
    "generate": generate,
    "cache": cache,
    "short": short,
    "blocks": blocks,
}
TUNING = ("short", "blocks")


def main(options: Options) -> int:
    if options.scaling:
        return scaling.main(options.out, max(3, options.repeats // 2))
    rows = []
    for name, section in SECTIONS.items():
        if options.only == name or (options.only is None and name not in TUNING):
            for row in section(options):
                print_row(row)
                rows.append(row)
    missed = [
        f"{row.work} ({row.section}): {row.ratios[name]:.2f}x {name}, at least {target}"
        for row in rows
        for name, target in row.targets.items()
        if name in row.ratios and row.ratios[name] < target
    ]
    print("all targets reached" if not missed else "missed:\n  " + "\n  ".join(missed))
    write(rows, options.out, options.repeats)
    return 0
