"""The hyperparameter search: its draws, its budget, and how it resumes."""

import contextlib
import dataclasses
import io
import json
import shutil
from typing import Literal

import line
import numpy as np
import pytest

from experiments import tasks
from experiments.__main__ import main
from experiments.options import hints, read
from experiments.training import sweep, train
from experiments.training.config import TrainConfig, choices
from experiments.training.search import Log, OneOf, sample
from experiments.training.sweep import Options


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Options of a task with three models."""

    model: Literal["fitted", "near", "far"] = "near"


SPACE = {"learning_rate": Log(0.01, 0.3), "clip": OneOf((1.0, 5.0))}
TASK = dataclasses.replace(
    line.LINE,
    presets={"smoke": Config(steps=4, batch_size=8, learning_rate=0.001, evaluations=2)},
    spaces={"near": SPACE, "far": {"learning_rate": Log(0.1, 0.2)}},
)


def options_in(folder):
    return Options(preset="smoke", trials=3, out=folder / "runs", results=folder / "sweeps")


@pytest.fixture
def options(tmp_path):
    return options_in(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished sweep, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("finished"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert sweep.main(TASK, options_in(folder)) == 0
    return folder, printed.getvalue()


def lines(options):
    return (options.results / "line.jsonl").read_text().splitlines()


def test_draws_are_in_their_ranges_and_depend_on_seed_model_and_trial_alone():
    assert sample(SPACE, 0, "near", 0) == {}
    draws = [sample(SPACE, 0, "near", trial) for trial in range(1, 200)]
    rates = np.array([draw["learning_rate"] for draw in draws])
    assert 0.01 <= rates.min() < 0.02
    assert 0.2 < rates.max() <= 0.3
    assert abs(np.median(np.log(rates)) - np.log(0.055)) < 0.3  # uniform in the logarithm
    assert {draw["clip"] for draw in draws} == {1.0, 5.0}
    assert all(float(f"{rate:.1e}") == rate for rate in rates)
    assert draws == [sample(SPACE, 0, "near", trial) for trial in range(1, 200)]
    for other in (sample(SPACE, 1, "near", 1), sample(SPACE, 0, "far", 1)):
        assert other != draws[0]


def test_every_model_starts_with_its_preset_and_the_best_trial_is_printed(finished):
    folder, printed = finished
    options = options_in(folder)
    trials = [json.loads(x) for x in lines(options)]
    assert [(trial["model"], trial["trial"]) for trial in trials] == [
        (model, number) for model in ("near", "far") for number in range(3)
    ]
    for trial in trials:
        number, drawn = trial["trial"], trial["options"]
        assert drawn == sample(TASK.spaces[trial["model"]], 0, trial["model"], number)
        expected = {"learning_rate": 0.001} | drawn
        assert expected.items() <= trial["config"].items()
        assert trial["validation"]["error"] > 0
        assert "test" not in trial
    best = min(trials[:3], key=lambda trial: trial["validation"]["error"])
    assert best["trial"] > 0  # the preset hardly learns
    assert f"best on validation error {best['validation']['error']:.4f}, the preset" in printed
    rate = best["options"]["learning_rate"]
    assert f"train line --preset smoke --model near --learning-rate {rate}" in printed
    assert not list(options.out.rglob("checkpoints"))


def test_finished_trials_are_not_repeated_and_others_continue(
    finished, tmp_path, monkeypatch, capsys
):
    folder, printed = finished
    options = options_in(shutil.copytree(folder, tmp_path / "copy"))
    before, printed = lines(options), printed.split("\n\n")[-1]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
        sweep.main(TASK, options)
    assert lines(options) == before
    assert capsys.readouterr().out.strip() == printed.strip()
    file = options.results / "line.jsonl"
    file.write_text("\n".join(before[:4]) + "\n")  # as if it had been interrupted
    sweep.main(TASK, options)
    names = ("model", "options", "validation")
    shown = [[json.loads(x)[name] for name in names] for x in (*before, *lines(options))]
    assert shown[:6] == shown[6:]


def test_interrupted_trial_leaves_no_line_and_its_run_resumes(options, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sweep.main(TASK, options)
    assert not options.results.exists()
    (folder,) = (options.out / "line").iterdir()
    flags = []
    whole = train.train

    def noted(task, config, data, where, given):
        flags.append((where, given.resume))
        return whole(task, config, data, where, given)

    monkeypatch.setattr(train, "train", noted)
    sweep.main(TASK, dataclasses.replace(options, trials=1, models=("near",)))
    assert flags == [(folder, True)]


def test_budget_is_the_same_for_all_models_and_counts_finished_trials(options, monkeypatch):
    seconds = {"near": 25.0, "far": 50.0}

    def pretend(task, config, data, folder, flags):
        progress = train.Progress("error", False).closed({"error": config.learning_rate})
        return train.Trained(None, None, progress._replace(seconds=seconds[config.model]))

    monkeypatch.setattr(train, "train", pretend)
    options = dataclasses.replace(options, minutes=2.0, trials=None)
    for _ in range(2):  # the second time, all trials are there
        sweep.main(TASK, options)
        trials = [json.loads(x) for x in lines(options)]
        assert [trial["model"] for trial in trials] == ["near"] * 4 + ["far"] * 2
    assert all(trial["config"]["minutes"] == 2.0 for trial in trials)
    assert {trial["budget_minutes"] for trial in trials} == {2.0}
    sweep.main(TASK, dataclasses.replace(options, minutes=2.5))
    assert len(lines(options)) == 6 + 2 + 1


def test_diverged_trial_is_recorded_and_never_best(options, monkeypatch, capsys):
    whole = train.train

    def fragile(task, config, *rest):
        if config.learning_rate != 0.001:
            raise FloatingPointError("line: the loss is nan at step 2")
        return whole(task, config, *rest)

    monkeypatch.setattr(train, "train", fragile)
    sweep.main(TASK, dataclasses.replace(options, models=("far",)))
    trials = [json.loads(x) for x in lines(options)]
    assert [trial["validation"] is None for trial in trials] == [False, True, True]
    assert "the loss is nan" in trials[1]["problem"]
    assert sweep.best_of(trials) is trials[0]
    assert sweep.best_of(trials[1:]) is None
    assert capsys.readouterr().out.rstrip().endswith("--preset smoke --model far")


def test_fixed_options_are_not_searched(options, capsys):
    one = dataclasses.replace(options, models=("near",))
    sweep.main(TASK, one, {"learning_rate": 0.2})
    trials = [json.loads(x) for x in lines(options)]
    assert {trial["config"]["learning_rate"] for trial in trials} == {0.2}
    assert [trial["options"] for trial in trials] == [{}, {"clip": 5.0}]  # the preset has 1.0
    assert "--model near --learning-rate 0.2" in capsys.readouterr().out


def test_best_of_scores_of_which_more_is_better():
    trials = [
        {"metric": "f1", "larger": True, "validation": {"f1": x}} for x in (0.5, 0.7, np.nan, 0.7)
    ]
    assert sweep.best_of(trials) is trials[1]


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "near"}'])
def test_damaged_line_raises(options, text):
    options.results.mkdir()
    (options.results / "line.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"line\.jsonl, line 1 is not a trial: remove it"):
        sweep.main(TASK, options)


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name != "fewshot"])
def test_every_trained_model_of_a_task_has_a_space_of_options_that_it_accepts(name):
    task = tasks.load(name)
    preset = next(iter(task.presets))
    counted = {"naive_bayes", "most_frequent", "ngram", "overlap", "lead", "best_sentence"}
    assert {*task.spaces} == {*choices(type(task.presets[preset]), "model")} - counted
    for model, space in task.spaces.items():
        for trial in range(5):
            task.configured(preset, model=model, **sample(space, 0, model, trial))


@pytest.mark.slow
def test_sweep_of_a_task_from_the_command_line(tmp_path, capsys):
    arguments = [
        "sweep",
        "trec",
        "--preset",
        "smoke",
        "--models",
        "text_cnn",
        "--trials",
        "2",
        "--steps",
        "2",
    ]
    arguments += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert main(arguments) == 0
    assert "text_cnn: 2 trials in" in capsys.readouterr().out
    trials = [json.loads(x) for x in (tmp_path / "trec.jsonl").read_text().splitlines()]
    assert [trial["steps"] for trial in trials] == [2, 2]
    assert main(arguments) == 0
    assert len((tmp_path / "trec.jsonl").read_text().splitlines()) == 2


def test_options_are_printed_as_the_command_line_takes_them():
    task = tasks.load("trec")
    given = {"normalize_embeddings": True, "learning_rate": 0.01}
    arguments = [x for option in given.items() for x in sweep.as_arguments(*option)]
    assert read(hints(type(task.presets["cpu"])), arguments, "train trec") == given
    assert sweep.as_arguments("cosine", False) == ["--no-cosine"]


def test_the_command_has_the_time_limit_that_ended_the_best_trial(options):
    trial = {"steps": 2, "seconds": 30.0, "metric": "error", "larger": False, "options": {}}
    trial |= {"validation": {"error": 0.1}, "config": {"steps": 4, "minutes": 0.5}}
    assert "--minutes 0.5" in sweep.summary(TASK, "near", options, {}, [trial])
    assert "--minutes" not in sweep.summary(TASK, "near", options, {}, [trial | {"steps": 4}])
