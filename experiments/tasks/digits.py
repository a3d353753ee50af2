"""Handwritten digits, classified by attention over patches: the smallest vision transformer.

::

    python -m experiments train digits                    # 98 %, 2 minutes on 2 CPU cores
    python -m experiments train digits --model cnn        # convolutions instead
    python -m experiments train digits --preset smoke     # seconds, to check that it runs

Models: ``logistic`` regression on the pixels; ``cnn``; ``vit``, which cuts an image of 8 x 8 pixels
into 16 patches of 2 x 2, each a token, prepends a class token, adds learned positions and applies
layers of self-attention. A figure shows the attention of the class token in the last layer.

Data: ``sklearn.datasets.load_digits``, 1797 images bundled with scikit-learn, so nothing is
downloaded. They are the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", 1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, where
the license is CC BY 4.0 (scikit-learn's own description states none). The split is ours, fixed and
stratified by class: 1257 training, 180 validation and 360 test images. The same 13 writers appear
in all of them, so the score says nothing about new writers.

Training images are shifted by up to one pixel in each direction, except for ``logistic``, which
does worse with it. There is no other augmentation.
"""

from __future__ import annotations

import numpy as np

from experiments.tasks import images
from experiments.tasks.images import Config, Data, Split

PRESETS = {
    "cpu": Config(steps=2000, batch_size=64, learning_rate=2e-3),
    "smoke": Config(steps=20, batch_size=32, width=32, depth=1, evaluations=1, synthetic=True),
    "accelerator": Config(steps=4000, batch_size=256, learning_rate=2e-3, width=96, depth=4),
}


def read() -> Data:
    """The splits, the same for every seed so that runs can be compared."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)
    index = np.arange(len(labels))
    rest, test = train_test_split(index, test_size=360, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
    splits = {"train": train, "validation": validation, "test": test}
    return {name: Split(pixels[i], labels[i]) for name, i in splits.items()}


TASK = images.task("digits", PRESETS, read, side=8, names=tuple("0123456789"))
