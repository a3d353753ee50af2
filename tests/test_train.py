"""The training loop: it learns, is reproducible, and reports failures."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import slow
from line import LINE, PLAIN, batches, equal, parameters, train_line

from experiments.training import optimizers
from experiments.training.checkpoints import BEST, Checkpoints
from experiments.training.config import TrainConfig
from experiments.training.runs import Flags
from experiments.training.task import Loss

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


def test_a_step_is_traced_once(tmp_path):
    traced = []

    def loss(config, model, batch):
        traced.append(1)
        return LINE.loss(config, model, batch)

    train_line(tmp_path, dataclasses.replace(LINE, loss=loss), steps=3)
    assert len(traced) == 1


def test_model_without_parameters_is_not_trained(tmp_path):
    task = dataclasses.replace(LINE, init=lambda *_: "counted", evaluate=lambda *_: {"error": 0.5})
    trained = train_line(tmp_path, task)
    assert (trained.model, trained.progress.step) == ("counted", 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_loss_names_the_step_and_saves_the_batch(tmp_path, bad):
    def with_bad(config, data, step, rows):
        for n in itertools.count(step):
            x, y = next(batches(config, data, n, rows))
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


def test_padding_and_lengths_of_all_batches_are_counted(tmp_path):
    def of_lengths(config, data, step, rows):
        for n in itertools.count(step):
            x, y = next(batches(config, data, n, rows))
            yield np.repeat(x, 2 + n % 2, axis=1), y

    task = dataclasses.replace(
        PLAIN,
        batches=of_lengths,
        loss=lambda config, model, batch: LINE.loss(config, model, (batch[0][:, :1], batch[1])),
        real=lambda batch: np.arange(batch[0].shape[1]) < np.full((8, 1), 2),
    )
    progress = train_line(tmp_path, task, steps=3, batch_size=8).progress
    assert (progress.tokens, progress.padding) == (8 * (2 + 3 + 2), 8)
    assert progress.lengths == (2, 3)


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


@pytest.mark.slow
def test_average_is_what_is_evaluated_and_saved(tmp_path):
    trained = train_line(tmp_path, ema=0.9, steps=20)
    averaged = nnx.state(trained.model, nnx.Param)
    assert equal(
        dict(jax.tree.flatten_with_path(averaged)[0]),
        dict(jax.tree.flatten_with_path(trained.state.average)[0]),
    )


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
