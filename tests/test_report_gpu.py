"""The GPU part of the speed page and of the README, from made-up records."""

import json

import numpy as np
import pytest

from experiments.report import gpu, speed, tables
from experiments.report.tables import Options

RUN = {
    "card": "NVIDIA H100",
    "platform": "gpu",
    "versions": {"jax": "0.11.2", "torch": "2.11.0"},
    "date": "2026-12-01",
    "dry": False,
}
CAUSAL = "causal, B=4 T=4096 N=16 H=128"


def row(part, item="x", **fields):
    return RUN | {"part": part, "item": item} | fields


def timed(implementation, ms, *, direction="forward", kind="causal", **fields):
    work = {"causal": 100.0, "decode": 1.0}[kind]
    call = {"causal": CAUSAL, "decode": "decode, B=8 T=1 S=32768 N=32 K=8 H=128"}[kind]
    sizes = {"T": 4096 if kind == "causal" else 1, "H": 128}
    measured = {"ms": ms, "tflops": work / ms, "share": work / ms / 800, "launch_bound": False}
    same = {"implementation": implementation, "kind": kind, "call": call, "direction": direction}
    return row("speed", call, **same, **sizes, **measured) | fields


RECORDS = [
    row("environment", "identity", driver="580.1"),
    row("environment", "copy", gb_per_s=3000.0, ms=1.0),
    row("environment", "matrix", n=8192, matrix_tflops=800.0, ms=1.0),
    row("environment", "matrix", n=4096, matrix_tflops=700.0, ms=1.0),
    timed("ours, pallas_gpu", 0.4),
    timed("ours, cudnn", 0.2),
    timed("jax.nn, cudnn", 0.25),
    timed("torch, flex", 0.5),
    timed("ours, pallas_gpu", 2.0, direction="forward + backward"),
    timed("torch, flex", 1.0, direction="forward + backward"),
    timed("ours, auto", 0.1, kind="decode", gb_per_s=2500.0),
    timed("torch, SDPA", 0.2, kind="decode", gb_per_s=1250.0, launch_bound=True),
    row("speed", CAUSAL, implementation="fa4_jax", call=CAUSAL, refused="no"),
    row("speed", CAUSAL, implementation="tokamax", call=CAUSAL, error="x", traceback="y"),
    row("speed", "packages", implementations=["tokamax"], skipped="tokamax is not installed"),
    row("training", work="training step, 8 x 1024", implementation="ours", tokens_per_s=3e5,
        mfu=0.4),
    row("training", work="training step, 8 x 1024", implementation="flax.nnx, cudnn",
        tokens_per_s=2e5, mfu=0.3),
    row("training", work="generate", implementation="ours", tokens_per_s=500.0),
    row("presets", task="shakespeare", preset="accelerator", metric="nats", score=1.47,
        target=1.48, reached=True, steps=900, of_steps=5000, seconds=50.0),
    row("contract", "a", implementation="pallas_gpu", dtype="bfloat16", verdict="failed", rows=[]),
    row("contract", "b", implementation="pallas_gpu", dtype="bfloat16", verdict="ok", worst=0.5),
    row("contract", "a", implementation="cudnn", dtype="bfloat16", verdict="refused", reason="no"),
]  # fmt: skip


def write(folder, records, name="card-2026-12-01.jsonl"):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "experiments" / "results"
    folder.mkdir(parents=True)
    return folder


def test_without_records_nothing_is_measured(results):
    assert gpu.section(results) == []
    assert gpu.draw(results) is None
    assert "GPUs and TPUs: not measured." in speed.page(results)
    assert gpu.paragraph(results) == "Speed on GPUs: not measured.\n"


def test_a_dry_run_is_no_measurement(results):
    write(results, [record | {"dry": True, "card": "cpu"} for record in RECORDS])
    assert "GPUs and TPUs: not measured." in speed.page(results)
    assert gpu.draw(results) is None


