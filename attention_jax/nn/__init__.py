"""Flax NNX modules around ``attention``, and drop-in functions for existing code.

A module holds parameters and passes them to the pure functions of this library, which do the
computation. A variant is a mask or a score, not a class. Local attention, then with global tokens:

>>> import numpy as np
>>> from flax import nnx
>>> from attention_jax import masks, nn
>>> tokens = np.ones((2, 12, 8), np.float32)  # *B T E
>>> local = masks.window(2, 2)
>>> module = nn.MultiHeadAttention(8, num_heads=2, mask=local, rngs=nnx.Rngs(0))
>>> module(tokens).shape
(2, 12, 8)
>>> flags = np.arange(12) < 4  # the first four tokens attend to all tokens, and all to them
>>> mask = local | masks.global_tokens(flags)
>>> module = nn.MultiHeadAttention(8, num_heads=2, mask=mask, rngs=nnx.Rngs(0))
>>> module(tokens).shape
(2, 12, 8)

Cross-attention takes a context; ``keys_values`` projects it once for many calls:

>>> context = np.ones((2, 5, 6), np.float32)
>>> cross = nn.MultiHeadAttention(8, num_heads=2, context_features=6, rngs=nnx.Rngs(0))
>>> bool((cross(tokens, context) == cross(tokens, cross.keys_values(context))).all())
True

``Block`` combines self-attention (or ``LatentAttention``), cross-attention and ``FeedForward`` or
``MixtureOfExperts``, each in a ``Residual``.
``Embeddings`` and ``ClassToken`` turn tokens into vectors, and ``AttentionPooling`` and ``pooling``
turn many vectors into one. ``attention_jax.models`` builds transformers from them.

In existing code, change one line. Arguments that are not supported raise an error:

>>> layer = nnx.MultiHeadAttention(  # or flax.linen.MultiHeadDotProductAttention
...     num_heads=2, in_features=8, attention_fn=nn.attention_fn, decode=False, rngs=nnx.Rngs(0))
>>> layer(tokens).shape
(2, 12, 8)
>>> query = np.ones((2, 12, 2, 4), np.float32)
>>> nn.dot_product_attention(query, query, query, is_causal=True).shape  # as jax.nn's
(2, 12, 2, 4)

Fine-tune few parameters with LoRA: ``low_rank`` adds a trainable low-rank change to projections and
freezes everything else; ``merged`` folds the changes back in:

>>> adapted = nn.low_rank(module, rank=1, where=("query", "value"), rngs=nnx.Rngs(1))
>>> sorted(".".join(path) for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.Param)))
['query.lora_a', 'query.lora_b', 'value.lora_a', 'value.lora_b']
>>> bool(np.allclose(nn.merged(adapted)(tokens), module(tokens), atol=1e-5))
True

``quantized`` stores the weights of a model as 8-bit integers.

``record_weights`` returns the attention weights of every module of a model, and
``moved_embeddings`` perturbs its embeddings, for adversarial training.
"""

from attention_jax.nn import pooling as pooling
from attention_jax.nn.attention import MultiHeadAttention as MultiHeadAttention
from attention_jax.nn.blocks import Block as Block
from attention_jax.nn.blocks import Residual as Residual
from attention_jax.nn.context import KeysValues as KeysValues
from attention_jax.nn.drop_in import attention_fn as attention_fn
from attention_jax.nn.drop_in import dot_product_attention as dot_product_attention
from attention_jax.nn.embeddings import Embeddings as Embeddings
from attention_jax.nn.embeddings import moved_embeddings as moved_embeddings
from attention_jax.nn.experts import MixtureOfExperts as MixtureOfExperts
from attention_jax.nn.feed_forward import FeedForward as FeedForward
from attention_jax.nn.int8 import quantized as quantized
from attention_jax.nn.latent_attention import LatentAttention as LatentAttention
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
    "LatentAttention",
    "MixtureOfExperts",
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
    "quantized",
    "record_weights",
    "with_low_rank",
]
