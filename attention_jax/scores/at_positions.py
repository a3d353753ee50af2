"""Scores evaluated at explicit positions of queries and keys."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from attention_jax.core.axes import Size
from attention_jax.core.positions import AtPositions, position_fields
from attention_jax.scores.base import Score


class ScoreAtPositions(AtPositions, Score):
    """``score`` evaluated at positions."""

    NAME = "a score of positions"
    ARGUMENTS = {"score_": "score"}
    score_: Score
    resolved: bool  # score_ is already resolved for the whole sequence

    MASKING = property(lambda self: self.score_.MASKING)

    def visible(self) -> Any:
        return self.score_.visible()

    def resolve(self, T: Size, S: Size, N: int) -> Self:
        return self.resolve_in_sequence(N)

    def resolve_in_sequence(self, N: int) -> Self:
        if self.resolved:
            return self
        return dataclasses.replace(self, score_=self.score_.resolve_in_sequence(N), resolved=True)

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        return self.score_.rule(s, self.example(b), self.head(n), self.queries(q), self.keys(k))

    def tile(self, s: Any, b: Any, n: Any, q0: Any, k0: Any) -> Any:
        if not self.contiguous:
            return super().tile(s, b, n, q0, k0)
        return self.score_.tile(s, self.example(b), self.head(n), self.queries(q0), self.keys(k0))


def score_at_positions(
    score: Score, queries: Any, keys: Any, *, resolved: bool = False, **numbers: Any
) -> Score:
    """``score`` evaluated at positions; arguments as for ``mask_at_positions``.

    >>> import numpy as np
    >>> from attention_jax.scores import alibi
    >>> from attention_jax.scores.at_positions import score_at_positions
    >>> score = score_at_positions(alibi(np.array([0.5])), np.array([4]), np.array([4, 5, 3]))
    >>> score.score(np.zeros((1, 3), np.float32), 0, 0, np.array([[0]]), np.arange(3)).tolist()
    [[0.0, -0.5, -0.5]]
    """
    if not score.USES_POSITIONS and not numbers:
        return score
    if isinstance(score, ScoreAtPositions) and queries is None and keys is None:
        return dataclasses.replace(score, **numbers)
    return ScoreAtPositions(
        score_=score, resolved=resolved, **position_fields(queries, keys, **numbers)
    )
