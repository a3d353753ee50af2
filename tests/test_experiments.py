"""``python -m experiments``: what it lists and refuses, and that its verbs do what they say."""

import json
import subprocess
import sys
import warnings

import jax
import pytest

from experiments.__main__ import main
from experiments.bench import compare
from experiments.tasks import TASKS, load
from experiments.training import config

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
    for word in ("train", "evaluate", "sample", "look", "report", "compare", "bench", "--help"):
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
        ("train digits --attention nope", ["nope", "blockwise", "xla", "flax"]),
        ("train digits --steps 0", ["steps must be above 0"]),
        ("train digits --steps many", ["many", "INT"]),
        ("train digits --model gru", ["gru", "logistic", "cnn", "vit"]),
        ("train digits --batch-size 10 --accumulate 4", ["batch_size must be a multiple", "4"]),
        ("train trec --mask nope", ["nope", "global", "window", "chunked"]),
        ("train trec --heads 3", ["heads must divide width"]),
        ("train trec --dtype float16", ["float16", "float32", "bfloat16"]),
        ("evaluate", ["needs the folder of a run", "runs here"]),
        ("sample --text x", ["needs the folder of a run"]),
        ("look --nope", ["needs the folder of a run"]),
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


# --- Runs.


def run(*arguments):
    """The verb's exit code; what goes wrong is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        return main([str(x) for x in arguments])


SAME = ("sst2", "fashion")  # rungs that are those of trec and digits, on other data
RUNGS = [
    (name, model)
    for name in TASKS
    if name not in SAME
    for model in config.choices(type(next(iter(load(name).presets.values()))), "model")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), RUNGS)
def test_every_rung_trains_is_scored_again_read_and_looked_at(name, model, tmp_path, capsys):
    options = ("--preset", "smoke", "--model", model, "--out", tmp_path, "--record", tmp_path)
    assert run("train", name, *options) == 0
    folder = tmp_path / name / f"{model}-smoke-seed0"
    record = json.loads((tmp_path / f"{name}.jsonl").read_text())  # one line
    assert record == json.loads((folder / "record.json").read_text())
    task = load(name)
    assert (record["task"], record["model"], record["seed"]) == (name, model, 0)
    assert record["config"]["synthetic"]
    assert record["versions"]["jax"] == jax.__version__
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
        assert "has no examples to read" in capsys.readouterr().err
    code = run("look", folder)
    said = capsys.readouterr()
    attends = "attention" in model or name == "vqa"
    attends |= model in ("vit", "transformer", "window", "copier", "finetuned", "adapted")
    attends |= (name, model) == ("qa", "gru")
    if task.look is not None and attends:
        assert code == 0
        page = (folder / "look.html").read_text()
        assert "://" not in page  # nothing from a network
    else:
        assert code == 2
        assert "no attention to look at" in said.err or "no page to look at" in said.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of ``trec``, and where it lies."""
    out = tmp_path_factory.mktemp("runs")
    options = ("--preset", "smoke", "--model", "attention", "--steps", 3, "--out", out)
    assert run("train", "trec", *options) == 0
    return out / "trec" / "attention-smoke-seed0", options


def test_a_run_is_not_replaced_unless_told(trained, capsys):
    folder, options = trained
    assert run("train", "trec", *options) == 2
    said = capsys.readouterr().err
    for words in (str(folder), "--resume", "--overwrite", "--name"):
        assert words in said


def test_a_run_of_another_configuration_is_not_resumed(trained, capsys):
    _, options = trained
    assert run("train", "trec", *options, "--width", 32, "--resume") == 2
    said = capsys.readouterr().err
    assert "width is 32, was 16" in said
    assert "seed" not in said.split("configuration:")[1]


def test_a_finished_run_that_is_resumed_is_scored_again(trained, capsys):
    folder, options = trained
    before = json.loads((folder / "record.json").read_text())
    assert run("train", "trec", *options, "--resume") == 0
    assert "goes on from step 3" in capsys.readouterr().out
    after = json.loads((folder / "record.json").read_text())
    assert (before["test"], before["curve"]) == (after["test"], after["curve"])


def test_a_damaged_checkpoint_is_told_from_a_missing_run(trained, tmp_path, capsys):
    import shutil

    folder, _ = trained
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for file in (copy / "checkpoints" / "best").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert run("evaluate", copy) == 2
    assert "no checkpoint is whole" in capsys.readouterr().err
    assert run("evaluate", tmp_path / "nothing") == 2
    assert "is no run: it has no run.json" in capsys.readouterr().err


def test_a_run_of_another_version_is_refused(trained, tmp_path, capsys):
    import shutil

    folder, _ = trained
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "run.json"
    said = json.loads(file.read_text())
    del said["config"]["width"]
    file.write_text(json.dumps(said))
    assert run("evaluate", tmp_path / "copy") == 2
    assert "another version of this task: its options differ by width" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" ", "text must not be empty or blank"),
        ("word " * 65, "text has 65 words, the model reads 64"),
    ],
)
@pytest.mark.parametrize("verb", ["sample", "look"])
def test_a_text_that_cannot_be_read_is_refused(trained, verb, text, said, capsys):
    folder, _ = trained
    assert run(verb, folder, "--text", text) == 2
    assert said in capsys.readouterr().err


def test_a_text_of_ones_own_is_read(trained, capsys):
    folder, _ = trained
    assert run("sample", folder, "--text", "class3 word1 neverseen") == 0
    said = capsys.readouterr().out
    assert said.startswith("class3 word1 neverseen")
    assert any(name in said for name in load("trec").data(load("trec").presets["smoke"]).classes)


@pytest.mark.slow
def test_what_has_no_weights_is_not_looked_at(tmp_path, capsys):
    options = ("--preset", "smoke", "--model", "attention", "--attention", "linear")
    assert run("train", "trec", *options, "--steps", 1, "--out", tmp_path) == 0
    capsys.readouterr()
    assert run("look", tmp_path / "trec" / "attention-smoke-seed0") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "linear_attention has no weights of a softmax over keys to look at: take" in line


def test_options_are_the_same_after_a_file():
    for name in TASKS:
        for preset in load(name).presets.values():
            written = json.loads(json.dumps(config.as_json(preset)))
            assert config.from_json(type(preset), written, "x") == preset


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
