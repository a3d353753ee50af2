"""Between the tensors of files and the variables of a model: checks, conversion, shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from attention_jax.core.int8 import Quantized
from attention_jax.models.pretrained.family import Family
from attention_jax.nn import Embeddings


def checked_leaves(model: Any, family: Family) -> dict[Any, Any]:
    """The variables of a model by path; raises unless they are those of its ``config``."""
    modules = [module for _, module in nnx.iter_modules(model)]
    if any(isinstance(module, nnx.LoRA) for module in modules):
        raise ValueError("model has low-rank adapters: save nn.merged(model)")
    if any(isinstance(x.get_raw_value(), Quantized) for _, x in _parameters(model)):
        raise ValueError("model is quantized: save the original model")
    if any(isinstance(module, Embeddings) and module.moved is not None for module in modules):
        raise ValueError(
            "model has moved embeddings (nn.moved_embeddings), which a checkpoint cannot express: "
            "save the original model"
        )
    plain = nnx.eval_shape(lambda: family.model(model.config, nnx.Rngs(0)))
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    expected = {path: x.get_value().shape for path, x in _parameters(plain)}
    there = {path: x.get_value().shape for path, x in _parameters(model)}
    errors = [
        f"{'.'.join(map(str, path))}: {there.get(path, 'none')}, expected {x}"
        for path, x in (expected | dict.fromkeys(there.keys() - expected.keys(), "none")).items()
        if there.get(path) != x
    ]
    if errors:
        raise ValueError("the parameters of model do not match its config: " + "; ".join(errors))
    return leaves


def _parameters(model: Any) -> list[tuple[Any, Any]]:
    """All variables except random state, intermediates and caches."""
    others = nnx.RngState, nnx.Intermediate, nnx.Cache
    return [(p, x) for p, x in nnx.to_flat_state(nnx.state(model)) if not isinstance(x, others)]


def converted(name: str, x: np.ndarray, dtype: Any, placed: Any = None) -> jax.Array:
    """A tensor as an array of the model; ``placed`` is its sharding, None for one device."""
    with np.errstate(over="ignore"):  # reported below, with the name
        result: Any = jnp.asarray(x, dtype) if placed is None else x.astype(dtype)
    narrow = jnp.finfo(dtype).bits < 32 and x.dtype != result.dtype
    library = jnp if placed is None else np  # a tensor to be sharded never goes to one device
    if narrow and np.isfinite(x).all() and not library.isfinite(result).all():
        raise ValueError(f"{name} overflows param_dtype = {result.dtype}")
    if placed is None:
        return result
    return jax.make_array_from_callback(x.shape, placed, lambda index: result[index])


def on_host(x: Any) -> np.ndarray:
    """The whole array in NumPy, gathered from its shards, those of other processes included."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    if isinstance(x, jax.Array) and not x.is_fully_replicated:
        x = jnp.copy(x)  # a sharded array keeps the NumPy array that was made of it
    return np.asarray(x)


def random_state(leaves: Mapping[Any, Any], seed: int) -> dict[Any, Any]:
    """The random state: each stream has a key of its own, with no key drawn yet."""
    values: dict[Any, Any] = {}
    for i, (path, x) in enumerate(leaves.items()):
        if isinstance(x, nnx.RngKey):
            values[path] = jax.random.fold_in(jax.random.key(seed), i)
        elif isinstance(x, nnx.RngCount):
            values[path] = jnp.zeros((), jnp.uint32)
    return values
