"""Image classification: models, the functions of a task and an attention figure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.core.axes import AnyArray
from attention_jax.models import Layers, VisionConfig, VisionTransformer
from experiments.datasets import text
from experiments.models.inference import full_batches, record_weights
from experiments.tasks.common import check_attends
from experiments.training import config as configs
from experiments.training import search
from experiments.training.losses import cross_entropy, logits, scores
from experiments.training.task import (
    ALL,
    Array,
    AttentionView,
    Loss,
    Metrics,
    Model,
    Rows,
    Task,
    self_attention,
)
from experiments.training.text_config import attention_options

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Config(configs.TrainConfig):
    """Options of an image classifier."""

    model: Literal["logistic", "cnn", "vit"] = "vit"
    """The model to train."""
    patch: int = 2
    """vit: side of a patch in pixels; divides the side of the image."""
    width: int = 48
    """vit: model width (E)."""
    heads: int = 4
    """vit: number of attention heads (N); divides the width."""
    depth: int = 3
    """vit: number of layers."""
    filters: int = 32
    """cnn: filters of the first convolution; the second has twice as many."""
    dropout: float = 0.1
    """Dropout rate: of the output of each sublayer (vit), of the classifier's input (cnn)."""
    shift: int = 1
    """cnn and vit: shift training images by up to this many pixels in each direction. logistic has
    a weight per pixel and does worse with shifts, so it is trained without."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.at_least_1(self, "patch", "width", "heads", "depth", "filters")
        configs.heads_divide(self, "width")
        configs.below_1(self, "dropout")
        configs.softmax_only(self)  # the figure shows its weights
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0, got {self.shift}")


SPACES = {
    "logistic": {name: search.USUAL[name] for name in ("learning_rate", "weight_decay")},
    **dict.fromkeys(("cnn", "vit"), search.USUAL),
}


class Split(NamedTuple):
    """Images ``[n side side]`` from 0 to 1 and their classes ``[n]``."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def side(self) -> int:
        """Side of an image in pixels."""
        return int(self.images.shape[-1])


Data = dict[str, Split]


def synthetic(side: int) -> Data:
    """Noise with a bright row or column that gives the class away; needs no files."""
    rng = np.random.default_rng(0)

    def images_of(n: int) -> Split:
        labels = rng.integers(0, CLASSES, n).astype(np.int32)
        images = rng.uniform(0, 0.5, (n, side, side)).astype(np.float32)
        for image, label in zip(images, labels, strict=True):
            image[label % side] += 0.5 * (label < side)
            image[:, label % side] += 0.5 * (label >= side)
        return Split(images, labels)

    return {"train": images_of(256), "validation": images_of(64), "test": images_of(64)}


# --- Models.


# Approximate mean and standard deviation of the pixels of both data sets.
MEAN, DEVIATION = 0.3, 0.35


class Logistic(nnx.Module):
    """Logistic regression on standardized pixels; without standardizing it learns slowly."""

    def __init__(self, side: int, rngs: nnx.Rngs) -> None:
        self.classify = nnx.Linear(side * side, CLASSES, rngs=rngs)

    def __call__(self, images: Array) -> jax.Array:
        """``[B side side]`` to logits ``[B 10]``."""
        pixels = (jnp.asarray(images) - MEAN) / DEVIATION
        return self.classify(pixels.reshape(images.shape[0], -1))


