"""Every implementation against the oracle, on the checker's catalogue (see ``contract``)."""

import pytest
from contract import CHECKS, PAIRS, PROMISES, assert_right, parameters

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
