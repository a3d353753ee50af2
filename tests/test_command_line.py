"""The command line of the experiments: listing, mistakes and Ctrl-C."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
from compiling import flags_of_one_device

from experiments.__main__ import COMMANDS, main
from experiments.options import read
from experiments.tasks import TASKS


def test_listing_imports_nothing_heavy():
    code = """if True:
        import sys
        from experiments.__main__ import main
        assert main([]) == 0
        heavy = {"jax", "matplotlib", "sklearn", "tyro"} & sys.modules.keys()
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in (*COMMANDS, "--help"):
        assert word in done.stdout
    for name, summary in TASKS.items():
        for text in (name, *summary):
            assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("trian", ["unknown command 'trian'; did you mean train?", "train, evaluate", "bench"]),
        ("train", ["needs a task", "digits"]),
        ("train digts", ["unknown task 'digts'; did you mean digits?", "digits, fashion"]),
        ("train xyz", ["unknown task 'xyz'. Tasks: digits"]),
        ("train digits nope", ["unknown option 'nope'", "--steps", "--patch"]),
        ("train digits --preset cpus", ["unknown preset 'cpus' of digits; did you mean cpu?"]),
        ("train digits --stpes 1", ["'--stpes' of train digits; did you mean --steps?", "--patch"]),
        ("train digits --attention blokwise", ["attention", "did you mean blockwise?", "flax"]),
        ("train digits --steps 0", ["steps must be above 0, got 0"]),
        ("train digits --steps many", ["--steps must be an integer, got 'many'"]),
        ("train digits --steps", ["--steps needs a value: an integer"]),
        ("train digits --minutes soon", ["--minutes must be a number, got 'soon'"]),
        ("train digits --resume=yes", ["--resume takes no value, got 'yes'"]),
        ("train digits --model vitt", ["--model must be one of logistic, cnn, vit, got 'vitt'"]),
        ("train digits --model vitt", ["did you mean vit?"]),
        ("train digits --batch-size 10 --accumulate 4", ["batch_size must be a multiple", "4"]),
        ("train trec --mask nope", ["--mask", "'nope'", "global", "window", "chunked"]),
        ("train trec --heads 3", ["heads must divide width"]),
        ("train trec --dtype float16", ["'float16'", "float32", "bfloat16"]),
        ("evaluate", ["needs the folder of a run"]),
        ("evaluate nowhere", ["nowhere is not a run: it has no run.json"]),
        ("evaluate run --split tets", ["--split must be one of validation, test, got 'tets'"]),
        ("sample --text x", ["needs the folder of a run"]),
        ("look --nope", ["needs the folder of a run"]),
        ("compare --nope", ["unknown option '--nope' of compare", "--quick", "--out"]),
        ("compare --only blockwize", ["did you mean blockwise?", "jax.nn"]),
        ("bench --only memry", ["--only must be one of forward", "did you mean memory?"]),
        ("bench --scaling --only decode", ["scaling measures every kind", "only decode"]),
        ("sweep", ["sweep needs a task: digits"]),
        ("sweep trecc", ["unknown task 'trecc'; did you mean trec?"]),
        ("sweep trec --minutes 0", ["minutes must be above 0, got 0"]),
        ("sweep trec --stpes 1", ["'--stpes' of sweep trec; did you mean --steps?", "--trials"]),
        ("sweep trec --models naive_bayes", ["models must be one of text_cnn", "'naive_bayes'"]),
        ("sweep fewshot", ["fewshot has no search spaces: add them to its Task as spaces"]),
        ("fewshot --models gru", ["models must be one of naive_bayes", "got 'gru'"]),
        ("fewshot --sizes 10 x", ["--sizes must be an integer, got 'x'"]),
    ],
)
def test_mistake_is_one_line_and_exits_with_code_2(arguments, words, capsys):
    assert main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_run_that_was_probably_meant_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/trec/attention-cpu-seed0")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    assert main(["look", "runs/trec/atention-cpu-seed0"]) == 2
    assert f"no run.json; did you mean {folder}? Runs here: {folder}" in capsys.readouterr().err


