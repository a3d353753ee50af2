"""Exact, composable attention for JAX, in linear memory on any device.

>>> import jax
>>> import attention_jax as aj
>>> x = jax.random.normal(jax.random.key(0), (2, 300, 4, 16))  # batch, length, heads, width
>>> mask = aj.masks.causal() & aj.masks.window(63, 0)
>>> aj.attention(x, x, x, mask=mask, score=aj.scores.softcap(30.0)).shape
(2, 300, 4, 16)
>>> aj.explain(x, x, x, mask=mask, platform="gpu").chosen
'pallas_gpu'

``attention`` computes attention, ``masks`` and ``scores`` build its options, ``reference`` defines
it in NumPy, and ``explain`` shows which backend runs and why. ALiBi and relative biases are in
``scores``, rotary embeddings in ``positions``, other kinds of attention in ``mechanisms``,
sequences split over devices in ``parallel``, and the checker, with all that it guarantees, in
``testing``.

Import the Flax modules and transformers separately, because Flax takes about as long to import as
JAX: ``from attention_jax import models, nn``.
"""

from attention_jax import cache as cache
from attention_jax import masks as masks
from attention_jax import mechanisms as mechanisms
from attention_jax import parallel as parallel
from attention_jax import positions as positions
from attention_jax import reference as reference
from attention_jax import scores as scores
from attention_jax import testing as testing
from attention_jax.api import attention as attention
from attention_jax.api import attention_weights as attention_weights
from attention_jax.api import explain as explain
from attention_jax.backends.explanation import Explanation as Explanation
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
    "mechanisms",
    "parallel",
    "positions",
    "reference",
    "scores",
    "testing",
]
