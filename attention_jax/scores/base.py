"""``Score``, the base class of scores."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attention_jax.core.axes import Size
from attention_jax.core.closures import conversions_explained
from attention_jax.core.pytree import Value


class Masking(enum.Enum):
    """Which of the logits that a score returns may be ``-inf``, and so mask the pair."""

    NEVER = "only where the input logit is -inf"
    VISIBLE = "only where the input logit is -inf or `visible()` is False"
    UNMASKS = "nowhere: pairs that an earlier score masked become visible again"
    UNKNOWN = "anywhere, and an input of -inf may become finite: the result must be inspected"

    @property
    def adds(self) -> bool:
        """Whether the score may mask a visible pair."""
        return self in (Masking.VISIBLE, Masking.UNKNOWN)

    @property
    def keeps(self) -> bool:
        """Whether a pair that an earlier score masked stays masked."""
        return self in (Masking.NEVER, Masking.VISIBLE)


class Score(Value):
    """A change of the logits before the softmax.

    **Writing your own.** Subclass ``Score``, annotate the fields, and define ``rule``, the formula
    on a tile of ``t x s`` pairs. The other declarations have safe but slower defaults:

    - ``AXES``: the axes of each field that holds an array. They determine the shape in which
      ``rule`` gets it: a scalar for ``"N"``, ``[t, 1]`` for ``"*B T"``, ``[1, s]`` for ``"*B S"``,
      ``[t, s]`` for ``"*B N T S"`` (see ``core.pytree``). An array that declares no axes is passed
      whole to every tile. With ``BROADCAST = True`` axes ``T``, ``S`` and ``N`` may have size 1.
    - ``MASKING``: which results may be ``-inf``. By default nothing is known, and every logit is
      inspected so that masked keys do not affect the result.
    - ``visible()``, with ``MASKING = Masking.VISIBLE``: the pairs that the score does not mask.
    - ``USES_POSITIONS = False`` if ``rule`` uses neither ``q`` nor ``k``.
    - ``tile``: a faster equivalent of ``rule`` for tiles of contiguous indices.
    - ``resolve`` and ``resolve_in_sequence``, for fields that depend on ``T``, ``S`` or ``N``.
    - ``NEW_TOKENS``: arrays along ``T`` that, with a cache, cover the new tokens only.

    ``rule`` cannot be overridden in a further subclass, because kernels and ``tile`` rely on the
    class. Kernels accept every score whose ``rule`` is elementwise arithmetic; ``explain`` says
    which scores they do not accept, and why.

    >>> from typing import Any
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from attention_jax import attention, scores
    >>> from attention_jax.scores import Masking, Score
    >>> class Boost(Score):
    ...     '''``s + gain[n]`` where query and key are of the same kind.'''
    ...     AXES = {"gain": "N", "query_kinds": "*B T", "key_kinds": "*B S"}
    ...     MASKING = Masking.NEVER
    ...     USES_POSITIONS = False
    ...     gain: Any
    ...     query_kinds: Any
    ...     key_kinds: Any
    ...     def rule(self, s, b, n, q, k):
    ...         return jnp.where(self.query_kinds == self.key_kinds, s + self.gain, s)
    >>> kinds, gain = np.array([0, 1, 0, 1]), np.array([0.5, 2.0], np.float32)
    >>> x = np.random.default_rng(0).normal(size=(4, 2, 8)).astype(np.float32)  # T N H
    >>> out = attention(x, x, x, score=Boost(gain, kinds, kinds))
    >>> same = kinds[:, None] == kinds[None, :]
    >>> dense = scores.bias(np.where(same, gain[:, None, None], np.float32(0)))
    >>> np.allclose(out, attention(x, x, x, score=dense), atol=1e-6)
    True
    """

    MASKING: ClassVar[Masking] = Masking.UNKNOWN
    USES_POSITIONS: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "rule" in vars(cls):
            cls.rule = _explained(cls.__name__, cls.rule)  # type: ignore[method-assign]

    def score(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        """The logits ``s`` of queries ``q`` and keys ``k`` in head ``n`` of example ``b``, changed.

        Args:
          s: logits, ``q`` and ``k`` broadcast to their shape.
          b, n: example (counted over the flattened ``*B``) and query head.
          q, k: positions; ints or integer arrays that broadcast.
        """
        return self.at(b, n, q, k).rule(s, b, n, q, k)

    def rule(self, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        """The new logits of one tile; the arrays of the score are already cut to it."""
        raise NotImplementedError(f"{type(self).__name__} must define rule(s, b, n, q, k)")

    def visible(self) -> Any:
        """Bool, broadcasts to the tile: False where ``rule`` masks the pair for any logit.

        The arrays of the score are already cut to the tile. Only called for ``Masking.VISIBLE``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define visible()")

    def tile(self, s: Any, b: Any, n: Any, q0: Any, k0: Any) -> Any:
        """``rule`` on the tile ``s [t s]`` whose first query is ``q0`` and first key ``k0``."""
        return self.rule(s, b, n, *tile_indices(s.shape, q0, k0))

    def offset_per_example(self) -> bool:
        """Whether the score has an array with the position of the first query of each example.

        A cache determines these positions itself, and raises an error for such a score.
        """
        return False


def _explained(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    """``rule`` with clearer errors if it treats an array as a Python value."""

    @functools.wraps(rule)
    def explained(self: Score, s: Any, b: Any, n: Any, q: Any, k: Any) -> Any:
        with conversions_explained(f"the rule of {name}"):
            return rule(self, s, b, n, q, k)

    return explained


def tile_indices(shape: tuple[Size, Size], q0: Any, k0: Any) -> tuple[jax.Array, jax.Array]:
    """Query indices ``[t, 1]`` and key indices ``[1, s]`` of a tile."""
    t, s = shape
    return (
        q0 + jnp.arange(t, dtype=jnp.int32)[:, None],
        k0 + jnp.arange(s, dtype=jnp.int32)[None, :],
    )
