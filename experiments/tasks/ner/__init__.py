"""Named entity recognition: diseases in abstracts, or people, places and things in social media.

::

    python -m experiments train ner                               # a transformer, diseases
    python -m experiments train ner --corpus wnut17
    python -m experiments train ner --model gru
    python -m experiments sample runs/ner/transformer-cpu-seed0 --text "He had Wilson 's disease ."

Models: ``most_frequent`` (the most frequent tag of each word, O for unknown words), a bidirectional
``gru``, ``transformer``. These read each word and, by convolutions, its characters. ``pretrained``
fine-tunes a published encoder, see ``trec``; it also reads how each word is capitalized, which the
encoder's vocabulary does not tell, and tags a word by its first token.

Data: the NCBI disease corpus, R. Dogan et al. 2014, 5,424 training, 923 validation and 940 test
sentences, as distributed by G. Crichton et al. 2017, CC BY 4.0; and WNUT 2017, L. Derczynski et
al., "Results of the WNUT2017 Shared Task on Novel and Emerging Entity Recognition", 3,394, 1,009
and 1,287 sentences, CC BY 4.0: entities of six types, few of them in both training and test. The
score is F1 of whole spans with their type; see ``bio`` for how invalid tag sequences are
repaired.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models.pretrained import Tokenizer
from experiments.datasets import text
from experiments.datasets.text import PAD
from experiments.models.inference import map_by_length, record_weights
from experiments.tasks.common import check_attends, random_indices
from experiments.tasks.ner.bio import agreement, spans
from experiments.tasks.ner.config import BUCKETS, CHANGES, PRESETS, SPACES, Config
from experiments.tasks.ner.data import (
    IGNORED,
    Batch,
    Data,
    Sentence,
    letters,
    load,
    normalized,
)
from experiments.tasks.ner.finetuned import PretrainedTagger, encode
from experiments.tasks.ner.models import MostFrequent, Tagger
from experiments.training.losses import cross_entropy, logits
from experiments.training.task import (
    ALL,
    Array,
    AttentionView,
    Loss,
    Metrics,
    Model,
    Rows,
    Task,
    self_attention,
)


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Model:
    """A fresh model, or the counted baseline."""
    if config.model == "most_frequent":
        return MostFrequent(data.splits["train"])
    if config.model == "pretrained":
        return PretrainedTagger(config, data.tags, rngs)
    return Tagger(config, len(data.vocabulary), len(data.tags), rngs)


def batches(config: Config, data: Data, step: int, rows: Rows = ALL) -> Iterator[Batch]:
    """Batches of sentences of similar length."""
    split = data.splits["train"]
    lengths = np.array([len(row) for row in split.words])
    size, seed = config.batch_size, config.seed
    if config.model == "pretrained":
        columns = split.words, data.shapes["train"], split.tags
        for index, length in text.bucketed(lengths, size, seed, step, data.sizes):
            mine = rows.of(index)
            yield Batch(*(text.padded([column[i] for i in mine], length) for column in columns))
        return
    for index, length in text.alike(lengths, size, seed, step, data.sizes):
        mine = rows.of(index)
        yield Batch(
            text.padded([split.words[i] for i in mine], length),
            letters([split.sentences[i].words for i in mine], length),
            text.padded([split.tags[i] for i in mine], length),
        )


def real(batch: Batch) -> Array:
    """Which words are real, ``[B T]``."""
    return batch.words != PAD


def loss(config: Config, model: Model, batch: Batch) -> Loss:
    """Cross-entropy of the tag of each word."""
    each = cross_entropy(model((batch.words, batch.letters)), batch.tags, config.label_smoothing)
    counted = real(batch) & (batch.tags != IGNORED)
    return Loss(jnp.where(counted, each, 0).sum(), counted.sum(dtype=jnp.float32))


def tag(model: Model, data: Data, sentences: list[list[str]], size: int = 64) -> list[list[str]]:
    """Tags of sentences; a sentence longer than the model reads is cut into independent chunks."""
    if isinstance(model, MostFrequent):
        return [model.tag(words) for words in sentences]
    if isinstance(data.vocabulary, Tokenizer):
        return _tag_tokens(model, data, sentences, size)
    limit = BUCKETS[-1]
    chunks = [
        (i, words[j : j + limit])
        for i, words in enumerate(sentences)
        for j in range(0, len(words), limit)
    ]

    def run(index: np.ndarray) -> Iterator[list[str]]:
        batch = [chunks[i][1] for i in index]
        length = text.bucket(max(map(len, batch)), BUCKETS)
        rows = data.vocabulary.encode_all(normalized(words) for words in batch)
        inputs = text.padded(rows, length, size), letters(batch, length, size)
        guesses = np.asarray(logits(model, inputs)).argmax(axis=-1)
        for words, row in zip(batch, guesses, strict=False):
            yield [data.tags[k] for k in row[: len(words)]]

    tags: list[list[str]] = [[] for _ in sentences]
    lengths = [len(words) for _, words in chunks]
    for (i, _), chunk_tags in zip(chunks, map_by_length(run, lengths, size), strict=True):
        tags[i] += chunk_tags
    return tags


def _tag_tokens(model: Model, data: Data, sentences: list[list[str]], size: int) -> list[list[str]]:
    """``tag`` with a pretrained encoder: a word has the tag of its first token."""
    encoded = encode(data.vocabulary, sentences)
    lengths = [len(x.tokens) for x in encoded]

    def run(index: np.ndarray) -> Iterator[list[str]]:
        batch = [encoded[i] for i in index]
        longest = max(len(x.tokens) for x in batch)
        length = text.bucket(longest, [*data.sizes, longest])
        columns = ([x.tokens for x in batch], [x.shapes for x in batch])
        inputs = tuple(text.padded(column, length, size) for column in columns)
        guesses = np.asarray(logits(model, inputs)).argmax(axis=-1)
        for x, row in zip(batch, guesses, strict=False):
            yield [data.tags[row[start]] if start >= 0 else "O" for start in x.starts]

    return map_by_length(run, lengths, size)


def evaluate(config: Config, model: Model, data: Data, split: str) -> Metrics:
    """F1, precision and recall of spans, and how many predicted tags were repaired."""
    sentences = data.splits[split].sentences
    tags = tag(model, data, [s.words for s in sentences])
    scores = agreement([s.tags for s in sentences], tags)
    return {
        "f1": scores.f1,
        "precision": scores.precision,
        "recall": scores.recall,
        "repaired": float(scores.repaired),
    }


def sample(config: Config, model: Model, data: Data, given: str | None) -> str:
    """A user's sentence with its entities in brackets, or five of the test split that have any."""
    if given is not None:
        sentences = [Sentence(text.check(given).split(), [])]
    else:
        named = [s for s in data.splits["test"].sentences if spans(s.tags)[0]]
        sentences = [named[i] for i in random_indices(len(named), 5, config.seed)]
    lines = []
    for sentence, tags in zip(
        sentences, tag(model, data, [s.words for s in sentences]), strict=True
    ):
        lines.append(f"model  {bracketed(sentence.words, tags)}")
        if sentence.tags:
            lines.append(f"right  {bracketed(sentence.words, sentence.tags)}\n")
    return "\n".join(lines)


