"""Resized models that keep their weights: more tokens, or images of another size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from attention_jax.core.axes import int_at_least
from attention_jax.core.int8 import Quantized
from attention_jax.models.vision import VisionTransformer

Model = TypeVar("Model", bound=nnx.Module)


def resize_vocabulary(model: Model, vocabulary: int) -> Model:
    """A copy of a model that knows more tokens, or only the first ones.

    Each new token starts as the mean of the old ones, in the embeddings and in an output layer, so
    that it changes the probabilities of the others little.

    Args:
      model: with a ``vocabulary`` in its ``config``, or in that of its encoder. It is not changed.
      vocabulary: number of tokens (V).

    Returns:
      A model that shares all other parameters with the old one.

    Raises:
      TypeError: a model without a vocabulary.
      ValueError: no tokens, parameters that the ``config`` does not describe (adapters), or a
        quantized model.

    >>> from flax import nnx
    >>> from attention_jax.models import Decoder, DecoderConfig, Layers, resize_vocabulary
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> model = Decoder(DecoderConfig(10, layers), rngs=nnx.Rngs(0))
    >>> larger = resize_vocabulary(model, 12)
    >>> larger.config.vocabulary, larger.embed.tokens.shape
    (12, (12, 8))

    Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
    """
    int_at_least("vocabulary", vocabulary, 1)

    def resized(x: jax.Array, axis: int) -> jax.Array:
        new = vocabulary - x.shape[axis]
        if new <= 0:
            return jax.lax.slice_in_dim(x, 0, vocabulary, axis=axis)
        mean = x.mean(axis, keepdims=True)
        return jnp.concatenate([x, *[mean] * new], axis)

    def change(x: Any) -> Any:
        names = x.get_metadata().get("out_sharding") or ()
        return resized(x.get_value(), names.index("vocab")) if "vocab" in names else x.get_value()

    return _changed(model, _with_vocabulary(getattr(model, "config", None), vocabulary), change)


def _with_vocabulary(config: Any, vocabulary: int) -> Any:
    """A configuration, or that of its encoder, with another vocabulary."""
    if hasattr(config, "vocabulary"):
        return dataclasses.replace(config, vocabulary=vocabulary)
    if hasattr(config, "encoder"):
        encoder = _with_vocabulary(config.encoder, vocabulary)
        return dataclasses.replace(config, encoder=encoder)
    raise TypeError(
        f"model must have a vocabulary in its config, as a Decoder has, got one with "
        f"{type(config).__name__}"
    )


def resize_image(model: nnx.Module, image: tuple[int, int]) -> VisionTransformer:
    """A copy of a vision transformer for images of another size.

    The learned positions form a grid with one vector per patch, which is resized by bicubic
    interpolation. The position of the class token stays.

    Args:
      model: is not changed.
      image: rows and columns of pixels.

    Returns:
      A model that shares all other parameters with the old one.

    Raises:
      TypeError: another model.
      ValueError: a size that the patches do not divide, adapters, or a quantized model.

    >>> from flax import nnx
    >>> import numpy as np
    >>> from attention_jax.models import Layers, VisionConfig, VisionTransformer, resize_image
    >>> config = VisionConfig(image=(8, 8), patch=4, channels=1, classes=3,
    ...                       layers=Layers(features=8, num_layers=2, num_heads=2))
    >>> model = resize_image(VisionTransformer(config, rngs=nnx.Rngs(0)), (12, 16))
    >>> model(np.ones((2, 12, 16, 1), np.float32)).shape
    (2, 3)

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.2.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"model must be a VisionTransformer, got {type(model).__name__}")
    rows, columns = image
    config = dataclasses.replace(model.config, image=(rows, columns))
    old, new = ([side // config.patch for side in x.image] for x in (model.config, config))
    first = int(config.pool == "class")

    def change(variable: Any) -> Any:
        value = variable.get_value()
        if value is not model.positions.get_value():
            return value
        grid = value[first:].reshape(*old, -1)
        y, x = (bicubic(a, b).astype(value.dtype) for a, b in zip(old, new, strict=True))
        grid = jnp.einsum("yi,xj,ije->yxe", y, x, grid)
        return jnp.concatenate([value[:first], grid.reshape(-1, value.shape[-1])])

    return _changed(model, config, change)


def bicubic(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
    """The matrix that interpolates ``old`` samples at ``new`` places, both at centers of cells.

    ::

        w(d) = (a + 2) |d|^3 - (a + 3) |d|^2 + 1          |d| <= 1
               a |d|^3 - 5 a |d|^2 + 8 a |d| - 4 a    1 < |d| <  2        a = -3/4

    as in PyTorch, whose interpolation published checkpoints are used with. Beyond the ends, the
    first and the last sample repeat.

    >>> from attention_jax.models.resize import bicubic
    >>> bicubic(2, 4).round(3).tolist()[1]
    [0.773, 0.227]

    Source: Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing".
    """
    a = -0.75
    at = (np.arange(new) + 0.5) * old / new - 0.5
    near = np.floor(at).astype(int)[:, None] + np.arange(-1, 3)
    d = np.abs(at[:, None] - near)
    inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
    outer = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    matrix = np.zeros((new, old))
    rows = np.arange(new)[:, None]
    np.add.at(matrix, (rows, near.clip(0, old - 1)), np.where(d <= 1, inner, outer))
    return matrix


def _changed(model: Any, config: Any, change: Callable[[Any], jax.Array]) -> Any:
    """A model of another configuration, with the variables of the old one after ``change``."""
    make: Callable[..., Any] = type(model)
    graph, expected = nnx.split(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))))
    old = dict(nnx.to_flat_state(nnx.state(model)))
    if any(isinstance(x.get_raw_value(), Quantized) for x in old.values()):
        raise ValueError("model is quantized: resize the original model")
    paths = {path for path, _ in nnx.to_flat_state(expected)}
    if paths != old.keys():
        different = sorted(".".join(map(str, path)) for path in paths ^ old.keys())
        raise ValueError(f"model must be as its config describes it, but differs in {different}")
    values = {path: x.replace(change(x)) for path, x in old.items()}
    new = nnx.merge(graph, nnx.from_flat_state(values))
    modules = (m for _, m in nnx.iter_graph(model) if isinstance(m, nnx.Dropout))
    new.eval() if all(m.deterministic for m in modules) else new.train()
    return new
