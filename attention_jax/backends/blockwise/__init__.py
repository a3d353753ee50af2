"""Attention in linear memory on every platform. Read ``run``, then ``formulas`` and ``loops``."""

from attention_jax.backends.blockwise.one_head import one_head_backward as one_head_backward
from attention_jax.backends.blockwise.one_head import one_head_forward as one_head_forward
from attention_jax.backends.blockwise.run import Blockwise as Blockwise
