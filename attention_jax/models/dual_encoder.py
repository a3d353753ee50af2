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
from attention_jax.models.vision import VisionConfig, VisionTransformer
from attention_jax.nn.linear import linear
from attention_jax.nn.logical import logical
from attention_jax.nn.norms import unit
from attention_jax.nn.padding import as_real
from attention_jax.nn.rngs import check_rngs

TEMPERATURE = 0.07  # of the logits, initially


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
    """Configuration of a ``DualEncoder``.

    Attributes:
      text: the tower of texts, a causal stack. Its head is not used.
      vision: the tower of images, without classes.
      features: width of the vectors (F).
      end: the token that ends a text. Its first occurrence holds the vector of the text; None: that
        of the largest token does, as in the first release of CLIP.
    """

    text: DecoderConfig
    vision: VisionConfig
    features: int
    end: int | None = None

    def __post_init__(self) -> None:
        int_at_least("features", self.features, 1)
        if self.vision.classes is not None:
            raise ValueError(f"vision must have no classes, got {self.vision.classes}")
        if not self.text.tied:
            raise ValueError("text must be tied: a head of its own would not be used")
        if self.end is not None:
            int_at_least("end", self.end, 0)


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
        self.text = Decoder(config.text, rngs=rngs)
        self.vision = VisionTransformer(config.vision, rngs=rngs)

        def project(tower: DecoderConfig | VisionConfig) -> nnx.Linear:
            options = {"axes": ("embed", None), "use_bias": False, **tower.layers.dtypes}
            return linear(tower.layers.features, config.features, rngs=rngs, **options)

        self.project_text, self.project_image = project(config.text), project(config.vision)
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
        tokens = check_positions(tokens, "tokens")
        real = as_real(real, tokens.shape)
        x = self.text.hidden(tokens, real=real)
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
        return unit(self.project_text(x))

    def images(self, images: Float[AnyArray, "*B rows columns channels"]) -> jax.Array:
        """The vectors of images, ``[*B F]``, in float32 or wider."""
        return unit(self.project_image(self.vision.pooled(self.vision.hidden(images))))
