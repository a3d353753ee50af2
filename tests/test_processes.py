"""Training over a mesh and over several processes, on loopback addresses."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from compiling import flags_of_one_device
from flax import nnx
from line import LINE, PLAIN, Line, equal, parameters, train_line

from experiments.__main__ import main
from experiments.tasks import TASKS, fewshot, load
from experiments.tasks.fewshot import pretraining
from experiments.training import layout, runs
from experiments.training.config import choices
from experiments.training.runs import Flags
from experiments.training.steps import trainer
from experiments.training.task import Rows
from experiments.training.train import train

ROOT = Path(__file__).parents[1]
TIMEOUT = 120  # seconds for anything that processes do

# --- Meshes in one process.


@pytest.mark.slow
def test_losses_over_a_mesh_are_those_of_one_device(tmp_path):
    """With dropout: the masks are those of one device too."""
    options = {"batch_size": 16, "steps": 12, "accumulate": 2, "evaluations": 3}
    one, other = (
        train_line(tmp_path / name, flags=f, **options)
        for name, f in (("one", Flags()), ("other", Flags(mesh="data=4")))
    )
    losses = [[point["loss"] for point in run.progress.curve] for run in (one, other)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for name, x in parameters(one).items():
        np.testing.assert_allclose(x, parameters(other)[name], rtol=1e-4, atol=1e-6)


def losses(folder, *options):
    """The losses of a small decoder, by step."""
    arguments = ["--out", str(folder.parent), "--name", folder.name, "--evaluations", "1"]
    assert main(["train", "shakespeare", "--preset", "smoke", *arguments, *options]) == 0
    lines = (folder.parent / "shakespeare" / folder.name / "log.jsonl").read_text().splitlines()
    return [x["loss"] for x in map(json.loads, lines) if "loss" in x]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The losses on one device."""
    return losses(tmp_path_factory.mktemp("runs") / "one", "--steps", "2")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,model=2,context=2", "context=4", "model=2"])
def test_a_decoder_is_trained_over_a_mesh(tmp_path, expected, mesh):
    fsdp = () if mesh == "model=2" else ("--fsdp",)
    found = losses(tmp_path / "run", "--steps", "2", "--mesh", mesh, *fsdp)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def assert_in_shards(state, split):
    """No array is replicated that a rule shards."""
    arrays, expected = jax.tree.leaves(state), jax.tree.leaves(split.shardings(state))
    assert any(not x.is_fully_replicated for x in arrays)
    for x, placed in zip(arrays, expected, strict=True):
        assert x.sharding.is_equivalent_to(placed, x.ndim)


def recorded(seen):
    """``shakespeare``, with the models that are made and evaluated in ``seen``."""
    task = load("shakespeare")

    def init(*arguments):
        model = task.init(*arguments)
        seen.append(isinstance(jax.tree.leaves(nnx.state(model, nnx.Param))[0], jax.core.Tracer))
        return model

    def evaluate(config, model, data, split):
        seen.append(nnx.state(model, nnx.Param))
        return {"nats": 0.0}

    return dataclasses.replace(task, init=init, evaluate=evaluate)


@pytest.mark.slow
def test_a_model_is_created_in_shards():
    seen = []
    task = recorded(seen)
    config = dataclasses.replace(task.presets["smoke"], ema=0.9)
    split, data = layout.layout("data=2,model=2", fsdp=True), task.data(config)
    model = split.create(lambda: task.init(config, data, nnx.Rngs(0)))
    assert all(seen)
    assert_in_shards(nnx.state(model, nnx.Param), split)
    training = trainer(task.loss, config, model, split)
    for state in training.initial:
        assert_in_shards(state, split)
    assert_in_shards(nnx.state(training.model(training.initial.weights), nnx.Param), split)


@pytest.mark.slow
def test_a_run_evaluates_and_returns_shards(tmp_path):
    seen = []
    task = recorded(seen)
    config = dataclasses.replace(task.presets["smoke"], steps=2)
    split = layout.layout("data=2", fsdp=True)
    flags = Flags(mesh="data=2", fsdp=True)
    trained = train(task, config, task.data(config), tmp_path, flags)
    for state in (seen[-1], trained.state, nnx.state(trained.model, nnx.Param)):
        assert_in_shards(state, split)


