"""Few cases that combine each value of each argument with each value of every other argument."""

import itertools

import numpy as np
import pytest


def cases(arguments, fast):
    """``pytest.param`` of dicts, one value for each argument; those after the first are slow tests.

    Args:
      arguments: the values of each argument, by its name.
      fast: how many cases are in a default run; they cover the most pairs.
    """
    chosen = [
        {name: arguments[name][i] for name, i in case.items()} for case in _covering(arguments)
    ]
    return [
        pytest.param(case, id=str(i), marks=[pytest.mark.slow] * (i >= fast))
        for i, case in enumerate(chosen)
    ]


def _covering(arguments):
    """Greedily: of random cases with the first uncovered pair, that with the most such pairs."""
    rng = np.random.default_rng(0)
    places = {name: range(len(arguments[name])) for name in sorted(arguments)}

    def pairs(case):
        return set(itertools.combinations(sorted(case.items()), 2))

    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(places, 2)
        for i, j in itertools.product(places[a], places[b])
    }
    while missing:
        first = dict(min(missing))
        drawn = [{n: int(rng.choice(p)) for n, p in places.items()} | first for _ in range(30)]
        best = max(drawn, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        yield best
