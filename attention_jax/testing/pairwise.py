"""Pairwise testing: few rows in which every two values of two options meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def pairwise(
    options: Mapping[str, Sequence[Any]], possible: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Few rows, each with one value of every option, in which every two values meet.

    Greedy and deterministic: each row starts from two values that have not met and takes, option
    by option, the value that meets most others for the first time. Ties are broken at random, with
    a fixed seed.

    Args:
      options: name -> values; a value must be hashable.
      possible: whether these values (of some options) may be in one row; it must allow the first
        value of each option with all values of the others.

    >>> from attention_jax.testing.pairwise import pairwise
    >>> for row in pairwise({"a": (0, 1), "b": (0, 1), "c": (0, 1)}):
    ...     print(*row.values())
    0 0 0
    1 1 0
    0 1 1
    1 0 1

    Source: Cohen et al. 1997, "The AETG System: An Approach to Testing Based on Combinatorial
    Design".
    """
    names = list(options)
    order = {name: i for i, name in enumerate(names)}
    # Taking turns instead would keep options with two values in step forever.
    rng = random.Random(0)

    def meet(a: tuple[str, Any], b: tuple[str, Any]) -> tuple[Any, Any]:
        return (a, b) if order[a[0]] < order[b[0]] else (b, a)

    def first(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[Any, Any]]:
        for a, b in pairs:  # along diagonals, so that the first rows differ in every option
            for shift, (i, x) in itertools.product(range(len(options[b])), enumerate(options[a])):
                y = options[b][(i + shift) % len(options[b])]
                if possible({a: x, b: y}):
                    yield (a, x), (b, y)

    seeds = list(first(itertools.combinations(names, 2)))
    missing = set(seeds)
    rows = []
    for seed in seeds:
        if seed not in missing:
            continue
        row = dict(seed)
        for name in names:
            if name not in row:
                row[name] = max(
                    (x for x in options[name] if possible({**row, name: x})),
                    key=lambda x, name=name: (  # type: ignore[misc]
                        sum(meet((name, x), other) in missing for other in row.items()),
                        rng.random(),
                    ),
                )
        missing -= {meet(a, b) for a, b in itertools.combinations(row.items(), 2)}
        rows.append({name: row[name] for name in names})
    return rows
