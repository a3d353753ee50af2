"""Every implementation against the oracle, on the checker's catalogue (see ``contract``)."""

import pytest
from contract import CHECKS, PAIRS, PROMISES, assert_right, by_default, parameters

from attention_jax.testing.cases import MASKS, OPTIONS, SCORES

# Case by case, so that implementations checked on one case share the oracle's answer.
EACH = [
    parameter
    for case in PROMISES + PAIRS
    for name, cases in CHECKS.items()
    if case in cases
    for parameter in parameters(name, [case])
]


@pytest.mark.parametrize(("name", "case"), EACH)
def test_equals_the_oracle(name, case):
    assert_right(name, case)


def test_a_default_run_has_every_mask_score_and_dtype():
    everywhere = [name for name in CHECKS if not name.startswith("native")]  # needs a compiler
    found = [case for name in everywhere for case in CHECKS[name] if by_default(name, case)]
    for option, values in (("mask", MASKS), ("score", SCORES), ("dtype", OPTIONS["dtype"])):
        assert {getattr(case, option) for case in found} >= {*values}
