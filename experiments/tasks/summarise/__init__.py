"""Titles of news, and papers in one sentence.

::

    python -m experiments train summarise                         # a Transformer that may copy
    python -m experiments train summarise --adversarial 0.1       # against an adversary
    python -m experiments train summarise --model lead
    python -m experiments train summarise --corpus scitldr --reads 192 --writes 48
    python -m experiments sample runs/summarise/copier-cpu-seed0

The ladder: ``lead`` (the first 12 words of an article, the first sentence of an abstract),
``best_sentence`` (the one most like the whole text, Radev 2004), ``gru``
and ``gru_attention`` (Cho 2014, Bahdanau 2015), ``transformer``, ``copier`` (a Transformer that
makes a word or points at one of the source, See 2017). All decode greedily, in lower case.

Data: ``titles``, the description and title of 7,600 news articles, the test part of AG news (X.
Zhang et al. 2015, "Character-level Convolutional Networks for Text Classification"; for research
and non-commercial use), shuffled once and split 80/10/10; ``scitldr``, I. Cachola et al. 2020,
"TLDR: Extreme Summarization of Scientific Documents", abstracts only, 1,992 to train, 619 and 618,
Apache-2.0. The score is ROUGE without stemming, see ``rouge``; against several references the best.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models import EncoderDecoder, EncoderDecoderConfig, generate
from attention_jax.nn import record_weights
from experiments.datasets import text
from experiments.datasets.text import END, PAD, START, UNKNOWN
from experiments.models.seq2seq import Seq2Seq, greedy
from experiments.tasks.summarise import rouge, summaries
from experiments.tasks.summarise.copier import Copier
from experiments.tasks.summarise.summaries import BestSentence, Lead, Text
from experiments.training import text_config
from experiments.training.config import at_least_1, softmax_only
from experiments.training.losses import cross_entropy
from experiments.training.task import AttentionView, Loss, Metrics, Task, encoder_and_decoder
from experiments.training.text_config import TextConfig

WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
BUCKETS = (32, 48, 64, 128, 192, 256)
OTHERS = 48  # words of a source without a number of their own that can be told apart


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """The options of a summariser."""

    model: Literal["lead", "best_sentence", "gru", "gru_attention", "transformer", "copier"] = (
        "copier"
    )
    """The rung of the ladder."""
    corpus: Literal["titles", "scitldr"] = "titles"
    """News articles and their titles, or abstracts and a sentence."""
    dropout: float = 0.3
    """Probability of dropping a number of the embeddings and of what each sublayer gives."""
    hidden: int = 2
    """Width of the feed-forward layers, in widths of the model."""
    least: int = 3
    """Words that training has less often are unknown: they can be copied, but not made."""
    reads: int = 64
    """Words of a source that are read; of longer ones the first, and they are counted."""
    writes: int = 20
    """Words of a summary at most; what training reads is cut, and counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "hidden", "least", "reads", "writes")
        softmax_only(self)  # what is decoded from a cache
        if self.reads > BUCKETS[-1]:
            raise ValueError(f"reads must be at most {BUCKETS[-1]}, got {self.reads}")
        if self.label_smoothing and self.model == "copier":
            raise ValueError(
                f"label_smoothing must be 0 for copier, got {self.label_smoothing}: words that "
                f"can only be copied have no probability where they are not"
            )


PRESETS = {
    "cpu": Config(
        steps=1200,
        batch_size=32,
        learning_rate=2e-3,
        width=128,
        depth=2,
        evaluations=4,
        ema=0.99,
        minutes=10,
    ),
    "smoke": Config(
        steps=4,
        batch_size=8,
        width=16,
        heads=2,
        depth=1,
        evaluations=1,
        writes=8,
        synthetic=True,
    ),
    "accelerator": Config(
        steps=6000,
        batch_size=128,
        learning_rate=1e-3,
        width=256,
        heads=8,
        depth=4,
        dropout=0.4,
        evaluations=10,
        ema=0.999,
        dtype="bfloat16",
    ),
}


class Split(NamedTuple):
    """Texts; words of their sources, and numbers of both sides."""

    texts: list[Text]
    words: list[list[str]]
    sources: list[list[int]]
    targets: list[list[int]]

    def take(self, index: np.ndarray) -> Split:
        """Some of them."""
        words, sources, targets = ([column[i] for i in index] for column in self[1:])
        return Split([self.texts[i] for i in index], words, sources, targets)


class Data(NamedTuple):
    """What the functions below are given."""

    vocabulary: text.Words
    splits: dict[str, Split]


