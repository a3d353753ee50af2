"""A share of the contract on a library that was built with sanitizers: python THIS LIBRARY.

The sanitizer's runtime must be loaded before Python: LD_PRELOAD. An error ends the process.
"""

import functools
import pathlib
import sys

from attention_jax import attention, testing
from attention_jax.backends import Native
from attention_jax.backends.native import library

NAMES = ("everything", "planted, bias", "lse, long, bfloat16", "traced layout")


def main(built):
    library.path = lambda: pathlib.Path(built)
    cases = [testing.trial(case) for name in NAMES for case in testing.cases(name=name)]
    backends = [
        Native(**options, instructions=name)
        for name in library.load().instructions
        for options in ({"block_k": 96, "few_queries": 0}, {"few_queries": 1000})
    ]
    for backend in backends:
        report = testing.check(functools.partial(attention, implementation=backend), cases=cases)
        wrong = [row for row in report.rows if row.verdict != "ok"]
        assert not wrong, f"{backend}\n{report}"
    print("right")


if __name__ == "__main__":
    main(sys.argv[1])
