"""Flax NNX modules around ``attention``, and functions that fit the slots of Flax's own.

All of the maths is in the pure functions: a module holds parameters and passes them on. A variant
is a mask, not a class: local attention is ``MultiHeadAttention(..., mask=masks.window(128, 128))``,
local with some global tokens ``masks.window(128, 128) | masks.global_tokens(flags)``.
"""

from attention_jax.nn import pooling as pooling
from attention_jax.nn.attention import KeysValues as KeysValues
from attention_jax.nn.attention import MultiHeadAttention as MultiHeadAttention
from attention_jax.nn.blocks import Block as Block
from attention_jax.nn.blocks import Residual as Residual
from attention_jax.nn.drop_in import attention_fn as attention_fn
from attention_jax.nn.drop_in import dot_product_attention as dot_product_attention
from attention_jax.nn.embeddings import Embeddings as Embeddings
from attention_jax.nn.embeddings import moved_embeddings as moved_embeddings
from attention_jax.nn.feed_forward import FeedForward as FeedForward
from attention_jax.nn.lora import Frozen as Frozen
from attention_jax.nn.lora import low_rank as low_rank
from attention_jax.nn.lora import low_rank_state as low_rank_state
from attention_jax.nn.lora import merged as merged
from attention_jax.nn.lora import with_low_rank as with_low_rank
from attention_jax.nn.norms import OnePlusRMSNorm as OnePlusRMSNorm
from attention_jax.nn.pooling import AttentionPooling as AttentionPooling
from attention_jax.nn.pooling import ClassToken as ClassToken
from attention_jax.nn.record_weights import record_weights as record_weights

__all__ = [
    "AttentionPooling",
    "Block",
    "ClassToken",
    "Embeddings",
    "FeedForward",
    "Frozen",
    "KeysValues",
    "MultiHeadAttention",
    "OnePlusRMSNorm",
    "Residual",
    "attention_fn",
    "dot_product_attention",
    "low_rank",
    "low_rank_state",
    "merged",
    "moved_embeddings",
    "pooling",
    "record_weights",
    "with_low_rank",
]
