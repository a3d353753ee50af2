"""Handwritten digits, classified by attention over patches: the smallest vision transformer.

::

    python -m experiments train digits                   # 1 minute on 2 CPU cores: 98 %
    python -m experiments train digits --preset smoke    # seconds, to see that it runs

An image of 8 x 8 pixels is cut into 16 patches of 2 x 2; each becomes a token, a class token joins
them, learned positions are added, and pre-norm blocks of self-attention follow. The class is read
from the class token. A picture shows what that token attends to in the last block.

Data: ``sklearn.datasets.load_digits``, 1797 images that come with scikit-learn: nothing is
downloaded. They are the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", 1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, where
the licence is CC BY 4.0 (scikit-learn's own description states none). The split is ours, fixed and
stratified by class: 1257 images to train, 180 to validate, 360 to test. The same 13 writers are on
all sides of it, so the score says nothing about the hand of somebody new.

Training images are shifted by up to one pixel in each direction; nothing else is done to them.
Seeds 0, 1, 2 gave 98.6, 97.8 and 98.3 % of the test in 46 to 49 s, other work on the same cores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx

from attention_jax import attention, attention_weights
from attention_jax.axes import AnyArray
from experiments import train

SIDE, CLASSES = 8, 10


@dataclasses.dataclass(frozen=True)
class Config(train.Config):
    """The model's options beside those of every task."""

    patch: int = 2
    """Side of a patch in pixels; divides 8."""
    width: int = 48
    """Numbers per token (E)."""
    heads: int = 4
    """Heads of attention (N); divides the width."""
    depth: int = 3
    """Blocks."""
    dropout: float = 0.1
    """Probability of dropping an attention probability."""
    shift: int = 1
    """Training images are shifted by up to this many pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if SIDE % self.patch:
            raise ValueError(f"patch must divide {SIDE}, got {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width {self.width}, got {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.shift < SIDE:
            raise ValueError(f"shift must be in [0, {SIDE}), got {self.shift}")


PRESETS = {
    "cpu": Config(steps=2000, batch_size=64, learning_rate=2e-3),
    "smoke": Config(steps=20, batch_size=32, width=32, depth=2, evaluations=1),
}


# --- The model.


class SelfAttention(nnx.Module):
    """Projections around ``attention``, which has no weights of its own."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.heads, self.dropout = config.heads, config.dropout
        self.implementation = config.attention
        self.query, self.key, self.value, self.out = (
            nnx.Linear(config.width, config.width, rngs=rngs) for _ in range(4)
        )

    def split_heads(self, x: jax.Array) -> jax.Array:
        """``[B T E]`` to ``[B T N H]``."""
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def query_and_key(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of tokens ``[B T E]``: twice ``[B T N H]``."""
        return self.split_heads(self.query(x)), self.split_heads(self.key(x))

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        out = attention(
            *self.query_and_key(x),
            self.split_heads(self.value(x)),
            dropout_rate=0.0 if dropout_key is None else self.dropout,
            dropout_key=dropout_key,
            implementation=self.implementation,
        )
        return self.out(out.reshape(x.shape))


class Block(nnx.Module):
    """Tokens look at each other, then each is thought over."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        E = config.width
        self.norm_attend, self.norm_think = nnx.LayerNorm(E, rngs=rngs), nnx.LayerNorm(E, rngs=rngs)
        self.attend = SelfAttention(config, rngs)
        self.up, self.down = nnx.Linear(E, 4 * E, rngs=rngs), nnx.Linear(4 * E, E, rngs=rngs)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        x = x + self.attend(self.norm_attend(x), dropout_key)
        return x + self.down(nnx.gelu(self.up(self.norm_think(x))))


class Classifier(nnx.Module):
    """Images ``[B 8 8]`` to logits ``[B 10]``. Without a key nothing is dropped."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        E, self.patch = config.width, config.patch
        tokens = 1 + (SIDE // self.patch) ** 2
        self.embed = nnx.Linear(self.patch**2, E, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, E)))
        # As large as what they are added to: with the usual 0.02 the model takes long to see where
        # a patch is: 92 % instead of 98 % of the validation images after 1500 steps.
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (tokens, E)))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])
        self.norm = nnx.LayerNorm(E, rngs=rngs)
        self.classify = nnx.Linear(E, CLASSES, rngs=rngs)

    def tokens(self, images: AnyArray) -> jax.Array:
        """``[B 8 8]`` to ``[B T E]``: the class token, then the patches row by row."""
        x = self.embed(jnp.asarray(patches(images, self.patch)))
        first = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[2]))
        return jnp.concatenate([first, x], axis=1) + self.positions[...]

    def __call__(self, images: AnyArray, key: jax.Array | None = None) -> jax.Array:
        x = self.tokens(images)
        for i, block in enumerate(self.blocks):
            x = block(x, None if key is None else jax.random.fold_in(key, i))
        return self.classify(self.norm(x[:, 0]))


def patches(images: AnyArray, side: int) -> AnyArray:
    """``[B 8 8]`` to ``[B patches pixels]``, row by row."""
    rows = SIDE // side
    x = images.reshape(-1, rows, side, rows, side)
    return x.swapaxes(2, 3).reshape(-1, rows * rows, side * side)


# --- The task.


class Split(NamedTuple):
    """Images ``[B 8 8]`` from 0 to 1 and their classes ``[B]``."""

    images: np.ndarray
    labels: np.ndarray


Data = dict[str, Split]


def data(config: Config) -> Data:
    """The three splits. They are the same for every seed, so that runs can be compared."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)
    indices = np.arange(len(labels))
    rest, test = train_test_split(indices, test_size=360, stratify=labels, random_state=0)
    fit, check = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
    splits = {"train": fit, "validation": check, "test": test}
    return {name: Split(images[index], labels[index]) for name, index in splits.items()}


def batches(config: Config, data: Data, rng: np.random.Generator) -> Iterator[Split]:
    """Shuffled anew for each pass; the last, incomplete batch of a pass is left out."""
    images, labels = data["train"]
    size = min(config.batch_size, len(labels))
    while True:
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - size + 1, size):
            index = order[start : start + size]
            yield Split(shifted(images[index], config.shift, rng), labels[index])


