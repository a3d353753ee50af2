"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import collections
import math
import re

KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
COLLECTIVES = rf"= (.*?) ({KINDS})(-start)?\("


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
    """Bytes of the arrays of a shape in HLO text.

    >>> _size("(f32[2,3]{1,0}, bf16[4]{0}, pred[5]{0}, f8e4m3fn[8]{0}, s64[])")
    53
    """
    return sum(
        _itemsize(dtype) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"([a-z]+[0-9a-z]*)\[([0-9,]*)\]", shapes)
    )


def _itemsize(dtype: str) -> int:
    """Bytes of an entry; the number in the name of a dtype is that of its bits."""
    bits = re.match("[a-z]+([0-9]+)", dtype)
    return -(-int(bits[1]) // 8) if bits else 1  # pred
