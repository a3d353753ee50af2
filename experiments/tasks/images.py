"""What the tasks that classify images share: the ladder, the loop's functions, the picture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.core.axes import AnyArray
from attention_jax.models import Layers, VisionConfig, VisionTransformer
from attention_jax.nn import record_weights
from experiments.datasets import text
from experiments.training import config as configs
from experiments.training.losses import cross_entropy, logits, scores
from experiments.training.task import AttentionView, Loss, Metrics, Task, self_attention
from experiments.training.text_config import attention_options

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Config(configs.TrainConfig):
    """The options of a classifier of images, beside those of every task."""

    model: Literal["logistic", "cnn", "vit"] = "vit"
    """The rung of the ladder."""
    patch: int = 2
    """Of vit: side of a patch in pixels; divides the image's."""
    width: int = 48
    """Of vit: numbers per token (E)."""
    heads: int = 4
    """Of vit: heads of attention (N); divides the width."""
    depth: int = 3
    """Of vit: layers."""
    filters: int = 32
    """Of cnn: of the first convolution; the second has twice as many."""
    dropout: float = 0.1
    """Of vit, of what each sublayer gives; of cnn, of what the classes are read from."""
    shift: int = 1
    """Training images are shifted by up to this many pixels, for cnn and vit: logistic, which has a
    weight for each pixel, is better without."""

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.at_least_1(self, "patch", "width", "heads", "depth", "filters")
        configs.heads_divide(self, "width")
        configs.below_1(self, "dropout")
        configs.softmax_only(self)  # whose weights the picture shows
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0, got {self.shift}")


class Split(NamedTuple):
    """Images ``[n side side]`` from 0 to 1 and their classes ``[n]``."""

    images: Any
    labels: Any

    @property
    def side(self) -> int:
        """Of an image, in pixels."""
        return int(self.images.shape[-1])


Data = dict[str, Split]


def made_up(side: int) -> Data:
    """A bright row or column tells the class: for ``smoke``, without any file."""
    rng = np.random.default_rng(0)

    def some(n: int) -> Split:
        labels = rng.integers(0, CLASSES, n).astype(np.int32)
        images = rng.uniform(0, 0.5, (n, side, side)).astype(np.float32)
        for image, label in zip(images, labels, strict=True):
            image[label % side] += 0.5 * (label < side)
            image[:, label % side] += 0.5 * (label >= side)
        return Split(images, labels)

    return {"train": some(256), "validation": some(64), "test": some(64)}


# --- Models.


# About the mean and the deviation of the pixels, of both tasks.
MEAN, DEVIATION = 0.3, 0.35


class Logistic(nnx.Module):
    """Logistic regression on the pixels, standardised: otherwise it learns slowly."""

    def __init__(self, side: int, rngs: nnx.Rngs) -> None:
        self.classify = nnx.Linear(side * side, CLASSES, rngs=rngs)

    def __call__(self, images: Any) -> jax.Array:
        """``[B side side]`` to logits ``[B 10]``."""
        pixels = (jnp.asarray(images) - MEAN) / DEVIATION
        return self.classify(pixels.reshape(images.shape[0], -1))


