"""The dropout mask as a hash of the key and the four indices ``(b, n, q, k)``.

It is the same for every implementation, block size and sharding, needs no ``T x S`` array of random
bits, and is recomputed in the backward pass instead of stored. The arithmetic is on unsigned 32-bit
integers, so NumPy computes the same bits.

Source: the mixing steps are the finalizer of MurmurHash3 (Appleby 2011).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.core.axes import Shape, is_array, kind
from attention_jax.core.positions import AtPositions, position_fields

# Odd constants that spread an index over 32 bits, one per index, so that (q, k) and (k, q) differ.
_SPREAD = {
    "b": np.uint32(0x9E3779B1),
    "n": np.uint32(0x85EBCA77),
    "q": np.uint32(0xC2B2AE3D),
    "k": np.uint32(0x27D4EB2F),
}


@jax.jit
def seed(key: Any) -> jax.Array:
    """Folds a JAX random key, new style or raw ``uint32``, into one ``uint32``.

    >>> import jax
    >>> from attention_jax.core.dropout import seed
    >>> seed(jax.random.key(0)).dtype.name
    'uint32'
    """
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    words = jnp.asarray(key).astype(jnp.uint32)
    mixed = jnp.uint32(0)
    for i in range(words.shape[0]):
        mixed = mix(mixed ^ words[i]) + _SPREAD["k"]
    return mixed


def mix(x: Any) -> Any:
    """MurmurHash3's finalizer: every input bit flips every output bit with probability 1/2."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


class Dropout(AtPositions):
    """Dropout as three scalars, so that a new rate does not compile again.

    Attributes:
      seed: uint32.
      threshold: uint32; hashes below it are kept.
      keep_probability: ``1 - rate``, in the dtype of the logits.
    """

    seed: Any
    threshold: Any
    keep_probability: Any

    def keep(self, b: Any, n: Any, q: Any, k: Any) -> Any:
        """The dropout mask of a tile, given indices: True where a probability is kept."""
        at = self.example(b), self.head(n), self.queries(q), self.keys(k)
        return keep(self.seed, *at, threshold=self.threshold)


def of_rate(rate: float, key: Any, dtype: Any) -> Dropout | None:
    """Dropout at ``rate``; None for a rate of 0. The key is None only in ``explain``."""
    if rate == 0.0:
        return None
    return Dropout(
        seed=np.uint32(0) if key is None else seed(key),
        threshold=threshold(rate),
        keep_probability=np.asarray(1.0 - rate, dtype),
        **position_fields(None, None),
    )


def threshold(rate: float) -> np.uint32:
    """The number of hash values, out of ``2 ** 32``, that keep a probability."""
    return np.uint32(min(round((1.0 - rate) * 2.0**32), 2**32 - 1))


def keep(seed: Any, b: Any, n: Any, q: Any, k: Any, *, threshold: Any) -> Any:
    """The dropout mask: True, with probability ``1 - rate``, where a probability is kept.

    Args:
      seed: ``uint32``, from ``seed(key)``.
      b, n, q, k: example, query head, query and key; integers or integer arrays that broadcast.
      threshold: ``uint32``, from ``threshold(rate)``.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from attention_jax.core.dropout import keep, seed, threshold
    >>> q, k = jnp.arange(100)[:, None], jnp.arange(100)[None, :]
    >>> round(float(keep(seed(jax.random.key(1)), 0, 0, q, k, threshold=threshold(0.25)).mean()), 2)
    0.75
    """

    def spread(x: Any, letter: str) -> Any:
        return jnp.asarray(x).astype(jnp.uint32) * _SPREAD[letter]

    row = mix(mix(mix(seed ^ spread(b, "b")) ^ spread(n, "n")) ^ spread(q, "q"))
    return mix(row ^ spread(k, "k")) < threshold


def keep_pairs(dropout: Dropout, b: Any, n: Any, shape: Shape) -> jax.Array:
    """The dropout mask of one head, bool ``[T S]``: True where a probability is kept.

    Args:
      dropout: with positions, if it has any, of shape ``[T 1]`` and ``[1 S]``.
    """
    q, k = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])[None, :]
    return dropout.keep(b, n, q, k)


def check_rate(rate: Any, name: str = "dropout_rate") -> None:
    """Raises unless ``rate``, the argument ``name``, is a Python number in [0, 1)."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.floating)):
        raise TypeError(
            f"{name} must be a float in [0, 1), got {kind(rate)}: it must be a Python number and "
            f"cannot be traced"
        )
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {rate}")


def check(rate: Any, key: Any, name: str = "dropout_key") -> None:
    """Raises unless ``rate`` is in [0, 1) and, if it is not 0, ``key`` is a random key."""
    check_rate(rate)
    if key is None:
        if rate > 0.0:
            raise ValueError(
                f"dropout_rate is {rate} but {name} is None: pass a key, for example "
                f"jax.random.key(0)"
            )
        return
    if not is_array(key):
        raise TypeError(
            f"{name} must be a JAX random key, such as jax.random.key(0), got {kind(key)}"
        )
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and key.dtype != jnp.uint32:
        raise TypeError(f"{name} must be a JAX random key, got dtype {key.dtype}")
    if key.ndim != (0 if typed else 1):
        raise ValueError(f"{name} must be one key, got shape {key.shape}")
