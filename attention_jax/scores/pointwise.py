"""Scores that do not depend on positions: softcap, bias."""

from __future__ import annotations

from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from attention_jax.core.axes import AnyArray, float_array, positive_float
from attention_jax.scores.base import Masking, Score


class Softcap(Score):
    """``cap * tanh(s / cap)``."""

    NAME = "scores.softcap"
    MASKING = Masking.UNMASKS
    USES_POSITIONS = False
    cap: Any  # a float, or a scalar array once hoisted

    def hoisted(self, dtype: Any, numbers: bool) -> Self:
        static = isinstance(self.cap, float)
        return type(self)(np.asarray(self.cap, dtype)) if numbers and static else self

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        s = jnp.asarray(s)
        cap = jnp.asarray(self.cap).astype(s.dtype)
        return cap * jnp.tanh(s / cap)


def softcap(cap: float) -> Score:
    """``cap * tanh(s / cap)``: keeps logits within ``(-cap, cap)``.

    >>> import numpy as np
    >>> from attention_jax.scores import softcap
    >>> float(softcap(2.0).score(np.float32(100.0), 0, 0, 0, 0))
    2.0

    Source: Gemma Team 2024, "Gemma 2", section 2.
    """
    return Softcap(positive_float("cap", cap))


class Bias(Score):
    """``s + array``."""

    NAME = "scores.bias"
    AXES = {"array": "*B N T S"}
    BROADCAST = True
    MASKING = Masking.VISIBLE
    USES_POSITIONS = False
    array: Any

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        s = jnp.asarray(s)
        # `s + array` alone would be NaN, not -inf, for a masked pair whose logit is NaN.
        return jnp.where(self.visible(), s + jnp.asarray(self.array).astype(s.dtype), -jnp.inf)

    def visible(self) -> Any:
        return jnp.asarray(self.array) != -jnp.inf


def bias(array: Float[AnyArray, "..."]) -> Score:
    """``s + array[b, n, i, j]``; ``-inf`` masks the pair.

    Args:
      array: floating, broadcastable to ``[*B N T S]``, differentiable.

    >>> import numpy as np
    >>> from attention_jax.scores import bias
    >>> score = bias(np.array([[0.5, -np.inf]]))
    >>> score.score(np.zeros(2, np.float32), 0, 0, 0, np.arange(2)).tolist()
    [0.5, -inf]
    """
    float_array("array", array)
    return Bias(array)
