"""Lengths at which a matrix of ``T x S`` would not fit in memory. Minutes, so marked slow."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def measure(*arguments):
    """Seconds, and MiB in addition to arguments and results, from a process of its own."""
    command = [sys.executable, "-m", "experiments.bench.memory", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_65536_tokens_forward_and_backward_take_less_than_256_mib():
    measured = measure("causal 65536", "--backward")
    assert measured["resident_mib"] < 256
    assert measured["planned_mib"] < 256


@pytest.mark.slow
def test_a_million_tokens_with_a_window():
    # The logits of one head alone would be 3.6 TiB.
    assert measure("window 1000000")["planned_mib"] < 1024
