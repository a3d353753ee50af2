"""Nested lists of digits: how they are written, made and evaluated."""

from __future__ import annotations

import random
from typing import Any

from experiments.datasets import text

OPERATORS = ("MIN", "MAX", "MED", "SM")
WORDS = text.Words((*text.SPECIAL, *map(str, range(10)), *(f"[{x}" for x in OPERATORS), "]"))
DIGIT, OPERATOR, CLOSE = (WORDS.words.index(x) for x in ("0", "[MIN", "]"))


def value(operator: int, arguments: list[int]) -> int:
    """What an operator, by its place in ``OPERATORS``, makes of digits.

    >>> [value(i, [7, 2, 9, 4]) for i in range(4)]
    [2, 9, 5, 2]
    """
    name = OPERATORS[operator]
    if name == "MIN":
        return min(arguments)
    if name == "MAX":
        return max(arguments)
    if name == "SM":
        return sum(arguments) % 10
    ordered, middle = sorted(arguments), len(arguments) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) // 2


def expression(config: Any, rng: random.Random) -> tuple[list[int], int]:
    """A random expression and what it comes to: an argument is a list a quarter of the time.

    One that grows longer than ``config.longest`` is left where it is.
    """
    row: list[int] = []

    def grow(nesting: int) -> int:
        operator = rng.randrange(len(OPERATORS))
        row.append(OPERATOR + operator)
        found = []
        for _ in range(rng.randint(2, config.arguments)):
            if len(row) > config.longest:
                break
            if nesting > 1 and rng.random() < 0.25:
                found.append(grow(nesting - 1))
            else:
                found.append(rng.randrange(10))
                row.append(DIGIT + found[-1])
        row.append(CLOSE)
        return value(operator, found or [0])

    return row, grow(config.nesting)


def values(row: list[int]) -> list[int]:
    """What each list of an expression comes to, at its operator and at its end; 0 at its digits.

    >>> values(WORDS.encode("[MAX 2 9 [MIN 4 7 ] 0 ]"))
    [9, 0, 0, 4, 0, 0, 4, 0, 9]
    """
    found, begun = [0] * len(row), list[int]()
    arguments: list[list[int]] = [[]]
    for i, token in enumerate(row):
        if token == CLOSE:
            start, given = begun.pop(), arguments.pop()
            found[start] = found[i] = value(row[start] - OPERATOR, given or [0])
            arguments[-1].append(found[i])
        elif token >= OPERATOR:
            begun.append(i)
            arguments.append([])
        else:
            arguments[-1].append(token - DIGIT)
    return found


def evaluated(words: list[str]) -> int:
    """What a written expression comes to.

    Raises:
      ValueError: it is no expression.

    >>> evaluated("[MAX 2 9 [MIN 4 7 ] 0 ]".split())
    9
    """
    stack: list[list[Any]] = [["", []]]
    for word in words:
        if word[:1] == "[" and word[1:] in OPERATORS:
            stack.append([word[1:], []])
        elif word == "]" and len(stack) > 1 and stack[-1][1]:
            operator, arguments = stack.pop()
            stack[-1][1].append(value(OPERATORS.index(operator), arguments))
        elif word.isdigit() and len(word) == 1:
            stack[-1][1].append(int(word))
        else:
            raise ValueError(
                f"text must be an expression such as '[MAX 2 9 [MIN 4 7 ] 0 ]', got {word!r} in it"
            )
    if len(stack) > 1 or len(stack[0][1]) != 1:
        raise ValueError("text must be one expression, with as many ] as [")
    return int(stack[0][1][0])
