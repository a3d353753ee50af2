"""``python -m experiments COMMAND ...``: trains, scores, reports and measures.

Modules are imported by the command that needs them, so that listing and errors are quick.
"""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import os
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from experiments.options import (
    HELP,
    PROGRAM,
    asks_for_help,
    hints,
    parse,
    read,
    show_help,
    unknown,
)
from experiments.tasks import TASKS, load

if TYPE_CHECKING:
    from experiments.training.config import TrainConfig

# Modules of the extra [experiments].
EXTRA = (
    "matplotlib",
    "orbax",
    "pooch",
    "requests",
    "sacrebleu",
    "sklearn",
    "tensorboardX",
    "tokenizers",
    "tqdm",
    "tyro",
)
SERVE = ("jinja2", "starlette", "uvicorn")  # modules of the extra [serve]
T = TypeVar("T")
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
LOST = 3  # the exit code of a process that lost the others


class Command(NamedTuple):
    """A subcommand."""

    usage: str
    help: str
    run: Callable[[Sequence[str]], int]


def main(arguments: Sequence[str]) -> int:
    """Runs the command that comes first; returns the exit code."""
    if not arguments or arguments[0] in HELP:
        print(listing())
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise ValueError(unknown("command", name, COMMANDS))
        return COMMANDS[name].run(rest)
    except KeyboardInterrupt:
        return interrupted("nothing was written", "start again with", arguments)
    except ModuleNotFoundError as missing:
        if "pip install" in str(missing):  # as of a checkpoint's weights or tokenizer
            print(f"error: {missing}", file=sys.stderr)
            return 2
        module = (missing.name or "").split(".")[0]
        if module not in EXTRA + SERVE:
            raise
        extra = "serve" if module in SERVE else "experiments"
        print(f'error: {missing}: python -m pip install -e ".[{extra}]"', file=sys.stderr)
        return 2
    except (OSError, ValueError, FloatingPointError, NotImplementedError) as problem:
        if "EXPERIMENTS_TRACEBACK" in os.environ:  # to debug a new task
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2


def interrupted(state: str, advice: str, arguments: Sequence[str]) -> int:
    """Prints what Ctrl-C left behind, and the command to type next; returns the exit code."""
    command = f"{PROGRAM} {shlex.join(arguments)}"
    print(f"interrupted: {state}; {advice}: {command}", file=sys.stderr)
    return INTERRUPTED


def lost(problem: Exception, folder: Path) -> int:
    """Prints that a run of several processes cannot go on; returns the exit code."""
    first = (str(problem).splitlines() or [""])[0]
    print(
        f"error: this process cannot go on, most likely because another one has ended: "
        f"{first[:200]}; start all processes again with --resume ({folder})",
        file=sys.stderr,
    )
    return LOST


def listing() -> str:
    """All commands and all tasks, as text."""
    lines = [__doc__.splitlines()[0].replace("``", ""), ""] if __doc__ else []
    for command in COMMANDS.values():
        lines.append(f"  {command.usage:42} {command.help}")
    lines += ["", "Tasks for train:"]
    for name, summary in TASKS.items():
        lines.append(f"  {name}")
        lines += [f"    {field:7} {text}" for field, text in summary._asdict().items()]
    lines += ["", f"Options: {PROGRAM} COMMAND --help; for train, {PROGRAM} train TASK --help"]
    return "\n".join(lines)


# --- Runs.