def test_replicated_weights_are_evaluated_on_one_device():
    config = LINE.presets["only"]
    split = layout.layout("data=4", fsdp=False)
    training = trainer(LINE.loss, config, split.create(lambda: Line(nnx.Rngs(0))), split)
    for x in jax.tree.leaves(nnx.state(training.model(training.initial.weights))):
        assert x.sharding.device_set == {jax.devices()[0]}


@pytest.mark.parametrize("name", TASKS)
def test_models_are_traced_unless_they_are_fitted(name):
    task = load(name)
    preset = task.presets["smoke"]
    models = choices(type(preset), "model")
    assert set(task.untraced) <= set(models)
    for model in set(models) - set(task.untraced):
        config = dataclasses.replace(preset, model=model)
        data = task.data(config)
        made = nnx.eval_shape(lambda c=config, d=data: task.init(c, d, nnx.Rngs(0)))
        assert jax.tree.leaves(nnx.state(made, nnx.Param))


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(tmp_path, expected):
    first = ("--minutes", "1e-9", "--mesh", "data=4", "--fsdp")  # stops after one step
    assert len(losses(tmp_path / "run", "--steps", "2", *first)) == 1
    second = ("--resume", "--mesh", "data=2,model=2")
    found = losses(tmp_path / "run", "--steps", "2", *second)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mesh", "data=16"], r"devices of mesh data=16 must be at most 8.*got 16.*XLA_FLAGS"),
        (["--mesh", "modle=2"], r"unknown axis 'modle'; did you mean model\? Axes: data, model"),
        (["--mesh", "data=x"], r"size of at least 1 for data, got 'x'"),
        (["--mesh", "data=2,data=2"], r"axis data twice"),
        (
            ["--mesh", "context=5"],
            r"length of sequences must be a multiple of the 5 devices along",
        ),
        (
            ["--mesh", "model=7"],
            r"mesh has model=7, which divides no heads, hidden units or",
        ),
        (["--mesh", "data=8"], r"batch_size must be a multiple of accumulate x data, 8, got 4"),
        (["--mesh", "model=2", "--fsdp"], r"fsdp needs an axis data or context"),
        (["--mesh", "context=2", "--model", "gru"], r"axis context, but Recurrent has no transf"),
        (["--mesh", "data=2", "--devices", "2"], r"devices must be 1 with mesh"),
        (["--processes", "2"], r"processes and process need coordinator"),
        (["--coordinator", "127.0.0.1:1"], r"coordinator needs processes"),
        (["--coordinator", "auto"], r"coordinator auto found no processes to join"),
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
def test_invalid_layouts_are_errors_of_one_line(tmp_path, capfd, monkeypatch, options, said):
    monkeypatch.setattr(layout, "REACHABLE", 1)
    arguments = ["train", "shakespeare", "--preset", "smoke", "--out", str(tmp_path), *options]
    assert main(arguments) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    assert re.search(said, line), line


def test_a_mesh_that_is_wrong_leaves_no_run_behind(tmp_path):
    arguments = ["train", "shakespeare", "--preset", "smoke", "--out", str(tmp_path)]
    assert main([*arguments, "--mesh", "modle=2"]) == 2
    assert not list(tmp_path.iterdir())


def test_other_processes_learn_that_the_first_could_not_start(monkeypatch):
    def full(*arguments, **options):
        raise OSError("No space left on device")

    sent = []
    monkeypatch.setattr(runs, "agreed", sent.append)
    with pytest.raises(OSError, match="No space left"):
        runs.together(full, None, None, preset="cpu", flags=Flags())
    assert sent == [1]


# --- What each process reads.


def parts_of(batches):
    """The first batches whole, and of two and of four processes, joined."""
    for parts in (1, 2, 4):
        each = [itertools.islice(batches(Rows(i, i + 1, parts)), 2) for i in range(parts)]
        together = list(zip(*each, strict=True))
        assert len({np.shape(x)[0] for batch in together[0] for x in jax.tree.leaves(batch)}) == 1
        yield [jax.tree.map(lambda *xs: np.concatenate(xs), *batch) for batch in together]


@pytest.mark.parametrize("name", TASKS)
def test_the_rows_of_all_processes_are_the_batch_of_one(name):
    task = load(name)
    config = task.presets["smoke"]
    data = task.data(config)
    whole, *joined = parts_of(functools.partial(task.batches, config, data, 3))
    for batches in joined:
        chex.assert_trees_all_equal(batches, whole)


