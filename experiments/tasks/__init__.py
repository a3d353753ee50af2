"""The table of training tasks. A new task is one file here and one row below."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from experiments.training.task import Task


class Summary(NamedTuple):
    """What is said of a task before its file, with all that it imports, is loaded."""

    shows: str
    data: str
    models: str
    time: str
    score: str


# The name is also the file: experiments/tasks/<name>.py, which holds TASK.
TASKS: dict[str, Summary] = {
    "digits": Summary(
        shows="images as tokens: a small vision transformer beside a convolutional network",
        data="1797 handwritten digits of 8 x 8 pixels, part of scikit-learn",
        models="logistic, cnn, vit",
        time="2 minutes on 2 CPU cores",
        score="test accuracy 98 %",
    ),
    "fashion": Summary(
        shows="the same on more and larger images",
        data="Fashion-MNIST, 70,000 pictures of clothes of 28 x 28 pixels, 31 MB to download",
        models="logistic, cnn, vit",
        time="10 minutes on 2 CPU cores",
        score="not measured",
    ),
    "trec": Summary(
        shows="what kind of answer a question asks for: words, convolutions, attention",
        data="TREC, 5,452 questions to train and 500 to test, six classes",
        models="naive_bayes, text_cnn, attention, attention_cnn",
        time="2 minutes on 2 CPU cores",
        score="test accuracy 90 %",
    ),
    "fewshot": Summary(
        shows="how many labelled examples it takes, with and without pretraining, and adapters",
        data="that of trec, of which few questions are labelled",
        models="naive_bayes, text_cnn, transformer, finetuned, adapted",
        time="2 minutes on 2 CPU cores; all of the curve 50",
        score="test accuracy of 100 labelled examples 60 %, of all 88 %",
    ),
    "sst2": Summary(
        shows="whether a film is liked",
        data="Stanford Sentiment Treebank, sentences only, 6,920 to train and 1,821 to test",
        models="naive_bayes, text_cnn, attention, attention_cnn",
        time="2 minutes on 2 CPU cores",
        score="test accuracy 80 %",
    ),
    "relations": Summary(
        shows="how two nouns of a sentence are related",
        data="SemEval-2010 task 8, 8,000 sentences to train and 2,717 to test, 19 classes",
        models="naive_bayes, text_cnn, attention, attention_cnn",
        time="10 minutes on 2 CPU cores",
        score="test macro-F1 73",
    ),
    "ner": Summary(
        shows="names in text, as a tag for each word",
        data="NCBI diseases, 5,424 sentences to train and 940 to test; WNUT 2017, 3,394 and 1,287",
        models="most_frequent, gru, transformer",
        time="10 minutes on 2 CPU cores",
        score="test F1 74 on NCBI",
    ),
    "shakespeare": Summary(
        shows="the next character: counts, recurrence, attention",
        data="tiny_shakespeare, 1.1 million characters",
        models="ngram, gru, gru_attention, transformer",
        time="10 minutes on 2 CPU cores",
        score="1.68 nats per character on the last tenth",
    ),
    "listops": Summary(
        shows="nested lists of digits: how far information travels, also by linear attention",
        data="made here, expressions of 32 to 512 tokens",
        models="gru, transformer, window, linear",
        time="10 minutes on 2 CPU cores",
        score="test accuracy 37 %",
    ),
    "vqa": Summary(
        shows="questions about pictures: words and patches as tokens of one encoder",
        data="made here, nine cells of coloured shapes and a question in words",
        models="question, image, joint, cross",
        time="10 minutes on 2 CPU cores",
        score="test accuracy 100 %",
    ),
    "links": Summary(
        shows="which facts a graph lacks",
        data="FB15k-237, 272,115 facts to train and 20,466 to test; WN18RR, 86,835 and 3,134",
        models="distmult, attention",
        time="10 minutes on 2 CPU cores",
        score="test MRR 0.23 on FB15k-237",
    ),
    "multi30k": Summary(
        shows="translation, German to English: recurrence, additive attention, attention alone",
        data="Multi30k, 29,000 descriptions of pictures and their translations",
        models="gru, gru_attention, transformer",
        time="10 minutes on 2 CPU cores",
        score="BLEU 30; 36 with three times the steps",
    ),
    "qa": Summary(
        shows="questions about a passage, answered by a span of it",
        data="SQuADShifts, new Wikipedia, 7,938 questions of 48 articles; XQuAD, English, 1,190",
        models="overlap, gru, transformer",
        time="10 minutes on 2 CPU cores",
        score="test F1 36",
    ),
    "summarise": Summary(
        shows="titles of news, papers in a sentence: taking, making and copying words",
        data="AG news, 7,600 articles with titles; SciTLDR, 3,229 abstracts with summaries",
        models="lead, best_sentence, gru, gru_attention, transformer, copier",
        time="10 minutes on 2 CPU cores",
        score="ROUGE-L 18.7 on titles",
    ),
}


def load(name: str) -> Task[Any, Any]:
    """The task called ``name``, one of ``TASKS``."""
    return importlib.import_module(f"experiments.tasks.{name}").TASK