def _split_task(command: str, arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The name of the task, which comes first, and the other arguments."""
    if not arguments:
        raise ValueError(f"{command} needs a task: {', '.join(TASKS)}")
    name, *rest = arguments
    if name not in TASKS:
        raise ValueError(unknown("task", name, TASKS))
    return name, rest


def _train(arguments: Sequence[str]) -> int:
    """``TASK [--preset NAME] [--option value ...]``."""
    if arguments and arguments[0] in HELP:
        print(listing())
        return 0
    name, rest = _split_task("train", arguments)

    from jax.errors import JaxRuntimeError

    from experiments.training.runs import Flags, folder_of, identity
    from experiments.training.train import run

    task = load(name)
    default = next(iter(task.presets.values()))
    kinds = hints(type(default)) | hints(Flags)
    given = [argument for argument in rest if argument not in HELP]
    values = read({"preset": str, **kinds}, given, f"train {name}")
    preset = values.pop("preset", next(iter(task.presets)))
    if preset not in task.presets:
        raise ValueError(unknown("preset", preset, task.presets, f" of {name}"))
    if asks_for_help(rest):
        chosen = {key: values[key] for key in ("model",) if key in values}
        _train_help(name, preset, tuple(task.presets), task.configured(preset, **chosen))
    flags = Flags(**{key: value for key, value in values.items() if key in hints(Flags)})
    changes = {key: value for key, value in values.items() if key not in hints(Flags)}
    config = task.configured(preset, **changes)
    folder = folder_of(task, config, preset=preset, flags=flags)
    before = identity(folder)
    try:
        with contextlib.ExitStack() as stack:
            if flags.process:  # process 0 prints
                devnull = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(devnull))
            run(task, config, preset=preset, flags=flags)
    except JaxRuntimeError as problem:
        if flags.coordinator is None:
            raise
        return lost(problem, folder)
    except KeyboardInterrupt:
        if flags.overwrite and before is not None and identity(folder) == before:
            state = f"{folder} still holds the previous run"
            return interrupted(state, "start again with", ["train", *arguments])
        state, resumable = _what_is_saved(folder)
        again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
        advice = "resume it with" if resumable else "start it again with"
        return interrupted(state, advice, ["train", *again, "--resume"])
    return 0


def _train_help(name: str, preset: str, presets: Sequence[str], config: TrainConfig) -> None:
    """Prints the options of a task, with the defaults of a preset and model, and exits."""
    from experiments.training.runs import Flags

    both = dataclasses.make_dataclass(
        f"{name.capitalize()}Options",
        [("config", type(config), config), ("flags", Flags, Flags())],
        frozen=True,
    )
    about = f"Presets: {', '.join(presets)}. The defaults below are those of {preset}."
    show_help(both, f"train {name} --preset {preset}", about, nested=True)


def _what_is_saved(folder: Path) -> tuple[str, bool]:
    """What is saved of an interrupted run, in words; and whether it can be resumed from there."""
    from experiments.training.checkpoints import LAST, Checkpoints

    step = Checkpoints(folder / "checkpoints").latest(LAST)
    if step is None:
        return f"{folder} has no checkpoint yet", False
    return f"{folder} is saved at step {step}", True


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Options of ``evaluate``."""

    split: Literal["validation", "test"] = "test"
    """The examples to score."""


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Options of ``sample``."""

    text: str | None = None
    """A text of your own; default an example of the test split."""
    out: Path | None = None
    """The file to write."""


@dataclasses.dataclass(frozen=True)
class LookOptions(TextOptions):
    """Options of ``look``."""

    out: Path | None = None
    """The file to write; default look.html, or compare.html, in the folder of the run."""
    compare: bool = False
    """Compare with the weights before training, those of the checkpoint for the model pretrained.
    """


def _evaluate(arguments: Sequence[str]) -> int:
    folder, rest = _split_run("evaluate", arguments)
    options = parse(EvaluateOptions, rest, "evaluate RUN")

    from experiments.training import runs
    from experiments.training.progress import one_line

    run = runs.load(folder, load)
    scores = run.task.evaluate(run.config, run.model, run.data, options.split)
    print(f"{folder}, weights of step {run.step}, {options.split}: {one_line(scores)}")
    return 0


def _sample(arguments: Sequence[str]) -> int:
    folder, rest = _split_run("sample", arguments)
    options = parse(TextOptions, rest, "sample RUN")

    from experiments.training import runs

    run = runs.load(folder, load)
    if run.task.sample is None:
        raise ValueError(f"{run.task.name} has no text to print; its pictures are in {folder}")
    text = run.task.sample(run.config, run.model, run.data, options.text)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text + "\n")
        print(f"wrote {options.out}")
    return 0


def _look(arguments: Sequence[str]) -> int:
    folder, rest = _split_run("look", arguments)
    options = parse(LookOptions, rest, "look RUN")

    from experiments.report import change, look
    from experiments.training import runs

    run = runs.load(folder, load)
    if run.task.look is None:
        raise ValueError(f"{run.task.name} has no attention page; its pictures are in {folder}")
    views = run.task.look(run.config, run.model, run.data, options.text)
    model = getattr(run.config, "model", "")
    name = "compare.html" if options.compare else "look.html"
    file = folder / name if options.out is None else options.out
    subtitle = f"weights of step {run.step}, preset {run.preset}, seed {run.config.seed}"
    if options.compare:
        before = run.task.look(run.config, runs.untrained(run), run.data, options.text)
        subtitle = f"before training, and after it: {subtitle}"
        text = change.page(f"{run.task.name}: {model}", subtitle, before, views)
        file.write_text(text, encoding="utf-8")
    else:
        look.write(file, f"{run.task.name}: {model}", subtitle, views)
    print(f"wrote {file}")
    return 0


def _split_run(command: str, arguments: Sequence[str]) -> tuple[Path, Sequence[str]]:
    """The folder of the run, which comes first, and the other arguments."""
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in HELP:
            kinds = {"evaluate": EvaluateOptions, "sample": TextOptions, "look": LookOptions}
            parse(kinds[command], arguments, f"{command} RUN")
        known = sorted(str(file.parent) for file in Path("runs").glob("*/*/run.json"))
        raise ValueError(f"{command} needs the folder of a run: {', '.join(known) or 'none here'}")
    return Path(arguments[0]), arguments[1:]


# --- Checkpoints.


def _chat(arguments: Sequence[str]) -> int:
    from experiments.serving import chat

    return chat.main(*_split_checkpoint("chat", chat.Options, arguments))


def _serve(arguments: Sequence[str]) -> int:
    from experiments.serving import server

    return server.main(*_split_checkpoint("serve", server.Options, arguments))


def _split_checkpoint(command: str, kind: type[T], arguments: Sequence[str]) -> tuple[str, T]:
    """The folder of the checkpoint, which comes first, and the options."""
    if asks_for_help(arguments):
        parse(kind, arguments, f"{command} FOLDER")
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(
            f"{command} needs the folder of a checkpoint, or org/name on the Hugging Face hub"
        )
    return arguments[0], parse(kind, arguments[1:], f"{command} FOLDER")


# --- Tables and measurements.


def _report(arguments: Sequence[str]) -> int:
    from experiments.report import tables

    return tables.main(parse(tables.Options, arguments, "report"))


def _compare(arguments: Sequence[str]) -> int:
    from experiments.bench import compare

    return compare.main(parse(compare.Options, arguments, "compare"))


def _card(arguments: Sequence[str]) -> int:
    from experiments.card import command

    return command.main(command.parse(arguments, PROGRAM))


def _fewshot(arguments: Sequence[str]) -> int:
    from experiments.tasks.fewshot import sweep

    options = parse(sweep.Options, arguments, "fewshot")
    try:
        return sweep.main(options)
    except KeyboardInterrupt:
        state = f"finished runs are in {options.out / 'fewshot'}"
        return interrupted(state, "resume with", ["fewshot", *arguments])


def _sweep(arguments: Sequence[str]) -> int:
    """``TASK [--minutes M] [--option value ...]``; options of the task are fixed in all trials."""
    from experiments.training import sweep

    if arguments and arguments[0].startswith("-"):
        if asks_for_help(arguments):
            parse(sweep.Options, arguments, "sweep TASK")
        arguments = ()
    name, rest = _split_task("sweep", arguments)
    if asks_for_help(rest):
        parse(sweep.Options, rest, f"sweep {name}")
    task = load(name)
    own, searched = hints(type(next(iter(task.presets.values())))), hints(sweep.Options)
    own.pop("model")
    values = read(own | searched, rest, f"sweep {name}")
    options = sweep.Options(**{key: x for key, x in values.items() if key in searched})
    fixed = {key: x for key, x in values.items() if key not in searched}
    try:
        return sweep.main(task, options, fixed)
    except KeyboardInterrupt:
        state = f"finished trials are in {options.results / f'{name}.jsonl'}"
        return interrupted(state, "resume with", ["sweep", *arguments])


def _walkthrough(arguments: Sequence[str]) -> int:
    from experiments import walkthrough

    return walkthrough.main(parse(walkthrough.Options, arguments, "walkthrough"))


def _bench(arguments: Sequence[str]) -> int:
    from experiments.bench import attention

    return int(attention.main(parse(attention.Options, arguments, "bench")) or 0)


def _plan(arguments: Sequence[str]) -> int:
    from experiments.plan import command, estimate

    return command.main(parse(estimate.Options, arguments, "plan"))


COMMANDS = {
    "train": Command(
        "train TASK [--preset NAME] [--option ...]", "trains a model on a task", _train
    ),
    "evaluate": Command("evaluate RUN [--split NAME]", "scores a trained model again", _evaluate),
    "sample": Command("sample RUN [--text TEXT]", "prints outputs of a trained model", _sample),
    "look": Command(
        "look RUN [--text TEXT] [--compare]",
        "writes a page that shows its attention weights",
        _look,
    ),
    "chat": Command("chat FOLDER [--option ...]", "talks with the model of a checkpoint", _chat),
    "serve": Command(
        "serve FOLDER [--port P] [--option ...]",
        "serves completions of a checkpoint over HTTP",
        _serve,
    ),
    "report": Command("report", "writes the pages and plots in experiments/results", _report),
    "compare": Command(
        "compare [--option ...]",
        "checks all implementations against the float64 oracle",
        _compare,
    ),
    "sweep": Command(
        "sweep TASK [--minutes M] [--option ...]",
        "searches the hyperparameters of each model",
        _sweep,
    ),
    "fewshot": Command(
        "fewshot [--option ...]", "trains with few labeled examples, plots accuracy", _fewshot
    ),
    "bench": Command("bench [--option ...]", "measures time and memory of attention", _bench),
    "plan": Command(
        "plan --size 8B --mesh data=16 [--fsdp]",
        "estimates memory, communication and time of a training step",
        _plan,
    ),
    "card": Command(
        "card --out FOLDER --minutes M [--dry]",
        "checks, measures and tunes the GPU kernels on an NVIDIA card",
        _card,
    ),
    "walkthrough": Command(
        "walkthrough", "prints self-attention by hand, step by step", _walkthrough
    ),
}


def _raise_later(problem: sys.UnraisableHookArgs) -> None:
    """Ctrl-C while a callback runs (of garbage collection, say) is not lost: it is sent again."""
    if problem.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(problem)


if __name__ == "__main__":
    sys.unraisablehook = _raise_later
    code = main(sys.argv[1:])
    if code in (INTERRUPTED, LOST):
        # JAX may still be computing in other threads, or wait for processes that have ended:
        # shutting Python down under them can crash or hang.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
