"""Attention that is no softmax of products: one file each, with the axes and rules of the rest."""

from attention_jax.mechanisms.additive import additive_attention as additive_attention
from attention_jax.mechanisms.additive import additive_weights as additive_weights

__all__ = ["additive_attention", "additive_weights"]
