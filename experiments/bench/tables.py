"""The measurements of ``bench``, printed and written: JSON, Markdown tables, a picture."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import time
from typing import Any

import jax
import numpy as np

from experiments.bench.contenders import have_torch

# Sections on whole models, in their own table.
MODELS = ("step", "finetune", "generate", "cache", "serve", "tasks")
TUNING = ("short", "blocks")  # sections that tune the library, run only by name


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The time of each contender on one piece of work, and the ratios we aim at."""

    section: str
    work: str
    seconds: dict[str, float]
    """By contender."""
    gflops: float
    """Of the work; 0 if not counted."""
    targets: dict[str, float]
    """By contender, the ratio to reach: its seconds over ours."""
    note: str = ""

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster than each contender we are."""
        ours = self.seconds.get("ours", 0.0)
        return {name: s / ours for name, s in self.seconds.items() if name != "ours"}


def print_measurement(measurement: Measurement) -> None:
    cells = [f"{name} {seconds * 1e3:.1f} ms" for name, seconds in measurement.seconds.items()]
    if measurement.gflops and measurement.section in ("forward", "train", *TUNING):
        cells[0] += f" ({measurement.gflops / measurement.seconds['ours']:.0f} GFLOP/s)"
    print(f"{measurement.section:8} {measurement.work:44} " + ", ".join(cells), flush=True)
    for name, ratio in measurement.ratios.items():
        target = measurement.targets.get(name)
        verdict = (
            ""
            if target is None
            else f"  (at least {target}: {'ok' if ratio >= target else 'MISSED'})"
        )
        print(f"{'':8} {'':44} {ratio:.2f}x {name}{verdict}")
    if measurement.note:
        print(f"{'':8} {'':44} {measurement.note}")


def write(measurements: list[Measurement], out: pathlib.Path, repeats: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    if have_torch():
        import torch

        versions["torch"] = torch.__version__
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions,
        "repeats": repeats,
        "rows": [{**dataclasses.asdict(m), "ratios": m.ratios} for m in measurements],
    }
    for name, text in (
        ("bench.json", json.dumps(record, indent=1) + "\n"),
        ("bench.md", table(measurements)),
    ):
        (out / name).write_text(text)
        print(f"wrote {out / name}")
    drawn = [m for m in measurements if m.section in ("forward", "train")]
    if drawn:
        path = out / "bench.png"
        draw(drawn, path, record)
        print(f"wrote {path}")


def read(record: dict[str, Any]) -> list[Measurement]:
    """The measurements of a record that ``write`` wrote."""
    names = [field.name for field in dataclasses.fields(Measurement)]
    return [Measurement(**{name: m[name] for name in names}) for m in record["rows"]]


def table(measurements: list[Measurement]) -> str:
    """Markdown tables: one of calls of attention, one of whole models, where there are any."""
    parts = [_calls([m for m in measurements if m.section not in MODELS])]
    parts += [_models([m for m in measurements if m.section in MODELS])]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _calls(measurements: list[Measurement]) -> list[str]:
    """The table of calls of attention."""
    if not measurements:
        return []
    others = ("blockwise", "jax.nn", "torch sdpa", "torch flex", "batch axis")
    kinds = {
        "forward": "forward",
        "train": "forward + backward",
        "window": "forward",
        "decode": "decode",
        "threads": "threads",
    }
    lines = [
        "| work | ours | vs blockwise | vs jax.nn | vs torch SDPA | vs torch flex "
        "| vs the batch axis | note |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for measurement in measurements:
        work = ", ".join(filter(None, (kinds.get(measurement.section), measurement.work)))
        cells = [
            f"{measurement.seconds['ours'] * 1e3:,.1f} ms",
            *(_ratio(measurement, name) for name in others),
        ]
        lines.append(f"| {work} | {' | '.join(cells)} | {measurement.note} |")
    return lines


def _models(measurements: list[Measurement]) -> list[str]:
    """The table of whole models."""
    if not measurements:
        return []
    lines = [
        "| work | ours | vs flax.nnx | vs torch | vs transformers | note |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for measurement in measurements:
        ours = f"{measurement.seconds['ours'] * 1e3:,.0f} ms" if measurement.seconds else ""
        cells = [ours, *(_ratio(measurement, name) for name in ("flax", "torch", "transformers"))]
        lines.append(f"| {measurement.work} | {' | '.join(cells)} | {measurement.note} |")
    return lines


def _ratio(measurement: Measurement, name: str) -> str:
    """How many times faster than a contender we are; bold if that reaches the target."""
    if name not in measurement.seconds:
        return ""
    ratio, target = measurement.ratios[name], measurement.targets.get(name)
    if target is None:
        return f"{ratio:.2f}x"
    bold = "**" if ratio >= target else ""
    return f"{bold}{ratio:.2f}x{bold} (aim {target:g}x)"


def draw(measurements: list[Measurement], path: pathlib.Path, record: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colors = {
        "ours": "#d1495b",
        "blockwise": "#edae49",
        "jax.nn": "#8d99ae",
        "torch sdpa": "#2b2d42",
    }
    sections = [s for s in ("forward", "train") if any(r.section == s for r in measurements)]
    figure, panels = plt.subplots(
        1, len(sections), figsize=(5.6 * len(sections), 4.2), squeeze=False, layout="constrained"
    )
    titles = {"forward": "Forward", "train": "Forward + backward"}
    for panel, section in zip(panels[0], sections, strict=True):
        part = [r for r in measurements if r.section == section]
        names = [n for n in colors if any(n in r.seconds for r in part)]
        step = 0.8 / len(names)
        for i, name in enumerate(names):
            y = np.arange(len(part)) + (i - (len(names) - 1) / 2) * step
            speed = [r.gflops / r.seconds[name] if name in r.seconds else 0.0 for r in part]
            label = {"ours": "attention_jax", "blockwise": "its blockwise loops"}.get(name, name)
            panel.barh(y, speed, height=0.93 * step, color=colors[name], label=label)
        panel.set_yticks(range(len(part)), [r.work.replace(" heads", " h") for r in part])
        panel.invert_yaxis()
        panel.set_xlabel("GFLOP/s, counted as if dense (higher is better)")
        panel.set_title(titles[section])
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False)
    machine = record["machine"]
    figure.suptitle(
        f"float32, H = 64, {machine['cores']} cores of {machine['cpu']}, jax "
        f"{record['versions']['jax']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def machine() -> dict[str, Any]:
    """The processor, JAX's platform and the number of cores."""
    return {"cpu": _cpu(), "device": jax.devices()[0].platform, "cores": _cores()}


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def _cores() -> int:
    return len(os.sched_getaffinity(0))
