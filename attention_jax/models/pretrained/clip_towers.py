"""The towers of CLIP alone: texts, such as the encoders of diffusion models, or images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx

from attention_jax.models.dual_encoder import (
    ImageTower,
    ImageTowerConfig,
    TextTower,
    TextTowerConfig,
)
from attention_jax.models.pretrained import clip
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.tensors import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """A family of one of the towers.

    Attributes:
      name: in the names of Hugging Face's classes.
      projection: the name of its tensor.
      read: makes our configuration of the entries and the width of the vectors.
      write: the entries, from our configuration.
      stored: the tensors.
      make: the model.
    """

    name: str
    projection: str
    read: Callable[[HFConfig, int | None], Any]
    write: Callable[[Any], dict[str, Any]]
    stored: Callable[[Any], Iterator[Tensor]]
    make: Callable[..., nnx.Module]

    IGNORED = clip.IGNORED

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """The one value of ``model_type``."""
        return (f"clip_{self.name.lower()}_model",)

    @property
    def PREFIX(self) -> str:
        """Missing in newer files of a tower without projection."""
        return f"{self.name.lower()}_model."

    @property
    def COPIES(self) -> Mapping[str, str]:
        """No tensor repeats another."""
        return {}

    @property
    def RENAMED(self) -> Mapping[str, str]:
        """No older files have other names."""
        return {}

    def from_hf(self, hf: HFConfig, names: set[str]) -> Any:
        """Our configuration from Hugging Face's."""
        plain, projected = f"CLIP{self.name}Model", f"CLIP{self.name}ModelWithProjection"
        features = hf.number("projection_dim", 512)
        found = hf.architecture((plain, projected), plain)
        return self.read(hf, features if found == projected else None)

    def to_hf(self, config: Any) -> dict[str, Any]:
        """Hugging Face's configuration from ours."""
        entries, name = self.write(config), f"CLIP{self.name}Model"
        if config.features is None:
            return entries | {"architectures": [name]}
        return entries | {
            "architectures": [f"{name}WithProjection"],
            "projection_dim": config.features,
        }

    def model(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The model that the configuration describes."""
        return self.make(config, rngs=rngs)

    def tensors(self, config: Any) -> Iterator[Tensor]:
        """Every tensor of a checkpoint, and where it belongs in the model."""
        return self.stored(config)

    def optional(self, config: Any) -> tuple[str, ...]:
        """Tensors of heads that this model does not have."""
        return (rf"{self.projection}\.weight",) if config.features is None else ()


def _text(hf: HFConfig, features: int | None) -> TextTowerConfig:
    text, end = clip.read_text(hf)
    return TextTowerConfig(text, features, end)


FAMILIES = (
    Tower(
        name="Text",
        projection="text_projection",
        read=_text,
        write=lambda x: clip.text_entries(x.text, x.end),
        stored=lambda x: clip.text_tensors(x.text, (), projected=x.features is not None),
        make=TextTower,
    ),
    Tower(
        name="Vision",
        projection="visual_projection",
        read=lambda hf, features: ImageTowerConfig(clip.read_vision(hf), features),
        write=lambda x: clip.vision_entries(x.vision),
        stored=lambda x: clip.vision_tensors(x.vision, (), projected=x.features is not None),
        make=ImageTower,
    ),
)
