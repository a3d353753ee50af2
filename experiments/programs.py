"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import collections
import math
import re

KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
COLLECTIVES = rf"= (.*?) ({KINDS})(-start)?\("
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def counts(program: str) -> collections.Counter[str]:
    """How many collectives of each kind a program has.

    >>> counts("%e = f32[3]{0} all-reduce(%p), to_apply=%add")
    Counter({'all-reduce': 1})
    """
    return collections.Counter({kind: len(sizes) for kind, sizes in sent(program).items()})


def sent(program: str) -> dict[str, list[int]]:
    """Bytes of the result of each collective in a program's HLO text, by kind."""
    found: dict[str, list[int]] = {}
    for shape, kind, start in re.findall(COLLECTIVES, program):
        # An asynchronous start has (operand, result, ...) as its shape, but that of an all-reduce
        # has only the result.
        result = _elements(shape)[1] if start and kind != "all-reduce" else shape
        found.setdefault(kind, []).append(_size(result))
    return found


def _elements(shape: str) -> list[str]:
    """The elements of a tuple in HLO text, which may be tuples, with layouts in braces."""
    elements, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            elements.append("")
        else:
            elements[-1] += character
    return elements


def _size(shapes: str) -> int:
    """Bytes of the arrays of a shape in HLO text."""
    return sum(
        BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", shapes)
    )
