"""How far a mask lets a query look ahead and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp


class Reach(NamedTuple):
    """Bounds on the keys a query may attend to, for any contents of the mask's arrays.

    None means no bound.

    Attributes:
      ahead: keys after a query are visible only at positions below this one, an int or an int array
        ``[*B]``; 0 is causal.
      back: no key more than this many positions before a query is visible to it.
    """

    ahead: Any
    back: int | None

    def __and__(self, other: Reach) -> Reach:
        """The reach of the intersection of two masks."""
        return Reach(_minimum(self.ahead, other.ahead), _minimum(self.back, other.back))

    def __or__(self, other: Reach) -> Reach:
        """The reach of the union of two masks."""
        return Reach(_maximum(self.ahead, other.ahead), _maximum(self.back, other.back))


UNBOUNDED = Reach(None, None)


def _minimum(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    if any(isinstance(x, int) and x == 0 for x in (a, b)):
        return 0
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return jnp.minimum(a, b)


def _maximum(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return jnp.maximum(a, b)
