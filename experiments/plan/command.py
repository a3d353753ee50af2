"""The command, and the table of published plans."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.plan.estimate import DEVICES, GB, SIZES, Options, abstract, estimate, lines

RESULTS = Path(__file__).parents[1] / "results" / "PLAN.md"
COMMAND = "python -m experiments plan --table"


def main(options: Options) -> int:
    """Prints a plan, or writes the table; returns the exit code."""
    if options.table:
        if given := _other_than_table(options):
            raise ValueError(
                f"table has plans of its own and takes only check, got also {', '.join(given)}: "
                f"leave out one or the other"
            )
        return _table(check=options.check)
    if options.check:
        raise ValueError("check needs --table, the page to check")
    for line in lines(options):
        print(line)
    if options.compile:
        from experiments.plan.ahead import compiled

        for line in compiled(options):
            print(line)
    return 0


def _other_than_table(options: Options) -> list[str]:
    """The names of options that change a plan and differ from their defaults."""
    names = [x.name for x in dataclasses.fields(Options) if x.name not in ("table", "check")]
    return [name for name in names if getattr(options, name) != getattr(Options, name)]


PUBLISHED = (
    Options("124M", "8k", "v5e", "data=16"),
    Options("124M", "128k", "v5e", "data=4,context=4"),
    Options("1.3B", "8k", "v5e", "data=16"),
    Options("1.3B", "8k", "v5e", "data=16", fsdp=True),
    Options("1.3B", "128k", "v5e", "data=1,context=16", fsdp=True),
    Options("1.3B", "8k", "h100", "data=8", fsdp=True),
    Options("8B", "8k", "v5e", "data=16", fsdp=True),
    Options("8B", "8k", "v5e", "data=64,model=4", fsdp=True),
    Options("8B", "128k", "v5e", "data=16,context=16", fsdp=True),
    Options("8B", "1M", "v5e", "data=1,context=256", fsdp=True),
    Options("8B", "8k", "h100", "data=8", fsdp=True),
    Options("8B", "128k", "h100", "data=1,context=8", fsdp=True),
)


def table() -> str:
    """The published page."""
    rows = [
        "# Plans",
        "",
        "Which training steps fit which devices, and the time of one at peak rates. Arithmetic,",
        "not measurements: nothing here has run. `python -m experiments plan --help` plans another",
        "one, and its `--compile` asks the compiler for TPUs.",
        "",
        "AdamW in float32, computation in bfloat16, every layer recomputed in the backward pass,",
        "one sequence for each part along `data`. GB per device; *acts* are the inputs of all",
        "layers and the intermediates of one. Time is computation plus communication: it assumes",
        "peak rates and no overlap. Rows with `context` assume that each device attends from its",
        "own queries to gathered keys and values; `train` does not do that yet, but gathers",
        "queries too.",
        "",
        "| model | tokens | device | mesh | params | optimizer | gradients | acts | sent | TFLOP "
        "| step | fits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    states = {size: abstract(size) for size in SIZES}
    for options in PUBLISHED:
        plan, device = estimate(options, states[options.size]), DEVICES[options.device]
        mesh = options.mesh.replace(",", ", ") + (", fsdp" if options.fsdp else "")
        sizes = (plan.parameters, plan.optimizer, plan.gradients, plan.activations + plan.temporary)
        numbers = [f"{x / GB:.2f}" for x in (*sizes, sum(plan.collectives.values()))]
        fits = "yes" if plan.memory <= device.memory else f"no, {plan.memory / GB:.0f} GB"
        cells = [options.size, options.length, device.name, mesh, *numbers]
        cells += [f"{plan.flops / 1e12:.0f}", f"{plan.seconds:.2g} s", fits]
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "Peak rates and memory:", ""]
    rows += [
        f"- {x.name}: {x.memory / GB:.0f} GB, {x.flops / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{x.link / GB:.0f} GB/s to its peers ({x.source})"
        for x in DEVICES.values()
    ]
    return "\n".join([*rows, ""])


def _table(*, check: bool) -> int:
    if check:
        if not RESULTS.exists() or RESULTS.read_text() != table():
            raise ValueError(f"{RESULTS} is not up to date: run {COMMAND}")
        print(f"{RESULTS} is up to date")
        return 0
    RESULTS.write_text(table())
    print(f"wrote {RESULTS}")
    return 0
