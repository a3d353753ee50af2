"""Sentiment of sentences from film reviews, positive or negative.

::

    python -m experiments train sst2                              # attention and convolutions
    python -m experiments train sst2 --model naive_bayes
    python -m experiments train sst2 --normalize-embeddings --adversarial 0.1

The models are those of ``trec``, and so is adversarial training.

Data: the Stanford Sentiment Treebank with two classes, R. Socher et al., "Recursive Deep Models for
Semantic Compositionality Over a Sentiment Treebank", 2013: 6,920 training, 872 validation and 1,821
test sentences. Most published results also train on the ten times as many phrases of the trees;
this task uses sentences only. For research use with citation; no license is stated. Lower-cased.
The model ``pretrained`` reads the Treebank's tokens as ordinary text, see ``text.ordinary``.
"""

from __future__ import annotations

from experiments.datasets import text
from experiments.datasets.files import lines
from experiments.models import finetuning
from experiments.tasks import classification
from experiments.tasks.classification import Config, Labeled

CLASSES = ("negative", "positive")

FOLDER = "sentence_classification"

PRESETS = {
    "cpu": Config(
        steps=500,
        batch_size=64,
        learning_rate=2e-3,
        label_smoothing=0.1,
        width=64,
        depth=1,
        dropout=0.5,
        word_dropout=0.3,
        least=1,
        evaluations=10,
        ema=0.995,
    ),
    "smoke": classification.SMOKE,
    "accelerator": classification.ACCELERATOR,
}


def read() -> dict[str, Labeled]:
    """The published splits."""
    files = {"train": "train", "validation": "dev", "test": "test"}
    return {
        split: classification.labeled(lines(f"{FOLDER}/stsa.binary.{name}"))
        for split, name in files.items()
    }


CHANGES = {
    ("cpu", "pretrained"): {
        **finetuning.OPTIONS,
        "feature_dropout": 0.1,
        "steps": 1080,
        "evaluations": 3,
    },
    ("smoke", "pretrained"): finetuning.SMOKE,
    ("accelerator", "pretrained"): {
        **finetuning.ACCELERATOR,
        "feature_dropout": 0.1,
        "steps": 430,
        "evaluations": 8,
    },
}

TASK = classification.task("sst2", CLASSES, read, PRESETS, changes=CHANGES, ordinary=text.ordinary)
