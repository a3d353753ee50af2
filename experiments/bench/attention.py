"""``bench``: speed, memory and first-call time, side by side with other libraries.

    python -m experiments bench                  # everything, about 15 minutes on 2 cores
    python -m experiments bench --only decode    # one section
    python -m experiments bench --scaling        # how cost grows with length, instead

Contenders take turns in one process, so that other load on the machine affects all of them;
figures are medians after a warm-up. Compare ratios: absolute figures differ between machines.
GFLOP/s count ``2 * B * N * T * S * (H + D)`` forward and 2.5 times that backward, both as if
dense, so that a causal figure above the dense one shows the blocks skipped.

torch is optional (``pip install torch==2.13.0``); without it its columns are empty.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
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
from experiments.bench import finetuning, scaling, serving
from experiments.bench.contenders import (
    TIMED,
    have_torch,
    in_turns,
    jax_nn,
    jitted,
    ours,
    product,
    timed_runs,
    torch_flex,
    torch_sdpa,
    total,
)
from experiments.bench.models import (
    Decoding,
    Size,
    cache_sizes,
    decode_hugging_face,
    decode_ours,
    have_transformers,
    train_flax,
    train_ours,
    train_torch,
    training_step,
)
from experiments.bench.shapes import SHAPES, SHORT, Shape
from experiments.bench.tables import TUNING, Measurement, print_measurement, write
from experiments.training.config import FLAX

Section = Literal[
    "forward",
    "train",
    "window",
    "decode",
    "threads",
    "vmap",
    "first",
    "memory",
    "step",
    "tasks",
    "finetune",
    "generate",
    "cache",
    "serve",
    "short",
    "blocks",
]


SINGLE_TILE = 512  # from this many queries on, the blockwise loops have more than one tile
PRODUCT_GFLOPS = 2 * 2048**3 / 1e9


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``bench``."""

    only: Section | None = None
    """One section; default all except ``short`` and ``blocks``, which tune the library's tables."""
    repeats: int = 9
    """At least this many timed runs of each contender, three after every two untimed ones; slow
    calls take a third as many."""
    flex: bool = True
    """Compile torch's flex_attention for the window section (needs a C++ compiler)."""
    scaling: bool = False
    """Measure how time and memory grow with length instead."""
    out: pathlib.Path = pathlib.Path("runs/bench")
    """Folder for bench.json, bench.md and bench.png, or for scaling.json and scaling.png."""


def measure(
    section: str, name: str, options: Options, targets: dict[str, float], backward: bool = False
) -> Measurement:
    """Times all contenders on a named shape."""
    shape = SHAPES[name]
    sparse = shape.window or shape.document
    contenders = {"ours": ours(shape, backward=backward)}
    if shape.T >= SINGLE_TILE:
        contenders["blockwise"] = ours(shape, backward=backward, implementation="blockwise")
    if not shape.document:
        contenders["jax.nn"] = jax_nn(shape, backward=backward)
    if have_torch() and not sparse:
        contenders["torch sdpa"] = torch_sdpa(shape, backward=backward)
    note = ""
    if have_torch() and sparse and options.flex:
        try:
            contenders["torch flex"] = torch_flex(shape)
            contenders["torch flex"]()
        except (RuntimeError, ImportError) as error:  # no C++ compiler, say
            contenders.pop("torch flex", None)
            note = f"torch flex: {type(error).__name__}"
    if section == "forward" and not (shape.causal or sparse):
        contenders["product"] = product()
    if section == "decode":
        contenders["total"] = total(shape.num_key_value_numbers)
    seconds = in_turns(contenders, options.repeats)
    gflops = shape.gflops(backward=backward)
    if "product" in seconds:
        rate = PRODUCT_GFLOPS / seconds.pop("product")
        note = f"{gflops / seconds['ours'] / rate:.2f} of the rate of a product of 2048 x 2048"
    if "total" in seconds:
        share = seconds.pop("total") / seconds["ours"]
        gigabytes = 4 * shape.num_key_value_numbers / 1e9
        note = f"{gigabytes / seconds['ours']:.1f} GB/s, {share:.2f} of the rate of a sum"
    return Measurement(section, str(shape), seconds, gflops, targets, note)


