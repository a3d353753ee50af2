"""Few labels: stratified draws, pretraining without labels, trained parameters and the curve."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import mostly_slow, needs_files

from attention_jax.nn import Frozen
from experiments.datasets import text
from experiments.report import ladders, tables
from experiments.tasks import fewshot, trec
from experiments.tasks.fewshot import curve, pretraining, sweep
from experiments.tasks.fewshot.config import ALL
from experiments.tasks.fewshot.data import batches, cycle, draw, load
from experiments.training import train

CONFIG = fewshot.PRESETS["smoke"]
CLASSES = len(trec.CLASSES)


def configured(**options):
    return dataclasses.replace(CONFIG, **options)


@pytest.fixture(scope="module")
def data():
    return load(CONFIG)


# --- Draws.


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_stratified_and_nested(seed):
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(np.arange(CLASSES), [1046, 1125, 77, 1101, 752, 806]))
    order = draw(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    assert sorted(labels[order[:CLASSES]]) == list(range(CLASSES))
    for n in (30, 100, 300, 1000):
        counts = np.bincount(labels[order[:n]], minlength=CLASSES)
        share = n * np.bincount(labels) / len(labels)
        assert (counts >= np.maximum(1, np.floor(share) - 1)).all()
        assert (counts <= np.ceil(share) + 1).all()
    np.testing.assert_array_equal(draw(labels, seed), order)
    assert set(draw(labels, seed + 1)[:30]) != set(order[:30])


def test_labeled_questions_are_a_subset_and_the_others_have_no_labels(data):
    few, full = data.splits["train"], data.splits["unlabeled"]
    assert len(few.rows) == len(few.labels) == len(few.lengths) == len(few.texts) == 50
    assert len(full.rows) == 200
    assert set(few.texts) <= set(full.texts)
    assert set(full.labels) == {-1}  # invalid, so that using one fails
    for row, words, length in zip(few.rows, few.texts, few.lengths, strict=True):
        assert row == data.words.encode(words)
        assert len(row) == length
    more = load(configured(examples=60)).splits["train"]
    assert more.texts[:50] == few.texts
    assert len(load(configured(examples=ALL)).splits["train"].rows) == 200
    other = load(configured(seed=1))
    assert other.splits["train"].texts != few.texts
    assert other.splits["test"].texts == data.splits["test"].texts


@pytest.mark.parametrize("examples", [CLASSES - 1, -1])
def test_fewer_examples_than_classes_are_rejected(examples):
    with pytest.raises(ValueError, match=f"examples must be 0.*at least {CLASSES}.*{examples}"):
        configured(examples=examples)


def test_more_examples_than_the_data_has_are_rejected():
    with pytest.raises(ValueError, match=r"examples must be at most 200.*got 201"):
        load(configured(examples=201))


@needs_files
def test_the_plot_knows_the_size_of_trec():
    full = load(fewshot.PRESETS["cpu"]).splits["unlabeled"]
    assert len(full.rows) == curve.TRAINING


def test_batches_have_one_shape_and_are_resumable_from_any_step(data):
    config = configured(batch_size=64)  # more than the number of examples
    whole, part = batches(config, data, 0), batches(config, data, 3)
    several = list(itertools.islice(whole, 4))
    assert {batch.words.shape for batch in several} == {(64, config.read)}
    np.testing.assert_array_equal(several[3].words, next(part).words)
    indices = np.concatenate(list(itertools.islice(cycle(50, 64, 0, 0), 25)))
    assert set(np.bincount(indices)) == {25 * 64 // 50}  # each equally often


# --- Pretraining.


def test_targets_are_the_masked_words(data):
    config = configured(hidden=3)
    rows = {tuple(row[: config.read]) for row in data.splits["unlabeled"].rows}
    for batch in itertools.islice(pretraining.masked_batches(config, data), 5):
        chosen = batch.targets != text.PAD
        assert set(chosen.sum(1)) == {2}  # a third of the seven words of a sentence
        at = np.take_along_axis(batch.words, batch.positions, 1)
        assert (at[chosen] == text.UNKNOWN).all()
        back = batch.words.copy()
        np.put_along_axis(back, batch.positions, np.where(chosen, batch.targets, at), 1)
        assert {tuple(x for x in row if x != text.PAD) for row in back.tolist()} <= rows


@pytest.mark.slow
def test_pretraining_learns_and_is_reproducible(data):
    config = configured(model="finetuned", pretraining_steps=60, pretraining_rate=1e-2)
    one, again = (pretraining.pretrain(config, data) for _ in range(2))
    assert np.mean(one.losses[-10:]) < np.mean(one.losses[:10]) - 0.1
    assert one.losses == again.losses
    other = pretraining.pretrain(config, load(configured(examples=10)))  # uses no labels
    for results in (again, other):
        jax.tree.map(np.testing.assert_array_equal, one.weights, results.weights)


@pytest.mark.parametrize("model", mostly_slow(fewshot.PRETRAINED, {"adapted"}))
def test_training_starts_from_the_pretrained_encoder(data, model):
    config = configured(model=model)
    calls = []

    def pretrained(config, data):
        fresh = fewshot.init(configured(model="transformer"), data, nnx.Rngs(5)).encoder
        calls.append(jax.device_get(nnx.state(fresh, nnx.Param)))
        return pretraining.Pretrained(calls[0], [1.0])

    classifier = fewshot.init(config, data, nnx.Rngs(0), pretrained)
    assert len(calls) == 1
    kind = Frozen if model == "adapted" else nnx.Param
    weights = jax.tree.leaves(nnx.state(classifier.encoder, kind))
    for a, b in zip(weights, jax.tree.leaves(calls[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    trained = {str(path[-1]) for path, _ in nnx.to_flat_state(nnx.state(classifier, nnx.Param))}
    if model == "adapted":
        assert trained == {"lora_a", "lora_b", "kernel", "bias"}
        plain = fewshot.init(configured(model="transformer"), data, nnx.Rngs(0))
        assert train.count_parameters(classifier) < train.count_parameters(plain) / 4
        classifier.eval()
        assert classifier(np.array([[5, 6, 7]], np.int32)).shape == (1, CLASSES)


# --- The curve.


@pytest.mark.slow
def test_sweep_skips_existing_runs_and_draws_the_curve(tmp_path, capsys):
    from matplotlib.image import imread

    options = sweep.Options(
        preset="smoke",
        models=("naive_bayes", "adapted"),
        sizes=(10, ALL),
        seeds=2,
        out=tmp_path / "runs",
        record=tmp_path / "results",
    )
    assert sweep.main(options) == 0
    printed = capsys.readouterr().out
    assert printed.count("pretrained for") == 4
    lines = (tmp_path / "results" / "fewshot.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    runs = {(r["model"], r["config"]["examples"], r["seed"]) for r in records}
    assert len(runs) == len(records) == 2 * 2 * 2
    assert f"| {records[-1]['model']} |" in printed
    pixels = imread(tmp_path / "results" / "fewshot.png")
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50

    assert tables.main(tables.Options(results=tmp_path / "results")) == 0
    page = (tmp_path / "results" / "README.md").read_text()
    assert "| 10 | all | parameters |" in page
    assert "![Accuracy of fewshot against" in page

    capsys.readouterr()
    assert sweep.main(options) == 0  # every run is skipped
    assert len((tmp_path / "results" / "fewshot.jsonl").read_text().splitlines()) == len(lines)
    assert "pretrained for" not in capsys.readouterr().out


def ladder(scores):
    """Rungs of synthetic records."""
    records = [
        {
            "task": "fewshot",
            "model": model,
            "preset": "cpu",
            "seed": seed,
            "metric": "accuracy",
            "larger": True,
            "test": {"accuracy": score},
            "validation": None,
            "curve": [],
            "parameters": 1234,
            "seconds": 3.0,
            "config": {"seed": seed, "model": model, "examples": size},
        }
        for (model, size), values in scores.items()
        for seed, score in enumerate(values)
    ]
    return ladders.rungs("fewshot", records)


def test_the_table_has_a_column_for_each_number_of_examples():
    rungs = ladder(
        {
            ("adapted", ALL): [0.9],
            ("adapted", 10): [0.5, 0.6],
            ("naive_bayes", 10): [0.4, 0.5],
            ("naive_bayes", 30): [0.6, 0.6],
        }
    )
    assert curve.table(rungs)[0].endswith(" | 10 | 30 | all | parameters |")
    assert curve.table(rungs)[2:] == [
        "| naive_bayes | 45.0 ± 7.1 | **60.0 ± 0.0** |  | 1,234 |",
        "| adapted | **55.0 ± 7.1** |  | **90.0** | 1,234 |",
    ]
    assert "1 to 2 draws of each" in curve.comment(rungs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("gru",)}, "models must be one of naive_bayes, .*got 'gru'"),
        ({"preset": "slow"}, "preset must be one of cpu, .*got 'slow'"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        sweep.Options(**options)


def test_a_run_of_another_configuration_is_rejected(tmp_path):
    options = sweep.Options(
        preset="smoke", models=("naive_bayes",), sizes=(10,), seeds=1, out=tmp_path
    )
    assert sweep.main(options) == 0
    (file,) = tmp_path.glob("fewshot/*/record.json")
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"config": record["config"] | {"rank": 99}}))
    with pytest.raises(ValueError, match=r"record\.json is of another configuration"):
        sweep.main(options)
