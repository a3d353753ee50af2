"""What ``bench`` measured, printed and written: JSON, a table in Markdown, a picture."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
import time
from typing import Any

import jax

from experiments.bench.contenders import have_torch

MODELS = ("step", "generate", "cache", "tasks")  # sections of whole models, in a table of their own


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: seconds of each contender, and what our ratios should reach."""

    section: str
    work: str
    seconds: dict[str, float]
    gflops: float  # of the work
    targets: dict[str, float]  # contender -> least ratio (its seconds over ours)
    note: str = ""

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster than each contender we are."""
        us = self.seconds.get("ours", 0.0)
        return {name: s / us for name, s in self.seconds.items() if name != "ours"}


def print_row(row: Row) -> None:
    cells = [f"{name} {seconds * 1e3:.1f} ms" for name, seconds in row.seconds.items()]
    if row.gflops and row.section in ("forward", "train", *TUNING):
        cells[0] += f" ({row.gflops / row.seconds['ours']:.0f} GFLOP/s)"
    print(f"{row.section:8} {row.work:44} " + ", ".join(cells), flush=True)
    for name, ratio in row.ratios.items():
        target = row.targets.get(name)
        verdict = (
            ""
            if target is None
            else f"  (at least {target}: {'ok' if ratio >= target else 'MISSED'})"
        )
        print(f"{'':8} {'':44} {ratio:.2f}x {name}{verdict}")
    if row.note:
        print(f"{'':8} {'':44} {row.note}")


def write(rows: list[Row], out: pathlib.Path, repeats: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    if have_torch():
        import torch

        versions["torch"] = torch.__version__
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": _cpu(), "device": jax.devices()[0].platform, "cores": _cores()},
        "versions": versions,
        "repeats": repeats,
        "rows": [{**dataclasses.asdict(row), "ratios": row.ratios} for row in rows],
    }
    for name, text in (
        ("bench.json", json.dumps(record, indent=1) + "\n"),
        ("bench.md", table(rows)),
    ):
        (out / name).write_text(text)
        print(f"wrote {out / name}")
    drawn = [row for row in rows if row.section in ("forward", "train")]
    if drawn:
        path = out / "bench.png"
        draw(drawn, path, record)
        print(f"wrote {path}")


def table(rows: list[Row]) -> str:
    """The rows as Markdown: ratios are how many times faster we are, bold where the aim is met."""

    def cell(row: Row, name: str) -> str:
        if name not in row.seconds:
            return ""
        ratio, target = row.ratios[name], row.targets.get(name)
        if target is None:
            return f"{ratio:.2f}x"
        bold = "**" if ratio >= target else ""
        return f"{bold}{ratio:.2f}x{bold} (aim {target:g}x)"

    others = ("jax.nn", "torch sdpa", "torch flex", "batch axis")
    lines = [
        "| work | ours | vs jax.nn | vs torch SDPA | vs torch flex | vs the batch axis | note |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.section in MODELS:
            continue
        kind = {"forward": "forward", "train": "forward + backward", "window": "forward"}
        work = ", ".join(filter(None, (kind.get(row.section), row.work)))
        if row.section == "decode":
            work = f"decode, {work}"
        cells = [f"{row.seconds['ours'] * 1e3:,.1f} ms", *(cell(row, name) for name in others)]
        lines.append(f"| {work} | " + " | ".join(cells) + f" | {row.note} |")
    lines += [
        "",
        "| work | ours | vs flax.nnx | vs torch | vs transformers | note |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.section in MODELS:
            ours = f"{row.seconds['ours'] * 1e3:,.0f} ms" if row.seconds else ""
            cells = [ours, *(cell(row, name) for name in ("flax", "torch", "transformers"))]
            lines.append(f"| {row.work} | " + " | ".join(cells) + f" | {row.note} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: pathlib.Path, record: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"ours": "#d1495b", "jax.nn": "#8d99ae", "torch sdpa": "#2b2d42"}
    sections = [s for s in ("forward", "train") if any(r.section == s for r in rows)]
    figure, panels = plt.subplots(
        1, len(sections), figsize=(5.6 * len(sections), 4.2), squeeze=False, layout="constrained"
    )
    titles = {"forward": "Forward", "train": "Forward + backward"}
    for panel, section in zip(panels[0], sections, strict=True):
        part = [r for r in rows if r.section == section]
        names = [n for n in colors if any(n in r.seconds for r in part)]
        for i, name in enumerate(names):
            at = np.arange(len(part)) + (i - (len(names) - 1) / 2) * 0.27
            speed = [r.gflops / r.seconds[name] if name in r.seconds else 0.0 for r in part]
            label = {"ours": "attention_jax"}.get(name, name)
            panel.barh(at, speed, height=0.25, color=colors[name], label=label)
        panel.set_yticks(range(len(part)), [r.work.replace(" heads", " h") for r in part])
        panel.invert_yaxis()
        panel.set_xlabel("GFLOP/s, counted dense (more is better)")
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


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))
