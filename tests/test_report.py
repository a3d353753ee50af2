"""The results pages: tables and plots from the records of runs and measurements."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import tasks
from experiments.report import ladders, plots, speed, tables
from experiments.report.tables import Options

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


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
    return Options(results=tmp_path)


def write(options, records, name="trec"):
    (options.results / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def reported(options):
    """The page that is written."""
    assert tables.main(options) == 0
    return (options.results / "README.md").read_text()


def test_means_and_spreads_are_over_seeds_and_in_the_order_of_the_ladder(options):
    write(options, LADDER[::-1])
    page = reported(options)
    trec = page[page.index("## trec") :]
    rows = [line for line in trec.splitlines() if line.startswith("| ")][2:]
    assert rows == [
        "| naive_bayes | 80.0 | 0.500 | 1 | 0 | 10 | 61 |",
        "| text_cnn | **91.0 ± 1.0** | 0.500 ± 0.000 | 3 | 1,234 | 10 | 62 |",
        "| attention | 88.1 ± 0.1 | 0.500 ± 0.000 | 3 | 1,234 | 10 | 62 |",
        "| attention_cnn | 89.1 ± 1.0 | 0.500 ± 0.000 | 3 | 1,234 | 10 | 62 |",
    ]
    assert "text_cnn (91.0) is better than attention (88.1)" in page
    assert "2026-11-25, on 1 x cpu (cpu), jax 0.10.2." in page
    assert "one seed" not in page  # a model fitted by counting has no seed
    assert page.index("## trec") < page.index("![Loss and score of trec") < page.index("## sst2")
    assert "Not run yet: `python -m experiments train sst2" in page


def test_report_twice_changes_nothing_and_check_notices_a_stale_page(options, capsys):
    write(options, LADDER)
    check = Options(options.results, check=True)
    assert tables.main(check) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert not (options.results / "README.md").exists()
    once = reported(options)
    assert reported(options) == once
    assert tables.main(check) == 0
    (options.results / "README.md").write_text(once + "edited\n")
    assert tables.main(check) == 1


@pytest.mark.parametrize(
    ("scores", "comment"),
    [
        ({"text_cnn": 0.9, "attention": 0.95}, "Each model is better than the one above it."),
        ({"text_cnn": 0.9, "attention": 0.9}, "(90.0) and text_cnn (90.0) are within the spread"),
        ({"text_cnn": 0.9, "attention": 0.85}, "text_cnn (90.0) is better than attention (85.0)"),
        ({"attention": 0.85}, "Only one model of the ladder"),
    ],
)
def test_comment_compares_each_model_with_the_one_before(scores, comment):
    ladder = ladders.rungs("trec", [record(m, 0, x) for m, x in scores.items()])
    assert comment in tables.comment(ladder)
    assert "one seed" in tables.comment(ladder)


def test_comment_names_differences_within_the_spread():
    runs = [
        *(record("text_cnn", s, x) for s, x in enumerate((0.90, 0.92))),
        *(record("attention", s, x) for s, x in enumerate((0.905, 0.925))),
    ]
    assert "are within the spread" in tables.comment(ladders.rungs("trec", runs))


def test_smaller_is_better_if_the_record_says_so():
    runs = [record(m, 0, x, larger=False) for m, x in (("text_cnn", 2.0), ("attention", 1.5))]
    ladder = ladders.rungs("trec", runs)
    assert "Each model is better" in tables.comment(ladder)
    assert "**150.0**" in "\n".join(tables.table(ladder))


def test_runs_that_differ_in_more_than_the_seed_have_separate_rows(options):
    window = [record("attention", s, 0.7, options={"mask": "window"}) for s in (0, 1)]
    names = [rung.name for rung in ladders.rungs("trec", LADDER + window)]
    assert names == [
        "naive_bayes",
        "text_cnn",
        "attention, mask global",
        "attention, mask window",
        "attention_cnn",
    ]


def test_row_names_the_preset_and_options_only_within_a_preset():
    smoke = record("attention", 0, 0.6, preset="smoke", options={"steps": 8, "width": 16})
    names = [rung.name for rung in ladders.rungs("trec", [smoke, record("attention", 0, 0.8)])]
    assert names == ["attention, preset cpu", "attention, preset smoke"]


def test_rows_of_the_same_model_are_not_compared():
    models = ("text_cnn", "attention", "attention_cnn")
    runs = [record(m, 0, x) for m, x in zip(models, (0.7, 0.8, 0.9), strict=True)]
    worse = record("attention", 0, 0.5, options={"mask": "window"})
    ladder = ladders.rungs("trec", [worse, *runs])
    assert [rung.name for rung in ladder][1:3] == [
        "attention, mask global",
        "attention, mask window",
    ]
    assert "Each model is better" in tables.comment(ladder)


def test_latest_of_equal_runs_counts(options):
    again = copy.deepcopy(LADDER[0])
    again["test"]["accuracy"] = 0.5
    write(options, [*LADDER, again])
    assert "| naive_bayes | 50.0 |" in reported(options)


def test_models_that_were_not_run_are_named(options):
    write(options, LADDER[:4])
    assert "Not run yet: attention, attention_cnn, pretrained." in reported(options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("3", "line 2 is not a record: it is not a JSON object"),
        ('{"task": "trec"}', "line 2 is not a record: it lacks model, seed"),
        (json.dumps(record("attention", 0, 0.8, test={})), "it lacks accuracy in test$"),
        (json.dumps(record("attention", 0, 0.8, curve=[{}])), "it lacks accuracy in curve$"),
        (json.dumps(record("attention", 0, 0.8, task="sst2")), "is a record of sst2, not trec"),
        (json.dumps(record("gone", 0, 0.8)), "model gone, which trec does not have"),
    ],
)
def test_damaged_line_raises(options, line, message):
    file = options.results / "trec.jsonl"
    file.write_text(json.dumps(LADDER[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        tables.main(options)


@pytest.mark.parametrize(
    "more",
    [
        {"signature": "nrefs:1|case:mixed"},
        {"test": {"accuracy": 0.9, "signature": "nrefs:1|case:mixed"}},
    ],
)
def test_signature_of_a_score_is_shown_below_the_table(options, more):
    write(options, [record("text_cnn", 0, 0.9, **more)])
    page = reported(options)
    assert "Signature of the scores: `nrefs:1|case:mixed`." in page
    assert "| signature" not in page


def test_score_that_some_seeds_lack_is_left_out_of_the_row():
    ladder = ladders.rungs(
        "trec", [record("attention", 0, 0.8, test={"accuracy": 0.8}), record("attention", 1, 0.9)]
    )
    assert tables.table(ladder)[-1] == "| attention | **85.0 ± 7.1** |  | 2 | 1,234 | 10 | 62 |"


def test_no_plot_for_models_fitted_by_counting(options):
    write(options, LADDER[:1])
    assert "![" not in reported(options)
    assert not (options.results / "trec.png").exists()


def test_baseline_without_a_validation_score_is_plotted_by_its_test_score(tmp_path):
    old = record("naive_bayes", 0, 0.8, curve=[], parameters=0, validation=None)
    plots.draw(ladders.rungs("trec", [old, *LADDER[1:]]), tmp_path / "trec.png")
    assert (tmp_path / "trec.png").stat().st_size > 1000


def test_all_versions_are_listed(options):
    write(options, [record("text_cnn", 0, 0.9, versions={"python": "3.11.7", "jax": "0.10.2"})])
    assert "2026-11-25, on 1 x cpu (cpu), python 3.11.7, jax 0.10.2." in reported(options)


def test_plot_has_lines(options):
    from matplotlib.image import imread

    write(options, LADDER)
    tables.main(options)
    pixels = imread(options.results / "trec.png")
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50


def test_committed_pages_are_up_to_date():
    assert tables.main(Options(RESULTS, check=True)) == 0


def test_links_of_the_pages_exist():
    for name in ("README.md", "SPEED.md"):
        links = re.findall(r"\]\(([^)]+)\)", (RESULTS / name).read_text())
        assert links
        assert [link for link in links if not (RESULTS / link).exists()] == []


def test_every_note_is_on_a_task():
    assert tables.NOTES.keys() <= tasks.TASKS.keys()


def test_speed_page_has_the_measurements_and_remarks_of_the_records(tmp_path):
    row = {"section": "forward", "work": "a call", "gflops": 1.0, "note": "noted"}
    row |= {"seconds": {"ours": 0.5, "jax.nn": 1.0}, "targets": {"jax.nn": 1.5}}
    model = {"section": "step", "work": "a step", "gflops": 0.0, "note": ""}
    model |= {"seconds": {"ours": 2.0, "torch": 1.0}, "targets": {"torch": 0.9}}
    record = {"date": "2026-11-25", "machine": {"cpu": "a processor", "cores": 2}}
    record |= {"versions": {"jax": "0.10.2"}, "repeats": 7, "rows": [row], "remarks": ["Remark."]}
    (tmp_path / "bench.json").write_text(json.dumps(record))
    (tmp_path / "bench-models.json").write_text(json.dumps(record | {"rows": [model]}))
    page = speed.page(tmp_path)
    assert "| forward, a call | 500.0 ms |  | **2.00x** (aim 1.5x) |  |  |  | noted |" in page
    assert "| a step | 2,000 ms |  | 0.50x (aim 0.9x) |  |  |" in page
    assert "2026-11-25, 2 cores of a processor, float32, jax 0.10.2, medians of 7 runs." in page
    assert page.count("\nRemark.\n") == 2
    assert "scaling.png" not in page


def test_each_data_set_has_its_own_table():
    def run(model, score, corpus):
        return record(model, 0, score, task="ner", options={"corpus": corpus})

    runs = [run("gru", 0.5, "wnut17"), run("gru", 0.7, "ncbi"), run("transformer", 0.6, "ncbi")]
    found = ladders.ladders("ner", runs)
    names = {part: [rung.name for rung in ladder] for part, ladder in found.items()}
    assert names == {"ncbi": ["gru", "transformer"], "wnut17": ["gru"]}
    section = tables.section("ner", found)
    assert section.index("On `ncbi`") < section.index("**70.0**") < section.index("On `wnut17`")
    assert "](ner-wnut17.png)" in section
    assert list(ladders.ladders("trec", LADDER)) == [""]
