"""Translation of descriptions of pictures, German to English.

::

    python -m experiments train multi30k                          # a Transformer
    python -m experiments train multi30k --steps 9600 --minutes 30
    python -m experiments train multi30k --model gru              # no attention
    python -m experiments sample runs/multi30k/transformer-cpu-seed0 --text "Ein Hund rennt."

The ladder: ``gru`` (one vector between encoder and decoder, Cho 2014), ``gru_attention`` (additive
attention, Bahdanau 2015), ``transformer``. All decode greedily. Subwords are byte-level BPE of both
languages together, trained on the training split; case and punctuation are kept. The records of
``gru`` and ``gru_attention`` are with ``--width 256 --learning-rate 2e-3 --steps 2400``.

Data: Multi30k, task 1, D. Elliott et al. 2016, "Multi30K: Multilingual English-German Image
Descriptions": 29,000 pairs to train, 1,014 to validate, test_2016_flickr to test, 1,000. No licence
is stated; its authors provide it for non-commercial research and education. The score is
sacrebleu's on the text as it is; its signature is in the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models import EncoderDecoder, EncoderDecoderConfig, generate
from attention_jax.nn import record_weights
from experiments.datasets import text
from experiments.datasets.files import lines
from experiments.datasets.text import END, PAD, START
from experiments.models.seq2seq import Seq2Seq, greedy
from experiments.training import text_config
from experiments.training.config import at_least_1, softmax_only
from experiments.training.losses import cross_entropy
from experiments.training.task import AttentionView, Loss, Metrics, Task, encoder_and_decoder
from experiments.training.text_config import TextConfig


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """The options of a translator."""

    model: Literal["gru", "gru_attention", "transformer"] = "transformer"
    """The rung of the ladder."""
    vocabulary: int = 4000
    """Subwords of both languages together."""
    hidden: int = 2
    """Width of the feed-forward layers of transformer, in widths of the model."""
    longest: int = 40
    """Subwords of a text that training reads; longer pairs are left out of it, and counted."""
    reads: int = 96
    """Subwords that a source to translate may have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "hidden")
        softmax_only(self)  # what is decoded from a cache
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

BUCKETS = (16, 24, 40, 64, 96)


class Pairs(NamedTuple):
    """Sentences, and the same as subwords."""

    sources: list[str]
    targets: list[str]
    source_rows: list[list[int]]
    target_rows: list[list[int]]


class Data(NamedTuple):
    """The splits and what makes subwords."""

    subwords: Any
    splits: dict[str, Pairs]


class Batch(NamedTuple):
    """Subwords ``[B S]`` and ``[B T+1]``: the target has a start, and an end."""

    source: Any
    target: Any


def read(config: Config) -> dict[str, tuple[list[str], list[str]]]:
    """German and English of the splits, as text."""
    if config.synthetic:
        return made_up()
    names = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
    return {
        split: (
            [line.strip() for line in lines(f"multi30k/raw/{name}.de.gz")],
            [line.strip() for line in lines(f"multi30k/raw/{name}.en.gz")],
        )
        for split, name in names.items()
    }


def made_up() -> dict[str, tuple[list[str], list[str]]]:
    """Numbers in German and English: for ``smoke``, without any file."""
    german, english = (
        ["null", "eins", "zwei", "drei", "vier"],
        ["zero", "one", "two", "three", "four"],
    )
    rng = np.random.default_rng(0)

    def some(n: int) -> tuple[list[str], list[str]]:
        rows = [rng.integers(0, 5, rng.integers(2, 7)) for _ in range(n)]
        return (
            [" ".join(german[i] for i in row) for row in rows],
            [" ".join(english[i] for i in row) for row in rows],
        )

    return {"train": some(64), "validation": some(16), "test": some(16)}


def data(config: Config) -> Data:
    """The splits as subwords; pairs that are too long are left out of training."""
    found = read(config)
    subwords = text.subwords([*found["train"][0], *found["train"][1]], config.vocabulary)
    splits = {}
    for name, (sources, targets) in found.items():
        if len(sources) != len(targets):
            raise ValueError(
                f"the {name} split has {len(sources)} sources and {len(targets)} targets: its "
                f"files do not belong together"
            )
        rows = [[x.ids for x in subwords.encode_batch(side)] for side in (sources, targets)]
        source_rows, target_rows = rows[0], [[START, *row, END] for row in rows[1]]
        keep = list(range(len(sources)))
        if name == "train":
            both = zip(source_rows, target_rows, strict=True)
            short = [max(len(x), len(y) - 1) <= config.longest for x, y in both]
            keep = [i for i in keep if short[i]]
            if left := len(sources) - len(keep):
                print(f"{left} of {len(sources)} pairs have more than {config.longest} subwords")
        splits[name] = Pairs(
            [sources[i] for i in keep],
            [targets[i] for i in keep],
            [source_rows[i] for i in keep],
            [target_rows[i] for i in keep],
        )
    return Data(subwords, splits)


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Any:
    """The rung."""
    vocabulary = data.subwords.get_vocab_size()
    if config.model != "transformer":
        attend = config.model == "gru_attention"
        return Seq2Seq(
            vocabulary, config.width, attend=attend, dropout_rate=config.dropout, rngs=rngs
        )
    stack = text_config.layers(config, hidden=config.hidden * config.width)
    return EncoderDecoder(
        EncoderDecoderConfig(
            vocabulary,
            stack,
            stack,
            positions=config.vectors,
            max_length=2 * config.reads if config.vectors == "learned" else None,
            embedding_scale=text_config.EMBEDDING_SCALE,
            dropout_rate=config.dropout,
        ),
        rngs=rngs,
    )