class CNN(nnx.Module):
    """Two convolutions of 3 x 3, each halved by its largest, and a hidden layer, as LeNet.

    Source: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition".
    """

    def __init__(self, config: Config, side: int, rngs: nnx.Rngs) -> None:
        F = config.filters
        self.first = nnx.Conv(1, F, kernel_size=(3, 3), rngs=rngs)
        self.second = nnx.Conv(F, 2 * F, kernel_size=(3, 3), rngs=rngs)
        self.hidden = nnx.Linear(2 * F * (side // 4) ** 2, 4 * F, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.classify = nnx.Linear(4 * F, CLASSES, rngs=rngs)

    def __call__(self, images: Any) -> jax.Array:
        """``[B side side]`` to logits ``[B 10]``."""
        x = jnp.asarray(images)[..., None]
        for convolution in (self.first, self.second):
            x = nnx.max_pool(jax.nn.relu(convolution(x)), (2, 2), strides=(2, 2))
        x = jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.classify(self.dropout(x))


class ViT(nnx.Module):
    """The library's vision transformer on gray images ``[B side side]``."""

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
        # As large as what they are added to: with the usual 0.02 the model takes long to see where
        # a patch is: 92 % instead of 98 % of the validation images after 1500 steps.
        positions = self.transformer.positions
        positions[...] = jax.random.normal(rngs.params(), positions.shape)

    def __call__(self, images: Any) -> jax.Array:
        """``[B side side]`` to logits ``[B 10]``."""
        return self.transformer(jnp.asarray(images)[..., None])


def init(config: Config, data: Data, rngs: nnx.Rngs) -> nnx.Module:
    """The rung."""
    side = data["train"].side
    if config.model == "logistic":
        return Logistic(side, rngs)
    return CNN(config, side, rngs) if config.model == "cnn" else ViT(config, side, rngs)


# --- The task.


def batches(config: Config, data: Data, step: int) -> Iterator[Split]:
    """Shuffled anew for each pass, and shifted anew for each step."""
    images, labels = data["train"]
    for index in text.shuffled(len(labels), config.batch_size, config.seed, step):
        rng = np.random.default_rng([config.seed, step, 1])
        most = 0 if config.model == "logistic" else config.shift
        yield Split(shifted(images[index], most, rng), labels[index])
        step += 1


def shifted(images: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Each image moved by its own random number of pixels; what comes in is 0, the paper."""
    side = images.shape[-1]
    padded = np.pad(images, ((0, 0), (most, most), (most, most)))
    down, right = rng.integers(0, 2 * most + 1, (2, len(images), 1, 1))
    i, j = np.arange(side)[:, None], np.arange(side)
    return padded[np.arange(len(images))[:, None, None], i + down, j + right]


def loss(config: Config, model: Any, batch: Split) -> Loss:
    """Cross-entropy."""
    each = cross_entropy(model(batch.images), batch.labels, config.label_smoothing)
    return Loss(each.sum(), jnp.float32(each.size))


def evaluate(config: Config, model: Any, data: Data, split: str) -> Metrics:
    """Accuracy and mean cross-entropy, over every image once."""
    images, labels = data[split]
    size = min(500, len(labels))
    found = []
    for start in range(0, len(labels), size):
        some = images[start : start + size]
        full = np.concatenate([some, np.zeros((size - len(some), *some.shape[1:]), some.dtype)])
        found.append(np.asarray(logits(model, full))[: len(some)])
    return scores(np.concatenate(found), labels)


def task(
    name: str,
    presets: Mapping[str, Config],
    read: Callable[[], Data],
    side: int,
    names: tuple[str, ...],
) -> Task[Config, Data]:
    """The task of this name, of square images that ``read`` gives and classes of these names."""

    def data(config: Config) -> Data:
        found = made_up(side) if config.synthetic else read()
        if side % config.patch:
            raise ValueError(f"patch must divide {side}, got {config.patch}")
        return found

    return Task(
        name=name,
        presets=presets,
        data=data,
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


# --- Who attends to whom.


def look(
    names: tuple[str, ...], config: Config, model: Any, data: Data, given: str | None
) -> list[AttentionView]:
    """Attention over the patches of a test image, the first or that of the number given."""
    if not isinstance(model, ViT):
        raise ValueError(f"model {config.model} has no attention to look at: take vit")
    images, labels = data["test"]
    at = given or "0"
    if not at.isdecimal() or int(at) >= len(images):
        raise ValueError(
            f"text must be the number of a test image, 0 to {len(images) - 1}, got {given!r}"
        )
    image, label = images[int(at) :][:1], labels[int(at)]
    guess = int(np.argmax(logits(model, image)))
    _, weights = record_weights(model, image)
    side = images.shape[-1] // config.patch
    cells = [f"{row},{column}" for row in range(side) for column in range(side)]
    (view,) = self_attention("patches, by row and column", ["class", *cells], weights)
    return [view._replace(note=f"Test image {at}: {names[label]}, read as {names[guess]}.")]


def class_token_attention(model: ViT, images: AnyArray) -> np.ndarray:
    """In the last layer: ``[B N T]``, the probability that each head gives to each token."""
    _, weights = record_weights(model, images)
    *_, last = weights.values()
    return np.asarray(last)[:, :, 0]


def pictures(
    names: tuple[str, ...], config: Config, model: Any, data: Data, folder: Path
) -> list[Path]:
    """Six test images, each beside what every head looks at, in one PNG; of ``vit`` alone."""
    if not isinstance(model, ViT):
        return []
    images, labels = data["test"]
    there = [label for label in (0, 2, 3, 4, 7, 9) if (labels == label).any()]
    chosen = [int(np.flatnonzero(labels == label)[0]) for label in there]
    images, labels = images[chosen], labels[chosen]
    predicted = np.argmax(logits(model, images), axis=-1)
    probabilities = class_token_attention(model, images)
    file = folder / "attention.png"
    titles = [
        f"{names[label]}, read as {names[guess]}"
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
        # The digit's outline over the heat maps shows which strokes lie under a patch. With a rim
        # of paper it closes at the border.
        rim = np.arange(-1, pixels + 1)
        outline = (rim, rim, np.pad(image, 1))
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
        "What the class token attends to in the last block\n"
        "(the maps show the patches; above each, what it keeps for itself)",
        fontsize=11,
    )
    bar = figure.colorbar(drawn, ax=axes[:, 1:], shrink=0.6, pad=0.02)
    bar.set_label("attention probability of a patch")
    figure.savefig(file, dpi=110)
