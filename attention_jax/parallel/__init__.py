"""x"""

from attention_jax.parallel.call import attention as attention
from attention_jax.parallel.orders import Order as Order
from attention_jax.parallel.orders import striped as striped
from attention_jax.parallel.orders import zigzag as zigzag

__all__ = ["Order", "attention", "striped", "zigzag"]
