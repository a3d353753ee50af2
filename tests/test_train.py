"""The training loop: it learns, is reproducible, and reports failures."""

import dataclasses
import itertools
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
from flax import nnx
from helpers import slow
from line import LINE, PLAIN, Line, batches, parameters, train_line

from experiments.training import optimizers
from experiments.training.checkpoints import BEST, LAST, Checkpoints
from experiments.training.config import TrainConfig
from experiments.training.progress import Progress
from experiments.training.runs import Flags
from experiments.training.task import Loss


def equal(one, other):
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


# --- Learning.


def test_training_learns_and_the_same_seed_gives_the_same_weights(tmp_path):
    one, again, other = (
        train_line(tmp_path / name, PLAIN, seed=seed)
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    assert one.progress.best["error"] < 0.02
    assert one.progress.step == 300
    assert one.progress.finished
    assert equal(parameters(one), parameters(again))
    assert not equal(parameters(one), parameters(other))


def test_dropout_differs_between_steps_and_is_off_in_evaluation(tmp_path):
    recorded = []

    def loss(config, model, batch):
        dropped = model.dropout(jax.numpy.ones(100))
        jax.debug.callback(lambda x: recorded.append(np.asarray(x)), dropped)
        x, _ = batch
        return Loss(model(x).sum(), jax.numpy.float32(x.size))

    trained = train_line(tmp_path, dataclasses.replace(LINE, loss=loss), steps=3)
    jax.effects_barrier()
    assert len({x.tobytes() for x in recorded}) == 3
    assert trained.model.dropout.deterministic


def test_model_without_parameters_is_not_trained(tmp_path):
    task = dataclasses.replace(LINE, init=lambda *_: "counted", evaluate=lambda *_: {"error": 0.5})
    trained = train_line(tmp_path, task)
    assert (trained.model, trained.progress.step) == ("counted", 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_loss_names_the_step_and_saves_the_batch(tmp_path, bad):
    def with_bad(config, data, step):
        for n in itertools.count(step):
            x, y = next(batches(config, data, n))
            yield x, y + np.float32(bad if n == 2 else 0)

    with pytest.raises(FloatingPointError, match=rf"loss is {bad} at step 3; its batch is in"):
        train_line(tmp_path, dataclasses.replace(LINE, batches=with_bad), steps=5)
    saved = np.load(tmp_path / "batch-3.npz")
    assert not np.isfinite(saved["1"]).any()


def test_training_stops_at_the_time_limit_and_still_evaluates(tmp_path):
    trained = train_line(tmp_path, minutes=1e-9)
    assert trained.progress.step == 1
    assert trained.progress.best
    assert not trained.progress.finished  # it can be resumed


def test_patience_stops_training_and_the_best_weights_are_kept(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    task = dataclasses.replace(LINE, evaluate=lambda *_: {"error": next(scores)})
    trained = train_line(tmp_path, task, steps=60, evaluations=6, patience=2)
    assert trained.progress.step == 40
    assert (trained.progress.best, trained.progress.best_step) == ({"error": 1.0}, 20)
    saved = Checkpoints(tmp_path / "checkpoints").restore(BEST, trained.state.parameters)
    assert saved.step == 20


def test_log_has_losses_and_scores(tmp_path):
    train_line(tmp_path, steps=20, evaluations=2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_error" in line] == [10, 20]
    assert {"loss", "gradient_norm", "points_per_second"} <= lines[0].keys()


# --- Microbatches, devices, dtypes.


@pytest.mark.parametrize(
    "split",
    [slow({"accumulate": 4}), slow({"devices": 8}), {"accumulate": 2, "devices": 4}],
)
def test_microbatches_and_devices_give_the_same_losses(tmp_path, split):
    split = {"batch_size": 16, "steps": 30} | split
    one = train_line(tmp_path / "one", PLAIN, batch_size=16, steps=30)
    other = train_line(tmp_path / "other", PLAIN, **split)
    losses = [[point["loss"] for point in run.progress.curve] for run in (one, other)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for name, x in parameters(one).items():
        np.testing.assert_allclose(x, parameters(other)[name], rtol=1e-4, atol=1e-6)


def test_more_devices_than_there_are_raise(tmp_path):
    with pytest.raises(ValueError, match=r"devices must be at most 8.*got 16.*XLA_FLAGS"):
        train_line(tmp_path, batch_size=16, devices=16)


def test_bfloat16_is_used_in_both_passes_and_weights_stay_float32(tmp_path):
    recorded = []

    def loss(config, model, batch):
        recorded.append((model.linear.kernel[...].dtype, batch[0].dtype))
        return LINE.loss(config, model, batch)

    trained = train_line(tmp_path, dataclasses.replace(LINE, loss=loss), dtype="bfloat16", steps=3)
    assert set(recorded) == {(np.dtype("bfloat16"), np.dtype("bfloat16"))}
    for name, x in parameters(trained).items():
        assert x.dtype in (np.float32, np.int32), name


# --- The optimizer.


@pytest.mark.parametrize("schedule", ["cosine", "inverse_sqrt"])
def test_learning_rate_warms_up_and_decays(schedule):
    config = TrainConfig(steps=1000, warmup=0.1, learning_rate=0.5, schedule=schedule)
    rate = [float(optimizers.schedule(config)(step)) for step in range(1001)]
    assert rate[0] == 0
    assert max(rate) == pytest.approx(0.5, rel=1e-3)
    assert np.argmax(rate) in range(99, 102)
    assert all(a >= b for a, b in itertools.pairwise(rate[101:]))
    expected = 0.0 if schedule == "cosine" else 0.5 * np.sqrt(100 / 1000)
    assert rate[1000] == pytest.approx(expected, abs=1e-6)


def test_matrices_decay_and_biases_do_not():
    assert optimizers.decay_mask(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))) == {
        "kernel": True,
        "bias": False,
    }


def test_average_forgets_the_initial_weights_and_then_moves_slowly():
    average = 0.0
    for step in range(2000):
        average = float(optimizers.average(average, 1.0, 0.99, step))
        if step == 20:
            assert average > 0.95
    assert average == pytest.approx(1.0, abs=1e-3)
    assert float(optimizers.average(0.0, 1.0, 0.99, 10_000)) == pytest.approx(0.01, rel=1e-4)


def test_average_is_what_is_evaluated_and_saved(tmp_path):
    trained = train_line(tmp_path, ema=0.9, steps=20)
    averaged = nnx.state(trained.model, nnx.Param)
    assert equal(
        dict(jax.tree.flatten_with_path(averaged)[0]),
        dict(jax.tree.flatten_with_path(trained.state.average)[0]),
    )


# --- Resuming.


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = train_line(tmp_path / "whole", steps=40, evaluations=4, ema=0.9)

    class InterruptedRunError(Exception):
        pass

    def interrupted(config, data, step):
        for n, batch in enumerate(batches(config, data, step), step):
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
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
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


# --- TensorBoard and profiles.


def test_tensorboard_has_losses_and_scores(tmp_path):
    train_line(tmp_path, flags=Flags(tensorboard=True), steps=4, evaluations=1)
    (file,) = (tmp_path / "tensorboard").iterdir()
    written = file.read_bytes()
    for name in (b"loss", b"gradient_norm", b"points_per_second", b"validation_error"):
        assert name in written


@pytest.mark.slow
def test_profile_is_written_for_long_and_short_runs(tmp_path):
    train_line(tmp_path, flags=Flags(profile=True), steps=25, evaluations=1)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    train_line(tmp_path / "short", flags=Flags(profile=True), steps=12, evaluations=1)
    assert list(
        (tmp_path / "short" / "profile").rglob("*.xplane.pb")
    )  # a run that ends during the trace
