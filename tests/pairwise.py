"""Few cases in which each value of an argument meets each value of every other argument."""

import itertools

import numpy as np
import pytest


def cases(arguments, fast, alone=()):
    """``pytest.param`` of dicts, one value for each argument; those after the first are slow tests.

    Args:
      arguments: the values of each argument, by its name.
      fast: how many cases are in a default run; they cover the most pairs.
      alone: arguments whose values each occur in some case, but are not paired.
    """
    chosen = [
        {name: arguments[name][i] for name, i in case.items()}
        for case in _covering(arguments, alone)
    ]
    return [
        pytest.param(case, id=str(i), marks=[pytest.mark.slow] * (i >= fast))
        for i, case in enumerate(chosen)
    ]


def _covering(arguments, alone):
    """Greedily: of random cases with the first missing pair, that with the most missing pairs."""
    rng = np.random.default_rng(0)
    places = {name: range(len(arguments[name])) for name in sorted(arguments)}

    def parts(case):
        """Pairs of values, and single values."""
        together = [item for item in sorted(case.items()) if item[0] not in alone]
        return {*itertools.combinations(together, 2), *((item,) for item in case.items())}

    missing = {((name, i),) for name in places for i in places[name]}
    for names in itertools.combinations([name for name in places if name not in alone], 2):
        missing |= {
            tuple(zip(names, chosen, strict=True))
            for chosen in itertools.product(*(places[name] for name in names))
        }
    while missing:
        first = dict(min(missing))
        drawn = [{n: int(rng.choice(p)) for n, p in places.items()} | first for _ in range(200)]
        best = max(drawn, key=lambda case: len(parts(case) & missing))
        missing -= parts(best)
        yield best
