"""``python -m experiments``: every model of every task, runs, and benchmarks."""

import functools
import json
import warnings

import jax
import numpy as np
import pytest
import tiny_bert
from helpers import mostly_slow, slow

from attention_jax import explain
from experiments.__main__ import main
from experiments.bench import attention, compare, contenders, tables
from experiments.bench.attention import SECTIONS, Options
from experiments.bench.shapes import SHAPES, SHORT, Shape
from experiments.tasks import TASKS, load
from experiments.training import config


@pytest.mark.parametrize("name", TASKS)
def test_task_loads_under_its_name(name):
    assert load(name).name == name


# --- Runs.


def run(*arguments):
    """The exit code of a command."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        return main([str(x) for x in arguments])


SAME = ("sst2", "fashion")  # the models of trec and digits, on other data
MODELS = [
    (name, model)
    for name in TASKS
    if name not in SAME
    for model in config.choices(type(next(iter(load(name).presets.values()))), "model")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), MODELS)
def test_model_trains_evaluates_samples_and_looks(name, model, tmp_path, capsys):
    options = ("--preset", "smoke", "--model", model, "--out", tmp_path, "--record", tmp_path)
    if model.startswith("pretrained"):
        (tmp_path / "checkpoint").mkdir()
        options += ("--checkpoint", tiny_bert.write(tmp_path / "checkpoint"))
    assert run("train", name, *options) == 0
    folder = tmp_path / name / f"{model}-smoke-seed0"
    record = json.loads((tmp_path / f"{name}.jsonl").read_text())  # one line
    assert record == json.loads((folder / "record.json").read_text())
    task = load(name)
    assert (record["task"], record["model"], record["seed"]) == (name, model, 0)
    assert record["config"]["synthetic"]
    assert record["versions"]["jax"] == jax.__version__
    if not model.startswith("pretrained"):
        assert str(tmp_path) not in json.dumps(record)
    trained = record["parameters"] > 0
    assert record["steps"] == (record["config"]["steps"] if trained else 0)
    assert bool(record["curve"]) == trained

    capsys.readouterr()
    assert run("evaluate", folder) == 0
    score = f"{task.metric} {record['test'][task.metric]:.4f}"
    assert score in capsys.readouterr().out

    if task.sample is not None:
        assert run("sample", folder) == 0
        assert len(capsys.readouterr().out) > 10
    else:
        assert run("sample", folder) == 2
        assert "has no text to print" in capsys.readouterr().err
    code = run("look", folder)
    captured = capsys.readouterr()
    attends = "attention" in model or name == "vqa"
    attends |= model in ("vit", "transformer", "window", "copier", "finetuned", "adapted")
    attends |= model.startswith("pretrained")
    attends |= (name, model) == ("qa", "gru")
    if task.look is not None and attends:
        assert code == 0
        page = (folder / "look.html").read_text()
        assert "://" not in page  # loads nothing from a network
    else:
        assert code == 2
        assert "no attention to look at" in captured.err or "no attention page" in captured.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of ``trec``, and its options."""
    out = tmp_path_factory.mktemp("runs")
    options = ("--preset", "smoke", "--model", "attention", "--steps", 3, "--out", out)
    assert run("train", "trec", *options) == 0
    return out / "trec" / "attention-smoke-seed0", options


def test_run_is_not_replaced_by_default(trained, capsys):
    folder, options = trained
    assert run("train", "trec", *options) == 2
    error = capsys.readouterr().err
    for word in (str(folder), "--resume", "--overwrite", "--name"):
        assert word in error


def contents(folder):
    """The bytes of all files of a run."""
    return {str(x): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--model pretrained --checkpoint /nowhere", "folder must be that of a checkpoint"),
        ("--freeze 9", "freeze must be at most 1"),
        ("--positions alibi --attention flax", "attention flax does not support scores"),
        ("--mesh data=3", "batch_size must be a multiple of accumulate x data, 3, got 16"),
        ("--model naive_bayes --low-rank 2", "low_rank needs a model that is trained"),
        ("--save-every 0", "save_every must be at least 1"),
        ("--record {file}", "record must be a folder, got the file"),
    ],
)
def test_a_run_is_not_replaced_by_one_that_cannot_start(trained, options, error, capsys):
    folder, given = trained
    before = contents(folder)
    words = options.format(file=folder / "run.json").split()
    assert run("train", "trec", *given, "--name", folder.name, "--overwrite", *words) == 2
    assert error in capsys.readouterr().err
    assert contents(folder) == before


def test_a_model_that_cannot_start_leaves_no_run_behind(tmp_path, capsys):
    options = ("--preset", "smoke", "--model", "attention", "--out", tmp_path)
    assert run("train", "trec", *options, "--positions", "alibi", "--attention", "flax") == 2
    assert not list(tmp_path.iterdir())


