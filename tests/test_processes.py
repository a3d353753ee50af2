"""Training over a mesh and over several processes, on loopback addresses."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import slow
from line import equal, parameters, train_line

from experiments.__main__ import main
from experiments.training import layout
from experiments.training.runs import Flags

ROOT = Path(__file__).parents[1]

# --- Meshes in one process.


@pytest.mark.parametrize(
    "flags",
    [
        Flags(mesh="data=4,model=2", fsdp=True),
        slow(Flags(mesh="data=2,model=2")),
        slow(Flags(mesh="data=8", fsdp=True)),
    ],
)
def test_losses_over_a_mesh_are_those_of_one_device(tmp_path, flags):
    """With dropout: the masks are those of one device too."""
    options = {"batch_size": 16, "steps": 12, "accumulate": 2, "evaluations": 3}
    one, other = (
        train_line(tmp_path / name, flags=f, **options)
        for name, f in (("one", Flags()), ("other", flags))
    )
    losses = [[point["loss"] for point in run.progress.curve] for run in (one, other)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for name, x in parameters(one).items():
        np.testing.assert_allclose(x, parameters(other)[name], rtol=1e-4, atol=1e-6)


def test_a_run_resumes_on_another_mesh(tmp_path):
    options = {"batch_size": 16, "steps": 8, "evaluations": 2, "ema": 0.9}
    whole = train_line(tmp_path / "whole", **options)
    first = Flags(mesh="data=8", fsdp=True)
    train_line(tmp_path / "parts", flags=first, **options | {"minutes": 1e-9})
    resumed = train_line(
        tmp_path / "parts", flags=Flags(mesh="data=2,model=2", resume=True), **options
    )
    for name, x in parameters(whole).items():
        np.testing.assert_allclose(x, parameters(resumed)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "mesh", [slow("data=2,model=2,context=2"), slow("context=4"), "data=2,context=2"]
)
def test_a_decoder_is_trained_over_a_mesh(tmp_path, mesh):
    def losses(*options):
        name = "".join(options).strip("-").replace("=", "").replace(",", "-")
        arguments = ["--out", str(tmp_path), "--name", name or "one", "--evaluations", "1"]
        arguments += ["--steps", "2", *options]
        assert main(["train", "shakespeare", "--preset", "smoke", *arguments]) == 0
        lines = (tmp_path / "shakespeare" / (name or "one") / "log.jsonl").read_text().splitlines()
        return [x["loss"] for x in map(json.loads, lines) if "loss" in x]

    np.testing.assert_allclose(losses("--mesh", mesh, "--fsdp"), losses(), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mesh", "data=16"], r"devices of mesh data=16 must be at most 8.*got 16.*XLA_FLAGS"),
        (["--mesh", "modle=2"], r"unknown axis 'modle'; did you mean model\? Axes: data, model"),
        (["--mesh", "data=x"], r"size of at least 1 for data, got 'x'"),
        (["--mesh", "data=2,data=2"], r"axis data twice"),
        (["--mesh", "data=8"], r"batch_size must be a multiple of accumulate x data, 8, got 4"),
        (["--mesh", "model=2", "--fsdp"], r"fsdp needs an axis data or context"),
        (["--mesh", "context=2", "--model", "gru"], r"axis context, but Recurrent has no transf"),
        (["--mesh", "data=2", "--devices", "2"], r"devices must be 1 with mesh"),
        (["--processes", "2"], r"processes and process need coordinator"),
        (["--coordinator", "127.0.0.1:1"], r"coordinator needs processes"),
        (
            ["--coordinator", "here", "--processes", "2", "--process", "1"],
            r"coordinator must be HOST:PORT or auto, got 'here'",
        ),
        (
            ["--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "1"],
            r"coordinator 127.0.0.1:1 did not answer within 1 s",
        ),
    ],
)
def test_layouts_that_cannot_be_are_refused_in_one_line(
    tmp_path, capfd, monkeypatch, options, said
):
    monkeypatch.setattr(layout, "REACHABLE", 1)
    arguments = ["train", "shakespeare", "--preset", "smoke", "--out", str(tmp_path), *options]
    assert main(arguments) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    assert re.search(said, line), line


# --- Several processes.


def environment():
    """One device to each process, and the tests' fast compiler flags."""
    flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}


def start(folder, steps, *more, processes=2, pause=0.0):
    """The processes of ``line.py``; each writes what it prints to ``folder/I.txt``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    running = []
    for i in range(processes):
        command = [sys.executable, "tests/line.py", str(folder), str(steps)]
        if processes > 1:
            command += [f"127.0.0.1:{port}", str(processes), str(i), str(pause)]
        command += more
        with (folder / f"{i}.txt").open("w") as output:
            running.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT
                )
            )
    return running


def finish(folder, running, timeout=240):
    for i, process in enumerate(running):
        assert process.wait(timeout) == 0, (folder / f"{i}.txt").read_text()[-2000:]
    return dict(np.load(folder / "parameters.npz"))


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_as_one(tmp_path):
    two = finish(tmp_path / "two", start(tmp_path / "two", 8, "plain"))
    one = finish(tmp_path / "one", start(tmp_path / "one", 8, "plain", processes=1))
    for name, x in one.items():
        np.testing.assert_allclose(x, two[name], rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "two" / "1.txt").read_text().count("step 4")  # only process 0 prints
    lines = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert len({line["step"] for line in map(json.loads, lines) if "loss" in line}) == 8
    longer = finish(tmp_path / "two", start(tmp_path / "two", 10, "plain", processes=1))
    expected = finish(tmp_path / "one", start(tmp_path / "one", 10, "plain", processes=1))
    for name, x in expected.items():
        np.testing.assert_allclose(x, longer[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes_with_the_same_bits(tmp_path, killed):
    folder = tmp_path / "killed"
    running = start(folder, 60, pause=0.2)
    while not list((folder / "checkpoints" / "last").glob("[1-9]*")):
        assert all(process.poll() is None for process in running)
        time.sleep(0.1)
    running[killed].send_signal(signal.SIGKILL)
    running[killed].wait()
    at = time.monotonic()
    assert running[1 - killed].wait(60) != 0
    assert time.monotonic() - at < 60
    resumed = finish(folder, start(folder, 60))
    whole = finish(tmp_path / "whole", start(tmp_path / "whole", 60))
    assert equal(resumed, whole)
