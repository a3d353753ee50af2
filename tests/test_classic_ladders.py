"""The table of classic ladders, and what it says about their order."""

import dataclasses
import json

import pytest

from experiments.report import classic, ladders, tables
from experiments.report.classic import LADDERS, Ladder, Step
from experiments.training.task import Rung

STEPS = (Step("classic", "naive_bayes"), Step("CNN", "text_cnn"), Step("both", "attention_cnn"))
TREC = Ladder("Questions", "trec", STEPS, why="Because of the data.")
HARDENED = Ladder(
    "Questions", "trec", (STEPS[2], Step("+ adversarial", "attention_cnn", adversarial=True))
)


def rung(model, *scores, seconds=60.0, larger=True, validation=None, name=None, **options):
    runs = [
        {
            "model": model,
            "seed": seed,
            "metric": "accuracy",
            "larger": larger,
            "test": {"accuracy": score},
            "validation": {"accuracy": score if validation is None else validation},
            "seconds": seconds,
            "parameters": 0 if model == "naive_bayes" else 10,
            "config": options,
        }
        for seed, score in enumerate(scores)
    ]
    return Rung(name or model, runs)


BAYES = rung("naive_bayes", 0.8)
CNN = rung("text_cnn", 0.89, 0.91)
BOTH = rung("attention_cnn", 0.94, 0.96)


def test_order_holds_if_every_rung_is_better_by_more_than_the_spread():
    assert classic.verdict(TREC, [BAYES, CNN, BOTH]) == "The order holds."


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ((0.5, 0.52), "The order does not hold: CNN (90.0) is better than both (51.0)."),
        ((0.9, 0.91), "The order is not established: both (90.5) and CNN (90.0) are within"),
    ],
)
def test_exception_is_named_with_the_reason(scores, said):
    verdict = classic.verdict(TREC, [BAYES, CNN, rung("attention_cnn", *scores)])
    assert verdict.startswith(said)
    assert verdict.endswith("Because of the data.")


def test_smaller_is_better_where_the_records_say_so():
    rungs = [rung(step.model, x, x, larger=False) for step, x in zip(STEPS, (3, 2, 1), strict=True)]
    assert classic.verdict(TREC, rungs).startswith("The order holds.")
    worse = [rung(step.model, x, x, larger=False) for step, x in zip(STEPS, (3, 2, 4), strict=True)]
    assert "CNN (200.0) is better than both (400.0)" in classic.verdict(TREC, worse)


def test_missing_rung_is_not_run_yet_and_the_order_holds_only_so_far():
    verdict = classic.verdict(TREC, [BAYES, CNN])
    assert verdict == "The order holds so far. Not run yet: both."
    assert classic.verdict(TREC, [CNN]).startswith("There is nothing to compare. Not run yet")
    rows = classic.section({"trec": {"": [BAYES, CNN]}}).splitlines()
    assert "|  | pretrained | `pretrained` | not run yet |  |  |" in rows
    assert "|  | CNN | `text_cnn` | 90.0 ± 1.4 | 2 | 1.0 |" in rows


def test_rung_with_one_seed_has_no_spread_unless_it_was_fitted_by_counting():
    holds = "The order holds. One seed, hence no spread:"
    one = rung("attention_cnn", 0.99)
    assert classic.verdict(TREC, [BAYES, CNN, one]) == f"{holds} both."
    assert classic.verdict(TREC, [BAYES, CNN, BOTH]) == "The order holds."


@pytest.mark.parametrize(
    ("score", "way"), [(0.7, "behind"), (0.9, "level with"), (0.99, "ahead of")]
)
def test_a_difference_without_a_spread_is_no_verdict(score, way):
    one, other = rung("text_cnn", 0.9), rung("attention_cnn", score)
    first, why = "CNN (90.0) is ahead of classic (80.0)", " Because of the data."
    second = f"both ({100 * score:.1f}) is {way} CNN (90.0)"
    assert classic.verdict(TREC, [BAYES, one, other]) == (
        f"There is no verdict on the order, with one seed each: {first}; {second}."
        f"{why if way == 'behind' else ''}"
    )
    assert classic.verdict(TREC, [BAYES, one]) == (
        f"There is no verdict on the order so far, with one seed each: {first}. Not run yet: both."
    )


