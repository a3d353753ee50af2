"""A score of positions rather than of indices into the arrays."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from jaxtyping import Int

from attention_jax.core.axes import AnyArray, Size, check_position_arrays, kind
from attention_jax.scores.base import Score


class Wrapped(Score):
    """A score whose rule gets other positions."""

    ARGUMENTS = {"score_": "score"}
    score_: Score

    MASKING = property(lambda self: self.score_.MASKING)

    def visible(self) -> Any:
        return self.score_.visible()

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        return self.resolve_in_sequence(N)

    def resolve_in_sequence(self, N: int) -> Self:
        return dataclasses.replace(self, score_=self.score_.resolve_in_sequence(N))


class Placed(Wrapped):
    """``score`` applied to positions."""

    NAME = "scores.at_positions"
    AXES = {"query_positions": "*B T", "key_positions": "*B S"}
    query_positions: Any
    key_positions: Any

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.score_.rule(s, b, n, self.query_positions, self.key_positions)


class Later(Wrapped):
    """``score`` with queries at positions from ``start`` and keys at positions from 0."""

    NAME = "scores.at_positions"
    AXES = {"start": "*B"}
    start: Any

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.score_.rule(s, b, n, q + self.start, k)

    def tile(self, s: Any, b: Any, n: Any, q0: Any, k0: Any) -> Any:
        return self.score_.tile(s, b, n, q0 + self.start, k0)


def at_positions(
    score: Score,
    query_positions: Int[AnyArray, "*B T"],
    key_positions: Int[AnyArray, "*B S"],
) -> Score:
    """``score`` applied to positions in place of indices, as ``masks.at_positions`` for masks.

    The logit of query ``i`` and key ``j`` changes as ``score`` changes that of positions
    ``query_positions[i]`` and ``key_positions[j]`` of one sequence, so ``align="end"`` means the
    same as ``align="start"``.

    Args:
      score: its rule gets positions in place of indices, while its arrays stay in the order of the
        call's queries and keys.
      query_positions, key_positions: int arrays ``[*B T]`` and ``[*B S]``, of one dtype. The mask
        must mask keys at negative positions.

    >>> import numpy as np
    >>> from attention_jax.scores import alibi, at_positions
    >>> placed = at_positions(alibi(np.array([0.5])), np.array([4]), np.array([4, 5, 3]))
    >>> placed.score(np.zeros((1, 3), np.float32), 0, 0, np.array([[0]]), np.arange(3)).tolist()
    [[0.0, -0.5, -0.5]]
    """
    if not isinstance(score, Score):
        raise TypeError(f"score must be a Score, got {kind(score)}")
    check_position_arrays(query_positions, key_positions)
    return Placed(score, query_positions, key_positions) if score.USES_POSITIONS else score


def later(score: Score, start: Int[AnyArray, "*B"]) -> Score:
    """``score`` with queries at positions from ``start [*B]`` and keys at positions from 0.

    The same as ``at_positions`` with contiguous positions, but uses the faster ``tile``.
    """
    return Later(score, start) if score.USES_POSITIONS else score
