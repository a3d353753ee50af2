"""How far a mask lets a query see: ahead of itself, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.masks.bands import Band
from attention_jax.masks.base import And, Mask, Or
from attention_jax.masks.sequence import Chunked, Lengths


class Sight(NamedTuple):
    """What is certain of a mask, whatever its arrays hold. None: nothing is."""

    ahead: Any
    """Keys after a query are visible only below this position, an int or int array ``[*B]``; 0:
    none is."""
    back: int | None
    """No key is visible that is more than this before its query."""


NOTHING_KNOWN = Sight(None, None)


def sight(mask: Mask) -> Sight:
    """How far queries see, by the rules of those masks that bound it.

    >>> from attention_jax.masks import causal, chunked, prefix, window
    >>> sight(causal()), sight(prefix(3) | causal()), sight(chunked(4) & window(2, None))
    (Sight(ahead=0, back=None), Sight(ahead=3, back=None), Sight(ahead=None, back=2))
    """
    if isinstance(mask, And):
        return Sight(*map(_nearer, sight(mask.left), sight(mask.right)))
    if isinstance(mask, Or):
        return Sight(*map(_farther, sight(mask.left), sight(mask.right)))
    if isinstance(mask, Band):
        return _band(mask)
    if isinstance(mask, Lengths):
        return Sight(mask.key, None)
    if isinstance(mask, Chunked):
        return Sight(None, mask.size - 1)
    return NOTHING_KNOWN


def _band(mask: Band) -> Sight:
    if isinstance(mask.offset, jax.core.Tracer):
        return NOTHING_KNOWN
    offset = np.asarray(mask.offset)  # align="end" adds 0: in one sequence T is S
    low, high = int(offset.min(initial=0)), int(offset.max(initial=0))
    if offset.ndim == 0:
        low = high = int(offset)
    ahead = 0 if mask.right is not None and mask.right + high <= 0 else None
    return Sight(ahead, None if mask.left is None else max(mask.left - low, 0))


def _nearer(a: Any, b: Any) -> Any:
    """The lesser bound; None is none."""
    if a is None or b is None:
        return b if a is None else a
    if any(isinstance(x, int) and x == 0 for x in (a, b)):
        return 0
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return jnp.minimum(a, b)


def _farther(a: Any, b: Any) -> Any:
    """The greater bound; None is none."""
    if a is None or b is None:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return jnp.maximum(a, b)


# --- Of the queries and keys in a cache.


def check_ahead(mask: Mask, start: Any, end: Any) -> None:
    """Raises where a query would see, in the whole sequence, a later key that is not there yet.

    Args:
      mask: of positions in the whole sequence.
      start, end: int ``[*B]``, queries are at positions from ``start`` on; there are keys below
        ``end``. Where they are traced, only what does not depend on them is checked.

    Raises:
      ValueError: the mask may show later keys without end; or it shows all those below a position,
        and they did not come in one call.
    """
    ahead = sight(mask).ahead
    if ahead is None:
        raise ValueError(
            f"mask may show a query later tokens, which are not there yet with a cache: and it "
            f"with masks.causal(), got {mask!r}"
        )
    if isinstance(ahead, int) and ahead == 0:
        return
    if any(isinstance(x, jax.core.Tracer) for x in (start, end, ahead)):
        return
    if bool(((end > start) & (start < ahead) & ((start > 0) | (end < ahead))).any()):
        raise ValueError(
            f"mask shows tokens before position {ahead} to each other, in both directions: with a "
            f"cache they must come in one call, the first, got tokens {start} to {end} of {mask!r}"
        )


def check_back(mask: Mask, capacity: int, intact: Callable[[int], Any]) -> None:
    """Raises where a query would see a key that a rolling cache holds no more.

    Args:
      mask: of positions in the whole sequence.
      capacity: how many tokens the cache holds.
      intact: says of a window whether all its tokens are there.

    Raises:
      ValueError: the mask looks back further than that.
    """
    back = sight(mask).back
    if back is None or back >= capacity:
        raise ValueError(
            f"mask may look back further than the {capacity} tokens of the rolling cache "
            f"(capacity): & it with masks.window({capacity - 1}, None), or take a larger or a "
            f"plain cache, got {mask!r}"
        )
    found = intact(back + 1)
    if not isinstance(found, jax.core.Tracer) and not bool(found.all()):
        raise ValueError(
            f"mask looks back at tokens that were written over by those that the cache was rolled "
            f"back by: a rolling cache of capacity {capacity} must be larger, got {mask!r}"
        )
