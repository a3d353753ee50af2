"""Estimates of training steps on other devices."""

import dataclasses

import pytest

from experiments.__main__ import main
from experiments.plan.command import RESULTS, table
from experiments.plan.estimate import Options, abstract, estimate
from experiments.programs import sent


@pytest.fixture(scope="module")
def state():
    return abstract("124M")


def plan(state, **changes):
    return estimate(dataclasses.replace(Options("124M"), **changes), state)


def test_fsdp_divides_what_is_stored_and_sends_more(state):
    plain, sharded = (plan(state, mesh="data=16", fsdp=fsdp) for fsdp in (False, True))
    assert plain.parameters == 4 * plain.total
    assert plain.optimizer == 2 * plain.parameters == 2 * plain.gradients
    assert plain.parameters / 16 <= sharded.parameters < plain.parameters / 15.9
    assert sharded.activations == plain.activations
    # Gathered twice in 2 bytes and scattered once in 4; all-reduced in 4, which is twice as much.
    assert sum(sharded.collectives.values()) == pytest.approx(sum(plain.collectives.values()))
    assert set(plain.collectives) == {"all-reduce of gradients"}


def test_tensor_and_context_parallelism_divide_work(state):
    one = plan(state, mesh="data=1")
    assert not one.collectives
    tensor, context = (plan(state, mesh=mesh) for mesh in ("model=4", "context=4"))
    for split in (tensor, context):
        assert split.flops == pytest.approx(one.flops / 4)
    assert context.activations == one.activations / 4
    assert tensor.activations == one.activations
    assert tensor.parameters < one.parameters / 3
    assert set(tensor.collectives) == {"all-reduce of activations"}
    assert "all-gather of keys and values" in context.collectives


def test_a_plan_is_printed(capsys):
    assert main(["plan", "--size", "124M", "--mesh", "data=2", "--device", "h100"]) == 0
    printed = capsys.readouterr().out
    assert "fits in 80 GB" in printed
    assert "all-reduce of gradients" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mesh", "data=2", "--batch", "3"], "does not divide batch, 3"),
        (["--mesh", "model=5"], "does not divide heads, 16"),
        (["--mesh", "rows=2"], "unknown axis 'rows'"),
        (["--check"], "check needs --table"),
        (["--table", "--size", "8B", "--compile"], "takes only check, got also size, compile"),
        (["--mesh", "model=4", "--fsdp"], "fsdp needs an axis data or context in mesh"),
        (["--size", "70B"], "--size must be one of 124M, 1.3B, 8B"),
    ],
)
def test_impossible_plans_raise_errors(capsys, options, said):
    assert main(["plan", *options]) == 2
    assert said in capsys.readouterr().err


def test_only_results_of_collectives_are_counted():
    program = """
      %a = (bf16[2,8]{1,0:T(8,128)}, bf16[16,8]{1,0:T(8,128)}) all-gather-start(%p), dimensions={0}
      %b = bf16[16,8]{1,0} all-gather-done(%a)
      %c = ((f32[4]{0}, f32[8]{0}), (f32[2]{0}, f32[4]{0}), u32[]) reduce-scatter-start(%p, %q)
      %d = (f32[4]{0}, f32[8]{0}) all-reduce-start(%p, %q), to_apply=%add
      %e = f32[3]{0} all-reduce(%p), to_apply=%add
    """
    assert sent(program) == {
        "all-gather": [2 * 16 * 8],
        "reduce-scatter": [4 * (2 + 4)],
        "all-reduce": [4 * (4 + 8), 4 * 3],
    }


@pytest.mark.slow
def test_the_published_table_is_up_to_date():
    assert RESULTS.read_text() == table()