class Batch(NamedTuple):
    """Words ``[B S]`` and ``[B T+1]``: the target has a start, and an end."""

    source: Any
    target: Any


# --- Data.


def tokens(written: str) -> list[str]:
    """Words and marks, in lower case."""
    return WORD.findall(written.lower())


def numbers(known: dict[str, int], words: list[str], others: dict[str, int]) -> list[int]:
    """Words as numbers, those that are not known as ``others`` says.

    >>> numbers({"a": 4, "b": 5}, ["a", "c", "d"], {"c": 6})
    [4, 6, 1]
    """
    return [known.get(word, others.get(word, UNKNOWN)) for word in words]


def others_of(known: dict[str, int], words: list[str]) -> dict[str, int]:
    """Numbers for the first ``OTHERS`` words of a source that are not known."""
    found = dict.fromkeys(word for word in words if word not in known)
    return {word: len(known) + i for i, word in enumerate([*found][:OTHERS])}


def data(config: Config) -> Data:
    """The splits as numbers; what is cut is counted."""
    read = {"titles": summaries.titles, "scitldr": summaries.scitldr}[config.corpus]
    found = summaries.made_up() if config.synthetic else read()
    both = [" ".join(tokens(x)) for t in found["train"] for x in (t.source, *t.summaries)]
    vocabulary = text.Words.of(both, config.least)
    splits = {}
    for name, texts in found.items():
        words = [tokens(t.source) for t in texts]
        wanted = [tokens(t.summaries[0]) for t in texts]
        for what, rows, most in (
            ("sources", words, config.reads),
            ("summaries to learn from", wanted if name == "train" else [], config.writes),
        ):
            if cut := sum(len(row) > most for row in rows):
                print(f"{name}: {cut} of {len(rows)} {what} have more than {most} words: cut")
        splits[name] = numbered(config, vocabulary, texts, words, wanted)
    return Data(vocabulary, splits)


def numbered(
    config: Config,
    vocabulary: text.Words,
    texts: list[Text],
    words: list[list[str]],
    wanted: list[list[str]],
) -> Split:
    """Texts, in words of both sides, as numbers: as much of them as is read and written."""
    known = vocabulary.numbers()
    words = [row[: config.reads] for row in words]
    sources, targets = [], []
    for row, summary in zip(words, wanted, strict=True):
        others = others_of(known, row) if config.model == "copier" else {}
        sources.append(numbers(known, row, others))
        targets.append([START, *numbers(known, summary[: config.writes], others), END])
    return Split(texts, words, sources, targets)


# --- The task.


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Any:
    """The rung."""
    V = len(data.vocabulary)
    if config.model == "lead":
        return Lead(words=12 if config.corpus == "titles" else None)
    if config.model == "best_sentence":
        return BestSentence([t.source for t in data.splits["train"].texts])
    if config.model in ("gru", "gru_attention"):
        attend = config.model == "gru_attention"
        return Seq2Seq(V, config.width, attend=attend, dropout_rate=config.dropout, rngs=rngs)
    stack = text_config.layers(config, hidden=config.hidden * config.width)
    shape = EncoderDecoderConfig(
        V,
        stack,
        stack,
        positions=config.vectors,
        max_length=BUCKETS[-1] if config.vectors == "learned" else None,
        embedding_scale=text_config.EMBEDDING_SCALE,
        dropout_rate=config.dropout,
    )
    if config.model == "copier":
        return Copier(shape, others=OTHERS, rngs=rngs)
    return EncoderDecoder(shape, rngs=rngs)


def batches(config: Config, data: Data, step: int) -> Iterator[Batch]:
    """Texts of about one length together."""
    split = data.splits["train"]
    lengths = np.array([len(row) for row in split.sources])
    longest = max(map(len, split.targets))  # one length for all targets, so one program less
    for index in text.alike(lengths, config.batch_size, config.seed, step):
        length = text.bucket(int(lengths[index].max()), BUCKETS)
        yield Batch(
            text.padded([split.sources[i] for i in index], length),
            text.padded([split.targets[i] for i in index], longest),
        )


