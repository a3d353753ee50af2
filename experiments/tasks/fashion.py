"""Images of clothing, classified by the models of ``digits``.

::

    python -m experiments train fashion                   # downloads 31 MB on first use
    python -m experiments train fashion --model cnn

The models are those of ``digits``, with 49 patches of 4 x 4 pixels.

Data: Fashion-MNIST, H. Xiao et al. 2017, greyscale images of 28 x 28 pixels: 55,000 for training,
the last 5,000 of the published training set for validation, 10,000 for test; MIT license.
"""

from __future__ import annotations

import gzip

import numpy as np

from experiments.datasets.files import path
from experiments.tasks import images
from experiments.tasks.images import Config, Data, Split

NAMES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

PRESETS = {
    "cpu": Config(
        steps=2500, batch_size=128, learning_rate=2e-3, patch=4, width=64, minutes=10, ema=0.99
    ),
    "smoke": Config(
        steps=10, batch_size=16, patch=4, width=32, depth=1, evaluations=1, synthetic=True
    ),
    "accelerator": Config(
        steps=20000,
        batch_size=512,
        learning_rate=1e-3,
        patch=4,
        width=192,
        heads=6,
        depth=6,
        ema=0.999,
        dtype="bfloat16",
        evaluations=20,
    ),
}


def read() -> Data:
    """The splits."""

    def split(name: str) -> Split:
        pixels = idx(f"fashion_mnist/{name}-images-idx3-ubyte.gz")
        labels = idx(f"fashion_mnist/{name}-labels-idx1-ubyte.gz")
        return Split((pixels / np.float32(255)).astype(np.float32), labels.astype(np.int32))

    images, labels = split("train")
    return {
        "train": Split(images[:-5000], labels[:-5000]),
        "validation": Split(images[-5000:], labels[-5000:]),
        "test": split("t10k"),
    }


def idx(name: str) -> np.ndarray:
    """Reads bytes in MNIST's IDX format: two zero bytes, type, rank, shape, values."""
    with gzip.open(path(name)) as file:
        raw = file.read()
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{name} must be an IDX file of bytes, but starts with {raw[:3]!r}")
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


TASK = images.task("fashion", PRESETS, read, side=28, names=NAMES)
