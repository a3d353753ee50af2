"""Every implementation against the oracle, on the checker's catalogue (see ``contract``)."""

import pytest
from contract import CHECKS, PAIRS, assert_right, by_default, pairs_of_values, parameters

from attention_jax import testing
from attention_jax.testing.cases import MASKS, OPTIONS, SCORES

# Case by case, so that implementations checked on one case share the oracle's answer.
EACH = [
    parameter
    for case in testing.cases()
    for name, cases in CHECKS.items()
    if case in cases
    for parameter in parameters(name, [case])
]


@pytest.mark.parametrize(("name", "case"), EACH)
def test_equals_the_oracle(name, case):
    assert_right(name, case)


def test_a_default_run_has_every_value_of_every_option():
    everywhere = [name for name in CHECKS if not name.startswith("native")]  # needs a compiler
    found = [case for name in everywhere for case in CHECKS[name] if by_default(name, case)]
    for option, values in (OPTIONS | {"mask": MASKS, "score": SCORES}).items():
        if option not in ("lengths", "heads", "batch", "widths"):
            assert {getattr(case, option) for case in found} >= {*values}
    for size, number in (("B", 3), ("T", 3), ("G", 3)):
        assert len({getattr(case.sizes, size) for case in found}) >= number


def test_every_two_values_are_checked_together():
    found = [case for cases in CHECKS.values() for case in cases]
    together = set().union(*map(pairs_of_values, found))
    assert together >= set().union(*map(pairs_of_values, PAIRS))
