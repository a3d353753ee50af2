"""How far a mask lets a query look ahead and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp


class Reach(NamedTuple):
    """Bounds on the keys a query may attend to, whatever the mask's arrays hold; None is no bound.

    Attributes:
      ahead: keys after a query are visible only below this position, an int or an int array
        ``[*B]``; 0 is causal.
      back: no key is visible that is more than this many positions before its query.
    """

    ahead: Any
    back: int | None

    def __and__(self, other: Reach) -> Reach:
        """The reach of the intersection of two masks."""
        return Reach(_least(self.ahead, other.ahead), _least(self.back, other.back))

    def __or__(self, other: Reach) -> Reach:
        """The reach of the union of two masks."""
        return Reach(_most(self.ahead, other.ahead), _most(self.back, other.back))


UNBOUNDED = Reach(None, None)


def _least(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    if any(isinstance(x, int) and x == 0 for x in (a, b)):
        return 0
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return jnp.minimum(a, b)


def _most(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return jnp.maximum(a, b)
