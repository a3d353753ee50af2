"""The tables of the README: what is in them is in the records, and what is not was not run."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import tasks
from experiments.report import ladders, plots, tables
from experiments.report.tables import Options

ROOT = Path(__file__).parents[1]


def record(model, seed, score, **more):
    options = more.pop("options", {})
    return {
        "task": "trec",
        "model": model,
        "preset": "cpu",
        "seed": seed,
        "metric": "accuracy",
        "larger": True,
        "signature": None,
        "test": {"accuracy": score, "cross_entropy": 0.5},
        "validation": {"accuracy": score - 0.02},
        "steps": 10,
        "seconds": 61.0 + seed,
        "parameters": 1234,
        "curve": [
            {"step": s, "seconds": 6.0 * s, "loss": 1 / s, "accuracy": score - 0.1 / s}
            for s in (1, 5, 10)
        ],
        "config": {"seed": seed, "model": model, "mask": "global"} | options,
        "time": "2026-11-25T10:00:00+00:00",
        "device": "1 x cpu (cpu)",
        "versions": {"jax": "0.10.2"},
    } | more


LADDER = [
    record("naive_bayes", 0, 0.80, curve=[], parameters=0),
    *(record("text_cnn", seed, 0.90 + 0.01 * seed) for seed in (0, 1, 2)),
    *(record("attention", seed, 0.88 + 0.001 * seed) for seed in (0, 1, 2)),
    *(record("attention_cnn", seed, 0.881 + 0.01 * seed) for seed in (0, 1, 2)),
]


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", {"trec": tasks.TASKS["trec"], "sst2": tasks.TASKS["sst2"]})
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- report:trec -->\nold\n<!-- /report:trec -->\nbetween\n"
        "<!-- report:sst2 -->\n<!-- /report:sst2 -->\nafter\n"
    )
    results = tmp_path / "results"
    results.mkdir()
    return Options(results=results, readme=readme)


def write(options, records, name="trec"):
    (options.results / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_means_and_spreads_are_over_seeds_and_in_the_order_of_the_ladder(options):
    write(options, LADDER[::-1])
    assert tables.main(options) == 0
    text = options.readme.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows == [
        "| naive_bayes | 80.0 | 0.500 | 1 | 0 | 10 | 61 |",
        "| text_cnn | **91.0 ± 1.0** | 0.500 ± 0.000 | 3 | 1,234 | 10 | 62 |",
        "| attention | 88.1 ± 0.1 | 0.500 ± 0.000 | 3 | 1,234 | 10 | 62 |",
        "| attention_cnn | 89.1 ± 1.0 | 0.500 ± 0.000 | 3 | 1,234 | 10 | 62 |",
    ]
    assert "text_cnn (91.0) is better than attention (88.1)" in text
    assert "2026-11-25, on 1 x cpu (cpu), jax 0.10.2." in text
    assert "\nold\n" not in text
    assert "one seed" not in text  # counting gives the same for each
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "Not run yet: `python -m experiments train sst2" in text


def test_a_second_time_changes_nothing_and_check_says_so(options, capsys):
    write(options, LADDER)
    check = Options(options.results, options.readme, check=True)
    assert tables.main(check) == 1
    assert "is not up to date" in capsys.readouterr().out
    tables.main(options)
    once = options.readme.read_text()
    tables.main(options)
    assert options.readme.read_text() == once
    assert tables.main(check) == 0


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"text_cnn": 0.9, "attention": 0.95}, "The classic order holds"),
        ({"text_cnn": 0.9, "attention": 0.9}, "(90.0) and text_cnn (90.0) are within the spread"),
        ({"text_cnn": 0.9, "attention": 0.85}, "text_cnn (90.0) is better than attention (85.0)"),
        ({"attention": 0.85}, "One rung of the ladder"),
    ],
)
def test_the_order_is_said_as_it_is(scores, said):
    ladder = ladders.rungs("trec", [record(m, 0, x) for m, x in scores.items()])
    assert said in tables.order(ladder)
    assert "one seed" in tables.order(ladder)


def test_a_difference_within_the_spread_is_called_so():
    runs = [
        *(record("text_cnn", s, x) for s, x in enumerate((0.90, 0.92))),
        *(record("attention", s, x) for s, x in enumerate((0.905, 0.925))),
    ]
    assert "are within the spread" in tables.order(ladders.rungs("trec", runs))


def test_less_is_better_where_the_record_says_so():
    runs = [record(m, 0, x, larger=False) for m, x in (("text_cnn", 2.0), ("attention", 1.5))]
    ladder = ladders.rungs("trec", runs)
    assert "The classic order holds" in tables.order(ladder)
    assert "**150.0**" in "\n".join(tables.table(ladder))


def test_runs_that_differ_in_more_than_the_seed_have_rows_of_their_own(options):
    window = [record("attention", s, 0.7, options={"mask": "window"}) for s in (0, 1)]
    names = [rung.name for rung in ladders.rungs("trec", LADDER + window)]
    assert names == [
        "naive_bayes",
        "text_cnn",
        "attention, mask global",
        "attention, mask window",
        "attention_cnn",
    ]


def test_a_preset_is_named_and_options_only_beside_runs_of_the_same_preset():
    smoke = record("attention", 0, 0.6, preset="smoke", options={"steps": 8, "width": 16})
    names = [rung.name for rung in ladders.rungs("trec", [smoke, record("attention", 0, 0.8)])]
    assert names == ["attention, preset cpu", "attention, preset smoke"]


def test_rows_of_one_model_are_no_steps_of_the_ladder():
    models = ("text_cnn", "attention", "attention_cnn")
    runs = [record(m, 0, x) for m, x in zip(models, (0.7, 0.8, 0.9), strict=True)]
    worse = record("attention", 0, 0.5, options={"mask": "window"})
    ladder = ladders.rungs("trec", [worse, *runs])
    assert [rung.name for rung in ladder][1:3] == [
        "attention, mask global",
        "attention, mask window",
    ]
    assert "The classic order holds" in tables.order(ladder)


def test_the_later_of_two_equal_runs_counts(options):
    again = copy.deepcopy(LADDER[0])
    again["test"]["accuracy"] = 0.5
    write(options, [*LADDER, again])
    tables.main(options)
    assert "| naive_bayes | 50.0 |" in options.readme.read_text()


def test_rungs_that_were_not_run_are_named(options):
    write(options, LADDER[:4])
    tables.main(options)
    assert "Not run yet: attention, attention_cnn." in options.readme.read_text()


def test_a_missing_place_is_named(options):
    options.readme.write_text("nothing\n")
    write(options, LADDER)
    with pytest.raises(ValueError, match=r"no place for trec: add the lines <!-- report:trec -->"):
        tables.main(options)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no JSON"),
        ("3", "line 2 is no record: it is no JSON object"),
        ('{"task": "trec"}', "line 2 is no record: it lacks model, seed"),
        (json.dumps(record("attention", 0, 0.8, test={})), "it lacks accuracy in test$"),
        (json.dumps(record("attention", 0, 0.8, curve=[{}])), "it lacks accuracy in curve$"),
        (json.dumps(record("attention", 0, 0.8, task="sst2")), "is a record of sst2, not of trec"),
        (json.dumps(record("gone", 0, 0.8)), "trec has no model gone"),
    ],
)
def test_a_damaged_line_is_named(options, line, said):
    file = options.results / "trec.jsonl"
    file.write_text(json.dumps(LADDER[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=said):
        tables.main(options)


@pytest.mark.parametrize(
    "more",
    [
        {"signature": "nrefs:1|case:mixed"},
        {"test": {"accuracy": 0.9, "signature": "nrefs:1|case:mixed"}},
    ],
)
def test_the_signature_of_a_score_is_told_and_is_no_column(options, more):
    write(options, [record("text_cnn", 0, 0.9, **more)])
    tables.main(options)
    text = options.readme.read_text()
    assert "Scores: `nrefs:1|case:mixed`." in text
    assert "| signature" not in text


def test_a_score_that_some_seeds_lack_is_left_out_of_their_row():
    ladder = ladders.rungs(
        "trec", [record("attention", 0, 0.8, test={"accuracy": 0.8}), record("attention", 1, 0.9)]
    )
    assert tables.table(ladder)[-1] == "| attention | **85.0 ± 7.1** |  | 2 | 1,234 | 10 | 62 |"


def test_nothing_is_drawn_where_all_is_counted(options):
    write(options, LADDER[:1])
    tables.main(options)
    assert "![" not in options.readme.read_text()
    assert not (options.results / "trec.png").exists()


def test_a_baseline_without_a_validation_score_is_drawn_by_its_test_score(tmp_path):
    old = record("naive_bayes", 0, 0.8, curve=[], parameters=0, validation=None)
    plots.draw(ladders.rungs("trec", [old, *LADDER[1:]]), tmp_path / "trec.png")
    assert (tmp_path / "trec.png").stat().st_size > 1000


def test_all_versions_are_told(options):
    write(options, [record("text_cnn", 0, 0.9, versions={"python": "3.11.7", "jax": "0.10.2"})])
    tables.main(options)
    assert "2026-11-25, on 1 x cpu (cpu), python 3.11.7, jax 0.10.2." in options.readme.read_text()


def test_the_plot_has_lines_on_it(options):
    from matplotlib.image import imread

    write(options, LADDER)
    tables.main(options)
    pixels = imread(options.results / "trec.png")
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50


def test_the_readme_is_what_the_records_say():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the links in the README begin there
        assert tables.main(Options(check=True)) == 0


def test_runs_on_other_data_are_in_a_table_of_their_own():
    def run(model, score, corpus):
        return record(model, 0, score, task="ner", options={"corpus": corpus})

    some = [run("gru", 0.5, "wnut17"), run("gru", 0.7, "ncbi"), run("transformer", 0.6, "ncbi")]
    found = ladders.ladders("ner", some)
    names = {part: [rung.name for rung in ladder] for part, ladder in found.items()}
    assert names == {"ncbi": ["gru", "transformer"], "wnut17": ["gru"]}
    said = tables.block("ner", found, Path("results"))
    assert said.index("On `ncbi`") < said.index("**70.0**") < said.index("On `wnut17`")
    assert "](results/ner-wnut17.png)" in said
    assert list(ladders.ladders("trec", LADDER)) == [""]