def test_a_replaced_run_leaves_nothing_behind(tmp_path):
    options = ("--preset", "smoke", "--model", "naive_bayes", "--out", tmp_path, "--name", "x")
    assert run("train", "trec", *options) == 0
    folder = tmp_path / "trec" / "x"
    (folder / "checkpoints").mkdir()
    (folder / "log.jsonl").write_text("old")
    (folder / "record.json").write_text("old")
    assert run("train", "trec", *options, "--seed", 1, "--overwrite") == 0
    assert json.loads((folder / "run.json").read_text())["config"]["seed"] == 1
    assert json.loads((folder / "record.json").read_text())["seed"] == 1
    assert not (folder / "checkpoints").exists()
    assert not (folder / "log.jsonl").exists()


def test_run_with_another_configuration_is_not_resumed(trained, capsys):
    _, options = trained
    assert run("train", "trec", *options, "--width", 32, "--resume") == 2
    error = capsys.readouterr().err
    assert "width is 32, was 16" in error
    assert "seed" not in error.split("configuration:")[1]


def test_resuming_a_finished_run_evaluates_it_again(trained, capsys):
    folder, options = trained
    before = json.loads((folder / "record.json").read_text())
    assert run("train", "trec", *options, "--resume") == 0
    assert "resumed from step 3" in capsys.readouterr().out
    after = json.loads((folder / "record.json").read_text())
    assert (before["test"], before["curve"]) == (after["test"], after["curve"])


def test_damaged_checkpoint_and_missing_run_raise_different_errors(trained, tmp_path, capsys):
    import shutil

    folder, _ = trained
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for file in (copy / "checkpoints" / "best").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert run("evaluate", copy) == 2
    assert "no checkpoint is intact" in capsys.readouterr().err
    assert run("evaluate", tmp_path / "nothing") == 2
    assert "is not a run: it has no run.json" in capsys.readouterr().err


def test_run_of_another_version_raises(trained, tmp_path, capsys):
    import shutil

    folder, _ = trained
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "run.json"
    content = json.loads(file.read_text())
    old = content | {"config": {k: x for k, x in content["config"].items() if k != "width"}}
    file.write_text(json.dumps(old))
    assert run("evaluate", tmp_path / "copy") == 2
    assert "another version of this task: its options differ by width" in capsys.readouterr().err
    file.write_text(json.dumps(content | {"task": "trek"}))
    assert run("evaluate", tmp_path / "copy") == 2
    assert "unknown task 'trek'; did you mean trec?" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"task": "trec", "pre', "[]", '{"task": "trec"}'])
def test_half_written_run_raises(content, tmp_path, capsys):
    folder = tmp_path / "trec" / "attention-smoke-seed0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    options = ("--preset", "smoke", "--model", "attention", "--out", tmp_path)
    for command in (("evaluate", folder), ("train", "trec", *options, "--resume")):
        assert run(*command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {folder / 'run.json'} is damaged: ")


def test_run_without_weights_raises(tmp_path, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    preset = config.as_json(load("trec").presets["smoke"])
    content = {"task": "trec", "preset": "smoke", "config": preset}
    (folder / "run.json").write_text(json.dumps(content))
    assert run("evaluate", folder) == 2
    assert f"{folder} has no weights yet" in capsys.readouterr().err


def test_run_of_another_task_is_not_resumed(trained, tmp_path, capsys):
    import shutil

    folder, _ = trained
    shutil.copytree(folder, tmp_path / "digits" / "mine")
    options = ("--preset", "smoke", "--name", "mine", "--resume", "--out", tmp_path)
    assert run("train", "digits", *options) == 2
    assert "is a run of trec, not digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ", "text must not be empty or blank"),
        ("word " * 65, "text has 65 words, the model reads 64"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "look"])
def test_unusable_text_raises(trained, command, text, message, capsys):
    folder, _ = trained
    assert run(command, folder, "--text", text) == 2
    assert message in capsys.readouterr().err


def test_sample_reads_a_given_text(trained, capsys):
    folder, _ = trained
    assert run("sample", folder, "--text", "class3 word1 neverseen") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("class3 word1 neverseen")
    assert any(name in printed for name in load("trec").data(load("trec").presets["smoke"]).classes)


@pytest.mark.slow
def test_look_at_a_mechanism_without_softmax_weights_raises(tmp_path, capsys):
    options = ("--preset", "smoke", "--model", "attention", "--attention", "linear")
    assert run("train", "trec", *options, "--steps", 1, "--out", tmp_path) == 0
    capsys.readouterr()
    assert run("look", tmp_path / "trec" / "attention-smoke-seed0") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "linear_attention has no softmax weights over keys to return: use" in line


