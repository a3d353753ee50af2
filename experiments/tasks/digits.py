"""Handwritten digits, classified by attention over patches: the smallest vision transformer.

::

    python -m experiments train digits                    # a minute or two on 2 CPU cores: 98 %
    python -m experiments train digits --model cnn        # convolutions instead
    python -m experiments train digits --preset smoke     # seconds, to see that it runs

The ladder: ``logistic`` regression on the pixels, ``cnn``, ``vit``: an image of 8 x 8 pixels is cut
into 16 patches of 2 x 2; each becomes a token, a class token joins them, learned positions are
added, and layers of self-attention follow. A picture shows what the class token attends to in the
last.

Data: ``sklearn.datasets.load_digits``, 1797 images that come with scikit-learn: nothing is
downloaded. They are the test part of E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", 1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, where
the licence is CC BY 4.0 (scikit-learn's own description states none). The split is ours, fixed and
stratified by class: 1257 images to train, 180 to validate, 360 to test. The same 13 writers are on
all sides of it, so the score says nothing about the hand of somebody new.

Training images are shifted by up to one pixel in each direction, but for ``logistic``, which that
harms; nothing else is done to them.
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
    """The three splits. They are the same for every seed, so that runs can be compared."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)
    index = np.arange(len(labels))
    rest, test = train_test_split(index, test_size=360, stratify=labels, random_state=0)
    fit, check = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
    splits = {"train": fit, "validation": check, "test": test}
    return {name: Split(pixels[some], labels[some]) for name, some in splits.items()}


TASK = images.task("digits", PRESETS, read, side=8, names=tuple("0123456789"))
