"""``Score``: what all scores have in common."""

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
    """Which of the logits that a score returns may be ``-inf``, which masks the pair."""

    NEVER = "where the given logit is -inf, and nowhere else"
    VISIBLE = "where the given logit is -inf or `visible()` is False, and nowhere else"
    UNMASKS = "nowhere: pairs that an earlier score masked are visible again"
    UNKNOWN = "anywhere, and a given -inf may become finite: only the result tells"

    @property
    def adds(self) -> bool:
        """Whether a pair that was visible may be masked."""
        return self in (Masking.VISIBLE, Masking.UNKNOWN)

    @property
    def keeps(self) -> bool:
        """Whether a pair that was masked stays so."""
        return self in (Masking.NEVER, Masking.VISIBLE)


class Score(Value):
    """A change of the logits before the softmax.

    **Writing your own.** Subclass ``Score``, annotate the fields, and give ``rule``, the formula on
    one tile of ``t x s`` pairs. The other declarations have defaults that are safe and slower:

    - ``AXES``: the axes of each field that holds an array, from which follows what ``rule`` gets of
      it: ``"N"`` a scalar, ``"*B T"`` ``[t, 1]``, ``"*B S"`` ``[1, s]``, ``"*B N T S"`` ``[t, s]``
      (see ``core.pytree``). An array that declares no axes is passed whole to every tile.
      With ``BROADCAST = True`` axes ``T``, ``S`` and ``N`` may have size 1.
    - ``MASKING``: which results may be ``-inf``. The default promises nothing: every logit is
      then inspected, to keep what masked keys hold out of the result.
    - ``visible()``, with ``MASKING = Masking.VISIBLE``: the pairs that the score does not mask.
    - ``USES_POSITIONS = False`` where ``rule`` uses neither ``q`` nor ``k``.
    - ``tile``: the same as ``rule``, faster, given that a tile's indices are contiguous.
    - ``resolve`` and ``resolve_in_sequence``, for what depends on ``T``, ``S`` or ``N``.
    - ``NEW_TOKENS``: arrays along ``T`` that are, with a cache, of the new tokens alone.

    A subclass may not change ``rule``, because kernels and ``tile`` rely on the class.
    Kernels accept every score whose ``rule`` is elementwise arithmetic; ``explain`` shows what they
    do not accept, and why.

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
    >>> bool(jnp.allclose(out, attention(x, x, x, score=dense), atol=1e-6))
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
        """bool, broadcasts to the tile: False where ``rule`` masks the pair whatever its logit is.

        The arrays of the score are already cut to the tile. Called for ``Masking.VISIBLE`` only.
        """
        raise NotImplementedError(f"{type(self).__name__} must define visible()")

    def tile(self, s: Any, b: Any, n: Any, q0: Any, k0: Any) -> Any:
        """``rule`` on the tile ``s [t s]`` whose first query is ``q0`` and first key ``k0``."""
        return self.rule(s, b, n, *tile_indices(s.shape, q0, k0))

    def offset_per_example(self) -> bool:
        """Whether an array says, example by example, at which position the queries begin.

        A cache says so too, and refuses a score that would count it twice.
        """
        return False


def _explained(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    """``rule``, whose errors say how to write one."""

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
