"""Nested lists of digits: their tokens, random generation and evaluation."""

from __future__ import annotations

import random
from typing import Any

from experiments.datasets import text
from experiments.tasks.listops.config import Config

OPERATORS = ("MIN", "MAX", "MED", "SM")
WORDS = text.Words((*text.SPECIAL, *map(str, range(10)), *(f"[{x}" for x in OPERATORS), "]"))
DIGIT, OPERATOR, CLOSE = (WORDS.words.index(x) for x in ("0", "[MIN", "]"))


def apply(operator: int, arguments: list[int]) -> int:
    """Applies an operator, given by its index in ``OPERATORS``, to digits.

    >>> [apply(i, [7, 2, 9, 4]) for i in range(4)]
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


def expression(config: Config, rng: random.Random) -> tuple[list[int], int]:
    """A random expression and its value; an argument is a list with probability 1/4.

    Generation stops early once the expression is longer than ``config.longest``; the result is then
    too long.
    """
    row: list[int] = []

    def grow(nesting: int) -> int:
        operator = rng.randrange(len(OPERATORS))
        row.append(OPERATOR + operator)
        digits = []
        for _ in range(rng.randint(2, config.arguments)):
            if len(row) > config.longest:
                break
            if nesting > 1 and rng.random() < 0.25:
                digits.append(grow(nesting - 1))
            else:
                digits.append(rng.randrange(10))
                row.append(DIGIT + digits[-1])
        row.append(CLOSE)
        return apply(operator, digits or [0])

    return row, grow(config.nesting)


def values(row: list[int]) -> list[int]:
    """The value of each list at its operator and at its closing bracket; 0 at digits.

    >>> values(WORDS.encode("[MAX 2 9 [MIN 4 7 ] 0 ]"))
    [9, 0, 0, 4, 0, 0, 4, 0, 9]
    """
    result, starts = [0] * len(row), list[int]()
    arguments: list[list[int]] = [[]]
    for i, token in enumerate(row):
        if token == CLOSE:
            start, digits = starts.pop(), arguments.pop()
            result[start] = result[i] = apply(row[start] - OPERATOR, digits or [0])
            arguments[-1].append(result[i])
        elif token >= OPERATOR:
            starts.append(i)
            arguments.append([])
        else:
            arguments[-1].append(token - DIGIT)
    return result


def evaluate_words(words: list[str]) -> int:
    """The value of an expression given as words.

    Raises:
      ValueError: it is not an expression.

    >>> evaluate_words("[MAX 2 9 [MIN 4 7 ] 0 ]".split())
    9
    """
    stack: list[list[Any]] = [["", []]]
    for word in words:
        if word[:1] == "[" and word[1:] in OPERATORS:
            stack.append([word[1:], []])
        elif word == "]" and len(stack) > 1 and stack[-1][1]:
            operator, arguments = stack.pop()
            stack[-1][1].append(apply(OPERATORS.index(operator), arguments))
        elif word.isdigit() and len(word) == 1:
            stack[-1][1].append(int(word))
        else:
            raise ValueError(
                f"text must be an expression such as '[MAX 2 9 [MIN 4 7 ] 0 ]': unexpected {word!r}"
            )
    if len(stack) > 1 or len(stack[0][1]) != 1:
        raise ValueError("text must be one expression with balanced brackets")
    return int(stack[0][1][0])
