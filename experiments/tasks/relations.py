"""Relation classification between two marked nouns: cause and effect, part and whole, ...

::

    python -m experiments train relations                         # attention and convolutions
    python -m experiments train relations --model naive_bayes
    python -m experiments sample runs/relations/attention_cnn-cpu-seed0 \\
        --text "The <e1> fire </e1> was caused by a <e2> spark </e2> ."

The models are those of ``trec``: ``naive_bayes``, ``text_cnn``, ``attention``, ``attention_cnn``,
``pretrained``. The markers around the nouns, ``<e1>`` and ``</e1>``, ``<e2>`` and ``</e2>``, are
ordinary words to every model but ``pretrained``, which classifies by its outputs at the two markers
that start a noun.

Data: SemEval-2010 task 8, I. Hendrickx et al. 2010, "Multi-Way Classification of Semantic Relations
Between Pairs of Nominals": 8,000 training sentences, of which a fixed tenth, stratified by
relation, is held out for validation, and 2,717 test sentences; nine relations, each in two
directions, and Other. CC BY 3.0. Lower-cased. The score, ``macro_f1``, is the official one: the
mean F1 of the nine relations, where a prediction must have the right direction.
"""

from __future__ import annotations

import itertools
import re
import zipfile

import numpy as np

from experiments.datasets.files import path
from experiments.models import finetuning
from experiments.tasks import classification
from experiments.tasks.classification import Config, Labeled
from experiments.training.losses import scores
from experiments.training.task import Metrics

RELATIONS = (
    "Cause-Effect",
    "Component-Whole",
    "Content-Container",
    "Entity-Destination",
    "Entity-Origin",
    "Instrument-Agency",
    "Member-Collection",
    "Message-Topic",
    "Product-Producer",
)
CLASSES = (*(f"{name}({way})" for name in RELATIONS for way in ("e1,e2", "e2,e1")), "Other")

ARCHIVE = "semeval2010_task8/SemEval2010_task8_all_data.zip"
FOLDER = "SemEval2010_task8_all_data"
FILES = {
    "train": f"{FOLDER}/SemEval2010_task8_training/TRAIN_FILE.TXT",
    "test": f"{FOLDER}/SemEval2010_task8_testing_keys/TEST_FILE_FULL.TXT",
}
WORD = re.compile(r"</?e[12]>|\w+|[^\w\s]")

PRESETS = {
    "cpu": Config(
        steps=1000,
        batch_size=64,
        learning_rate=2e-3,
        label_smoothing=0.1,
        depth=1,
        dropout=0.5,
        longest=128,
        evaluations=6,
        ema=0.995,
        minutes=10,
    ),
    "smoke": classification.SMOKE,
    "accelerator": classification.ACCELERATOR,
}


def words(sentence: str) -> str:
    """Splits a sentence into words, separated by spaces; a marker is one word.

    >>> words('"The <e1>fire</e1>, it is."')
    '" The <e1> fire </e1> , it is . "'
    """
    return " ".join(WORD.findall(sentence))


def parse(content: str) -> Labeled:
    """Parses the task's format: a number and a sentence, a relation, a comment, an empty line."""
    lines = [line.strip() for line in content.split("\n")]
    texts, labels = [], []
    for sentence, relation in itertools.pairwise(lines):
        if re.match(r'\d+\t"', sentence):
            texts.append(words(sentence.split("\t", 1)[1][1:-1]).lower())
            labels.append(CLASSES.index(relation))
    return Labeled(texts, np.array(labels, np.int32))


def read() -> dict[str, Labeled]:
    """The splits, the same for every seed so that runs can be compared."""
    from sklearn.model_selection import train_test_split

    with zipfile.ZipFile(path(ARCHIVE)) as archive:
        published = {name: parse(archive.read(file).decode()) for name, file in FILES.items()}
    rest, test = published["train"], published["test"]
    index, relation = np.arange(len(rest.texts)), rest.labels // 2
    train, validation = train_test_split(index, test_size=800, stratify=relation, random_state=0)
    return {"train": rest.take(train), "validation": rest.take(validation), "test": test}


def macro_f1(guesses: np.ndarray, labels: np.ndarray) -> float:
    """The official score: the mean F1 of the nine relations.

    A prediction is right if relation and direction are. Precision divides by the predictions of a
    relation in either direction, recall by its examples in either direction. Other has no F1 of its
    own; confusing it with a relation costs precision or recall.

    >>> macro_f1(np.arange(19), np.arange(19))
    1.0
    """
    f1s = []
    for i in range(len(RELATIONS)):
        predicted, actual = guesses // 2 == i, labels // 2 == i
        right = np.sum(predicted & (guesses == labels))
        f1s.append(2 * right / max(predicted.sum() + actual.sum(), 1))
    return float(np.mean(f1s))


def score(logits: np.ndarray, labels: np.ndarray) -> Metrics:
    """The official score, accuracy and cross-entropy."""
    return {"macro_f1": macro_f1(logits.argmax(axis=-1), labels), **scores(logits, labels)}


CHANGES = {
    ("cpu", "pretrained"): {
        **finetuning.OPTIONS,
        "feature_dropout": 0.1,
        "steps": 1125,
        "evaluations": 4,
    },
    ("smoke", "pretrained"): finetuning.SMOKE,
    ("accelerator", "pretrained"): {
        **finetuning.ACCELERATOR,
        "feature_dropout": 0.1,
        "steps": 560,
        "evaluations": 5,
    },
}
SYMBOLS = (("<e1>", "§"), ("</e1>", "§"), ("<e2>", "¶"), ("</e2>", "¶"))  # rare in any text

TASK = classification.task(
    "relations",
    CLASSES,
    read,
    PRESETS,
    score=score,
    metric="macro_f1",
    changes=CHANGES,
    symbols=SYMBOLS,
)
