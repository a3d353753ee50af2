"""Mechanisms other than dot-product softmax attention over all keys, one file each.

Axes, errors and the results of fully masked rows are those of ``attention``. Each file begins with
the formula, implements it for one head of one example, then maps it over heads and examples.

================================================  =========================================  =======
function                                          weights                                    cost
================================================  =========================================  =======
``additive_attention``                            ``softmax(v . tanh(q + k))``               T S H
``inverted_attention``                            softmax over the queries                   T S
``slot_attention``                                the same, normalized over the keys         T S
``topk_attention``                                softmax over the ``k`` largest logits      T S
``linear_attention``, ``performer_features``      ``f(q) . f(k)`` of feature maps            T
``retention``                                     ``decay^(i-j) q . k``                      T
``gated_linear_attention``                        linear, with a state that gates decay      T
``delta_rule``                                    linear, with a state that is corrected     T
``linformer_attention``                           softmax over ``R`` mixtures of the keys    T R
``routing_attention``, ``update_centroids``       softmax within ``C`` clusters              T S / C
``differential_attention``                        the difference of two softmaxes            2 T S
``latent_attention``                              softmax, keys and values from a latent     T S
``absorbed_latent_attention``                     the same, for decoding from a small cache  T S
================================================  =========================================  =======

The recurrent ones return their state, so that a sequence can be resumed, by one token or by many:

>>> import functools
>>> import jax
>>> import numpy as np
>>> from attention_jax import masks, mechanisms
>>> x = jax.random.normal(jax.random.key(0), (1, 9, 2, 4))
>>> attend = functools.partial(mechanisms.linear_attention, mask=masks.causal(), return_state=True)
>>> attend = jax.jit(attend)
>>> whole, _ = attend(x, x, x)
>>> first, last = x[:, :8], x[:, 8:]
>>> _, state = attend(first, first, first)
>>> out, _ = attend(last, last, last, state=state)
>>> bool(np.allclose(out, whole[:, 8:], atol=1e-5))
True

``as_attention`` lets a module use a mechanism. Arguments that it does not support, such as a score,
raise an error that names them:

>>> from flax import nnx
>>> from attention_jax.nn import MultiHeadAttention
>>> slots = mechanisms.as_attention(mechanisms.slot_attention)
>>> module = MultiHeadAttention(8, num_heads=2, attention=slots, rngs=nnx.Rngs(0))
>>> module(np.ones((1, 5, 8), np.float32)).shape
(1, 5, 8)

``chunkwise`` runs the recurrent mechanisms chunk by chunk, ``causal_padding`` reads their masks and
``packing`` resets their state between packed documents.
"""

from attention_jax.mechanisms.additive import additive_attention as additive_attention
from attention_jax.mechanisms.additive import additive_weights as additive_weights
from attention_jax.mechanisms.as_attention import NAMED as NAMED
from attention_jax.mechanisms.as_attention import as_attention as as_attention
from attention_jax.mechanisms.deltanet import delta_rule as delta_rule
from attention_jax.mechanisms.differential import differential_attention as differential_attention
from attention_jax.mechanisms.differential import differential_weight as differential_weight
from attention_jax.mechanisms.gated_linear import (
    gated_linear_attention as gated_linear_attention,
)
from attention_jax.mechanisms.inverted import inverted_attention as inverted_attention
from attention_jax.mechanisms.latent import absorbed_latent_attention as absorbed_latent_attention
from attention_jax.mechanisms.latent import latent_attention as latent_attention
from attention_jax.mechanisms.linear import Features as Features
from attention_jax.mechanisms.linear import linear_attention as linear_attention
from attention_jax.mechanisms.linformer import linformer_attention as linformer_attention
from attention_jax.mechanisms.packing import PackedState as PackedState
from attention_jax.mechanisms.performer import performer_features as performer_features
from attention_jax.mechanisms.retentive import retention as retention
from attention_jax.mechanisms.routing import clusters as clusters
from attention_jax.mechanisms.routing import routing_attention as routing_attention
from attention_jax.mechanisms.routing import update_centroids as update_centroids
from attention_jax.mechanisms.slot import slot_attention as slot_attention
from attention_jax.mechanisms.topk import topk_attention as topk_attention

__all__ = [
    "NAMED",
    "Features",
    "PackedState",
    "absorbed_latent_attention",
    "additive_attention",
    "additive_weights",
    "as_attention",
    "clusters",
    "delta_rule",
    "differential_attention",
    "differential_weight",
    "gated_linear_attention",
    "inverted_attention",
    "latent_attention",
    "linear_attention",
    "linformer_attention",
    "performer_features",
    "retention",
    "routing_attention",
    "slot_attention",
    "topk_attention",
    "update_centroids",
]