class CNN(nnx.Module):
    """Two 3 x 3 convolutions, each with 2 x 2 max pooling, and a hidden layer, as in LeNet.

    Source: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition".
    """

    def __init__(self, config: Config, side: int, rngs: nnx.Rngs) -> None:
        F = config.filters
        self.first = nnx.Conv(1, F, kernel_size=(3, 3), rngs=rngs)
        self.second = nnx.Conv(F, 2 * F, kernel_size=(3, 3), rngs=rngs)
        self.hidden = nnx.Linear(2 * F * (side // 4) ** 2, 4 * F, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.classify = nnx.Linear(4 * F, CLASSES, rngs=rngs)

    def __call__(self, images: Array) -> jax.Array:
        """``[B side side]`` to logits ``[B 10]``."""
        x = jnp.asarray(images)[..., None]
        for convolution in (self.first, self.second):
            x = nnx.max_pool(jax.nn.relu(convolution(x)), (2, 2), strides=(2, 2))
        x = jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.classify(self.dropout(x))


class ViT(nnx.Module):
    """The library's vision transformer on greyscale images ``[B side side]``."""

    def __init__(self, config: Config, side: int, rngs: nnx.Rngs) -> None:
        layers = Layers(
            features=config.width,
            num_layers=config.depth,
            num_heads=config.heads,
            dropout_rate=config.dropout,
            **attention_options(config),
        )
        self.transformer = VisionTransformer(
            VisionConfig((side, side), config.patch, layers, classes=CLASSES, channels=1),
            rngs=rngs,
        )
        # Standard deviation 1, that of the patch embeddings they are added to. With the usual 0.02
        # the model is slow to learn where a patch is: 92 % instead of 98 % validation accuracy
        # after 1500 steps.
        positions = self.transformer.positions
        positions[...] = jax.random.normal(rngs.params(), positions.shape)

    def __call__(self, images: Array) -> jax.Array:
        """``[B side side]`` to logits ``[B 10]``."""
        return self.transformer(jnp.asarray(images)[..., None])


def init(config: Config, data: Data, rngs: nnx.Rngs) -> nnx.Module:
    """A fresh model."""
    side = data["train"].side
    if config.model == "logistic":
        return Logistic(side, rngs)
    return CNN(config, side, rngs) if config.model == "cnn" else ViT(config, side, rngs)


# --- The task.


def batches(config: Config, data: Data, step: int, rows: Rows = ALL) -> Iterator[Split]:
    """Batches in a new order for each epoch, with new random shifts for each step."""
    images, labels = data["train"]
    for index in text.shuffled(len(labels), config.batch_size, config.seed, step):
        rng = np.random.default_rng([config.seed, step, 1])
        limit = 0 if config.model == "logistic" else config.shift
        shifts = rng.integers(-limit, limit + 1, (2, len(index))).T
        mine = rows.of(index)
        yield Split(shifted(images[mine], rows.of(shifts)), labels[mine])
        step += 1


def shifted(images: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Moves each image up and left by its two ``shifts [B 2]`` in pixels, filling with zeros."""
    side, limit = images.shape[-1], int(np.abs(shifts).max(initial=0))
    padded = np.pad(images, ((0, 0), (limit, limit), (limit, limit)))
    down, right = shifts.T[:, :, None, None] + limit
    i, j = np.arange(side)[:, None], np.arange(side)
    return padded[np.arange(len(images))[:, None, None], i + down, j + right]


def loss(config: Config, model: Model, batch: Split) -> Loss:
    """Cross-entropy."""
    each = cross_entropy(model(batch.images), batch.labels, config.label_smoothing)
    return Loss(each.sum(), jnp.float32(each.size))


def evaluate(config: Config, model: Model, data: Data, split: str) -> Metrics:
    """Accuracy and mean cross-entropy of one split."""
    images, labels = data[split]
    n = len(labels)
    batches = [np.asarray(logits(model, images[i])) for i in full_batches(n, min(500, n))]
    return scores(np.concatenate(batches)[:n], labels)


def task(
    name: str,
    presets: Mapping[str, Config],
    read: Callable[[], Data],
    side: int,
    names: tuple[str, ...],
) -> Task[Config, Data]:
    """Builds an image classification task.

    Args:
      name: of the task.
      presets: named configurations.
      read: reads the splits.
      side: height and width of the images in pixels.
      names: of the classes.
    """

    def load(config: Config) -> Data:
        if side % config.patch:
            raise ValueError(f"patch must divide {side}, got {config.patch}")
        return synthetic(side) if config.synthetic else read()

    return Task(
        name=name,
        presets=presets,
        spaces=SPACES,
        data=load,
        init=init,
        batches=batches,
        loss=loss,
        evaluate=evaluate,
        metric="accuracy",
        larger=True,
        unit="images",
        look=functools.partial(look, names),
        pictures=functools.partial(pictures, names),
    )


# --- Attention weights.


def look(
    names: tuple[str, ...], config: Config, model: Model, data: Data, given: str | None
) -> list[AttentionView]:
    """Attention weights over the patches of a test image, by default the first.

    Args:
      given: index of the image, in digits.
    """
    check_attends(config, "vit")
    images, labels = data["test"]
    at = given or "0"
    if not at.isdecimal() or int(at) >= len(images):
        raise ValueError(
            f"text must be the index of a test image, 0 to {len(images) - 1}, got {given!r}"
        )
    image, label = images[int(at) :][:1], labels[int(at)]
    guess = int(np.argmax(logits(model, image)))
    _, weights = record_weights(model, image)
    side = images.shape[-1] // config.patch
    cells = [f"{row},{column}" for row in range(side) for column in range(side)]
    (view,) = self_attention("patches, by row and column", ["class", *cells], weights)
    return [view._replace(note=f"Test image {at}: {names[label]}, predicted {names[guess]}.")]


def class_token_attention(model: ViT, images: AnyArray) -> np.ndarray:
    """Attention weights ``[B N T]`` of the class token in the last layer."""
    _, weights = record_weights(model, images)
    *_, last = weights.values()
    return np.asarray(last)[:, :, 0]


def pictures(
    names: tuple[str, ...], config: Config, model: Model, data: Data, folder: Path
) -> list[Path]:
    """Writes a PNG of six test images with the attention of each head; ``vit`` only."""
    if not isinstance(model, ViT):
        return []
    images, labels = data["test"]
    present = [label for label in (0, 2, 3, 4, 7, 9) if (labels == label).any()]
    chosen = [int(np.flatnonzero(labels == label)[0]) for label in present]
    images, labels = images[chosen], labels[chosen]
    predicted = np.argmax(logits(model, images), axis=-1)
    probabilities = class_token_attention(model, images)
    file = folder / "attention.png"
    titles = [
        f"{names[label]}, predicted {names[guess]}"
        for label, guess in zip(labels, predicted, strict=True)
    ]
    draw(images, titles, probabilities, file)
    return [file]


def draw(images: np.ndarray, titles: list[str], probabilities: np.ndarray, file: Path) -> None:
    """One row per image: the image, then a heat map over its patches for each head."""
    # A Figure without pyplot needs no display and leaves no global state.
    from matplotlib.figure import Figure

    examples, heads, tokens = probabilities.shape
    pixels = images.shape[-1]
    side = round((tokens - 1) ** 0.5)
    maps = probabilities[:, :, 1:].reshape(examples, heads, side, side)
    maps = maps.repeat(pixels // side, axis=2).repeat(pixels // side, axis=3)
    figure = Figure(figsize=(2.4 + 1.7 * heads, 1.2 + 1.75 * examples), layout="constrained")
    axes = figure.subplots(examples, 1 + heads, squeeze=False)
    for row, image, title, row_maps, itself in zip(
        axes, images, titles, maps, probabilities[:, :, 0], strict=True
    ):
        row[0].imshow(image, cmap="gray_r", vmin=0, vmax=1)
        # The outline of the image over the heat maps shows which strokes lie under a patch. One
        # pixel of padding closes it at the border.
        pixel = np.arange(-1, pixels + 1)
        outline = (pixel, pixel, np.pad(image, 1))
        row[0].set_title(title, fontsize=10)
        for axis, heat, own in zip(row[1:], row_maps, itself, strict=True):
            drawn = axis.imshow(heat, cmap="magma", vmin=0, vmax=maps.max())
            axis.contour(*outline, levels=[0.5], colors="white", linewidths=0.9, alpha=0.8)
            axis.set(xlim=(-0.5, pixels - 0.5), ylim=(pixels - 0.5, -0.5))
            axis.set_title(f"{100 * own:.0f} % to itself", fontsize=9)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for head, axis in enumerate(axes[0][1:]):
        axis.set_title(f"head {head + 1}\n{axis.get_title()}", fontsize=9)
    figure.suptitle(
        "Attention of the class token in the last layer\n"
        "(maps over the patches; above each, the attention to the class token itself)",
        fontsize=11,
    )
    bar = figure.colorbar(drawn, ax=axes[:, 1:], shrink=0.6, pad=0.02)
    bar.set_label("attention weight of a patch")
    figure.savefig(file, dpi=110)