def test_pairs_with_a_spread_are_judged_beside_others_without():
    one = rung("text_cnn", 0.9)
    undecided = "No verdict with one seed each: CNN (90.0) is ahead of classic (80.0)."
    better, worse = rung("attention_cnn", 0.98, 0.99), rung("attention_cnn", 0.5, 0.51)
    assert classic.verdict(TREC, [BAYES, one, better]) == (
        f"The order holds where there is a spread. {undecided}"
    )
    assert classic.verdict(TREC, [BAYES, one, worse]) == (
        "The order does not hold: CNN (90.0) is better than both (50.5). "
        f"{undecided} Because of the data."
    )


def test_smaller_is_ahead_where_the_records_say_so():
    pair = (rung("naive_bayes", 3, larger=False), rung("text_cnn", 2, larger=False))
    assert "is ahead of" in classic._difference(pair)


def test_models_that_are_fitted_by_counting_need_one_seed():
    counted = [rung("naive_bayes", x, name=str(x)) for x in (0.7, 0.8)]
    assert classic._has_spread((counted[0], counted[1]))
    assert not classic._has_spread((BAYES, rung("text_cnn", 0.9)))


def test_shorter_training_of_a_rung_that_falls_behind_is_named():
    slow, quick = rung("text_cnn", 0.9, seconds=1200), rung("attention_cnn", 0.8, seconds=600)
    named = "both trained for 10 minutes, CNN for 20."
    assert named in classic.verdict(TREC, [BAYES, slow, quick])
    assert "trained for" not in classic.verdict(TREC, [BAYES, CNN, quick])  # it had more time
    better = rung("attention_cnn", 0.99, seconds=600)
    assert "trained for" not in classic.verdict(TREC, [BAYES, slow, better])


def test_first_row_of_a_model_counts_and_a_better_one_is_named():
    longer = rung("attention_cnn", 0.99, seconds=1800, name="attention_cnn, steps 9")
    worse = rung("attention_cnn", 0.1, name="attention_cnn, steps 1")
    verdict = classic.verdict(TREC, [BAYES, CNN, rung("attention_cnn", 0.5), longer, worse])
    assert "CNN (90.0) is better than both (50.0)" in verdict
    assert "`attention_cnn, steps 9` reaches 99.0 in 30 minutes." in verdict
    assert "steps 1" not in verdict


def test_strength_with_the_best_validation_score_counts():
    plain = rung("attention_cnn", 0.90, 0.90, adversarial=0.0)
    rungs = [
        plain,
        rung("attention_cnn", 0.99, 0.99, validation=0.5, adversarial=0.1),
        rung("attention_cnn", 0.95, 0.95, validation=0.6, adversarial=0.3),
    ]
    rows = classic._cells(HARDENED.steps[1], classic._chosen(HARDENED.steps[1], rungs))
    assert rows == ["`attention_cnn` `--adversarial 0.3`", "95.0 ± 0.0", "2", "1.0"]
    assert classic._chosen(HARDENED.steps[0], rungs) is plain
    assert classic.verdict(HARDENED, rungs) == "The order holds. 2 strengths were tried."


@pytest.mark.parametrize("ladder", LADDERS, ids=[ladder.task for ladder in LADDERS])
def test_ladder_names_models_of_its_task_and_a_data_set_with_records(ladder):
    assert {step.model for step in ladder.steps} <= set(ladders.models(ladder.task))
    file = tables.Options().results / f"{ladder.task}.jsonl"
    assert ladder.part in ladders.ladders(ladder.task, ladders.read(file))


def test_option_that_a_record_lacks_has_its_default(tmp_path):
    """Runs before and after an option was added are one rung."""
    config = dataclasses.asdict(ladders.tasks.load("trec").presets["cpu"])
    scores = {"test": {"accuracy": 0.9}, "validation": {"accuracy": 0.9}, "curve": []}
    common = {"task": "trec", "model": "attention", "metric": "accuracy", "larger": True} | scores
    old = {name: x for name, x in config.items() if name != "adversarial"}
    records = [
        common | {"seed": seed, "parameters": 1, "seconds": 1.0, "config": {**one, "seed": seed}}
        for seed, one in enumerate((old, config, {**config, "adversarial": 0.1}))
    ]
    file = tmp_path / "trec.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = ladders.rungs("trec", ladders.read(file))
    names = [(rung.name, len(rung.runs)) for rung in found]
    assert names == [("attention, adversarial 0.0", 2), ("attention, adversarial 0.1", 1)]
