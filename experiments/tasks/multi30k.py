"""Translation of image descriptions, German to English.

::

    python -m experiments train multi30k                          # a transformer
    python -m experiments train multi30k --steps 9600 --minutes 30
    python -m experiments train multi30k --model gru              # no attention
    python -m experiments sample runs/multi30k/transformer-cpu-seed0 --text "Ein Hund rennt."

Models: ``gru`` (one vector between encoder and decoder, Cho 2014), ``gru_attention`` (additive
attention, Bahdanau 2015), ``transformer``. All decode greedily. Subwords are a joint byte-level BPE
of both languages, trained on the training split; case and punctuation are kept. The records of
``gru`` and ``gru_attention`` use ``--width 256 --learning-rate 2e-3 --steps 2400``.

Data: Multi30k, task 1, D. Elliott et al. 2016, "Multi30K: Multilingual English-German Image
Descriptions": 29,000 training and 1,014 validation pairs, and the 1,000 of test_2016_flickr. No
license is stated; its authors provide it for non-commercial research and education. The score is
sacrebleu's BLEU on untokenized text; its signature is in the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models import EncoderDecoder
from experiments.datasets import text
from experiments.datasets.files import lines
from experiments.datasets.text import END, PAD, START
from experiments.models.inference import record_weights
from experiments.models.seq2seq import Seq2Seq, decode_rows, transformer_config
from experiments.tasks.common import check_attends, check_length, random_indices
from experiments.training import search
from experiments.training.config import at_least_1, softmax_only
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
from experiments.training.text_config import TextConfig


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """Options of a translation model."""

    model: Literal["gru", "gru_attention", "transformer"] = "transformer"
    """The model to train."""
    vocabulary: int = 4000
    """Size of the joint subword vocabulary."""
    hidden: int = 2
    """transformer: feed-forward width in units of the model width."""
    longest: int = 40
    """Subwords per training sentence at most; longer pairs are dropped."""
    reads: int = 96
    """Subwords of a source to translate at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "hidden")
        softmax_only(self)  # decoding uses a cache
        if self.vocabulary < 300:
            raise ValueError(f"vocabulary must be at least 300, got {self.vocabulary}")
        if not 2 <= self.longest <= self.reads:
            raise ValueError(f"longest must be in [2, reads = {self.reads}], got {self.longest}")


PRESETS = {
    "cpu": Config(
        steps=3200,
        batch_size=32,
        learning_rate=3e-3,
        label_smoothing=0.1,
        width=128,
        depth=2,
        vocabulary=3000,
        evaluations=2,
        ema=0.99,
        minutes=10,
    ),
    "smoke": Config(
        steps=4,
        batch_size=8,
        width=16,
        heads=2,
        depth=1,
        vocabulary=300,
        evaluations=1,
        synthetic=True,
    ),
    "accelerator": Config(
        steps=8000,
        batch_size=256,
        learning_rate=1e-3,
        schedule="inverse_sqrt",
        label_smoothing=0.1,
        width=512,
        heads=8,
        depth=4,
        dropout=0.3,
        vocabulary=8000,
        evaluations=16,
        ema=0.999,
        dtype="bfloat16",
    ),
}

SPACES = dict.fromkeys(("gru", "gru_attention", "transformer"), search.USUAL)

BUCKETS = (16, 24, 40, 64, 96)


class Pairs(NamedTuple):
    """Sentences of both languages, and their subword indices."""

    sources: list[str]
    targets: list[str]
    source_rows: list[list[int]]
    target_rows: list[list[int]]


class Data(NamedTuple):
    """The subword tokenizer and the splits."""

    subwords: Any
    splits: dict[str, Pairs]


class Batch(NamedTuple):
    """Sources ``[B S]`` and targets ``[B T+1]`` from the start to the end token."""

    source: Array
    target: Array


def read(config: Config) -> dict[str, tuple[list[str], list[str]]]:
    """German and English sentences of each split."""
    if config.synthetic:
        return synthetic()
    names = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
    return {
        split: (
            [line.strip() for line in lines(f"multi30k/raw/{name}.de.gz")],
            [line.strip() for line in lines(f"multi30k/raw/{name}.en.gz")],
        )
        for split, name in names.items()
    }


def synthetic() -> dict[str, tuple[list[str], list[str]]]:
    """Digits in German and English words; needs no files."""
    german = ["null", "eins", "zwei", "drei", "vier"]
    english = ["zero", "one", "two", "three", "four"]
    rng = np.random.default_rng(0)

    def pairs(n: int) -> tuple[list[str], list[str]]:
        rows = [rng.integers(0, 5, rng.integers(2, 7)) for _ in range(n)]
        return (
            [" ".join(german[i] for i in row) for row in rows],
            [" ".join(english[i] for i in row) for row in rows],
        )

    return {"train": pairs(64), "validation": pairs(16), "test": pairs(16)}


def load(config: Config) -> Data:
    """The splits as subwords; pairs longer than ``longest`` are dropped from training."""
    corpus = read(config)
    subwords = text.subwords([*corpus["train"][0], *corpus["train"][1]], config.vocabulary)
    splits = {}
    for name, (sources, targets) in corpus.items():
        if len(sources) != len(targets):
            raise ValueError(
                f"the {name} split has {len(sources)} sources but {len(targets)} targets: its "
                f"files do not match"
            )
        source_rows = [x.ids for x in subwords.encode_batch(sources)]
        target_rows = [[START, *x.ids, END] for x in subwords.encode_batch(targets)]
        keep = np.arange(len(sources))
        if name == "train":
            keep = np.flatnonzero(pair_lengths(source_rows, target_rows) <= config.longest)
            if dropped := len(sources) - len(keep):
                print(
                    f"{dropped} of {len(sources)} training pairs have more than {config.longest} "
                    f"subwords: dropped"
                )
        splits[name] = Pairs(
            [sources[i] for i in keep],
            [targets[i] for i in keep],
            [source_rows[i] for i in keep],
            [target_rows[i] for i in keep],
        )
    return Data(subwords, splits)


