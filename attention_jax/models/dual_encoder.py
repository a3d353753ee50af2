"""Two towers, of texts and of images, whose vectors are compared (CLIP)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.core.axes import AnyArray, check_positions, int_at_least
from attention_jax.models.decoder import Decoder, DecoderConfig
from attention_jax.models.layers import Layers
from attention_jax.models.vision import VisionConfig, VisionTransformer
from attention_jax.nn.linear import linear
from attention_jax.nn.logical import logical
from attention_jax.nn.norms import unit
from attention_jax.nn.padding import as_real
from attention_jax.nn.rngs import check_rngs

TEMPERATURE = 0.07  # of the logits, initially


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """Configuration of a ``TextTower``.

    Attributes:
      text: a causal stack. Its head is not used.
      features: width of the vectors (F); None: that of the stack, without a projection.
      end: the token that ends a text. Its first occurrence holds the vector of the text; None: that
        of the largest token does, as in the first release of CLIP.
    """

    text: DecoderConfig
    features: int | None = None
    end: int | None = None

    def __post_init__(self) -> None:
        if self.features is not None:
            int_at_least("features", self.features, 1)
        if not self.text.tied:
            raise ValueError("text must be tied: a head of its own would not be used")
        if self.end is not None:
            int_at_least("end", self.end, 0)


@dataclasses.dataclass(frozen=True)
class ImageTowerConfig:
    """Configuration of an ``ImageTower``.

    Attributes:
      vision: a vision transformer without classes.
      features: width of the vectors (F); None: that of the stack, without a projection.
    """

    vision: VisionConfig
    features: int | None = None

    def __post_init__(self) -> None:
        if self.features is not None:
            int_at_least("features", self.features, 1)
        if self.vision.classes is not None:
            raise ValueError(f"vision must have no classes, got {self.vision.classes}")


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
    """Configuration of a ``DualEncoder``.

    Attributes:
      text, end: of the tower of texts, see ``TextTowerConfig``.
      vision: of the tower of images, see ``ImageTowerConfig``.
      features: width of the vectors (F).
    """

    text: DecoderConfig
    vision: VisionConfig
    features: int
    end: int | None = None

    def __post_init__(self) -> None:
        int_at_least("features", self.features, 1)
        TextTowerConfig(self.text, self.features, self.end)  # raises for wrong ones
        ImageTowerConfig(self.vision, self.features)


class TextTower(nnx.Module):
    """Texts as vectors: a causal stack, of which the last real token holds the vector.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import DecoderConfig, Layers, TextTower, TextTowerConfig
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> text = DecoderConfig(10, layers, positions="learned", max_length=5)
    >>> model = TextTower(TextTowerConfig(text, features=6, end=9), rngs=nnx.Rngs(0))
    >>> model(np.array([[3, 1, 9], [4, 9, 9]])).shape
    (2, 6)

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
    Supervision".
    """

    def __init__(self, config: TextTowerConfig, *, rngs: nnx.Rngs) -> None:
        check_rngs(rngs)
        self.config = config
        self.decoder = Decoder(config.text, rngs=rngs)
        self.project = nnx.data(_projection(config.text.layers, config.features, rngs))

    def __call__(self, tokens: Any, *, real: Any = None) -> jax.Array:
        """The vectors of texts, ``[*B T]`` to ``[*B F]``.

        Args:
          tokens: integers ``[*B T]``.
          real: bool ``[*B T]``, False for padding.

        Raises:
          ValueError: a text without the token ``end``. Under ``jit``, where tokens are not known,
            its vector is NaN instead.
        """
        tokens = check_positions(tokens, "tokens")
        real = as_real(real, tokens.shape)
        x = self.hidden(tokens, real=real)
        at, end = jnp.asarray(tokens, jnp.int32), self.config.end
        if end is not None:
            at = jnp.where(at == end, 1, 0)
        at = at if real is None else jnp.where(real, at, -1)
        ended = at.max(axis=-1) == 1
        if end is not None and not isinstance(at, jax.core.Tracer) and not ended.all():
            raise ValueError(f"tokens must hold end = {end} in each text, got a text without")
        index = jnp.argmax(at, axis=-1)
        x = jnp.take_along_axis(x, index[..., None, None], axis=-2)[..., 0, :]
        if end is not None:
            x = jnp.where(ended[..., None], x, jnp.nan)
        return x if self.project is None else self.project(x)

    def hidden(self, tokens: Any, *, real: Any = None) -> jax.Array:
        """The hidden states of the tokens ``[*B T E]``, after the final norm."""
        x: jax.Array = self.decoder.hidden(tokens, real=real)
        return x


class ImageTower(nnx.Module):
    """Images as vectors: a vision transformer, whose class token holds the vector.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import ImageTower, ImageTowerConfig, Layers, VisionConfig
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> vision = VisionConfig(image=(4, 4), patch=2, channels=1, layers=layers)
    >>> model = ImageTower(ImageTowerConfig(vision, features=6), rngs=nnx.Rngs(0))
    >>> model(np.ones((3, 4, 4, 1), np.float32)).shape
    (3, 6)

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
    Supervision".
    """

    def __init__(self, config: ImageTowerConfig, *, rngs: nnx.Rngs) -> None:
        check_rngs(rngs)
        self.config = config
        self.transformer = VisionTransformer(config.vision, rngs=rngs)
        self.project = nnx.data(_projection(config.vision.layers, config.features, rngs))

    def __call__(self, images: Float[AnyArray, "*B rows columns channels"]) -> jax.Array:
        """The vectors of images, ``[*B F]``."""
        x = self.transformer.pooled(self.hidden(images))
        return x if self.project is None else self.project(x)

    def hidden(self, images: Float[AnyArray, "*B rows columns channels"]) -> jax.Array:
        """The hidden states of class token and patches ``[*B T E]``, after the final norm."""
        return self.transformer.hidden(images)


def _projection(layers: Layers, features: int | None, rngs: nnx.Rngs) -> nnx.Linear | None:
    if features is None:
        return None
    options = {"axes": ("embed", None), "use_bias": False, **layers.dtypes}
    return linear(layers.features, features, rngs=rngs, **options)


class DualEncoder(nnx.Module):
    """Texts and images as vectors of length 1; logits are their products over a temperature.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import (
    ...     DecoderConfig, DualEncoder, DualEncoderConfig, Layers, VisionConfig)
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> config = DualEncoderConfig(
    ...     text=DecoderConfig(10, layers, positions="learned", max_length=5),
    ...     vision=VisionConfig(image=(4, 4), patch=2, channels=1, layers=layers),
    ...     features=6, end=9)
    >>> model = DualEncoder(config, rngs=nnx.Rngs(0))
    >>> texts, images = np.array([[3, 1, 9], [4, 9, 9]]), np.ones((3, 4, 4, 1), np.float32)
    >>> model(texts, images).shape, model.texts(texts).shape, model.images(images).shape
    ((2, 3), (2, 6), (3, 6))

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
    Supervision".
    """

    def __init__(self, config: DualEncoderConfig, *, rngs: nnx.Rngs) -> None:
        check_rngs(rngs)
        self.config = config
        text = TextTowerConfig(config.text, config.features, config.end)
        self.text = TextTower(text, rngs=rngs)
        self.vision = ImageTower(ImageTowerConfig(config.vision, config.features), rngs=rngs)
        start = jnp.asarray(-math.log(TEMPERATURE), config.text.layers.param_dtype)
        self.log_scale = nnx.Param(start, **logical())

    def __call__(
        self, tokens: Any, images: Float[AnyArray, "M rows columns channels"], *, real: Any = None
    ) -> jax.Array:
        """Logits of each text with each image, ``[N M]``, in float32 or wider.

        Args:
          tokens: integers ``[N T]``.
          images: ``[M rows columns channels]``.
          real: bool ``[N T]``, False for padding.
        """
        a, b = self.texts(tokens, real=real), self.images(images)
        dtype = jnp.promote_types(a.dtype, b.dtype)
        scale = jnp.exp(self.log_scale[...].astype(dtype))
        return scale * (a.astype(dtype) @ b.astype(dtype).T)

    def texts(self, tokens: Any, *, real: Any = None) -> jax.Array:
        """The vectors of texts, ``[*B T]`` to ``[*B F]``, in float32 or wider.

        Raises:
          ValueError: a text without the token ``end``. Under ``jit``, where tokens are not known,
            its vector is NaN instead.
        """
        return unit(self.text(tokens, real=real))

    def images(self, images: Float[AnyArray, "*B rows columns channels"]) -> jax.Array:
        """The vectors of images, ``[*B F]``, in float32 or wider."""
        return unit(self.vision(images))
