"""What attention modules share: how they hold masks and scores, and the options of a call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax import cache as caches
from attention_jax.backends.arguments import MaskLike, as_mask, check_flag
from attention_jax.cache import Cache
from attention_jax.core.axes import Size, kind, same_rank
from attention_jax.masks import Mask
from attention_jax.nn.rngs import dropout_key
from attention_jax.positions import Rotary


def held(value: Any) -> Any:
    """A mask or scores as an attribute: data to Flax if they hold arrays, else static."""
    return nnx.data(value) if jax.tree.leaves(value) else value


def both_masks(own: Mask | None, mask: MaskLike, *, whole: bool) -> MaskLike:
    """The masks of module and call combined; a bool array is passed on if it is the only one."""
    if own is None or mask is None or not (whole or isinstance(mask, Mask)):
        return own if mask is None else mask
    given = as_mask(mask)
    return own if given is None else own & given


def check_rotary(rotary: Any) -> None:
    """Raises unless the option of a module is a ``Rotary`` or None."""
    if rotary is not None and not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a Rotary or None, got {kind(rotary)}")


def check_cache(cache: Any, count: Any, rotary: Rotary | None) -> None:
    """Raises unless a module with these positions can use the cache; ``count`` needs one."""
    if cache is None:
        if count is not None:
            raise ValueError("count must be None without a cache: mark padding with mask")
        return
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a KVCache, a PagedCache or None, got {kind(cache)}")
    scaling: Any = None if rotary is None else rotary.scaling
    dynamic = scaling is not None and scaling.depends_on_length
    if dynamic and (cache.rolling or cache.capacity > scaling.original):
        raise NotImplementedError(
            f"cache cannot be used with {type(scaling).__name__} beyond its {scaling.original} "
            f"original tokens: cached keys would have to be rotated again; use another scaling"
        )


def next_positions(cache: Cache | None, T: Size) -> jax.Array:
    """The positions of ``T`` new tokens: from 0, or from the end of the cache."""
    positions = jnp.arange(T, dtype=jnp.int32)
    if cache is None:
        return positions
    length, positions = same_rank(cache.length[..., None], positions)
    return length + positions


def new_cache(
    batch: tuple[int, ...],
    *,
    rolling: bool,
    page_size: int | None,
    pages: int | None,
    **options: Any,
) -> Cache:
    """An empty cache: with a ``page_size`` a paged one, see ``cache.init_paged`` and ``init``."""
    if page_size is None:
        if pages is not None:
            raise ValueError("pages must be None without a page_size")
        return caches.init(batch, rolling=rolling, **options)
    if not isinstance(batch, tuple | list) or len(batch) != 1:
        raise ValueError(f"batch must be (rows,) with a page_size, got {batch}")
    if rolling:
        raise ValueError("rolling must be False with a page_size: pages hold all tokens")
    return caches.init_paged(batch[0], page_size=page_size, pages=pages, **options)


def dropout(rate: float, deterministic: bool, rngs: Any) -> dict[str, Any]:
    """The options of ``attention`` for dropout of the probabilities."""
    check_flag("deterministic", deterministic)
    if deterministic or not rate:
        return {}
    return {"dropout_rate": rate, "dropout_key": dropout_key(rngs)}
