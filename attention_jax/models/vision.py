"""The vision transformer (ViT): an encoder over the patches of an image."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attention_jax.core.axes import AnyArray, accumulation_dtype, int_at_least, same_rank
from attention_jax.core.dropout import check_rate
from attention_jax.core.shards import gathered
from attention_jax.models.layers import Layers
from attention_jax.models.stack import Stack
from attention_jax.nn import AttentionPooling, ClassToken, pooling
from attention_jax.nn.embeddings import EMBED_INIT
from attention_jax.nn.linear import linear
from attention_jax.nn.logical import logical
from attention_jax.nn.rngs import check_rngs

POOLS = ("class", "mean", "attention")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Configuration of a ``VisionTransformer``.

    Attributes:
      image: rows and columns of pixels.
      patch: side of a patch in pixels.
      layers: the stack.
      classes: number of classes (C); None: the model returns the vectors of the tokens.
      channels: of the images.
      patch_bias: whether the projection of the patches has a bias.
      embedding_norm: whether the embeddings are normalized.
      pool: ``"class"``, a class token before the patches, ``"mean"`` or ``"attention"``.
      dropout_rate: of the embeddings.
    """

    image: tuple[int, int]
    patch: int
    layers: Layers
    classes: int | None = None
    channels: int = 3
    patch_bias: bool = True
    embedding_norm: bool = False
    pool: str = "class"
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("patch", "channels"):
            int_at_least(name, getattr(self, name), 1)
        check_rate(self.dropout_rate)
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {self.pool!r}")
        if any(side % self.patch for side in self.image):
            raise ValueError(f"patch must divide the image {self.image}, got {self.patch}")

    @property
    def patches(self) -> int:
        """The number of patches."""
        return (self.image[0] // self.patch) * (self.image[1] // self.patch)


class VisionTransformer(nnx.Module):
    """An encoder over image patches, with a head of classes or none.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Layers, VisionConfig, VisionTransformer
    >>> config = VisionConfig(image=(8, 8), patch=4, channels=1, classes=3,
    ...                       layers=Layers(features=8, num_layers=1, num_heads=2))
    >>> VisionTransformer(config, rngs=nnx.Rngs(0))(np.ones((2, 8, 8, 1), np.float32)).shape
    (2, 3)

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words".
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        check_rngs(rngs)
        layers = config.layers
        E, param_dtype = layers.features, layers.param_dtype
        self.config = config
        self.embed = linear(
            config.patch**2 * config.channels,
            E,
            axes=(None, "embed"),
            use_bias=config.patch_bias,
            **layers.dtypes,
            rngs=rngs,
        )
        self.norm: Any = nnx.data(layers.new_norm(rngs)() if config.embedding_norm else None)
        self.class_token = nnx.data(None)
        if config.pool == "class":
            self.class_token = ClassToken(E, param_dtype=param_dtype, rngs=rngs)
        tokens = config.patches + (config.pool == "class")
        self.positions = nnx.Param(
            EMBED_INIT(rngs.params(), (tokens, E), param_dtype), **logical(None, "embed")
        )
        self.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs if config.dropout_rate else None)
        self.stack = Stack(layers, causal=False, rngs=rngs)
        self.pooling = self.classify = nnx.data(None)
        if config.pool == "attention":
            self.pooling = AttentionPooling(E, layers.num_heads, **layers.dtypes, rngs=rngs)
        if config.classes is not None:
            self.classify = linear(
                E, config.classes, axes=("embed", None), **layers.dtypes, rngs=rngs
            )

    def __call__(self, images: Float[AnyArray, "*B rows columns channels"]) -> jax.Array:
        """The logits ``[*B C]``, in float32 or wider; without classes the tokens ``[*B T E]``."""
        x = self.hidden(images)
        if self.classify is None:
            return x
        y = self.classify(self.pooled(x))
        return y.astype(accumulation_dtype(y.dtype))

    def tokens(self, images: Float[AnyArray, "*B rows columns channels"]) -> jax.Array:
        """The embeddings ``[*B T E]``: the class token if there is one, then patches row by row."""
        expected = (*self.config.image, self.config.channels)
        if images.shape[-3:] != expected:
            raise ValueError(
                f"images must have shape [*B rows columns channels] with {expected}, got "
                f"{images.shape}"
            )
        x = self.embed(patches(images, self.config.patch))
        if self.class_token is not None:
            x = self.class_token(x)
        x, positions = same_rank(x, gathered(self.positions[...], 1).astype(x.dtype))
        x = x + positions
        return self.dropout(x if self.norm is None else self.norm(x))

    def hidden(self, images: Float[AnyArray, "*B rows columns channels"]) -> jax.Array:
        """The hidden states ``[*B T E]``, after the layers."""
        return self.stack(self.tokens(images))

    def pooled(self, x: Float[AnyArray, "*B T E"]) -> jax.Array:
        """One vector for the image, ``[*B E]``."""
        if self.pooling is not None:
            return self.pooling(x)
        x = jnp.asarray(x)
        return x[..., 0, :] if self.config.pool == "class" else pooling.mean(x)


def patches(images: Any, side: int) -> Any:
    """``[*B rows columns channels]`` to flattened patches ``[*B patches .]``, row by row.

    >>> import numpy as np
    >>> from attention_jax.models.vision import patches
    >>> patches(np.arange(8).reshape(2, 4, 1), 2).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    *batch, rows, columns, channels = images.shape
    x = jnp.asarray(images).reshape(*batch, rows // side, side, columns // side, side, channels)
    x = jnp.swapaxes(x, -4, -3)
    return x.reshape(*batch, (rows // side) * (columns // side), side * side * channels)
