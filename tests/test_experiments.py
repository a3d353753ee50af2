"""``python -m experiments``: what it lists and refuses, and that training and comparing work."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import compare, train
from experiments.__main__ import main
from experiments.tasks import TASKS, digits, load

TINY = dataclasses.replace(
    digits.PRESETS["smoke"], steps=4, batch_size=16, width=16, heads=2, depth=1
)


@pytest.fixture(scope="module")
def data():
    return digits.data(TINY)


# --- The command line.


def test_lists_verbs_and_tasks_without_importing_what_it_does_not_need():
    code = """if True:
        import sys
        from experiments.__main__ import main
        assert main([]) == 0
        heavy = {"jax", "matplotlib", "sklearn", "tyro"} & sys.modules.keys()
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("train", "compare", "bench", "--help"):
        assert word in done.stdout
    for name, row in TASKS.items():
        for said in (name, *row):
            assert said in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nope", ["unknown verb 'nope'", "train", "compare", "bench"]),
        ("train", ["needs a task", "digits"]),
        ("train nope", ["unknown task 'nope'", "digits"]),
        ("train digits nope", ["unknown option 'nope'", "--steps", "--patch"]),
        ("train digits --preset nope", ["unknown preset 'nope'", "cpu", "smoke"]),
        ("train digits --nope 1", ["unknown option '--nope'", "--steps", "--patch"]),
        ("train digits --attention nope", ["nope", "blockwise", "xla"]),
        ("train digits --steps 0", ["steps must be above 0"]),
        ("train digits --patch 3", ["patch must divide 8"]),
        ("compare --nope", ["unknown option '--nope'", "--quick", "--out"]),
        ("compare --only nope", ["nope", "blockwise", "jax.nn"]),
    ],
)
def test_a_mistake_ends_with_code_2_and_lists_what_is_valid(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for words in said:
        assert words in printed


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads_under_its_name(name):
    assert load(name).name == name


# --- The loop, on a task that is done in no time: the line y = 2 x - 1.


def line_batches(config, data, rng):
    while True:
        x = rng.normal(size=(config.batch_size, 1)).astype(np.float32)
        yield x, data[0] * x + data[1]


def line_loss(model, batch, key):
    x, y = batch
    noise = 0.01 * jax.random.normal(key, y.shape)
    return jnp.mean((model(x) + noise - y) ** 2)


LINE = train.Task(
    name="line",
    presets={"only": train.Config(steps=300, batch_size=8, learning_rate=0.1)},
    data=lambda config: np.float32([2, -1]),
    init=lambda config, rngs: nnx.Linear(1, 1, rngs=rngs),
    batches=line_batches,
    loss=line_loss,
    evaluate=lambda model, data, split: {"bias": float(model.bias[0])},
    report=lambda model, data, stem: [],
)


def train_line(task=LINE, **changes):
    config = dataclasses.replace(LINE.presets["only"], **changes)
    return train.train(task, config, task.data(config))


def test_training_learns_and_the_same_seed_learns_the_same():
    one, again, other = (train_line(seed=seed) for seed in (0, 0, 1))
    assert one.loss < 1e-3
    assert one.validation["bias"] == pytest.approx(-1, abs=0.02)
    assert one.steps == 300
    assert (one.loss, one.validation) == (again.loss, again.validation)
    assert one.loss != other.loss


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_no_number_ends_training_and_names_the_step(bad):
    def batches(config, data, rng):
        good = line_batches(config, data, rng)
        for step in itertools.count(1):
            x, y = next(good)
            yield x, y + np.float32(bad if step == 3 else 0)

    with pytest.raises(FloatingPointError, match=f"line: the loss is {bad} at step 3"):
        train_line(dataclasses.replace(LINE, batches=batches), steps=5)


def test_training_stops_when_the_time_is_up_and_still_scores():
    trained = train_line(minutes=1e-9)
    assert trained.steps == 1
    assert trained.validation


def test_weights_decay_and_biases_do_not():
    assert train.decays(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))) == {
        "kernel": True,
        "bias": False,
    }