def shifted(images: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Each image moved by its own random number of pixels; what comes in is 0, the paper."""
    padded = np.pad(images, ((0, 0), (most, most), (most, most)))
    down, right = rng.integers(0, 2 * most + 1, (2, len(images), 1, 1))
    i, j = np.arange(SIDE)[:, None], np.arange(SIDE)
    return padded[np.arange(len(images))[:, None, None], i + down, j + right]


def loss(model: Classifier, batch: Split, key: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    logits = model(batch.images, key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


@nnx.jit
def predict(model: Classifier, images: AnyArray) -> jax.Array:
    """Logits, with nothing dropped."""
    return model(images)


def evaluate(model: Classifier, data: Data, split: str) -> train.Metrics:
    """Accuracy and mean cross-entropy."""
    images, labels = data[split]
    logits = np.asarray(predict(model, images))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return {
        "accuracy": float(np.mean(np.argmax(logits, axis=-1) == labels)),
        "cross_entropy": float(cross_entropy),
    }


# --- What the class token attends to.


@nnx.jit
def class_token_attention(model: Classifier, images: AnyArray) -> jax.Array:
    """In the last block: ``[B N T]``, the probability that each head gives to each token."""
    *before, last = model.blocks
    x = model.tokens(images)
    for block in before:
        x = block(x, None)
    return attention_weights(*last.attend.query_and_key(last.norm_attend(x)))[:, :, 0]


def report(model: Classifier, data: Data, stem: Path) -> list[Path]:
    """Test digits, each beside what every head looks at, in one PNG."""
    images, labels = data["test"]
    chosen = [int(np.flatnonzero(labels == digit)[0]) for digit in (0, 2, 3, 4, 7, 9)]
    images, labels = images[chosen], labels[chosen]
    predicted = np.argmax(predict(model, images), axis=-1)
    probabilities = np.asarray(class_token_attention(model, images))
    file = stem.with_name(f"{stem.name}-attention.png")
    titles = [f"{label}, read as {guess}" for label, guess in zip(labels, predicted, strict=True)]
    draw(images, titles, probabilities, file)
    return [file]


def draw(images: np.ndarray, titles: list[str], probabilities: np.ndarray, file: Path) -> None:
    """One row per image: the image, then a heat map over its patches for each head."""
    # A Figure without pyplot needs no display and leaves no global state.
    from matplotlib.figure import Figure

    examples, heads, tokens = probabilities.shape
    side = round((tokens - 1) ** 0.5)
    maps = probabilities[:, :, 1:].reshape(examples, heads, side, side)
    maps = maps.repeat(SIDE // side, axis=2).repeat(SIDE // side, axis=3)
    figure = Figure(figsize=(2.0 + 1.7 * heads, 1.2 + 1.75 * examples), layout="constrained")
    axes = figure.subplots(examples, 1 + heads, squeeze=False)
    for row, image, title, row_maps, itself in zip(
        axes, images, titles, maps, probabilities[:, :, 0], strict=True
    ):
        row[0].imshow(image, cmap="gray_r", vmin=0, vmax=1)
        # The digit's outline over the heat maps shows which strokes lie under a patch. With a rim
        # of paper it closes at the border.
        rim = np.arange(-1, SIDE + 1)
        outline = (rim, rim, np.pad(image, 1))
        row[0].set_title(title, fontsize=10)
        for axis, heat, own in zip(row[1:], row_maps, itself, strict=True):
            drawn = axis.imshow(heat, cmap="magma", vmin=0, vmax=maps.max())
            axis.contour(*outline, levels=[0.5], colors="white", linewidths=0.9, alpha=0.8)
            axis.set(xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5))
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


TASK = train.Task(
    name="digits",
    presets=PRESETS,
    data=data,
    init=Classifier,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    report=report,
)