def batches(config: Config, data: Data, step: int) -> Iterator[Batch]:
    """Pairs of about one length together."""
    pairs = data.splits["train"]
    both = zip(pairs.source_rows, pairs.target_rows, strict=True)
    lengths = np.array([max(len(source), len(target) - 1) for source, target in both])
    for index in text.alike(lengths, config.batch_size, config.seed, step):
        length = text.bucket(int(lengths[index].max()), BUCKETS)
        yield Batch(
            text.padded([pairs.source_rows[i] for i in index], length),
            text.padded([pairs.target_rows[i] for i in index], length + 1),
        )


def logits_of(model: Any, source: Any, target: Any) -> jax.Array:
    """``[B T V]``."""
    if isinstance(model, Seq2Seq):
        return model(source, target)
    return model(source, target, source_real=source != PAD, target_real=target != PAD)


def loss(config: Config, model: Any, batch: Batch) -> Loss:
    """Cross-entropy of each subword of the target after those before it."""
    wanted = batch.target[:, 1:]
    logits = logits_of(model, batch.source, batch.target[:, :-1])
    each = cross_entropy(logits, wanted, config.label_smoothing)
    real = wanted != PAD
    return Loss(jnp.where(real, each, 0).sum(), real.sum(dtype=jnp.float32))


def translate(model: Any, data: Data, rows: list[list[int]], size: int = 128) -> list[list[int]]:
    """Subwords of the translations, greedily, without start and end."""
    made: dict[int, list[int]] = {}
    for index in text.covering([len(row) for row in rows], size):
        length = text.bucket(max(len(rows[i]) for i in index), BUCKETS)
        source = text.padded([rows[i] or [END] for i in index], length, size)
        source[len(index) :, 0] = END  # rows that fill the batch are not empty
        most = min(2 * length, 96)
        if isinstance(model, Seq2Seq):
            found = greedy(model, source, start=START, stop=END, most=most)
        else:
            found = generate(
                model,
                np.full((size, 1), START, np.int32),
                source=source,
                source_real=source != PAD,
                max_new_tokens=most,
                stop=END,
                pad_token=PAD,
            ).tokens
        for i, row in zip(index.tolist(), np.asarray(found).tolist(), strict=False):
            made[i] = row[: row.index(END)] if END in row else [x for x in row if x != PAD]
    return [made[i] for i in range(len(rows))]


def evaluate(config: Config, model: Any, data: Data, split: str) -> Metrics:
    """sacrebleu of the greedy translations of every sentence."""
    import sacrebleu

    pairs = data.splits[split]
    made = data.subwords.decode_batch(translate(model, data, pairs.source_rows))
    return {"bleu": sacrebleu.corpus_bleu([x.strip() for x in made], [pairs.targets]).score}


def signature() -> str:
    """How sacrebleu counts."""
    import sacrebleu

    metric = sacrebleu.BLEU()
    metric.corpus_score(["a b c d"], [["a b c d"]])
    return str(metric.get_signature())


def encode(config: Config, data: Data, sentence: str) -> list[int]:
    """A source as subwords.

    Raises:
      ValueError: it is empty, or longer than the model reads.
    """
    row: list[int] = data.subwords.encode(text.check(sentence)).ids
    if len(row) > config.reads:
        raise ValueError(
            f"text has {len(row)} subwords, the model reads {config.reads} (reads): give less"
        )
    return row


def sample(config: Config, model: Any, data: Data, sentence: str | None) -> str:
    """A translation; without a text, five of the test split."""
    if sentence is not None:
        made = translate(model, data, [encode(config, data, sentence)], size=1)
        return str(data.subwords.decode(made[0]).strip())
    pairs = data.splits["test"]
    chosen = np.random.default_rng(config.seed).permutation(len(pairs.sources))[:5]
    made = data.subwords.decode_batch(
        translate(model, data, [pairs.source_rows[i] for i in chosen], size=len(chosen))
    )
    return "\n\n".join(
        f"source     {pairs.sources[i]}\nreference  {pairs.targets[i]}\nmodel      {x.strip()}"
        for i, x in zip(chosen, made, strict=True)
    )


def look(config: Config, model: Any, data: Data, sentence: str | None) -> list[AttentionView]:
    """The attention of a source, of its translation, and of the translation to the source."""
    if config.model == "gru":
        raise ValueError("model gru has no attention to look at: take gru_attention or transformer")
    source = data.splits["test"].sources[0] if sentence is None else sentence
    row = encode(config, data, source)
    target = [START, *translate(model, data, [row], size=1)[0]]
    names = [[_shown(data, x) for x in side] for side in (row, target)]
    sources, targets = names
    arrays = np.array([row], np.int32), np.array([target], np.int32)
    if isinstance(model, Seq2Seq):
        weights = np.asarray(model.weights(*arrays))[:, None]
        return [AttentionView("translation to source", targets, sources, weights)]
    _, found = record_weights(model, *arrays)
    return encoder_and_decoder("source", sources, "translation", targets, found)


def _shown(data: Data, token: int) -> str:
    if token < len(text.SPECIAL):
        return text.SPECIAL[token]
    return str(data.subwords.decode([token]))


TASK = Task(
    name="multi30k",
    presets=PRESETS,
    data=data,
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
