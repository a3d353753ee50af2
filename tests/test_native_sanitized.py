"""The native kernel under sanitizers: random calls of its handlers, and contract cases.

It is built here, by the compiler that installed the package, with warnings as errors.
"""

import os
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from contract import needs_native

from attention_jax.backends.native import library

CHECKS = pathlib.Path(__file__).parent / "native_checks"
KERNEL = library.path().parent / "kernel"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=fast", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
SECONDS, RACES_SECONDS = 120, 20  # of random calls, always the same ones
RACES = ["-fsanitize=thread"]

pytestmark = [
    needs_native,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


def run(*command, **env):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def compiled(folder, flags):
    """The kernel's sources and the random calls, compiled with these sanitizers."""

    def build(source):
        target = folder / f"{source.stem}.o"
        run("g++", *FLAGS, *WARNINGS, *flags, f"-I{KERNEL}", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, [*sorted(KERNEL.glob("*.cpp")), CHECKS / "fuzz.cpp"]))


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("sanitized"), SANITIZE)


def test_random_calls_stay_within_their_arrays(objects, tmp_path):
    program = tmp_path / "fuzz"
    run("g++", *SANITIZE, *objects, "-o", program, "-lpthread")
    assert "accepted" in run(program, SECONDS)


def test_threads_of_random_calls_do_not_race(tmp_path):
    empty = tmp_path / "empty"
    empty.with_suffix(".cpp").write_text("int main() {}")
    run("g++", *RACES, empty.with_suffix(".cpp"), "-o", empty)
    if subprocess.run(empty, capture_output=True).returncode:
        pytest.skip("ThreadSanitizer does not run on this machine")
    program = tmp_path / "fuzz"
    run("g++", *RACES, *compiled(tmp_path, RACES), "-o", program, "-lpthread")
    assert "accepted" in run(program, RACES_SECONDS)


def test_contract_cases(objects, tmp_path):
    built = tmp_path / "kernel.so"
    kernel = [x for x in objects if x.stem != "fuzz"]
    run("g++", "-shared", *SANITIZE, *kernel, "-o", built, "-lpthread")
    runtime = [
        run("g++", f"-print-file-name={name}.so").strip() for name in ("libasan", "libubsan")
    ]
    out = run(
        sys.executable,
        CHECKS / "contract_sanitized.py",
        built,
        LD_PRELOAD=":".join(runtime),
        ASAN_OPTIONS="detect_leaks=0",  # Python's own
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    assert out.strip().endswith("right")
