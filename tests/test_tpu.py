"""Programs for a TPU, compiled ahead of time on a machine without one."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: libtpu"
    ),
]


@pytest.fixture(scope="module")
def found():
    """What the compiler reports, from a process with its own environment."""
    program = pathlib.Path(__file__).parent / "ahead_for_tpu.py"
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)  # memory and cost, on record with -s
    return json.loads(run.stdout)


def test_the_default_path_for_a_tpu_is_splash_attention(found):
    assert (found["default backend"], found["platform"]) == ("cpu", "tpu")
    chosen = {name: value for name, value in found.items() if name.startswith("chosen")}
    assert set(chosen.values()) == {"splash"}
    assert len(chosen) == 4


@pytest.mark.parametrize("name", ["causal", "window, softcap", "prefix, sinks, lse", "segments"])
def test_forward_and_backward_compile_to_kernels_without_an_array_of_pairs(found, name):
    forward, backward = found[f"attend, {name}"], found[f"grads, {name}"]
    assert forward["kernels"] == 1
    # Forward, dq, dk and dv; the lse's gradient takes attention to the keys besides.
    assert backward["kernels"] == (6 if "lse" in name else 3)
    for program in (forward, backward):
        assert program["pairs"] == 0
        # In main memory, 0 where all fits on the chip; less than an array T x S of all heads.
        assert 0 <= program["temporary bytes"] < 8 * 1024 * 1024 * 4
        assert program["bytes accessed"] > program["argument bytes"] > 0
        assert program["flops"] > 0


def test_float32_compiles_in_full_precision(found):
    assert found["grads, float32"]["kernels"] == 3


def test_a_training_step_compiles_with_the_kernels_of_every_layer(found):
    step = found["training step"]
    assert step["kernels"] == 2 * 3
    assert step["pairs"] == 0
    assert step["flops"] > 1e10


def test_each_device_of_an_explicit_mesh_has_its_own_kernel_and_sends_nothing(found):
    assert found["sharded attend"] == {"kernels": 1, "collectives": 0}
    assert found["sharded grads"] == {"kernels": 3, "collectives": 0}
