"""``python -m experiments VERB ...``: lists what there is, or does it.

Nothing heavy is imported before it is known what to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

from experiments.tasks import TASKS, load

PROGRAM = "python -m experiments"
EXTRA = ("matplotlib", "sklearn", "tqdm", "tyro")  # modules of the extra [experiments]
Options = TypeVar("Options")


class Verb(NamedTuple):
    """Something to do."""

    usage: str
    does: str
    run: Callable[[Sequence[str]], int]


def main(arguments: Sequence[str]) -> int:
    """Runs the verb that the arguments begin with; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *rest = arguments
    if name not in VERBS:
        fail(f"unknown verb {name!r}", "verbs", VERBS)
    try:
        return VERBS[name].run(rest)
    except ModuleNotFoundError as missing:
        if missing.name not in EXTRA:
            raise
        print(f'error: {missing}: python -m pip install -e ".[experiments]"', file=sys.stderr)
        return 2


def listing() -> str:
    """All verbs, and for train the tasks."""
    lines = [__doc__.splitlines()[0].replace("``", ""), ""] if __doc__ else []
    for verb in VERBS.values():
        lines.append(f"  {verb.usage:42} {verb.does}")
    lines += ["", "Tasks for train:"]
    for name, row in TASKS.items():
        lines.append(f"  {name}")
        lines += [f"    {word:7} {said}" for word, said in row._asdict().items()]
    lines += ["", f"Options: {PROGRAM} VERB --help; for train, {PROGRAM} train TASK --help"]
    return "\n".join(lines)


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

    from experiments import train

    task = load(name)
    preset, rest = split_preset(rest, next(iter(task.presets)))
    if preset not in task.presets:
        fail(f"unknown preset {preset!r} of {name}", "presets", task.presets)
    default = task.presets[preset]
    config = parse(
        type(default),
        rest,
        f"train {name} --preset {preset}",
        default,
        f"Presets: {', '.join(task.presets)}. The defaults below are those of {preset}.",
    )
    train.run(task, config, preset=preset)
    return 0


def split_preset(arguments: Sequence[str], default: str) -> tuple[str, list[str]]:
    """The value of ``--preset``, and the other arguments: it decides what their defaults are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=PROGRAM)
    parser.add_argument("--preset", default=default)
    found, rest = parser.parse_known_args(arguments)
    return found.preset, rest


def _compare(arguments: Sequence[str]) -> int:
    from experiments import compare

    return compare.main(parse(compare.Options, arguments, "compare"))


def _bench(arguments: Sequence[str]) -> int:
    from experiments import bench

    return int(bench.main(parse(bench.Options, arguments, "bench")) or 0)


VERBS = {
    "train": Verb("train TASK [--preset NAME] [--option ...]", "trains a model on a task", _train),
    "compare": Verb(
        "compare [--option ...]", "checks us and our peers against the float64 oracle", _compare
    ),
    "bench": Verb("bench [--option ...]", "measures time and memory", _bench),
}


def parse(
    options: type[Options],
    arguments: Sequence[str],
    command: str,
    default: Options | None = None,
    description: str | None = None,
) -> Options:
    """Options from the command line, into a frozen dataclass."""
    import tyro

    start = default if default is not None else tyro.MISSING_NONPROP
    found, unknown = tyro.cli(
        options,
        args=arguments,
        prog=f"{PROGRAM} {command}",
        default=start,
        description=description,
        return_unknown_args=True,
    )
    if unknown:
        fail(f"unknown option {unknown[0]!r}", f"options of {command}", flags(options))
    return found


def flags(options: Any) -> list[str]:
    """The options as they are typed."""
    return ["--" + field.name.replace("_", "-") for field in dataclasses.fields(options)]


def fail(problem: str, kind: str, valid: Iterable[str]) -> NoReturn:
    """Says what was wrong and what would be right, and ends with exit code 2."""
    print(f"error: {problem}\n{kind}: {', '.join(valid)}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
