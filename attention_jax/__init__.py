"""attention_jax: attention for JAX that can be trusted, read and afforded."""

from attention_jax import cache as cache
from attention_jax import masks as masks
from attention_jax import positions as positions
from attention_jax import reference as reference
from attention_jax import scores as scores
from attention_jax.api import Explanation as Explanation
from attention_jax.api import attention as attention
from attention_jax.api import attention_weights as attention_weights
from attention_jax.api import explain as explain
from attention_jax.cache import KVCache as KVCache
from attention_jax.masks import Mask as Mask
from attention_jax.masks.block_map import BlockMap as BlockMap
from attention_jax.masks.block_map import block_map as block_map
from attention_jax.scores import Score as Score

__version__ = "0.1.0"

__all__ = [
    "BlockMap",
    "Explanation",
    "KVCache",
    "Mask",
    "Score",
    "attention",
    "attention_weights",
    "block_map",
    "cache",
    "explain",
    "masks",
    "positions",
    "reference",
    "scores",
]
