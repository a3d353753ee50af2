"""``python -m experiments VERB ...``: trains, scores, reports and measures.

Modules are imported by the verb that needs them, so that listing and errors are quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from experiments.tasks import TASKS, load

PROGRAM = "python -m experiments"
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
Options = TypeVar("Options")


class Verb(NamedTuple):
    """A subcommand."""

    usage: str
    help: str
    run: Callable[[Sequence[str]], int]


def main(arguments: Sequence[str]) -> int:
    """Runs the verb that comes first; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *rest = arguments
    if name not in VERBS:
        fail(f"unknown verb {name!r}", "verbs", VERBS)
    try:
        return VERBS[name].run(rest)
    except ModuleNotFoundError as missing:
        if (missing.name or "").split(".")[0] not in EXTRA:
            raise
        print(f'error: {missing}: python -m pip install -e ".[experiments]"', file=sys.stderr)
        return 2
    except (OSError, ValueError, FloatingPointError, NotImplementedError) as problem:
        if "EXPERIMENTS_TRACEBACK" in os.environ:  # to debug a new task
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2


def listing() -> str:
    """All verbs and all tasks, as text."""
    lines = [__doc__.splitlines()[0].replace("``", ""), ""] if __doc__ else []
    for verb in VERBS.values():
        lines.append(f"  {verb.usage:42} {verb.help}")
    lines += ["", "Tasks for train:"]
    for name, summary in TASKS.items():
        lines.append(f"  {name}")
        lines += [f"    {field:7} {text}" for field, text in summary._asdict().items()]
    lines += ["", f"Options: {PROGRAM} VERB --help; for train, {PROGRAM} train TASK --help"]
    return "\n".join(lines)


# --- Runs.


def _train(arguments: Sequence[str]) -> int:
    """``TASK [--preset NAME] [--option value ...]``."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    if not arguments:
        fail("train needs a task", "tasks", TASKS)
    name, *rest = arguments
    if name not in TASKS:
        fail(f"unknown task {name!r}", "tasks", TASKS)

    from experiments.training.runs import Flags
    from experiments.training.train import run

    task = load(name)
    preset, rest = split_preset(rest, next(iter(task.presets)))
    if preset not in task.presets:
        fail(f"unknown preset {preset!r} of {name}", "presets", task.presets)
    default = task.presets[preset]
    both = dataclasses.make_dataclass(
        f"{name.capitalize()}Options",
        [("config", type(default), default), ("flags", Flags, Flags())],
        frozen=True,
    )
    options: Any = parse(
        both,
        rest,
        f"train {name} --preset {preset}",
        description=(
            f"Presets: {', '.join(task.presets)}. The defaults below are those of {preset}."
        ),
        parts=(type(default), Flags),
    )
    run(task, options.config, preset=preset, flags=options.flags)
    return 0


def split_preset(arguments: Sequence[str], default: str) -> tuple[str, list[str]]:
    """The value of ``--preset``, which determines the defaults, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=PROGRAM)
    parser.add_argument("--preset", default=default)
    found, rest = parser.parse_known_args(arguments)
    return found.preset, rest


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Options of ``evaluate``."""

    split: str = "test"
    """validation or test."""

    def __post_init__(self) -> None:
        if self.split not in ("validation", "test"):
            raise ValueError(f"split must be validation or test, got {self.split}")


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Options of ``sample`` and ``look``."""

    text: str | None = None
    """A text of your own; default an example of the test split."""
    out: Path | None = None
    """The file to write; default, of ``look``, look.html in the folder of the run."""


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
    options = parse(TextOptions, rest, "look RUN")

    from experiments.report import look
    from experiments.training import runs

    run = runs.load(folder, load)
    if run.task.look is None:
        raise ValueError(f"{run.task.name} has no attention page; its pictures are in {folder}")
    views = run.task.look(run.config, run.model, run.data, options.text)
    model = getattr(run.config, "model", "")
    file = folder / "look.html" if options.out is None else options.out
    subtitle = f"weights of step {run.step}, preset {run.preset}, seed {run.config.seed}"
    look.write(file, f"{run.task.name}: {model}", subtitle, views)
    print(f"wrote {file}")
    return 0


def _split_run(verb: str, arguments: Sequence[str]) -> tuple[Path, Sequence[str]]:
    """The folder of the run, which comes first, and the other arguments."""
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            options = EvaluateOptions if verb == "evaluate" else TextOptions
            parse(options, arguments, f"{verb} RUN")
        known = sorted(str(file.parent) for file in Path("runs").glob("*/*/run.json"))
        fail(f"{verb} needs the folder of a run", "runs here", known or ["none"])
    return Path(arguments[0]), arguments[1:]


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

    return sweep.main(parse(sweep.Options, arguments, "fewshot"))


def _walkthrough(arguments: Sequence[str]) -> int:
    from experiments import walkthrough

    return walkthrough.main(parse(walkthrough.Options, arguments, "walkthrough"))


def _bench(arguments: Sequence[str]) -> int:
    from experiments.bench import attention

    return int(attention.main(parse(attention.Options, arguments, "bench")) or 0)


VERBS = {
    "train": Verb("train TASK [--preset NAME] [--option ...]", "trains a model on a task", _train),
    "evaluate": Verb("evaluate RUN [--split NAME]", "scores a trained model again", _evaluate),
    "sample": Verb("sample RUN [--text TEXT]", "prints outputs of a trained model", _sample),
    "look": Verb("look RUN [--text TEXT]", "writes a page that shows its attention weights", _look),
    "report": Verb("report", "writes the pages and plots in experiments/results", _report),
    "compare": Verb(
        "compare [--option ...]",
        "checks all implementations against the float64 oracle",
        _compare,
    ),
    "fewshot": Verb(
        "fewshot [--option ...]", "trains with few labelled examples, plots accuracy", _fewshot
    ),
    "bench": Verb("bench [--option ...]", "measures time and memory of attention", _bench),
    "card": Verb(
        "card --out FOLDER --minutes M [--dry]",
        "checks, measures and tunes the GPU kernels on an NVIDIA card",
        _card,
    ),
    "walkthrough": Verb("walkthrough", "prints self-attention by hand, step by step", _walkthrough),
}


def parse(
    options: type[Options],
    arguments: Sequence[str],
    command: str,
    description: str | None = None,
    parts: Sequence[Any] = (),
) -> Options:
    """Parses options into a dataclass, or into one with the nested dataclasses ``parts``."""
    import tyro

    found, unknown = tyro.cli(
        options,
        args=arguments,
        prog=f"{PROGRAM} {command}",
        description=description,
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes,) if parts else (),
    )
    if unknown:
        valid = [flag for part in parts or (options,) for flag in flags(part)]
        fail(f"unknown option {unknown[0]!r}", f"options of {command}", valid)
    return found


def flags(options: Any) -> list[str]:
    """The options as typed on the command line."""
    return ["--" + field.name.replace("_", "-") for field in dataclasses.fields(options)]


def fail(problem: str, kind: str, valid: Iterable[str]) -> NoReturn:
    """Prints what was wrong and what is valid; exits with code 2."""
    print(f"error: {problem}\n{kind}: {', '.join(valid)}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