def test_the_rows_of_all_processes_in_pretraining_are_the_batch_of_one():
    config = fewshot.PRESETS["smoke"]
    data = fewshot.load(config)
    whole, *joined = parts_of(functools.partial(pretraining.masked_batches, config, data))
    for batches in joined:
        chex.assert_trees_all_equal(batches, whole)


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((8,), 0, [Rows(0, 2, 8), Rows(2, 4, 8), Rows(4, 6, 8), Rows(6, 8, 8)]),
        ((2, 4), 0, [Rows(0, 1, 2), Rows(0, 1, 2), Rows(1, 2, 2), Rows(1, 2, 2)]),
        ((4, 2), 1, [Rows(0, 2, 2)] * 4),
    ],
)
def test_a_process_reads_the_rows_of_its_devices(shape, axis, expected):
    """Of four processes with two devices each."""
    devices = [types.SimpleNamespace(process_index=i // 2) for i in range(8)]
    grid = np.array(devices).reshape(shape)
    assert [layout.rows_of(grid, axis, process) for process in range(4)] == expected


def test_a_batch_that_is_not_split_equally_raises():
    with pytest.raises(ValueError, match="a multiple of the 4 devices along data, got 6 examples"):
        Rows(0, 1, 4).of(np.arange(6))


# --- Several processes.


def environment():
    """One device to each process, and the tests' fast compiler flags."""
    return os.environ | {"XLA_FLAGS": flags_of_one_device(), "JAX_PLATFORMS": "cpu"}


@contextlib.contextmanager
def started(folder, steps, *, processes=2, pause=0.0, plain=False):
    """The processes of ``line.py``; each writes what it prints to ``folder/I.txt``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    running = []
    try:
        for i in range(processes):
            command = [sys.executable, "tests/line.py", str(folder), str(steps)]
            command += [f"127.0.0.1:{port}", str(processes), str(i), str(pause)]
            with (folder / f"{i}.txt").open("w") as output:
                running.append(
                    subprocess.Popen(
                        [*command, *(["plain"] if plain else [])],
                        cwd=ROOT,
                        env=environment(),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait(TIMEOUT)


@pytest.mark.slow
def test_processes_that_do_not_meet_end_with_the_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = "from experiments.training import layout; layout.REACHABLE = 2; "
    program += f"layout.connect('{address}', 2, 0)"
    command = [sys.executable, "-c", program]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )
    assert ended.returncode == 2
    assert re.search(
        f"^error: the 2 processes could not meet at coordinator {address} within 2 s", ended.stderr
    )


def finished(folder, steps, **options):
    """The parameters after processes have trained until the end."""
    with started(folder, steps, **options) as running:
        for i, process in enumerate(running):
            assert process.wait(TIMEOUT) == 0, (folder / f"{i}.txt").read_text()[-2000:]
    return dict(np.load(folder / "parameters.npz"))


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_as_one(tmp_path):
    def alone(name, steps):
        flags = Flags(resume=True, save_every=1)
        options = {"steps": steps, "evaluations": 4, "ema": 0.9}
        return parameters(train_line(tmp_path / name, PLAIN, flags=flags, **options))

    def compare(found, expected):
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-6)

    compare(finished(tmp_path / "two", 8, plain=True), alone("one", 8))
    first, second = ((tmp_path / "two" / f"{i}.txt").read_text() for i in range(2))
    assert "step 4" in first
    assert "step 4" not in second
    assert str(Rows(0, 1, 2)) in first
    assert str(Rows(1, 2, 2)) in second
    lines = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert len({line["step"] for line in map(json.loads, lines) if "loss" in line}) == 8
    compare(alone("two", 10), alone("one", 10))


def train_until_killed(folder, steps, killed):
    """Kills one process after the next checkpoint; the other must end within a minute."""

    def last():
        return max((int(x.name) for x in saved.glob("[1-9]*") if x.name.isdigit()), default=0)

    saved, until = folder / "checkpoints" / "last", time.monotonic() + TIMEOUT
    before = last()
    with started(folder, steps, pause=0.3) as running:
        while last() == before:
            assert all(process.poll() is None for process in running)
            assert time.monotonic() < until
            time.sleep(0.1)
        running[killed].kill()  # SIGKILL
        assert running[1 - killed].wait(60) != 0


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_resumes_with_the_same_bits(tmp_path):
    for killed in (1, 0):  # 0 is the coordinator
        train_until_killed(tmp_path, 10, killed)
        assert not (tmp_path / "parameters.npz").exists()
    assert equal(finished(tmp_path, 10), finished(tmp_path / "whole", 10))
