"""Few labels: who is drawn, what is learned without labels, what trains, and the curve."""

import dataclasses
import itertools
import json
import os

import jax
import numpy as np
import pytest
from flax import nnx

from attention_jax.nn import Frozen
from experiments.datasets import files, text
from experiments.report import ladders, tables
from experiments.tasks import fewshot, trec
from experiments.tasks.fewshot import ALL, curve, draw, sweep
from experiments.training import train

CONFIG = fewshot.PRESETS["smoke"]
CLASSES = len(trec.CLASSES)


def configured(**options):
    return dataclasses.replace(CONFIG, **options)


@pytest.fixture(scope="module")
def found():
    return fewshot.data(CONFIG)


# --- Draws.


@pytest.mark.parametrize("seed", range(3))
def test_a_draw_has_each_class_and_then_its_share_and_is_part_of_larger_ones(seed):
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


def test_the_labelled_are_some_of_all_and_the_rest_has_no_labels(found):
    few, whole = found.splits["train"], found.splits["unlabelled"]
    assert len(few.rows) == len(few.labels) == len(few.lengths) == len(few.texts) == 50
    assert len(whole.rows) == 200
    assert set(few.texts) <= set(whole.texts)
    assert set(whole.labels) == {-1}  # whatever reads them fails
    for row, words, length in zip(few.rows, few.texts, few.lengths, strict=True):
        assert row == found.words.encode(words)
        assert len(row) == length
    more = fewshot.data(configured(examples=60)).splits["train"]
    assert more.texts[:50] == few.texts
    assert len(fewshot.data(configured(examples=ALL)).splits["train"].rows) == 200
    other = fewshot.data(configured(seed=1))
    assert other.splits["train"].texts != few.texts
    assert other.splits["test"].texts == found.splits["test"].texts


@pytest.mark.parametrize("examples", [CLASSES - 1, -1])
def test_fewer_than_one_of_each_class_are_refused(examples):
    with pytest.raises(ValueError, match=f"examples must be 0.*at least {CLASSES}.*{examples}"):
        configured(examples=examples)


def test_more_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"examples must be at most 200.*got 201"):
        fewshot.data(configured(examples=201))


@pytest.mark.skipif(files.VARIABLE not in os.environ, reason="no folder of data sets is named")
def test_all_of_trec_are_as_many_as_the_plot_says():
    whole = fewshot.data(fewshot.PRESETS["cpu"]).splits["unlabelled"]
    assert len(whole.rows) == curve.TRAINING