@pytest.mark.slow
def test_a_smoke_run_writes_a_line_of_json_and_a_picture(tmp_path, capsys):
    from matplotlib.image import imread

    options = f"--steps 3 --width 16 --depth 1 --seed 7 --attention xla --out {tmp_path}"
    assert main(["train", "digits", "--preset", "smoke", *options.split()]) == 0
    file = tmp_path / "digits" / "smoke.jsonl"
    picture = tmp_path / "digits" / "smoke-seed7-attention.png"
    printed = capsys.readouterr().out
    assert "test: accuracy 0." in printed
    assert str(file) in printed
    assert str(picture) in printed

    record = json.loads(file.read_text())  # one line
    assert record["steps"] == record["config"]["steps"] == 3
    assert record["seed"] == 7
    assert record["config"]["attention"] == "xla"
    assert record["seconds"] > 0
    assert "cpu" in record["device"]
    assert record["versions"]["jax"] == jax.__version__
    assert set(record["metrics"]) == {"loss", "validation", "test"}
    assert record["parameters"] > 1000

    pixels = imread(picture)
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50


# --- The digits.


def test_the_splits_are_disjoint_stratified_and_the_same_for_every_seed(data):
    assert {name: len(split.labels) for name, split in data.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    for split in data.values():
        assert split.images.dtype == np.float32
        assert split.images.min() == 0
        assert split.images.max() == 1
        share = np.bincount(split.labels, minlength=10) / len(split.labels)
        np.testing.assert_allclose(share, 0.1, atol=0.01)
    together = np.concatenate([split.images for split in data.values()])
    everything = digits.data(dataclasses.replace(TINY, seed=1))
    assert len(np.unique(together, axis=0)) == 1797  # no image twice
    np.testing.assert_array_equal(everything["test"].images, data["test"].images)


def test_shifted_moves_images_by_whole_pixels():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(50, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(digits.shifted(images, 0, rng), images)
    seen = set()
    for before, after in zip(images, digits.shifted(images, 1, rng), strict=True):
        padded = np.pad(before, 1)
        windows = {(i, j): padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)}
        found = [where for where, w in windows.items() if np.array_equal(w, after)]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == 9


def test_patches_are_row_by_row():
    x = digits.patches(jnp.arange(64.0).reshape(1, 8, 8), 2)
    assert x.shape == (1, 16, 4)
    assert x[0, 0].tolist() == [0, 1, 8, 9]
    assert x[0, 1].tolist() == [2, 3, 10, 11]
    assert x[0, 4].tolist() == [16, 17, 24, 25]


def test_what_the_class_token_attends_to_is_what_the_last_block_uses(data):
    model = digits.Classifier(TINY, nnx.Rngs(0))
    images = jnp.asarray(data["test"].images[:5])
    weights = digits.class_token_attention(model, images)
    assert weights.shape == (5, TINY.heads, 17)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    (block,) = model.blocks
    x = block.norm_attend(model.tokens(images))
    value = block.attend.split_heads(block.attend.value(x))
    read = jnp.einsum("bns,bsnh->bnh", weights, value).reshape(5, -1)
    np.testing.assert_allclose(block.attend.out(read), block.attend(x, None)[:, 0], atol=1e-5)


# --- Comparing.


def test_compare_tells_right_from_wrong_and_refused(monkeypatch, tmp_path, capsys):
    few = ("no option", "rows that see nothing: mask", "sinks")
    monkeypatch.setattr(compare, "OPTIONS", {name: compare.OPTIONS[name] for name in few})
    file = tmp_path / "compare.json"
    options = compare.Options(quick=True, gradients=False, only=("xla", "jax.nn"), out=file)
    assert compare.main(options) == 0
    record = json.loads(file.read_text())
    assert record["table"] == {
        "no option": {"xla": "ok", "jax.nn": "ok"},
        "rows that see nothing: mask": {"xla": "ok", "jax.nn": "differs"},
        "sinks": {"xla": "ok", "jax.nn": "refused"},
    }
    printed = capsys.readouterr().out
    assert "=== xla (ours)" in printed
    assert "=== jax.nn (peer)" in printed
    assert printed.splitlines()[-1] == "ours: all within bounds"


def test_compare_ends_with_code_1_if_one_of_ours_is_wrong(monkeypatch, capsys):
    def wrong(query, key, value, **options):
        return query

    monkeypatch.setattr(compare, "OPTIONS", {"no option": compare.OPTIONS["no option"]})
    monkeypatch.setattr(compare, "contenders", lambda: {"xla": wrong})
    assert compare.main(compare.Options(quick=True, gradients=False)) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "ours: out of bounds in xla"
