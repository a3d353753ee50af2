"""Command-line options: the fields of a dataclass as ``--name value``, with one-line errors.

Only ``--help`` needs tyro, which shows the docstring below each field.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

PROGRAM = "python -m experiments"
HELP = ("-h", "--help")
DESCRIBED = {int: "an integer", float: "a number"}


def parse(kind: type[T], arguments: Sequence[str], command: str) -> T:
    """An instance of a dataclass, with the fields that the arguments name replaced."""
    if asks_for_help(arguments):
        show_help(kind, command)
    return kind(**read(hints(kind), arguments, command))


def asks_for_help(arguments: Sequence[str]) -> bool:
    return any(argument in HELP for argument in arguments)


def show_help(
    kind: type[Any], command: str, description: str | None = None, *, nested: bool = False
) -> typing.NoReturn:
    """Prints the options of a dataclass, or of the dataclasses nested in it, and exits."""
    import tyro

    tyro.cli(
        kind,
        args=["--help"],
        prog=f"{PROGRAM} {command}",
        description=description,
        config=(tyro.conf.OmitArgPrefixes,) if nested else (),
    )
    raise SystemExit(0)


def hints(kind: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    found = typing.get_type_hints(kind)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def read(kinds: Mapping[str, Any], arguments: Sequence[str], command: str) -> dict[str, Any]:
    """The values of the options that the arguments name.

    A bool is ``--name`` or ``--no-name``; a tuple is followed by any number of values.

    >>> read({"steps": int, "resume": bool}, ["--steps", "3", "--resume"], "train")
    {'steps': 3, 'resume': True}

    Args:
      kinds: the type of each option.
      arguments: as typed.
      command: what the options belong to, for errors.

    Raises:
      ValueError: an unknown option, or a value of the wrong type.
    """
    found: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word, equals, attached = words.pop(0).partition("=")
        name = word.removeprefix("--").replace("-", "_")
        off = name.startswith("no_") and kinds.get(name.removeprefix("no_")) is bool
        name = name.removeprefix("no_") if off else name
        if not word.startswith("--") or name not in kinds:
            raise ValueError(unknown("option", word, map(flag, kinds), f" of {command}"))
        if kinds[name] is bool:
            if equals:
                raise ValueError(f"{word} takes no value, got {attached!r}")
            found[name] = not off
            continue
        values = [attached] if equals else []
        several = typing.get_origin(kinds[name]) is tuple
        while words and not words[0].startswith("--") and (several or not values):
            values.append(words.pop(0))
        if not values:
            raise ValueError(f"{word} needs a value: {described(kinds[name])}")
        found[name] = (
            tuple(convert(word, typing.get_args(kinds[name])[0], value) for value in values)
            if several
            else convert(word, kinds[name], values[0])
        )
    return found


def convert(option: str, kind: Any, value: str) -> Any:
    """A value of this type from its text.

    >>> convert("--patience", int | None, "3")
    3
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
        if value == "None":
            return None
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(not_one_of(option, value, typing.get_args(kind)))
        return value
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{option} must be {described(kind)}, got {value!r}") from None


def described(kind: Any) -> str:
    """What an option of this type takes, in words."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if kind in (str, Path, int, float):
        return DESCRIBED.get(kind, "a text" if kind is str else "a path")
    return described(typing.get_args(kind)[0])


def flag(name: str) -> str:
    """A field as an option: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")


# --- Messages.


def unknown(kind: str, given: str, known: Iterable[str], of: str = "") -> str:
    """Says that there is no such thing, which is the nearest, and which there are.

    >>> unknown("task", "digit", ["digits", "trec"])
    "unknown task 'digit'; did you mean digits? Tasks: digits, trec"
    """
    known = list(known)
    near = nearest(given, known)
    return f"unknown {kind} {given!r}{of}{near or '.'} {kind.capitalize()}s: {', '.join(known)}"


def not_one_of(name: str, given: str, known: Iterable[str]) -> str:
    """Says which values an argument may have, and which is the nearest.

    >>> not_one_of("--model", "vitt", ["cnn", "vit"])
    "--model must be one of cnn, vit, got 'vitt'; did you mean vit?"
    """
    known = list(known)
    return f"{name} must be one of {', '.join(known)}, got {given!r}{nearest(given, known)}"


def nearest(given: str, known: Iterable[str]) -> str:
    """The name that was probably meant, as the end of a message; empty if none is close."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
