"""``card``: its command line, processes, items and calls. The dry run is a step of the gate."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from attention_jax import testing
from attention_jax.api import explain
from attention_jax.backends import Blockwise
from attention_jax.backends.pallas_gpu import run as pallas_gpu
from attention_jax.backends.pallas_gpu.launch import Tiles
from attention_jax.testing.problems import problem
from experiments.__main__ import main
from experiments.card import (
    calls,
    command,
    contenders,
    contract,
    speed,
    tiles,
    timing,
    training,
    worker,
)
from experiments.card.parts import PARTS, Setting

ROOT = pathlib.Path(__file__).parents[1]
# Not on every machine that has a card.
OPTIONAL = ("tyro", "beartype", "tensorboardX", "pooch")


def rows(out):
    return [json.loads(line) for line in (out / worker.RECORDS).read_text().splitlines()]


# --- The command line.


def test_parts_run_in_this_order():
    names = [part.name for part in PARTS]
    assert names == ["environment", "contract", "speed", "tiles", "training", "presets"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "1"], "--minutes must be at least 2, got 1"),
        (["--minutes", "nan"], "--minutes must be at least 2, got nan"),
        ([], "--minutes is required"),
        (["--minutes", "5", "--only", "tile"], "--only must name some of .*tiles.*, got tile"),
        (["--minutes", "5", "--only", ""], "--only must name some of .*, got nothing"),
        (["--minutes", "5", "--dri"], "unrecognized arguments: --dri"),
    ],
)
def test_bad_options(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["card", "--out", str(tmp_path / "out"), *arguments])
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_no_gpu_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    assert main(["card", "--out", str(tmp_path), "--minutes", "5"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "this machine has no NVIDIA GPU" in captured.err
    assert "--dry runs on any machine" in captured.err


@pytest.mark.parametrize("failing", [True, False])
def test_a_driver_without_a_gpu(tmp_path, capsys, monkeypatch, failing):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho 'No devices were found'\nexit {6 if failing else 0}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(command.shutil, "which", lambda name: str(tool))
    if failing:
        assert main(["card", "--out", str(tmp_path), "--minutes", "5"]) == 2
        assert "finds no GPU: No devices were found" in capsys.readouterr().err
    else:
        assert command.no_card() is None


@pytest.mark.parametrize("dry", [True, False])
def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path, capsys, monkeypatch, dry):
    (tmp_path / "file").write_text("")

    def never(*arguments):
        raise AssertionError("a part ran")

    monkeypatch.setattr(command, "run_parts", never)
    monkeypatch.setattr(command, "no_card", lambda: None)
    out = str(tmp_path / "file" / "out")
    assert main(["card", "--out", out, *(["--dry"] if dry else ["--minutes", "2"])]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


# --- Parts.


def test_lanes_share_the_cases(monkeypatch):
    every = contract.catalogue(False)[:50]
    monkeypatch.setattr(contract, "catalogue", lambda dry: every)
    setting = Setting(pathlib.Path(), dry=False, lane=0, lanes=4, seconds=1.0)
    shares = [
        [item.name for item in contract.items(dataclasses.replace(setting, lane=lane))]
        for lane in range(4)
    ]
    names = [f"{case.name}, {case.dtype}" for case in every]
    assert sorted(itertools.chain(*shares)) == sorted(names)
    assert len(set(names)) == len(names)


def test_a_dry_run_without_optional_packages(tmp_path):
    """Modules import, and a part runs, where these packages are missing."""
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in OPTIONAL:
        (absent / f"{name}.py").write_text(
            f'raise ModuleNotFoundError("No module named {name!r}", name="{name}")\n'
        )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(absent), str(ROOT)])}
    code = textwrap.dedent(f"""
        import importlib, sys
        for name in {OPTIONAL!r}:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                continue
            sys.exit(name + " was not hidden")
        from experiments.card.parts import PARTS
        for part in PARTS:
            importlib.import_module(part.module)
        from experiments.tasks import load
        from experiments.card.presets import TARGETS
        for task, *_ in TARGETS:
            assert load(task).presets["accelerator"]
        from experiments.__main__ import main
        out = {str(tmp_path / "out")!r}
        sys.exit(main(["card", "--dry", "--out", out, "--only", "environment"]))
    """)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    found = rows(tmp_path / "out")
    assert {row["part"] for row in found} == {"environment"}
    for row in found:
        assert row["dry"]
        assert row["card"] == "cpu"
        assert row["platform"] == "cpu"
        assert row["versions"]["jax"]
        assert row["date"]
    assert {"matrix_tflops", "gb_per_s"} <= {name for row in found for name in row}


def test_an_incomplete_dry_run_fails(tmp_path):
    def complete(*found):
        lines = [json.dumps({"part": "tiles", "item": "x", **row}) for row in found]
        (tmp_path / worker.RECORDS).write_text("\n".join(lines))
        return command.complete(tmp_path / worker.RECORDS, ["tiles"])

    assert complete({"n": 1}, {"skipped": "no package"})
    assert not complete({"skipped": "no package"})
    assert not complete({"n": 1}, {"error": "no"})
    assert not complete({"n": 1}, worker.LATE)


def test_summary_counts_and_names_problems(tmp_path):
    found = [{"part": "tiles", "item": "a"}, {"part": "tiles", "item": "b", "error": "x\ny"}]
    file = tmp_path / worker.RECORDS
    file.write_text("\n".join(map(json.dumps, found)))
    assert command.summary(file) == [
        "tiles: 1 results, 1 errors, 0 skipped",
        "  tiles, b: error: x",
    ]


# --- Correctness.


def test_the_core_cases_come_first_in_every_dtype():
    every = contract.catalogue(False)
    core = [case.name for case in testing.cases(tag="core")]
    seen = list(dict.fromkeys(case.name for case in every))
    assert seen[:10] == core[:10]
    first = [case for case in every if case.name == core[0]]
    assert [case.dtype for case in first] == list(contract.DTYPES)
    assert {case.dtype for case in every} == set(contract.DTYPES)


@pytest.mark.parametrize("case", contract.FOR_CUDNN, ids=lambda case: case.name)
def test_cases_for_cudnn_are_supported_by_it(case):
    p = problem(dataclasses.replace(case, dtype="bfloat16"))
    x = p.planted
    reasons = explain(x.query, x.key, x.value, mask=p.mask, platform="gpu").reasons
    assert not reasons["cudnn"].startswith("cannot")


def test_verdicts():
    def row(verdict, error=1.0):
        return testing.Row("case", "out", error, 2.0, verdict)

    assert contract.verdict((row("ok", 0.5), row("ok"))) == {"verdict": "ok", "worst": 0.5}
    assert contract.verdict((row("refused: no"),)) == {"verdict": "refused", "reason": "no"}
    failed = contract.verdict((row("ok"), row("wrong")))
    assert failed["verdict"] == "failed"
    assert [r["verdict"] for r in failed["rows"]] == ["wrong"]


# --- Speed.

DRY_CALLS = tuple(calls.calls(True))


def test_every_kind_is_timed():
    assert [call.kind for call in DRY_CALLS] == list(calls.KINDS)
    full = list(calls.calls(False))
    assert len(set(full)) == len(full)
    assert {call.kind for call in full[: len(calls.KINDS)]} == set(calls.KINDS)
    for call in full:
        if call.kind == "decode":
            assert call.S == 32_768
        else:
            assert call.B * call.T == 16_384
            assert call.N * call.H == 2048
    lengths = {call.T for call in full if call.kind == "causal" and call.H == 64}
    assert lengths == {512, 1024, 2048, 4096, 8192, 16_384}


@pytest.mark.parametrize("call", DRY_CALLS, ids=str)
def test_pairs_are_those_of_the_mask(call):
    mask = call.options(call.documents)["mask"]
    dense = np.ones((call.B, 1, call.T, call.S), bool)
    if mask is not None:
        dense = np.broadcast_to(
            mask.to_dense(call.T, call.S, B=call.B, N=1), (call.B, 1, call.T, call.S)
        )
    assert call.pairs == dense.sum()
    assert call.flops(backward=True) == 3.5 * 4 * call.N * call.H * dense.sum()


@pytest.mark.parametrize(
    "call", [c for c in DRY_CALLS if c.kind in ("dense", "causal", "window", "gqa", "decode")],
    ids=str,
)  # fmt: skip
def test_jax_nn_computes_the_same(call):
    q, k, v, *_ = call.arrays()
    ours = contenders._ours("xla", call)(q, k, v)
    with jax.numpy_dtype_promotion("standard"):
        theirs = contenders._jax_nn(True, call)(q, k, v)
    np.testing.assert_allclose(
        np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=0.03, rtol=0.03
    )


def test_records_of_speed():
    call = calls.Call("causal", 1, 64, 64, 2, 2, 16)
    timed = timing.Timed(each=1e-3, spread=1e-4, queued=1e-5, calls=7)
    found = speed.results(call, "ours", True, timed, rate=2.0)
    assert found["tflops"] == pytest.approx(3.5 * 4 * 2 * (64 * 65 / 2) * 16 / 1e-3 / 1e12)
    assert found["share"] == found["tflops"] / 2
    assert found["direction"] == "forward + backward"
    assert not found["launch_bound"]
    assert timed._replace(queued=1e-3).fields()["launch_bound"]


def test_one_failing_contender_leaves_the_others(monkeypatch):
    def refusing(call):
        raise NotImplementedError("not this")

    def failing(call):
        return lambda q, k, v: q + k[:, :1, :, :3]

    table = {"refusing": refusing, "failing": failing}
    table["right"] = lambda call: contenders._ours(Blockwise(16, 16), call)
    monkeypatch.setattr(speed, "of_jax", lambda dry: table)
    found = list(speed.of_call(calls.Call("decode", 1, 1, 64, 2, 2, 16), True, None))
    by_name = {row["implementation"]: row for row in found}
    assert by_name["refusing"]["refused"] == "not this"
    assert "error" in by_name["failing"]
    assert "traceback" in by_name["failing"]
    assert by_name["right"]["ms"] > 0
    assert by_name["right"]["first_s"] > 0
    assert by_name["right"]["extra_mib"] > 0


def test_queued_calls_are_waited_for_once_a_round():
    log = []
    timed = timing.queued(lambda: log.append("call"), lambda x: log.append("wait"), least=0.0)
    assert timed.calls == 1
    assert log == ["call", "wait"] * 5
    log.clear()
    timed = timing.queued(
        lambda: (time.sleep(0.002), log.append("call")), lambda x: log.append("wait"), least=0.01,
        rounds=2,
    )  # fmt: skip
    assert log[4:] == (["call"] * timed.calls + ["wait"]) * 2
    assert timed.calls >= 2
    assert timed.each >= 0.002
    assert timed.queued >= 0.002


# --- Tiles.


def test_tiles_that_are_tried_fit_a_hopper_card():
    for H, backward in itertools.product((64, 128), (False, True)):
        found = tiles.candidates(H, backward=backward, dry=False)
        assert len(found) > 15
        assert len(set(found)) == len(found)
        used = [pallas_gpu.shared_bytes(x, H, H, 2, backward=backward) for x in found]
        assert max(used) <= tiles.HOPPER
        assert min(used) <= pallas_gpu.SHARED_MEMORY


def tuned(**row):
    return {"part": "tiles", "card": "a card", "date": "2026-11-27", "versions": {"jax": "1"},
            "pass": "forward", "H": 128, "fits_everywhere": True, **row}  # fmt: skip


def test_the_fastest_tiles_become_the_table(monkeypatch):
    found = [
        tuned(tiles=[64, 64, 4, 2], ms=2.0),
        tuned(tiles=[128, 64, 8, 2], ms=1.0),
        tuned(tiles=[128, 128, 8, 4], ms=0.5, fits_everywhere=False),
        tuned(tiles=[32, 32, 4, 2], ms=3.0, **{"pass": "backward", "H": 64}),
        {"part": "speed", "ms": 0.1},
    ]
    scope = {}
    exec(tiles.source(found), scope)
    table = scope["TUNED"]
    assert table == {("forward", 128, 2): (128, 64, 8, 2), ("backward", 64, 2): (32, 32, 4, 2)}
    assert "Measured on a card, 2026-11-27, jax 1." in tiles.source(found)

    table["forward", 128, 2] = (128, 32, 8, 2)
    monkeypatch.setattr(pallas_gpu, "TUNED", table)
    chosen = pallas_gpu.choose_tiles(pallas_gpu.FORWARD, 4096, 4096, 128, 128, 2)
    assert chosen == Tiles(128, 32, 8, 2)
    assert pallas_gpu.choose_tiles(pallas_gpu.FORWARD, 16, 4096, 128, 128, 2)[0] == 16
    assert pallas_gpu.choose_tiles(pallas_gpu.BACKWARD, 4096, 4096, 64, 64, 2)[:2] == (32, 32)
    untuned = pallas_gpu.choose_tiles(pallas_gpu.FORWARD, 4096, 4096, 128, 128, 4)
    assert untuned in pallas_gpu.FORWARD


def test_tuned_tiles_that_do_not_fit_are_passed_over(monkeypatch):
    monkeypatch.setattr(pallas_gpu, "TUNED", {("forward", 128, 2): (128, 128, 8, 4)})
    chosen = pallas_gpu.choose_tiles(pallas_gpu.FORWARD, 4096, 4096, 128, 128, 2)
    assert chosen in pallas_gpu.FORWARD


# --- Models.


def test_flops_of_a_step_are_those_of_124_million_parameters():
    short, long = training.Size(8, 1024), training.Size(1, 16_384)
    per_token = [size.flops / size.B / size.T for size in (short, long)]
    weights = 6 * 123.5e6
    assert per_token[0] == pytest.approx(weights + 12 * 12 * 768 * 512.5, rel=1e-3)
    assert per_token[1] == pytest.approx(weights + 12 * 12 * 768 * 8192.5, rel=1e-3)