def test_batches_have_one_shape_and_are_the_same_from_any_step(found):
    config = configured(batch_size=64)  # more than there are examples
    whole, part = fewshot.batches(config, found, 0), fewshot.batches(config, found, 3)
    several = list(itertools.islice(whole, 4))
    assert {batch.words.shape for batch in several} == {(64, config.read)}
    np.testing.assert_array_equal(several[3].words, next(part).words)
    seen = np.concatenate(list(itertools.islice(fewshot.endless(50, 64, 0, 0), 25)))
    assert set(np.bincount(seen)) == {25 * 64 // 50}  # each as often as any other


# --- Guessing words.


def test_hidden_words_are_those_that_were_there(found):
    config = configured(hidden=3)
    rows = {tuple(row[: config.read]) for row in found.splits["unlabelled"].rows}
    for batch in itertools.islice(fewshot.hidden(config, found), 5):
        chosen = batch.targets != text.PAD
        assert set(chosen.sum(1)) == {2}  # of the seven words of a sentence
        at = np.take_along_axis(batch.words, batch.places, 1)
        assert (at[chosen] == text.UNKNOWN).all()
        back = batch.words.copy()
        np.put_along_axis(back, batch.places, np.where(chosen, batch.targets, at), 1)
        assert {tuple(x for x in row if x != text.PAD) for row in back.tolist()} <= rows


@pytest.mark.slow
def test_words_are_learned_to_be_guessed_and_the_same_again(found):
    config = configured(model="finetuned", pretraining_steps=60, pretraining_rate=1e-2)
    one, again = (fewshot.pretrain(config, found) for _ in range(2))
    assert np.mean(one.losses[-10:]) < np.mean(one.losses[:10]) - 0.1
    assert one.losses == again.losses
    other = fewshot.pretrain(config, fewshot.data(configured(examples=10)))  # of all, unlabelled
    for results in (again, other):
        jax.tree.map(np.testing.assert_array_equal, one.weights, results.weights)


@pytest.mark.parametrize("model", fewshot.PRETRAINED)
def test_training_begins_where_guessing_ended(found, model):
    config = configured(model=model)
    asked = []

    def pretrained(config, data):
        fresh = fewshot.init(configured(model="transformer"), data, nnx.Rngs(5)).encoder
        asked.append(jax.device_get(nnx.state(fresh, nnx.Param)))
        return fewshot.Pretrained(asked[0], [1.0])

    rung = fewshot.init(config, found, nnx.Rngs(0), pretrained)
    assert len(asked) == 1
    kind = Frozen if model == "adapted" else nnx.Param
    got = jax.tree.leaves(nnx.state(rung.encoder, kind))
    for a, b in zip(got, jax.tree.leaves(asked[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    trained = {str(path[-1]) for path, _ in nnx.to_flat_state(nnx.state(rung, nnx.Param))}
    if model == "adapted":
        assert trained == {"lora_a", "lora_b", "kernel", "bias"}
        plain = fewshot.init(configured(model="transformer"), found, nnx.Rngs(0))
        assert train.count_parameters(rung) < train.count_parameters(plain) / 4
        rung.eval()
        assert rung(np.array([[5, 6, 7]], np.int32)).shape == (1, CLASSES)


# --- The curve.


@pytest.mark.slow
def test_the_curve_is_run_once_and_drawn(tmp_path, capsys):
    from matplotlib.image import imread

    options = sweep.Options(
        preset="smoke",
        models=("naive_bayes", "finetuned", "adapted"),
        sizes=(10, ALL),
        seeds=2,
        out=tmp_path / "runs",
        record=tmp_path / "results",
    )
    assert sweep.main(options) == 0
    said = capsys.readouterr().out
    assert said.count("guessed words") == 8
    lines = (tmp_path / "results" / "fewshot.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = {(r["model"], r["config"]["examples"], r["seed"]) for r in records}
    assert len(found) == len(records) == 3 * 2 * 2
    assert f"| {records[-1]['model']} |" in said
    pixels = imread(tmp_path / "results" / "fewshot.png")
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50

    assert tables.main(tables.Options(results=tmp_path / "results")) == 0
    page = (tmp_path / "results" / "README.md").read_text()
    assert "| 10 | all | parameters |" in page
    assert "![Accuracy of fewshot against" in page

    capsys.readouterr()
    assert sweep.main(options) == 0  # nothing is run
    assert len((tmp_path / "results" / "fewshot.jsonl").read_text().splitlines()) == len(lines)
    assert "guessed words" not in capsys.readouterr().out


def ladder(scores):
    """Rungs of made-up records."""
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
        for (model, size), some in scores.items()
        for seed, score in enumerate(some)
    ]
    return ladders.rungs("fewshot", records)


def test_the_table_has_a_column_for_each_number():
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
    assert "1 to 2 of each" in curve.comment(rungs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"models": ("gru",)}, "models must be of naive_bayes, .*got gru"),
        ({"preset": "slow"}, "preset must be of cpu, .*got slow"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_options_that_there_are_not_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        sweep.Options(**options)


def test_a_run_of_another_configuration_is_not_taken_for_this_one(tmp_path):
    options = sweep.Options(
        preset="smoke", models=("naive_bayes",), sizes=(10,), seeds=1, out=tmp_path
    )
    assert sweep.main(options) == 0
    (file,) = tmp_path.glob("fewshot/*/record.json")
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"config": record["config"] | {"rank": 99}}))
    with pytest.raises(ValueError, match=r"record\.json is of another configuration"):
        sweep.main(options)
