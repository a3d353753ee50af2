"""The table of training tasks.

To add a task, write a module or package here that defines ``TASK``, and add an entry below.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.options import unknown

if TYPE_CHECKING:
    from experiments.training.task import Task


class Summary(NamedTuple):
    """What ``python -m experiments`` prints about a task without importing it."""

    about: str
    data: str
    models: str
    time: str
    score: str


# Keys are module names: experiments/tasks/<name>.py or experiments/tasks/<name>/ defines TASK.
TASKS: dict[str, Summary] = {
    "digits": Summary(
        about="image classification with a small vision transformer and a convolutional network",
        data="scikit-learn's 1,797 handwritten digits, 8 x 8 pixels",
        models="logistic, cnn, vit",
        time="2 minutes on 2 CPU cores",
        score="98 % test accuracy",
    ),
    "fashion": Summary(
        about="the digits models on more and larger images",
        data="Fashion-MNIST, 70,000 images of clothing, 28 x 28 pixels, a 31 MB download",
        models="logistic, cnn, vit",
        time="10 minutes on 2 CPU cores",
        score="not measured yet",
    ),
    "trec": Summary(
        about="question classification by the type of answer asked for",
        data="TREC, 5,452 training and 500 test questions, 6 classes",
        models="naive_bayes, text_cnn, attention, attention_cnn, pretrained",
        time="2 minutes on 2 CPU cores",
        score="90 % test accuracy",
    ),
    "fewshot": Summary(
        about="accuracy by number of labeled examples, with and without pretraining and LoRA",
        data="TREC, with labels for only some of the training questions",
        models="naive_bayes, text_cnn, transformer, finetuned, adapted, pretrained, "
        "pretrained_adapted",
        time="2 minutes on 2 CPU cores; 50 minutes for the whole curve",
        score="60 % test accuracy with 100 labeled examples, 88 % with all",
    ),
    "sst2": Summary(
        about="sentiment classification of film reviews",
        data="Stanford Sentiment Treebank, 6,920 training and 1,821 test sentences, no phrases",
        models="naive_bayes, text_cnn, attention, attention_cnn, pretrained",
        time="2 minutes on 2 CPU cores",
        score="80 % test accuracy",
    ),
    "relations": Summary(
        about="relation classification between two marked nouns of a sentence",
        data="SemEval-2010 task 8, 8,000 training and 2,717 test sentences, 19 classes",
        models="naive_bayes, text_cnn, attention, attention_cnn, pretrained",
        time="10 minutes on 2 CPU cores",
        score="73 test macro-F1",
    ),
    "ner": Summary(
        about="named entity recognition, one BIO tag per word",
        data="NCBI diseases, 5,424 training and 940 test sentences; WNUT 2017, 3,394 and 1,287",
        models="most_frequent, gru, transformer, pretrained",
        time="10 minutes on 2 CPU cores",
        score="74 test F1 on NCBI",
    ),
    "shakespeare": Summary(
        about="character-level language modeling with n-grams, recurrence and attention",
        data="tiny_shakespeare, 1.1 million characters",
        models="ngram, gru, gru_attention, transformer",
        time="10 minutes on 2 CPU cores",
        score="1.68 nats per character on the last tenth of the text",
    ),
    "listops": Summary(
        about="long-range dependencies in nested lists of digits; softmax and linear attention",
        data="generated expressions of 32 to 512 tokens",
        models="gru, transformer, window, linear",
        time="10 minutes on 2 CPU cores",
        score="37 % test accuracy",
    ),
    "vqa": Summary(
        about="visual question answering with words and image patches as tokens of one encoder",
        data="generated 3 x 3 grids of colored shapes, each with a question in words",
        models="question, image, joint, cross",
        time="10 minutes on 2 CPU cores",
        score="100 % test accuracy",
    ),
    "links": Summary(
        about="link prediction in a knowledge graph",
        data="FB15k-237, 272,115 training and 20,466 test facts; WN18RR, 86,835 and 3,134",
        models="distmult, attention",
        time="10 minutes on 2 CPU cores",
        score="0.23 test MRR on FB15k-237",
    ),
    "multi30k": Summary(
        about="German to English translation with recurrence, additive attention, transformers",
        data="Multi30k, 29,000 image descriptions with translations",
        models="gru, gru_attention, transformer",
        time="10 minutes on 2 CPU cores",
        score="30 BLEU; 36 with three times the steps",
    ),
    "qa": Summary(
        about="extractive question answering: the answer is a span of a passage",
        data="SQuADShifts new Wikipedia, 7,938 questions on 48 articles; English XQuAD, 1,190",
        models="overlap, gru, transformer, pretrained",
        time="10 minutes on 2 CPU cores",
        score="36 test F1",
    ),
    "summarise": Summary(
        about="summarization: news headlines and one-sentence paper summaries, with copying",
        data="AG News, 7,600 articles with titles; SciTLDR, 3,229 abstracts with summaries",
        models="lead, best_sentence, gru, gru_attention, transformer, copier, pretrained",
        time="10 minutes on 2 CPU cores",
        score="18.7 ROUGE-L on titles",
    ),
}


def load(name: str) -> Task[Any, Any]:
    """Imports the task called ``name``.

    Raises:
      ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(unknown("task", name, TASKS))
    return importlib.import_module(f"experiments.tasks.{name}").TASK