def test_config_survives_json():
    for name in TASKS:
        for preset in load(name).presets.values():
            written = json.loads(json.dumps(config.as_json(preset)))
            assert config.from_json(type(preset), written, "x") == preset


# --- Benchmarks.


def test_compare_distinguishes_ok_differs_and_refused(monkeypatch, tmp_path, capsys):
    few = ("no option", "empty rows: mask", "sinks")
    monkeypatch.setattr(compare, "OPTIONS", {name: compare.OPTIONS[name] for name in few})
    file = tmp_path / "compare.json"
    options = compare.Options(quick=True, gradients=False, only=("xla", "jax.nn"), out=file)
    assert compare.main(options) == 0
    record = json.loads(file.read_text())
    assert record["table"] == {
        "no option": {"xla": "ok", "jax.nn": "ok"},
        "empty rows: mask": {"xla": "ok", "jax.nn": "differs"},
        "sinks": {"xla": "ok", "jax.nn": "refused"},
    }
    printed = capsys.readouterr().out
    assert "=== xla (ours)" in printed
    assert "=== jax.nn (peer)" in printed
    assert printed.splitlines()[-1] == "ours: all within bounds"


def test_compare_exits_with_code_1_if_ours_is_out_of_bounds(monkeypatch, capsys):
    def wrong(query, key, value, **options):
        return query

    monkeypatch.setattr(compare, "OPTIONS", {"no option": compare.OPTIONS["no option"]})
    monkeypatch.setattr(compare, "contenders", lambda: {"xla": wrong})
    assert compare.main(compare.Options(quick=True, gradients=False)) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "ours: out of bounds in xla"


@pytest.mark.parametrize(
    "name", mostly_slow(SHAPES, {*SHAPES} - {"window 1000000", "documents 8192"})
)
def test_named_shape_has_an_implementation_on_every_platform(name):
    shape = SHAPES[name]
    for platform in ("cpu", "gpu", "tpu"):
        explanation = explain(*shape.structs(), mask=shape.mask, platform=platform)
        assert explanation.chosen
    assert int(name.split()[-1]) == shape.S


@pytest.mark.parametrize("shape", [SHORT[0], slow(SHORT[1])], ids=str)
@pytest.mark.parametrize("backward", [slow(False), True])
def test_contenders_run(shape, backward):
    for contender in (contenders.ours, contenders.jax_nn):
        assert contender(shape, backward=backward)() is not None


def test_ours_and_jax_nn_compute_the_same_on_a_named_shape():
    shape = SHAPES["first causal 1024"]
    one, other = (contender(shape)() for contender in (contenders.ours, contenders.jax_nn))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_contenders_take_turns_until_there_are_enough_timed_runs():
    calls = []
    both = {name: functools.partial(calls.append, name) for name in ("one", "other")}
    assert contenders.in_turns(both, 4).keys() == both.keys()
    assert contenders.timed_runs(4) == 6
    a_turn = contenders.UNTIMED + contenders.TIMED
    assert calls == 2 * (["one"] * a_turn + ["other"] * a_turn)


def test_bench_goes_on_without_flex_attention_if_it_fails(monkeypatch):
    def fails(shape):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(attention, "have_torch", lambda: True)
    monkeypatch.setattr(attention, "torch_flex", fails)
    monkeypatch.setitem(SHAPES, "small", Shape(16, 16, 1, window=4))
    measured = attention.measure("window", "small", Options(repeats=1), {})
    assert measured.seconds.keys() == {"ours", "jax.nn"}
    assert measured.note == "torch flex: RuntimeError"


def test_bench_measures_prints_and_writes_a_section(tmp_path, capsys):
    (row,) = tables.read({"rows": [MEASURED]})
    tables.print_measurement(row)
    assert "2.00x jax.nn  (at least 1.5: ok)" in capsys.readouterr().out
    tables.write([row], tmp_path, repeats=1)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert tables.read(record) == [row]
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert "| forward, a call | 500.0 ms |  | **2.00x** (aim 1.5x) |" in tables.table([row])


MEASURED = {
    "section": "forward",
    "work": "a call",
    "seconds": {"ours": 0.5, "jax.nn": 1.0},
    "gflops": 1.0,
    "targets": {"jax.nn": 1.5},
    "note": "",
}


@pytest.mark.slow
def test_cache_section_has_sizes():
    rows = SECTIONS["cache"](Options())
    assert [row.note for row in rows] == ["16,384 MiB", "4,096 MiB", "512 MiB"]