def bracketed(words: list[str], tags: list[str]) -> str:
    """Words with spans in brackets.

    >>> bracketed(["a", "b", "c"], ["O", "B-x", "I-x"])
    'a [x b c]'
    """
    shown = [*words]
    for span in spans(tags)[0]:
        shown[span.start] = f"[{span.kind} {shown[span.start]}"
        shown[span.stop - 1] += "]"
    return " ".join(shown)


def look(config: Config, model: Model, data: Data, given: str | None) -> list[AttentionView]:
    """Attention weights of the transformer on one sentence; default the first test sentence."""
    check_attends(config, "transformer", "pretrained")
    first = data.splits["test"].sentences[0].words
    words = (first if given is None else text.check(given).split())[: BUCKETS[-1]]
    if isinstance(data.vocabulary, Tokenizer):
        (x,) = encode(data.vocabulary, [words])
        inputs = np.array([x.tokens], np.int32), np.array([x.shapes], np.int32)
        _, weights = record_weights(model, inputs)
        return self_attention("encoder", data.vocabulary.strings(x.tokens), weights)
    rows = data.vocabulary.encode_all([normalized(words)])
    inputs = np.array(rows, np.int32), letters([words], len(words))
    _, weights = record_weights(model, inputs)
    return self_attention("encoder", words, weights)


TASK = Task(
    name="ner",
    presets=PRESETS,
    spaces=SPACES,
    data=load,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="f1",
    larger=True,
    unit="words",
    untraced=("most_frequent", "pretrained"),
    changes=CHANGES,
    real=real,
    sample=sample,
    look=look,
)