def _fewer(options: Options) -> int:
    """Timed runs of calls that take long."""
    return max(TIMED, options.repeats // 3)


def forward(options: Options) -> list[Measurement]:
    """Forward, short to long."""
    return [
        measure("forward", name, options, {"torch sdpa": target})
        for name, target in (
            ("dense 128", 1.15),
            ("dense 512", 1.15),
            ("dense 1024", 1.15),
            ("dense 2048", 1.2),
            ("dense 4096", 1.2),
            ("causal 2048", 1.35),
            ("causal 4096", 1.35),
            ("causal 8192", 1.35),
        )
    ]


def train(options: Options) -> list[Measurement]:
    """Forward and backward."""
    return [
        measure("train", name, options, {"torch sdpa": 1.25}, backward=True)
        for name in ("dense 512", "dense 1024", "dense 2048", "causal 2048", "causal 4096")
    ]


def window(options: Options) -> list[Measurement]:
    """A sliding window of 256 keys, and packed documents."""
    fewer = dataclasses.replace(options, repeats=_fewer(options))
    return [
        measure("window", "window 2048", options, {}),
        measure("window", "window 16384", fewer, {"torch flex": 2.0}),
        measure("window", "documents 8192", fewer, {"torch flex": 2.0, "blockwise": 3.0}),
    ]


def decode(options: Options) -> list[Measurement]:
    """One query against a cache; bound by reading keys and values."""
    return [
        measure("decode", name, options, {"torch sdpa": target})
        for name, target in (("decode 2048", 1.0), ("decode 8192", 3.0))
    ]


def threads(options: Options) -> list[Measurement]:
    """The same calls on 1, 2, 4, ... cores, each row in its own process."""
    measurements = []
    for work, arguments in (
        ("8 heads, 2048, causal", ["causal 2048"]),
        ("8 heads, 2048, causal, fwd+bwd", ["causal 2048", "--backward"]),
        ("32/8 heads, 1 x 8192, dense", ["decode 8192"]),
    ):
        alone: dict[str, float] = {}
        for cores in _powers_of_2(len(os.sched_getaffinity(0))):
            seconds = _in_its_own_process(
                "threads", *arguments, "--cores", str(cores), "--repeats", str(options.repeats)
            )
            alone = alone or seconds
            note = ", ".join(
                f"{name} {alone[name] / x:.2f}x one core's" for name, x in seconds.items()
            )
            on = f"{work}, on {cores} core{'s' if cores > 1 else ''}"
            measurements.append(
                Measurement("threads", on, seconds, 0.0, {}, note if cores > 1 else "")
            )
    return measurements


def _powers_of_2(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]


def vmap(options: Options) -> list[Measurement]:
    """``vmap`` over examples beside a batch axis."""
    measurements = []
    for shape in (SHAPES["batch dense 128"], SHAPES["batch causal 1024"]):
        q, k, v = shape.arrays()
        mask = shape.mask
        mapped = jax.jit(jax.vmap(lambda q, k, v, mask=mask: aj.attention(q, k, v, mask=mask)))
        contenders: dict[str, Callable[[], Any]] = {
            "ours": functools.partial(lambda f, *a: jax.block_until_ready(f(*a)), mapped, q, k, v),
            "batch axis": ours(shape),
        }
        seconds = in_turns(contenders, options.repeats)
        work = f"vmap over {shape.B}, {shape}"
        measurements.append(Measurement("vmap", work, seconds, shape.gflops(), {"batch axis": 0.9}))
    return measurements


def first(options: Options) -> list[Measurement]:
    """The first call: tracing, compiling, running. Median of three, with caches cleared before."""
    measurements = []
    for backward in (False, True):
        shape = SHAPES["first causal 1024"]
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
        gflops = shape.gflops(backward=backward)
        measurements.append(Measurement("first", work, medians, gflops, {"jax.nn": 2.0}))
    return measurements


def memory(options: Options) -> list[Measurement]:
    """Memory in addition to arguments and results, measured in its own process by ``memory``."""
    measurements = []
    for work, arguments in (
        ("65,536 tokens, causal, fwd+bwd, one head", ["causal 65536", "--backward"]),
        ("1,000,000 tokens, window 512, fwd, one head", ["window 1000000"]),
    ):
        measured = _in_its_own_process("memory", *arguments)
        resident = max(0.0, measured["resident_mib"])
        note = (
            f"{measured['planned_mib']:.0f} MiB planned, {resident:.0f} MiB resident, in addition "
            f"to arguments and results"
        )
        measurements.append(
            Measurement("memory", work, {"ours": measured["seconds"]}, 0.0, {}, note)
        )
    return measurements


def _in_its_own_process(module: str, *arguments: str) -> dict[str, float]:
    """The JSON line that a module of this package prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.bench.{module}", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}: {done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def step(options: Options) -> list[Measurement]:
    """A training step of a whole decoder with AdamW."""
    measurements = []
    for T, targets in (
        (256, {"flax": 1.05, "torch": 0.9}),
        (1024, {"flax": 2.0, "torch": 1.1}),
    ):
        size = Size(T)
        contenders = {"ours": train_ours(size), "flax": train_flax(size)}
        if have_torch():
            contenders["torch"] = train_torch(size)
        seconds = in_turns(contenders, _fewer(options))
        note = f"{size.B * T / seconds['ours']:,.0f} tokens/s"
        measurements.append(
            Measurement("step", f"training step, {size}", seconds, 0.0, targets, note)
        )
    return measurements


def tasks(options: Options) -> list[Measurement]:
    """A training step of our tasks, beside the same step with ``--attention flax``."""
    measurements = []
    for name, changes, target in (
        ("shakespeare", {"context": 256}, 1.05),
        ("shakespeare", {"context": 1024, "batch_size": 8}, 1.8),
        ("multi30k", {}, 0.95),
    ):
        contenders = {
            "ours": training_step(name, **changes),
            "flax": training_step(name, attention=FLAX, **changes),
        }
        seconds = in_turns(contenders, _fewer(options))
        changed = [f"{option} {x}" for option, x in changes.items()]
        work = ", ".join([f"training step of {name}", *changed])
        measurements.append(Measurement("tasks", work, seconds, 0.0, {"flax": target}))
    return measurements


def finetune(options: Options) -> list[Measurement]:
    """Fine-tuning a published encoder on sentences, in batches of similar length."""
    measurements = []
    with finetuning.checkpoint() as folder:
        for freeze in (False, True):
            work = finetuning.FineTuning(freeze=freeze)
            contenders = {"ours": finetuning.ours(work, folder)}
            if have_transformers():
                contenders["transformers"] = finetuning.transformers(work, folder)
            seconds = in_turns(contenders, _fewer(options))
            note, targets = work.note(seconds["ours"]), {"transformers": 1.0}
            measurements.append(Measurement("finetune", str(work), seconds, 0.0, targets, note))
    return measurements


def generate(options: Options) -> list[Measurement]:
    """Greedy decoding with caches: short and long prompts, few and many new tokens."""
    measurements = []
    for prompt, new, target in ((64, 32, 1.0), (64, 256, 2.2), (768, 64, 1.0)):
        decoding = Decoding(prompt=prompt, new=new)
        contenders = {"ours": decode_ours(decoding)}
        if have_transformers():
            contenders["transformers"] = decode_hugging_face(decoding)
        seconds = in_turns(contenders, _fewer(options))
        note = f"{seconds['ours'] / new * 1e3:.1f} ms a token"
        work = f"generate, {decoding}"
        measurements.append(
            Measurement("generate", work, seconds, 0.0, {"transformers": target}, note)
        )
    return measurements


def cache(options: Options) -> list[Measurement]:
    """Size of the caches."""
    return [Measurement("cache", work, {}, 0.0, {}, note) for work, note in cache_sizes()]


def serve(options: Options) -> list[Measurement]:
    """Requests for GPT-2 and a model of Qwen2's shape: one, eight, and 32 of mixed lengths."""
    return serving.measurements(_fewer(options))


def short(options: Options) -> list[Measurement]:
    """Short sequences, to find the length from which the loops are faster than the full logits."""
    measurements = []
    for shape in SHORT:
        for backward in (False, True):
            contenders = {
                "ours": ours(shape, backward=backward),
                "blockwise": ours(shape, backward=backward, implementation="blockwise"),
                "xla": ours(shape, backward=backward, implementation="xla"),
                "jax.nn": jax_nn(shape, backward=backward),
            }
            if have_torch():
                contenders["torch sdpa"] = torch_sdpa(shape, backward=backward)
            gflops = shape.gflops(backward=backward)
            work = f"batch {shape.B}, {shape}" + (", fwd+bwd" if backward else "")
            measurements.append(
                Measurement("short", work, in_turns(contenders, options.repeats), gflops, {})
            )
    return measurements


def blocks(options: Options) -> list[Measurement]:
    """The speed of the blockwise loops by block size, for ``SPEED``."""
    measurements = []
    for size in SPEED:
        for shape in (SHAPES["dense 4096"], SHAPES["causal 4096"]):
            for backward in (False, True):
                run = jitted(_with_blocks(shape, size), shape, backward)
                seconds = in_turns({"ours": run}, options.repeats)
                gflops = shape.gflops(backward=backward)
                work = f"blocks of {size}, {shape}" + (", fwd+bwd" if backward else "")
                measurements.append(Measurement("blocks", work, seconds, gflops, {}))
    return measurements


def _with_blocks(shape: Shape, size: tuple[int, int]) -> Callable[..., jax.Array]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return aj.attention(q, k, v, mask=shape.mask, implementation=Blockwise(*size))

    return attend


SECTIONS: dict[str, Callable[[Options], list[Measurement]]] = {
    "forward": forward,
    "train": train,
    "window": window,
    "decode": decode,
    "threads": threads,
    "vmap": vmap,
    "first": first,
    "memory": memory,
    "step": step,
    "tasks": tasks,
    "finetune": finetune,
    "generate": generate,
    "cache": cache,
    "serve": serve,
    "short": short,
    "blocks": blocks,
}


def main(options: Options) -> int:
    if options.scaling:
        if options.only is not None:
            raise ValueError(
                f"scaling measures every kind, got only {options.only}: give one of them"
            )
        return scaling.main(options.out, _fewer(options))
    measurements = []
    for name, section in SECTIONS.items():
        if options.only == name or (options.only is None and name not in TUNING):
            for measurement in section(options):
                print_measurement(measurement)
                measurements.append(measurement)
    missed = [
        f"{m.work} ({m.section}): {m.ratios[name]:.2f}x {name}, at least {target}"
        for m in measurements
        for name, target in m.targets.items()
        if name in m.ratios and m.ratios[name] < target
    ]
    print("all targets reached" if not missed else "missed:\n  " + "\n  ".join(missed))
    write(measurements, options.out, timed_runs(options.repeats))
    return 0