def test_page(results):
    write(results, RECORDS)
    page = speed.page(results)
    assert "GPUs: [below](#on-a-gpu). TPUs: not measured." in page
    assert "### NVIDIA H100" in page
    assert "2026-12-01, driver 580.1, jax 0.11.2, torch 2.11.0. Measured limits: " in page
    assert "bfloat16 matrix products 800 TFLOP/s, copies 3,000 GB/s." in page
    names = ["ours, auto", "ours, pallas_gpu", "ours, cudnn"]
    names += ["jax.nn, cudnn", "torch, SDPA", "torch, flex"]
    assert f"| call | {' | '.join(names)} | share of matrix rate |" in page
    assert f"| forward, {CAUSAL} |  | 250 | **500** | 400 |  | 200 | 62% |" in page
    assert f"| forward + backward, {CAUSAL} |  | 50 |  |  |  | **100** | 6% |" in page
    assert "| **2,500 GB/s** |  |  |  | 1,250 GB/s (launch-bound) |  |  |" in page
    assert "| training step, 8 x 1024 | 300,000 tokens/s | 1.50x | 40% |" in page
    assert "| generate | 500 tokens/s |  |  |" in page
    assert "| shakespeare, accelerator | **1.47 nats** | 1.48 | 900 of 5,000 | 50 |" in page
    assert "| pallas_gpu | bfloat16 | 1 | 0 | 1 |" in page
    assert "| cudnn | bfloat16 | 0 | 1 | 0 |" in page
    assert "](card.png)" in page


def test_a_later_run_replaces_what_it_measured_again(results):
    write(results, RECORDS)
    again = [timed("ours, pallas_gpu", 0.1, date="2026-12-02"), RECORDS[-3] | {"verdict": "ok"}]
    write(results, again, "card-2026-12-02.jsonl")
    page = speed.page(results)
    assert f"| forward, {CAUSAL} |  | **1,000** | 500 | 400 |  | 200 | 125% |" in page
    assert "| pallas_gpu | bfloat16 | 2 | 0 | 0 |" in page
    assert "2026-12-01 to 2026-12-02" in page


def test_each_card_has_its_own_tables(results):
    write(results, [*RECORDS, timed("ours, auto", 0.3, card="NVIDIA H200")])
    page = speed.page(results)
    assert page.index("### NVIDIA H100") < page.index("### NVIDIA H200")


def test_plot_has_a_bar_for_each_implementation(results):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    write(results, RECORDS)
    assert gpu.draw(results) == results / gpu.PICTURE
    pixels = imread(results / gpu.PICTURE)[..., :3]
    for name in ("ours, pallas_gpu", "ours, cudnn", "jax.nn, cudnn", "torch, flex"):
        near = np.abs(pixels - np.array(to_rgb(gpu.COLORS[name]))).max(-1) < 0.01
        assert near.sum() > 100, name


def test_readme_is_written_between_the_marks(results, monkeypatch, capsys):
    monkeypatch.setattr(tables.tasks, "TASKS", {})
    readme = results.parents[1] / "README.md"
    readme.write_text(f"before\n{gpu.START}old\n{gpu.END}after\n")
    write(results, RECORDS)
    assert tables.main(Options(results, check=True)) == 1
    assert "old" in readme.read_text()
    assert tables.main(Options(results)) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{gpu.START}TFLOP/s of causal attention over 4,096 tokens")
    assert text.endswith(f"{gpu.END}after\n")
    assert (
        "- NVIDIA H100, forward: `ours, pallas_gpu` 250, `ours, cudnn` 500, `jax.nn, cudnn` 400, "
        "`torch, flex` 200\n"
    ) in text
    assert tables.main(Options(results, check=True)) == 0
    assert (results / gpu.PICTURE).exists()
    readme.write_text("no marks")
    with pytest.raises(ValueError, match=r"README\.md must hold the lines <!-- gpu -->"):
        tables.main(Options(results))
