"""Wrong calls: each raises an error that names the argument, what was expected and what was given.

Under the tests' import hook a wrong call fails at the annotations, before the library's own
checks. The messages that users get come from one process without it: this file, run as a script.
"""

import ast
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from wrong_calls import good
from wrong_calls.attention import wrong_arguments, wrong_constructions
from wrong_calls.functions import wrong_drop_ins, wrong_mechanisms, wrong_positions
from wrong_calls.models import wrong_models
from wrong_calls.modules import wrong_modules

ROOT = pathlib.Path(__file__).parent.parent


def every_wrong_call():
    """All wrong calls: name, function, error, and parts of its message."""
    from attention_jax import Mask, Score, attention, attention_weights, explain

    def jitted(arguments):
        traced = {
            n: x
            for n, x in arguments.items()
            if isinstance(x, (np.ndarray, jax.Array, Mask, Score))
        }
        rest = {n: x for n, x in arguments.items() if n not in traced}
        return jax.jit(lambda traced: attention(**traced, **rest))(traced)

    def struct(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, np.ndarray) else x

    for wrong, error, *parts in wrong_arguments():
        arguments = {**good(), **wrong}
        name = f"{', '.join(wrong)}: {parts[-1]}"
        yield f"attention {name}", functools.partial(attention, **arguments), error, parts
        yield f"under jit {name}", functools.partial(jitted, arguments), error, parts
        if "ShapeDtypeStruct" not in parts:
            yield f"explain {name}", functools.partial(explain, **arguments), error, parts
            three = {n: struct(x) if n in good() else x for n, x in arguments.items()}
            yield f"explain shapes {name}", functools.partial(explain, **three), error, parts
        if not wrong.keys() & {"value", "dropout_rate", "implementation", "return_lse"}:
            del arguments["value"]
            yield f"weights {name}", functools.partial(attention_weights, **arguments), error, parts
    wrong = [*wrong_constructions(), *wrong_positions(), *wrong_modules(), *wrong_models()]
    wrong += [*wrong_mechanisms(), *wrong_drop_ins()]
    for number, (call, error, *parts) in enumerate(wrong):
        yield f"construction {number} {parts[:3]}", call, error, parts


def outcome(call):
    try:
        call()
    except Exception as e:  # noqa: BLE001  whatever it is, it is what we report
        return type(e).__name__, str(e)
    return None, "no error"


def report():
    rows = [[name, *outcome(call), error, parts] for name, call, error, parts in every_wrong_call()]
    json.dump(rows, sys.stdout)


@functools.cache
def outcomes():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_wrong_calls_raise_errors_that_say_what_is_wrong():
    assert len(outcomes()) > 300
    failures = [
        f"{name}\n    expected {error} with {parts}\n    got {got}: {message}"
        for name, got, message, error, parts in outcomes()
        if got != error or not all(part in message for part in parts)
    ]
    assert not failures, f"{len(failures)} of {len(outcomes())}:\n" + "\n".join(failures)


SOURCES = sorted((ROOT / "attention_jax").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_bare_assert_and_no_blind_except(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise ValueError instead"
        if isinstance(node, ast.ExceptHandler):
            if path.parent.name == "testing":  # runs what is not ours, and reports how it fails
                continue
            caught = ast.unparse(node.type) if node.type else "everything"
            blind = {"everything", "Exception", "BaseException"} & set(
                caught.strip("()").split(", ")
            )
            assert not blind, f"line {node.lineno}: says what it expects, not {caught}"


if __name__ == "__main__":
    report()