def loss(config: Config, model: Any, batch: Batch) -> Loss:
    """Cross-entropy of each word of the summary after those before it.

    A word that is unknown, and not in the source either, is none that a model should make: it
    counts for nothing.
    """
    target, wanted = batch.target[:, :-1], batch.target[:, 1:]
    reals = {"source_real": batch.source != PAD, "target_real": target != PAD}
    if isinstance(model, Copier):
        each = -model.log_probability(batch.source, target, wanted, **reals)
    else:
        options = {} if isinstance(model, Seq2Seq) else reals
        logits = model(batch.source, target, **options)
        each = cross_entropy(logits, wanted, config.label_smoothing)
    real = (wanted != PAD) & (wanted != UNKNOWN)
    return Loss(jnp.where(real, each, 0).sum(), real.sum(dtype=jnp.float32))


def summarise(config: Config, model: Any, data: Data, split: Split, size: int = 64) -> list[str]:
    """Summaries of texts: a rule's, or the likeliest word after the likeliest."""
    if not isinstance(model, nnx.Module):
        return [model(t.source) for t in split.texts]
    made: dict[int, str] = {}
    size = min(size, len(split.sources))
    known = data.vocabulary.numbers()
    for index in text.covering([len(row) for row in split.sources], size):
        length = text.bucket(max(len(split.sources[i]) for i in index), BUCKETS)
        source = text.padded([split.sources[i] or [END] for i in index], length, size)
        source[len(index) :, 0] = END  # rows that fill the batch are not empty
        for i, row in zip(index.tolist(), decoded(config, model, source), strict=False):
            words = [*data.vocabulary.words, *others_of(known, split.words[i])]
            made[i] = " ".join(words[x] for x in row)
    return [made[i] for i in range(len(split.sources))]


def decoded(config: Config, model: Any, source: np.ndarray) -> list[list[int]]:
    """Words, without start and end."""
    if isinstance(model, Seq2Seq):
        found = greedy(model, source, start=START, stop=END, most=config.writes)
    else:
        found = generate(
            model,
            np.full((len(source), 1), START, np.int32),
            source=source,
            source_real=source != PAD,
            max_new_tokens=config.writes,
            stop=END,
            pad_token=PAD,
        ).tokens
    rows = np.asarray(found).tolist()
    return [[x for x in row if x not in (PAD, END)] for row in rows]


def evaluate(config: Config, model: Any, data: Data, split: str) -> Metrics:
    """ROUGE over all summaries."""
    texts = data.splits[split]
    made = summarise(config, model, data, texts)
    return rouge.mean([t.summaries for t in texts.texts], made)._asdict()


def given(config: Config, data: Data, written: str) -> Split:
    """A text as a split of its own; a longer one than the model reads is cut, and that is said."""
    words = tokens(text.check(written))
    if len(words) > config.reads:
        print(f"text has {len(words)} words: the first {config.reads} (reads) are read")
    return numbered(config, data.vocabulary, [Text(written, [])], [words], [[]])


def sample(config: Config, model: Any, data: Data, written: str | None) -> str:
    """A summary; without a text, five of the test split."""
    if written is not None:
        return summarise(config, model, data, given(config, data, written))[0]
    split = data.splits["test"]
    chosen = np.random.default_rng(config.seed).permutation(len(split.texts))[:5]
    some = split.take(chosen)
    return "\n\n".join(
        f"source     {t.source}\nreference  {t.summaries[0]}\nmodel      {made}"
        for t, made in zip(some.texts, summarise(config, model, data, some), strict=True)
    )


def look(config: Config, model: Any, data: Data, written: str | None) -> list[AttentionView]:
    """The attention of a source, of its summary, and of the summary to the source."""
    if config.model not in ("gru_attention", "transformer", "copier"):
        raise ValueError(
            f"model {config.model} has no attention to look at: take gru_attention, transformer "
            f"or copier"
        )
    first = data.splits["test"].texts[0].source
    split = given(config, data, first if written is None else written)
    words, source = split.words[0], np.array(split.sources, np.int32)
    target = np.array([[START, *decoded(config, model, source)[0]]], np.int32)
    said = ["<s>", *summarise(config, model, data, split)[0].split()]
    if isinstance(model, Seq2Seq):
        weights = np.asarray(model.weights(source, target))[:, None]
        return [AttentionView("summary to source", said, words, weights)]
    _, found = record_weights(model, source, target)
    seen = encoder_and_decoder("source", words, "summary", said, found)
    if isinstance(model, Copier):
        pointed = np.asarray(model.copied_from(source, target))[:, None]
        seen.insert(0, AttentionView("what is copied", said, words, pointed))
    return seen


TASK = Task(
    name="summarise",
    presets=PRESETS,
    data=data,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="rouge_l",
    larger=True,
    unit="words",
    sample=sample,
    look=look,
)
