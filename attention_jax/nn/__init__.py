"""Attention for Flax: functions that fit the slots of modules that exist."""

from attention_jax.nn.drop_in import attention_fn as attention_fn
from attention_jax.nn.drop_in import dot_product_attention as dot_product_attention

__all__ = ["attention_fn", "dot_product_attention"]