def pair_lengths(sources: list[list[int]], targets: list[list[int]]) -> np.ndarray:
    """The longer side of each pair; a target counts without its start token."""
    pairs = zip(sources, targets, strict=True)
    return np.array([max(len(source), len(target) - 1) for source, target in pairs])


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Model:
    """A fresh model."""
    V = data.subwords.get_vocab_size()
    if config.model == "transformer":
        return EncoderDecoder(transformer_config(config, V, max_length=2 * config.reads), rngs=rngs)
    attend = config.model == "gru_attention"
    return Seq2Seq(V, config.width, attend=attend, dropout_rate=config.dropout, rngs=rngs)


def batches(config: Config, data: Data, step: int, rows: Rows = ALL) -> Iterator[Batch]:
    """Batches of pairs of similar length."""
    pairs = data.splits["train"]
    lengths = pair_lengths(pairs.source_rows, pairs.target_rows)
    for index, length in text.alike(lengths, config.batch_size, config.seed, step, BUCKETS):
        mine = rows.of(index)
        yield Batch(
            text.padded([pairs.source_rows[i] for i in mine], length),
            text.padded([pairs.target_rows[i] for i in mine], length + 1),
        )


def logits_of(model: Model, source: Array, target: Array) -> jax.Array:
    """Logits ``[B T V]`` of the subword after each of ``target [B T]``."""
    if isinstance(model, Seq2Seq):
        return model(source, target)
    return model(source, target, source_real=source != PAD, target_real=target != PAD)


def loss(config: Config, model: Model, batch: Batch) -> Loss:
    """Cross-entropy of each subword of the target given the subwords before it."""
    targets = batch.target[:, 1:]
    logits = logits_of(model, batch.source, batch.target[:, :-1])
    each = cross_entropy(logits, targets, config.label_smoothing)
    real = targets != PAD
    return Loss(jnp.where(real, each, 0).sum(), real.sum(dtype=jnp.float32))


def translate(model: Model, data: Data, rows: list[list[int]], size: int = 128) -> list[list[int]]:
    """Subwords of the translations, decoded greedily, without start and end tokens."""
    return decode_rows(
        model, rows, limit=lambda length: min(2 * length, 96), size=size, buckets=BUCKETS
    )


def evaluate(config: Config, model: Model, data: Data, split: str) -> Metrics:
    """BLEU of the greedy translations of one split, by sacrebleu."""
    import sacrebleu

    pairs = data.splits[split]
    translations = data.subwords.decode_batch(translate(model, data, pairs.source_rows))
    stripped = [x.strip() for x in translations]
    return {"bleu": sacrebleu.corpus_bleu(stripped, [pairs.targets]).score}


def signature() -> str:
    """sacrebleu's description of how it computes BLEU."""
    import sacrebleu

    metric = sacrebleu.BLEU()
    metric.corpus_score(["a b c d"], [["a b c d"]])
    return str(metric.get_signature())


def encode(config: Config, data: Data, sentence: str) -> list[int]:
    """Subword indices of a user's text.

    Raises:
      ValueError: it is empty, or longer than the model reads.
    """
    row: list[int] = data.subwords.encode(text.check(sentence)).ids
    check_length(len(row), config.reads, "subwords", "reads")
    return row


def sample(config: Config, model: Model, data: Data, sentence: str | None) -> str:
    """The translation of a user's text, or of five sources of the test split."""
    if sentence is not None:
        (row,) = translate(model, data, [encode(config, data, sentence)], size=1)
        return str(data.subwords.decode(row).strip())
    pairs = data.splits["test"]
    chosen = random_indices(len(pairs.sources), 5, config.seed)
    translations = data.subwords.decode_batch(
        translate(model, data, [pairs.source_rows[i] for i in chosen], size=len(chosen))
    )
    return "\n\n".join(
        f"source     {pairs.sources[i]}\nreference  {pairs.targets[i]}\nmodel      {x.strip()}"
        for i, x in zip(chosen, translations, strict=True)
    )


def look(config: Config, model: Model, data: Data, sentence: str | None) -> list[AttentionView]:
    """Attention weights of a source, its translation, and from the translation to the source."""
    check_attends(config, "gru_attention", "transformer")
    source = data.splits["test"].sources[0] if sentence is None else sentence
    row = encode(config, data, source)
    target = [START, *translate(model, data, [row], size=1)[0]]
    sources, targets = ([_token_text(data, x) for x in side] for side in (row, target))
    arrays = np.array([row], np.int32), np.array([target], np.int32)
    if isinstance(model, Seq2Seq):
        weights = np.asarray(model.weights(*arrays))[:, None]
        return [AttentionView("translation to source", targets, sources, weights)]
    _, recorded = record_weights(model, *arrays)
    return encoder_and_decoder("source", sources, "translation", targets, recorded)


def _token_text(data: Data, token: int) -> str:
    if token < len(text.SPECIAL):
        return text.SPECIAL[token]
    return str(data.subwords.decode([token]))


TASK = Task(
    name="multi30k",
    presets=PRESETS,
    spaces=SPACES,
    data=load,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="bleu",
    larger=True,
    unit="tokens",
    signature=signature,
    sample=sample,
    look=look,
)
