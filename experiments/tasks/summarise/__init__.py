"""Summarization: titles of news articles, and papers in one sentence.

::

    python -m experiments train summarise                         # a pointer-generator transformer
    python -m experiments train summarise --adversarial 0.1       # with adversarial training
    python -m experiments train summarise --model lead
    python -m experiments train summarise --corpus scitldr --reads 192 --writes 48
    python -m experiments sample runs/summarise/copier-cpu-seed0

Models: ``lead`` (the first 12 words of an article, the first sentence of an abstract),
``best_sentence`` (the sentence most similar to the whole text, Radev 2004), ``gru`` and
``gru_attention`` (Cho 2014, Bahdanau 2015), ``transformer``, ``copier`` (a transformer that can
also copy words of the source, See 2017), ``pretrained`` (a copier with a published encoder, see
``trec``, and its subwords in place of words). All decode greedily and in lower case.

Data: ``titles``, the descriptions and titles of 7,600 news articles, the test set of AG News (X.
Zhang et al. 2015, "Character-level Convolutional Networks for Text Classification"; for research
and non-commercial use), in a fixed 80/10/10 split; ``scitldr``, I. Cachola et al. 2020, "TLDR:
Extreme Summarization of Scientific Documents", abstracts only, 1,992 training, 619 validation and
618 test papers, Apache-2.0. The score is ROUGE without stemming, see ``rouge``; with several
references, the best counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models import EncoderDecoder
from attention_jax.models.pretrained import Tokenizer
from experiments.datasets import text
from experiments.datasets.text import PAD, START, UNKNOWN
from experiments.models.inference import record_weights
from experiments.models.seq2seq import Seq2Seq, decode, decode_rows, transformer_config
from experiments.tasks.common import check_attends, random_indices
from experiments.tasks.summarise import finetuned, rouge
from experiments.tasks.summarise.config import BUCKETS, CHANGES, PRESETS, SPACES, Config
from experiments.tasks.summarise.copier import Copier
from experiments.tasks.summarise.data import (
    OTHERS,
    Data,
    Split,
    Text,
    encode,
    load,
    others_of,
    tokens,
)
from experiments.tasks.summarise.extractive import BestSentence, Lead
from experiments.training.losses import cross_entropy
from experiments.training.task import (
    ALL,
    Array,
    AttentionView,
    Loss,
    Metrics,
    Model,
    Rows,
    Task,
    encoder_and_decoder,
)

TOKENS = 2  # tokens per word that are decoded at most


class Batch(NamedTuple):
    """Sources ``[B S]`` and targets ``[B T+1]`` from the start to the end token."""

    source: Array
    target: Array


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Model:
    """A fresh model, or an extractive baseline."""
    if config.model == "pretrained":
        return finetuned.copier(config, rngs)
    V = len(data.vocabulary)
    if config.model == "lead":
        return Lead(words=12 if config.corpus == "titles" else None)
    if config.model == "best_sentence":
        return BestSentence([t.source for t in data.splits["train"].texts])
    if config.model in ("gru", "gru_attention"):
        attend = config.model == "gru_attention"
        return Seq2Seq(V, config.width, attend=attend, dropout_rate=config.dropout, rngs=rngs)
    shape = transformer_config(config, V, max_length=BUCKETS[-1])
    if config.model == "copier":
        return Copier(shape, others=OTHERS, rngs=rngs)
    return EncoderDecoder(shape, rngs=rngs)


def batches(config: Config, data: Data, step: int, rows: Rows = ALL) -> Iterator[Batch]:
    """Batches of texts of similar length."""
    split = data.splits["train"]
    lengths = np.array([len(row) for row in split.sources])
    longest = max(map(len, split.targets))  # one length for all targets, to compile less
    order = text.bucketed if config.model == "pretrained" else text.alike
    for index, length in order(lengths, config.batch_size, config.seed, step, data.sizes):
        mine = rows.of(index)
        yield Batch(
            text.padded([split.sources[i] for i in mine], length),
            text.padded([split.targets[i] for i in mine], longest),
        )


def real(batch: Batch) -> Array:
    """Which words of the sources are real, ``[B S]``."""
    return batch.source != PAD


def loss(config: Config, model: Model, batch: Batch) -> Loss:
    """Cross-entropy of each word of the summary given the words before it.

    Words that are neither in the vocabulary nor in the source are ignored.
    """
    inputs, targets = batch.target[:, :-1], batch.target[:, 1:]
    padding = {"source_real": batch.source != PAD, "target_real": inputs != PAD}
    if isinstance(model, Copier):
        each = -model.log_probability(batch.source, inputs, targets, **padding)
    else:
        options = {} if isinstance(model, Seq2Seq) else padding
        logits = model(batch.source, inputs, **options)
        each = cross_entropy(logits, targets, config.label_smoothing)
    counted = (targets != PAD) & (targets != UNKNOWN)
    return Loss(jnp.where(counted, each, 0).sum(), counted.sum(dtype=jnp.float32))


def summarise(config: Config, model: Model, data: Data, split: Split, size: int = 64) -> list[str]:
    """Summaries of texts, by an extractive baseline or decoded greedily."""
    if not isinstance(model, nnx.Module):
        return [model(t.source) for t in split.texts]
    tokenizer = data.vocabulary if isinstance(data.vocabulary, Tokenizer) else None
    rows = decode_rows(
        model,
        split.sources,
        limit=lambda _: longest_summary(config, data),
        size=min(size, len(split.sources)),
        buckets=[*data.sizes, max(map(len, split.sources))],
    )
    if tokenizer:
        return [tokenizer.decode(row) for row in rows]
    return [" ".join(x) for x in written(data.vocabulary, rows, split.words)]


def written(
    vocabulary: text.Words, rows: Sequence[list[int]], sources: Sequence[list[str]]
) -> list[list[str]]:
    """The words of decoded rows: those of the vocabulary, and words copied from the sources."""
    known, summaries = vocabulary.numbers(), []
    for row, source in zip(rows, sources, strict=True):
        words = [*vocabulary.words, *others_of(known, source)]
        summaries.append([words[x] for x in row])
    return summaries


def longest_summary(config: Config, data: Data) -> int:
    """Words, or tokens of a checkpoint, that are written at most."""
    return config.writes * (TOKENS if isinstance(data.vocabulary, Tokenizer) else 1)


def evaluate(config: Config, model: Model, data: Data, split: str) -> Metrics:
    """Mean ROUGE of one split."""
    texts = data.splits[split]
    summaries = summarise(config, model, data, texts)
    return rouge.mean([t.summaries for t in texts.texts], summaries)._asdict()


def as_split(config: Config, data: Data, given: str) -> Split:
    """A user's text as a split; a text longer than the model reads is cut, with a message."""
    words = tokens(text.check(given))
    if len(words) > config.reads:
        print(f"text has {len(words)} words: only the first {config.reads} (reads) are read")
    return encode(config, data.vocabulary, [Text(given, [])], [words], [[]])