def test_values_have_the_types_of_their_options():
    kinds = {"batch_size": int, "rate": float | None, "flex": bool, "out": Path}
    kinds |= {"model": Literal["cnn", "vit"], "sizes": tuple[int, ...], "only": str | None}
    words = "--batch-size 3 --rate=1e-3 --no-flex --out x --model vit --sizes 1 2 --only None"
    assert read(kinds, words.split(), "train") == {
        "batch_size": 3,
        "rate": 1e-3,
        "flex": False,
        "out": Path("x"),
        "model": "vit",
        "sizes": (1, 2),
        "only": None,
    }
    assert read(kinds, ["--batch_size", "-3", "--flex"], "train") == {
        "batch_size": -3,
        "flex": True,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train digits --preset smoke", ["--preset smoke", "--patch", "--resume", "accelerator"]),
        ("evaluate", ["--split"]),
        ("bench", ["--scaling"]),
    ],
)
def test_help_lists_the_options(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*arguments.split(), "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for word in words:
        assert word in printed


# --- Ctrl-C.


# ``python -m experiments``. A shell starts background jobs with SIGINT ignored, and so the tests.
PROGRAM = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("experiments", run_name="__main__", alter_sys=True)
"""


def interrupt(arguments, when):
    """Sends SIGINT once ``when()`` is true; returns what the process printed as errors."""
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"XLA_FLAGS": flags_of_one_device(), "PYTHONPATH": root},
        text=True,
    )
    with process:
        while process.poll() is None and not when():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    return errors.splitlines()


@pytest.mark.slow
def test_interrupted_training_says_how_to_resume(tmp_path, capsys):
    arguments = ["train", "trec", "--preset", "smoke", "--model", "attention", "--steps", "40"]
    arguments += ["--save-every", "5", "--out", str(tmp_path)]
    folder = tmp_path / "trec" / "attention-smoke-seed0"
    last = folder / "checkpoints" / "last"
    line = interrupt([*arguments, "--overwrite"], lambda: (last / "5").exists())[-1]
    state, command = line.split("; resume it with: ")
    assert state.startswith(f"interrupted: {folder} is saved at step ")
    step = int(state.split()[-1])
    assert 0 < step < 40
    assert command == shlex.join(["python", "-m", "experiments", *arguments, "--resume"])
    assert main(shlex.split(command)[3:]) == 0
    assert f"resumed from step {step}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "work", "line"),
    [
        (
            "train trec --preset smoke --overwrite",
            "training.train.run",
            "attention_cnn-smoke-seed0 has no checkpoint yet; start it again with: "
            "python -m experiments train trec --preset smoke --resume",
        ),
        (
            "train trec --preset smoke --model attention --resume",
            "training.train.run",
            "attention-smoke-seed0 is saved at step 7; resume it with: "
            "python -m experiments train trec --preset smoke --model attention --resume",
        ),
        (
            "fewshot --seeds 1",
            "tasks.fewshot.sweep.main",
            "finished runs are in runs/fewshot; resume with: "
            "python -m experiments fewshot --seeds 1",
        ),
        (
            "bench --only forward",
            "bench.attention.main",
            "nothing was written; start again with: python -m experiments bench --only forward",
        ),
        (
            "compare --quick",
            "bench.compare.main",
            "nothing was written; start again with: python -m experiments compare --quick",
        ),
    ],
)
def test_interrupted_command_says_what_to_type(
    arguments, work, line, monkeypatch, tmp_path, capsys
):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("runs/trec/attention-smoke-seed0/checkpoints/last/7").mkdir(parents=True)
    monkeypatch.setattr(f"experiments.{work}", interrupted)
    assert main(arguments.split()) == 130
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith("interrupted: ")
    assert printed.endswith(line)


def test_an_interrupt_before_a_run_is_replaced_says_that_it_is_still_there(
    monkeypatch, tmp_path, capsys
):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    folder = Path("runs/trec/attention-smoke-seed0")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    monkeypatch.setattr("experiments.training.train.run", interrupted)
    arguments = "train trec --preset smoke --model attention --overwrite"
    assert main(arguments.split()) == 130
    assert capsys.readouterr().err == (
        f"interrupted: {folder} still holds the previous run; start again with: "
        f"python -m experiments {arguments}\n"
    )


@pytest.mark.slow
def test_interrupted_process_prints_no_traceback():
    start = time.monotonic()
    errors = interrupt(["compare", "--quick"], lambda: time.monotonic() > start + 8)
    assert errors[-1].startswith("interrupted: ")


def test_an_interrupt_during_a_callback_is_sent_again(tmp_path):
    """Python drops what a callback of the garbage collector raises."""
    program = """
import gc, runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
def wait():
    def callback(*_):
        gc.callbacks.remove(callback)
        signal.raise_signal(signal.SIGINT)
    gc.callbacks.append(callback)
    gc.collect()
    while True:
        time.sleep(0.01)
import experiments.options
experiments.options.asks_for_help = lambda _: wait()
sys.argv = ["experiments", "train", "trec"]
runpy.run_module("experiments", run_name="__main__")
"""
    process = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=50,
    )
    assert process.returncode == 130, process.stderr
    assert process.stderr.startswith("interrupted: ")
