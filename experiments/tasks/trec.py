"""Question classification: does a question ask for a number, a place, a person, ...?

::

    python -m experiments train trec                              # attention and convolutions
    python -m experiments train trec --model text_cnn             # without attention
    python -m experiments train trec --mask window --positions rotary
    python -m experiments train trec --model pretrained           # a published encoder, fine-tuned
    python -m experiments train trec --normalize-embeddings --adversarial 0.1

Models: ``naive_bayes`` on words and bigrams; ``text_cnn`` (Kim 2014, CNN-rand); ``attention``, a
transformer encoder with mean pooling; ``attention_cnn``, convolutions over the word embeddings and
the encoder's output; ``pretrained``, all-MiniLM-L6-v2, an encoder of 22 million parameters that
was trained on much text, with a linear layer on the mean of its outputs. All are fine-tuned but
the embeddings. ``--checkpoint FOLDER`` starts from another checkpoint; see ``finetuning``.
With ``--normalize-embeddings``, ``--adversarial`` is the training of Miyato et al. 2017; its size
is relative to the norm of a sentence's embeddings, which for ``T`` words is about ``sqrt(T *
width)``, so that 0.1 perturbs ten words by a norm of 3.6.

Data: TREC questions with six classes, X. Li and D. Roth, "Learning Question Classifiers", 2002,
5,452 for training, of which a fixed, stratified tenth is held out for validation, and 500 for test.
For research use with citation; no license is stated. Lower-cased.
"""

from __future__ import annotations

import numpy as np

from experiments.datasets.files import lines
from experiments.models import finetuning
from experiments.tasks import classification
from experiments.tasks.classification import Config, Labeled

CLASSES = ("description", "entity", "abbreviation", "human", "location", "number")

FOLDER = "sentence_classification"

PRESETS = {
    "cpu": Config(
        steps=800,
        batch_size=64,
        learning_rate=3e-3,
        label_smoothing=0.1,
        depth=1,
        dropout=0.5,
        evaluations=8,
        ema=0.995,
    ),
    "smoke": classification.SMOKE,
    "accelerator": classification.ACCELERATOR,
}


def read() -> dict[str, Labeled]:
    """The splits, the same for every seed so that runs can be compared."""
    from sklearn.model_selection import train_test_split

    rest = classification.labeled(lines(f"{FOLDER}/TREC.train.all", encoding="latin-1"))
    test = classification.labeled(lines(f"{FOLDER}/TREC.test.all", encoding="latin-1"))
    index = np.arange(len(rest.texts))
    train, validation = train_test_split(index, test_size=545, stratify=rest.labels, random_state=0)
    return {"train": rest.take(train), "validation": rest.take(validation), "test": test}


CHANGES = {
    ("cpu", "pretrained"): {
        **finetuning.OPTIONS,
        "feature_dropout": 0.1,
        "steps": 918,
        "evaluations": 4,
    },
    ("smoke", "pretrained"): finetuning.SMOKE,
    ("accelerator", "pretrained"): {
        **finetuning.ACCELERATOR,
        "feature_dropout": 0.1,
        "steps": 460,
        "evaluations": 6,
    },
}

TASK = classification.task("trec", CLASSES, read, PRESETS, changes=CHANGES)
