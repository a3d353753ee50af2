"""The processes of ``card``: what hangs, dies or raises is recorded, and the rest still runs."""

import json
import os
import pathlib
import time

import pytest

from experiments.card import processes, worker
from experiments.card.parts import Part

ROOT = pathlib.Path(__file__).parents[1]


def rows(out):
    return [json.loads(line) for line in (out / worker.RECORDS).read_text().splitlines()]


SLEEPY = """
import os, signal, sys, time
from experiments.card.parts import Item, Skipped

def items(setting):
    yield Item("good", lambda: iter([{"n": 1}, {"n": 2}]))
    yield Item("raises", raises)
    yield Item("hangs", hangs, limit=1.0)
    yield Item("dies", dies)
    yield Item("poisoned", poisoned)
    yield Item("skipped", skipped)
    yield Item("package", package)
    yield Item("last", lambda: iter([{"pid": os.getpid()}]))

def raises():
    yield {"n": 3}
    raise ZeroDivisionError("by nothing")

def hangs():
    yield {"n": 4}
    time.sleep(60)

def dies():
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    yield {}

def poisoned():
    raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")
    yield {}

def skipped():
    raise Skipped("no data")
    yield {}

def package():
    import a_package_that_is_not_there
    yield {}
"""
ENDLESS = """
import itertools, time
from experiments.card.parts import Item

def items(setting):
    for i in itertools.count():
        yield Item(str(i), nap)

def nap():
    time.sleep(0.2)
    yield {"n": 1}
"""
STUCK = """
import time
from experiments.card.parts import Item

def items(setting):
    yield Item("stuck", stuck, limit=100.0)

def stuck():
    time.sleep(100)
    yield {}
"""
BROKEN = "import a_module_of_ours_with_a_typo\n"
IDENTITY = {"card": "a card", "versions": {"jax": "1.2"}, "date": "2026-11-27", "dry": True}


@pytest.fixture
def fake(tmp_path):
    """Runs parts given by their source; returns the records."""

    def run(seconds, **sources):
        folder = tmp_path / "modules"
        folder.mkdir()
        for name, source in sources.items():
            (folder / f"{name}_part.py").write_text(source)
        parts = [Part(name, f"{name}_part", 1.0) for name in sources]
        path = os.pathsep.join([str(ROOT), str(folder)])
        one = processes.Run(tmp_path, True, seconds, {"PYTHONPATH": path})
        processes.run_parts(one, parts, lambda: IDENTITY)
        return rows(tmp_path)

    return run


@pytest.mark.slow
def test_nothing_stops_at_a_failure(fake):
    found = fake(60.0, sleepy=SLEEPY)
    by_item = {}
    for row in found:
        by_item.setdefault(row["item"], []).append(row)
        assert row["part"] == "sleepy"
        assert row.items() >= IDENTITY.items()
    assert list(by_item) == [
        "good", "raises", "hangs", "dies", "poisoned", "skipped", "package", "last"
    ]  # fmt: skip
    assert [row["n"] for row in by_item["good"]] == [1, 2]
    result, error = by_item["raises"]
    assert result["n"] == 3
    assert error["error"] == "ZeroDivisionError: by nothing"
    assert "in raises" in error["traceback"]
    result, error = by_item["hangs"]
    assert result["n"] == 4  # what came before it hung is kept
    assert error["error"] == "took longer than 1 s"
    assert by_item["dies"][0]["error"] == "its process ended: SIGSEGV"
    assert by_item["dies"][0]["log"].endswith("last words\n")
    assert "ILLEGAL_ADDRESS" in by_item["poisoned"][0]["error"]
    assert by_item["skipped"][0]["skipped"] == "no data"
    assert by_item["package"][0]["skipped"] == "a_package_that_is_not_there is not installed"
    assert len(by_item["last"]) == 1


@pytest.mark.slow
def test_a_part_stops_at_its_time_in_the_middle_and_the_next_one_runs(fake):
    start = time.monotonic()
    found = fake(8.0, endless=ENDLESS, stuck=STUCK, other=ENDLESS)
    assert time.monotonic() - start < 12
    kinds = {part: [row for row in found if row["part"] == part] for part in ("endless", "other")}
    assert all(sum("n" in row for row in of_part) >= 2 for of_part in kinds.values())
    assert all(of_part[-1]["late"] for of_part in kinds.values())
    (stuck,) = (row for row in found if row["part"] == "stuck")
    assert stuck["item"] == "stuck"
    assert stuck["skipped"] == worker.LATE["skipped"]


def test_a_part_that_cannot_be_imported_is_a_record(fake):
    found = fake(30.0, broken=BROKEN, other=ENDLESS.replace("itertools.count()", "range(1)"))
    assert [row["part"] for row in found] == ["broken", "other"]
    assert "a_module_of_ours_with_a_typo" in json.dumps(found[0])
