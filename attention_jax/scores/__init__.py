"""Scores: frozen values that change the logits before the softmax, applied in the given order.

A score is a pytree with one method, ``score(s, b, n, q, k) -> s``: the new logit of query ``q`` and
key ``k`` in head ``n`` of example ``b``. Its arrays may be traced, batched over ``*B`` and
differentiated.

=======================  =====================================================  ================
constructor              the new logit                                          file
=======================  =====================================================  ================
``softcap``              ``cap * tanh(s / cap)``                                ``pointwise.py``
``bias``                 ``s + array``                                          ``pointwise.py``
``alibi``                ``s - slope * distance`` (ALiBi)                       ``distance.py``
``relative_bias``        ``s + table[bucket(distance)]`` (T5)                   ``distance.py``
``relative_embedding``   ``s + query . table[distance]`` (Shaw)                 ``distance.py``
``score_fn``             any function                                           ``functions.py``
=======================  =====================================================  ================

>>> import numpy as np
>>> from attention_jax.scores import alibi
>>> q, k = np.arange(2)[:, None], np.arange(3)[None, :]
>>> s = np.zeros((2, 3), np.float32)
>>> alibi(np.array([0.5])).score(s, 0, 0, q, k).tolist()
[[0.0, -0.5, -1.0], [-0.5, 0.0, -0.5]]

The docstring of ``Score`` shows how to write your own.
"""

from attention_jax.scores.at_positions import ScoreAtPositions as ScoreAtPositions
from attention_jax.scores.base import Masking as Masking
from attention_jax.scores.base import Score as Score
from attention_jax.scores.base import tile_indices as tile_indices
from attention_jax.scores.distance import Alibi as Alibi
from attention_jax.scores.distance import RelativeBias as RelativeBias
from attention_jax.scores.distance import RelativeEmbedding as RelativeEmbedding
from attention_jax.scores.distance import alibi as alibi
from attention_jax.scores.distance import alibi_slopes as alibi_slopes
from attention_jax.scores.distance import relative_bias as relative_bias
from attention_jax.scores.distance import relative_buckets as relative_buckets
from attention_jax.scores.distance import relative_embedding as relative_embedding
from attention_jax.scores.functions import ScoreFn as ScoreFn
from attention_jax.scores.functions import score_fn as score_fn
from attention_jax.scores.pointwise import Bias as Bias
from attention_jax.scores.pointwise import Softcap as Softcap
from attention_jax.scores.pointwise import bias as bias
from attention_jax.scores.pointwise import softcap as softcap

__all__ = [
    "Masking",
    "Score",
    "alibi",
    "alibi_slopes",
    "bias",
    "relative_bias",
    "relative_buckets",
    "relative_embedding",
    "score_fn",
    "softcap",
]
