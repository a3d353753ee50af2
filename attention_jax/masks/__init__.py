"""Masks: composable frozen values that say which keys each query may attend to.

A mask is a pytree with ``&``, ``|``, ``~`` and one method, ``mask(b, n, q, k)``: True where query
``q`` of head ``n`` in example ``b`` may attend to key ``k``. The indices are integers or integer
arrays that broadcast. ``T x S`` is never materialized; ``to_dense`` does so on request, and
``print(mask)`` draws a small picture.

>>> from attention_jax.masks import causal, window
>>> print(causal() & window(3, 0))
█·······
██······
███·····
████····
·████···
··████··
···████·
····████

A mask class declares its fields, its ``rule`` on one tile of pairs, and ``block``, which bounds
``rule`` on whole blocks: whether some pair may be visible, and whether all pairs certainly are.
``block`` is interval arithmetic, in NumPy while tracing if the fields are Python ints, in JAX at
run time if they are arrays. So a new Python int recompiles, and a new array does not: in a loop
over offsets or lengths, pass ``jnp.asarray(i)``. The docstring of ``Mask`` shows how to write your
own.
"""

from attention_jax.masks.at_positions import MaskAtPositions as MaskAtPositions
from attention_jax.masks.bands import Band as Band
from attention_jax.masks.bands import Dilated as Dilated
from attention_jax.masks.bands import causal as causal
from attention_jax.masks.bands import dilated as dilated
from attention_jax.masks.bands import window as window
from attention_jax.masks.base import And as And
from attention_jax.masks.base import Mask as Mask
from attention_jax.masks.base import Not as Not
from attention_jax.masks.base import Or as Or
from attention_jax.masks.explicit import BlockSparse as BlockSparse
from attention_jax.masks.explicit import Dense as Dense
from attention_jax.masks.explicit import MaskFn as MaskFn
from attention_jax.masks.explicit import Neighborhood as Neighborhood
from attention_jax.masks.explicit import block_sparse as block_sparse
from attention_jax.masks.explicit import dense as dense
from attention_jax.masks.explicit import mask_fn as mask_fn
from attention_jax.masks.explicit import neighborhood as neighborhood
from attention_jax.masks.reach import Reach as Reach
from attention_jax.masks.sequence import Chunked as Chunked
from attention_jax.masks.sequence import GlobalTokens as GlobalTokens
from attention_jax.masks.sequence import Lengths as Lengths
from attention_jax.masks.sequence import Padding as Padding
from attention_jax.masks.sequence import Segments as Segments
from attention_jax.masks.sequence import chunked as chunked
from attention_jax.masks.sequence import global_tokens as global_tokens
from attention_jax.masks.sequence import lengths as lengths
from attention_jax.masks.sequence import padding as padding
from attention_jax.masks.sequence import prefix as prefix
from attention_jax.masks.sequence import segments as segments

__all__ = [
    "Mask",
    "Reach",
    "block_sparse",
    "causal",
    "chunked",
    "dense",
    "dilated",
    "global_tokens",
    "lengths",
    "mask_fn",
    "neighborhood",
    "padding",
    "prefix",
    "segments",
    "window",
]
