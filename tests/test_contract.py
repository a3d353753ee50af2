"""Every implementation against the oracle, on the checker's catalogue (see ``contract``)."""

import pytest
from contract import CHECKS, PAIRS, PROMISES, assert_right

# Case by case, so that those who are checked on one share the oracle's answer.
# A default run has time for every fourth pair.
EACH = [
    pytest.param(
        name,
        case,
        id=f"{case.name}-{name}",
        marks=[pytest.mark.slow] if case in PAIRS and case not in PAIRS[::4] else [],
    )
    for case in (*PROMISES, *PAIRS)
    for name in CHECKS
    if case in CHECKS[name]
]


@pytest.mark.parametrize(("name", "case"), EACH)
def test_equals_the_oracle(name, case):
    assert_right(name, case)
