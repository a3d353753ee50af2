"""The command line of ``card``, which needs the standard library alone."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.card.parts import PARTS, Fields, Part
from experiments.card.processes import Run, run_parts
from experiments.card.worker import RECORDS

LEAST = 2.0  # minutes: below, starting JAX takes most of the time
DRY_MINUTES = 15.0  # on a slow machine with other work; usually it takes one


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ``card``."""

    out: Path
    minutes: float
    only: tuple[str, ...]
    dry: bool


def parse(arguments: Sequence[str], program: str) -> Options:
    """Options from the command line; exits with code 2 on a wrong one."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog=f"{program} card",
        description="Checks, measures and tunes the GPU kernels on an NVIDIA card.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder for the records")
    parser.add_argument(
        "--minutes", type=float, help=f"the run stops itself after this many, at least {LEAST:g}"
    )
    parser.add_argument(
        "--only", default=",".join(names), help=f"some of the parts: {', '.join(names)}"
    )
    parser.add_argument(
        "--dry",
        action="store_true",
        help="run every part on tiny shapes, with interpreted kernels, on any machine",
    )
    found = parser.parse_args(arguments)
    if found.minutes is None:
        if not found.dry:
            parser.error("--minutes is required: how long the run may take")
        found.minutes = DRY_MINUTES
    if not found.minutes >= LEAST:
        parser.error(f"--minutes must be at least {LEAST:g}, got {found.minutes:g}")
    only = tuple(filter(None, found.only.split(",")))
    unknown = [name for name in only if name not in names]
    if unknown or not only:
        got = ", ".join(unknown) or "nothing"
        parser.error(f"--only must name some of {', '.join(names)}, got {got}")
    return Options(found.out, found.minutes, only, found.dry)


def main(options: Options, parts: Sequence[Part] = PARTS) -> int:
    """Runs the parts; returns the exit code."""
    if problem := unwritable(options.out):
        print(f"error: --out: {problem}", file=sys.stderr)
        return 2
    if not options.dry and (problem := no_card()):
        print(f"error: {problem}; --dry runs on any machine", file=sys.stderr)
        return 2
    records = options.out / RECORDS
    if records.exists():  # a run before this one
        records.rename(records.with_name(f"records-until-{_now():%Y%m%dT%H%M%S}.jsonl"))
    start: Fields = {"card": "none" if options.dry else "unknown", "versions": {}}
    start |= {"date": f"{_now():%Y-%m-%d}", "dry": options.dry}

    def identify() -> Fields:
        found = _identity(records)
        return start | found if found else start

    def usable() -> bool:
        found = _identity(records)
        return options.dry or not found or found["platform"] == "gpu"

    # The environment is always looked at: every record says on what it was measured.
    chosen = [part for part in parts if part.name in (*options.only, "environment")]
    run = Run(options.out, options.dry, 60 * options.minutes)
    run_parts(run, chosen, identify, usable)
    if not usable():
        print("error: JAX finds no GPU: install jax[cuda13], or use --dry", file=sys.stderr)
        return 2
    for line in summary(records):
        print(line)
    print(f"wrote {records}")
    # On a card a failure is a result.
    return int(options.dry and not complete(records, [part.name for part in chosen]))


def unwritable(out: Path) -> str | None:
    """Why nothing can be written to a folder, which is made if need be; None if it can."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as problem:
        return f"{out} cannot be written: {problem.strerror}"
    return None


def no_card() -> str | None:
    """Why there is no NVIDIA card to run on, as far as its driver can tell; None if there is."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "this machine has no NVIDIA GPU (there is no nvidia-smi)"
    try:
        found = subprocess.run(
            [tool, "-L"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return f"nvidia-smi does not answer: {problem}"
    if found.returncode or not found.stdout.strip():
        return f"nvidia-smi finds no GPU: {(found.stdout + found.stderr).strip()[:200]}"
    return None


def complete(records: Path, names: Sequence[str]) -> bool:
    """Whether every part has results, and nothing failed or was late."""
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    with_results = {row["part"] for row in rows if "skipped" not in row}
    failed = any("error" in row or "late" in row for row in rows)
    return with_results >= set(names) and not failed


def summary(records: Path) -> list[str]:
    """Results, failures and what was left out, by part."""
    counts: dict[str, dict[str, int]] = {}
    problems = []
    for line in records.read_text().splitlines() if records.exists() else ():
        one = json.loads(line)
        kind = next((kind for kind in ("error", "skipped") if kind in one), "results")
        by_kind = counts.setdefault(one["part"], {"results": 0, "error": 0, "skipped": 0})
        by_kind[kind] += 1
        if kind != "results":
            text = str(one[kind]).splitlines()[0][:160]
            problems.append(f"  {one['part']}, {one['item']}: {kind}: {text}")
    lines = [
        f"{part}: {n['results']} results, {n['error']} errors, {n['skipped']} skipped"
        for part, n in counts.items()
    ]
    return [*lines, *problems]


def _identity(records: Path) -> Fields | None:
    """What the first part found out about the machine; None until it has."""
    if not records.exists():
        return None
    for line in records.read_text().splitlines():
        one = json.loads(line)
        if "platform" in one:
            return {name: one[name] for name in ("card", "versions", "date", "dry", "platform")}
    return None


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
