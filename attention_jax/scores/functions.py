"""Scores defined by functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from attention_jax.core.axes import AnyArray, check_function
from attention_jax.core.closures import apply, hoist, of_tile
from attention_jax.core.pytree import indexable
from attention_jax.scores.base import Score


class ScoreFn(Score):
    """A score given by a function."""

    NAME = "scores.score_fn"
    DEFAULTS = {"arrays": ()}
    fn: Callable[..., Any]
    arrays: tuple[Any, ...]

    def hoisted(self, dtype: Any, numbers: bool) -> Self:
        dtypes = (dtype, *(jnp.int32,) * 4)
        return type(self)(*hoist(self.fn, self.arrays, dtypes, "score_fn"))

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        s = jnp.asarray(s)
        arrays = [indexable(x) for x in self.arrays]
        changed = apply("score_fn", self.fn, (s, b, n, q, k), arrays)
        shape = jnp.broadcast_shapes(s.shape, np.shape(q), np.shape(k))
        return jnp.asarray(of_tile("score_fn", changed, shape, s.dtype))


def score_fn(fn: Callable[..., Any], *arrays: AnyArray) -> Score:
    """``fn(s, b, n, q, k, *arrays)``: the FlexAttention contract.

    Args:
      fn: takes logits ``s [t, s]``, int scalars ``b``, ``n``, int arrays ``q [t, 1]``,
        ``k [1, s]``; returns logits that broadcast to ``s``, which are cast to its dtype. It is
        traced: write ``jnp.where`` for ``if``. It may close over arrays, even traced ones.
      *arrays: arrays for ``fn`` to index. GPU kernels accept these; of what ``fn`` closes over
        they accept only numbers. Floating arrays of both kinds are differentiable. The gradient of
        an array takes time proportional to its size for every tile, so use ``bias`` for an array
        of ``T x S``.

    >>> import numpy as np
    >>> from attention_jax.scores import score_fn
    >>> nearer = score_fn(lambda s, b, n, q, k: s - 0.5 * abs(q - k))
    >>> float(nearer.score(np.float32(3.0), 0, 0, 4, 2))
    2.0
    """
    check_function(fn, "s, b, n, q, k", arrays)
    return ScoreFn(fn, tuple(arrays))
