"""Checkpoints: runs resume bit for bit, and damaged checkpoints are skipped."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from compiling import flags_of_one_device
from flax import nnx
from line import LINE, Line, batches, equal, parameters, train_line

from experiments.training.checkpoints import LAST, Checkpoints
from experiments.training.progress import Progress
from experiments.training.runs import Flags

# --- Resuming.


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = train_line(tmp_path / "whole", steps=40, evaluations=4, ema=0.9)

    class InterruptedRunError(Exception):
        pass

    def interrupted(config, data, step, rows):
        for n, batch in enumerate(batches(config, data, step, rows), step):
            if n == 25:
                raise InterruptedRunError
            yield batch

    with pytest.raises(InterruptedRunError):
        train_line(
            tmp_path / "parts",
            dataclasses.replace(LINE, batches=interrupted),
            steps=40,
            evaluations=4,
            ema=0.9,
        )
    flags = Flags(resume=True)
    parts = train_line(tmp_path / "parts", flags=flags, steps=40, evaluations=4, ema=0.9)
    assert equal(parameters(whole), parameters(parts))
    one, two = (
        [{k: x for k, x in point.items() if k != "seconds"} for point in run.progress.curve]
        for run in (whole, parts)
    )
    assert one == two
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)
    assert steps.count(40) == 2  # a loss and a score


def program(folder, steps):
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"XLA_FLAGS": flags_of_one_device(), "PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("line.py")), str(folder), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


def is_saving(folder):
    return any("tmp" in path.name for path in (folder / "checkpoints").glob("*/*"))


@pytest.mark.slow
def test_repeatedly_killed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    steps = 250
    with program(tmp_path / "whole", steps) as whole:
        assert whole.wait() == 0
    folder, rng = tmp_path / "killed", np.random.default_rng(0)
    kills, during_a_save = 0, 0
    while not (folder / "parameters.npz").exists():
        with program(folder, steps) as run:
            run.stdout.readline()  # it has started
            last = folder / "checkpoints" / LAST
            before = {path.name for path in last.glob("*")}
            # Wait for progress; then kill at any moment, or in the middle of a save.
            while run.poll() is None and {path.name for path in last.glob("*")} == before:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
            while kills % 2 and run.poll() is None and not is_saving(folder):
                pass
            if kills < 6:
                during_a_save += is_saving(folder)
                run.send_signal(signal.SIGKILL)
                kills += 1
            run.wait()
    assert kills == 6
    assert during_a_save >= 2
    one, two = (np.load(tmp_path / name / "parameters.npz") for name in ("whole", "killed"))
    assert equal(dict(one), dict(two))


def test_progress_survives_json():
    progress = Progress("error", False).after(1.0, 0.5)
    progress, _ = progress.scored({"error": 0.25}, 0.6)
    again = Progress.from_notes(progress, json.loads(json.dumps(progress.notes())))
    assert again == progress
    assert (
        Progress.from_notes(progress, json.loads(json.dumps(Progress("error", False).notes()))).step
        == 0
    )


# --- Checkpoints.


@pytest.fixture
def state():
    return nnx.state(Line(nnx.Rngs(0)), nnx.Param)


def test_newest_two_checkpoints_are_kept_and_the_newest_is_restored(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        assert checkpoints.save(
            LAST, step, jax.tree.map(lambda x, s=step: x * 0 + s, state), {"n": step}
        )
    assert {path.name for path in (tmp_path / LAST).iterdir()} == {"2", "3"}
    found = checkpoints.restore(LAST, state)
    assert (found.step, found.notes) == (3, {"n": 3})
    assert all((np.asarray(x) == 3).all() for x in jax.tree.leaves(found.state))


def test_restore_without_checkpoints_is_none(tmp_path, state):
    assert Checkpoints(tmp_path).restore(LAST, state) is None


DAMAGES = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "garbled": lambda file: file.write_bytes(bytes(255 - x for x in file.read_bytes())),
    "gone": lambda file: file.unlink(),
}


def saved(folder, state, *steps):
    checkpoints = Checkpoints(folder)
    for step in steps:
        assert checkpoints.save(LAST, step, state, {"n": step})
    return checkpoints


def files(folder):
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def largest(folder):
    """The largest file of data."""
    return max(folder.rglob("d/*"), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, state, damage):
    checkpoints = saved(tmp_path, state, 1, 2)
    file = largest(tmp_path / LAST / "2")
    DAMAGES[damage](file)
    with pytest.warns(RuntimeWarning) as caught:
        found = checkpoints.restore(LAST, state)
    (warning,) = caught
    for words in (str(file), "step 2 is damaged", "using step 1"):
        assert words in str(warning.message)
    assert "\n" not in str(warning.message)
    assert found.step == 1
    saved(tmp_path, state, 2)  # is written again
    assert checkpoints.restore(LAST, state).step == 2


def test_damage_to_any_file_of_a_checkpoint_is_noticed(tmp_path, state):
    checkpoints = saved(tmp_path, state, 1, 2)
    all_files = files(tmp_path / LAST / "2")
    assert len(all_files) > 5
    for file in all_files:
        before = file.read_bytes()
        for damage in DAMAGES:
            if (file.name, damage) == ("sums.json", "gone"):
                continue
            DAMAGES[damage](file)
            with pytest.warns(RuntimeWarning, match="step 2 is damaged"):
                assert checkpoints.restore(LAST, state).step == 1
            file.write_bytes(before)
    assert checkpoints.restore(LAST, state).step == 2


@pytest.mark.parametrize("left", [None, "state", "notes"])
def test_emptied_checkpoint_is_skipped(tmp_path, state, left):
    checkpoints = saved(tmp_path, state, 1, 2)
    for path in (tmp_path / LAST / "2").iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.warns(RuntimeWarning, match=r"step 2 is damaged: .*; using step 1"):
        assert checkpoints.restore(LAST, state).step == 1


# A run that was killed before writing checksums, or an older version, leaves none.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["state", "notes"])
def test_damage_is_noticed_without_checksums(tmp_path, state, damage, part):
    checkpoints = saved(tmp_path, state, 1, 2)
    (tmp_path / LAST / "2" / "sums.json").unlink()
    assert checkpoints.restore(LAST, state).step == 2
    for file in files(tmp_path / LAST / "2" / part):
        DAMAGES[damage](file)
    with pytest.warns(RuntimeWarning, match=r"step 2 is damaged"):
        assert checkpoints.restore(LAST, state).step == 1


def test_no_intact_checkpoint_raises(tmp_path, state):
    checkpoints = saved(tmp_path, state, 1, 2)
    cut = [largest(tmp_path / LAST / step) for step in "12"]
    for file in cut:
        DAMAGES["cut"](file)
    with pytest.raises(ValueError, match="no checkpoint is intact") as error:
        checkpoints.restore(LAST, state)
    for words in ("step 1 is damaged", "step 2 is damaged", *map(str, cut)):
        assert words in str(error.value)


def test_run_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path):
    flags = Flags(resume=True, save_every=1)
    whole = train_line(tmp_path, flags=flags, steps=3, evaluations=1)
    DAMAGES["cut"](largest(tmp_path / "checkpoints" / LAST / "3"))
    with pytest.warns(RuntimeWarning, match=r"step 3 is damaged: .*; using step 2"):
        again = train_line(tmp_path, flags=flags, steps=3, evaluations=1)
    assert equal(parameters(whole), parameters(again))


def test_checkpoint_of_another_model_raises(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(LAST, 1, state, {})
    with pytest.raises(ValueError, match=r"holds another model: 4 arrays differ"):
        checkpoints.restore(LAST, nnx.state(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Param))


@pytest.mark.slow
def test_full_disk_warns_and_keeps_the_checkpoint_before(tmp_path):
    # A limit on file sizes acts like a full disk: the write fails half-way.
    code = f"""if True:
        import resource, signal, sys, warnings
        import jax, numpy as np
        from pathlib import Path
        from experiments.training.checkpoints import LAST, Checkpoints
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoints = Checkpoints(Path({str(tmp_path)!r}))
        state = {{"x": np.random.default_rng(0).normal(size=100_000)}}
        assert checkpoints.save(LAST, 1, state, {{"n": 1}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not checkpoints.save(LAST, 2, state, {{"n": 2}})
        assert any("could not be saved" in str(w.message) for w in caught), caught
        found = checkpoints.restore(LAST, state)
        assert found.step == 1, found
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert checkpoints.save(LAST, 3, state, {{"n": 3}})
        assert checkpoints.restore(LAST, state).step == 3
        assert sorted(p.name for p in Path({str(tmp_path)!r}, LAST).iterdir()) == ["1", "3"]
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