def sample(config: Config, model: Model, data: Data, given: str | None) -> str:
    """The summary of a user's text, or of five texts of the test split."""
    if given is not None:
        return summarise(config, model, data, as_split(config, data, given))[0]
    split = data.splits["test"]
    chosen = split.take(random_indices(len(split.texts), 5, config.seed))
    return "\n\n".join(
        f"source     {t.source}\nreference  {t.summaries[0]}\nmodel      {summary}"
        for t, summary in zip(chosen.texts, summarise(config, model, data, chosen), strict=True)
    )


def look(config: Config, model: Model, data: Data, given: str | None) -> list[AttentionView]:
    """Attention weights of a text, its summary, and from the summary to the text."""
    check_attends(config, "gru_attention", "transformer", "copier", "pretrained")
    first = data.splits["test"].texts[0].source
    split = as_split(config, data, first if given is None else given)
    words, source = split.words[0], np.array(split.sources, np.int32)
    rows = decode(model, source, longest_summary(config, data))
    target = np.array([[START, *rows[0]]], np.int32)
    if isinstance(data.vocabulary, Tokenizer):
        summary = data.vocabulary.strings(target[0])
    else:
        summary = ["<s>", *written(data.vocabulary, rows, [words])[0]]
    if isinstance(model, Seq2Seq):
        weights = np.asarray(model.weights(source, target))[:, None]
        return [AttentionView("summary to source", summary, words, weights)]
    _, recorded = record_weights(model, source, target)
    views = encoder_and_decoder("source", words, "summary", summary, recorded)
    if isinstance(model, Copier):
        copied = np.asarray(model.copied_from(source, target))[:, None]
        views.insert(0, AttentionView("copied words", summary, words, copied))
    return views


TASK = Task(
    name="summarise",
    presets=PRESETS,
    spaces=SPACES,
    data=load,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="rouge_l",
    larger=True,
    unit="words",
    untraced=("lead", "best_sentence", "pretrained"),
    changes=CHANGES,
    real=real,
    sample=sample,
    look=look,
)
