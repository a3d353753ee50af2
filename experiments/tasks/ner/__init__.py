"""Names in text: of diseases in abstracts, of people, places and things in messages.

::

    python -m experiments train ner                               # a Transformer, diseases
    python -m experiments train ner --corpus wnut17
    python -m experiments train ner --model gru
    python -m experiments sample runs/ner/transformer-cpu-seed0 --text "He had Wilson 's disease ."

The ladder: ``most_frequent`` (the tag that a word mostly has, O for words never seen), ``gru`` in
both directions, ``transformer``. The trained ones see each word and its characters, by
convolutions.

Data: the NCBI disease corpus, R. Dogan et al. 2014, 5,424 sentences to train, 923 to validate and
940 to test, as distributed by G. Crichton et al. 2017, CC BY 4.0; and WNUT 2017, L. Derczynski et
al., "Results of the WNUT2017 Shared Task on Novel and Emerging Entity Recognition", 3,394, 1,009
and 1,287, CC BY 4.0: names of six kinds, few of them in both training and test. The score is F1 of
whole spans with their kind; see ``spans`` for tags that break the scheme.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models.layers import Stack
from attention_jax.nn import record_weights
from attention_jax.nn.embeddings import Embeddings
from attention_jax.nn.linear import Linear
from experiments.datasets import text
from experiments.datasets.files import lines
from experiments.datasets.text import PAD
from experiments.models.recurrent import GRU
from experiments.models.sentences import WordDropout
from experiments.tasks.ner.spans import Agreement, agreement, spans
from experiments.training import text_config
from experiments.training.config import at_least_1, below_1
from experiments.training.losses import cross_entropy, logits
from experiments.training.task import AttentionView, Loss, Metrics, Task, self_attention
from experiments.training.text_config import TextConfig

FILES = {
    "ncbi": {
        "train": "ner_ncbi_disease/train.tsv",
        "validation": "ner_ncbi_disease/devel.tsv",
        "test": "ner_ncbi_disease/test.tsv",
    },
    "wnut17": {
        "train": "wnut17/wnut17train.conll",
        "validation": "wnut17/emerging.dev.conll",
        "test": "wnut17/emerging.test.annotated",
    },
}
LETTERS = 16  # bytes of a word that are read: its first and last eight where it is longer
BUCKETS = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """The options of a tagger."""

    model: Literal["most_frequent", "gru", "transformer"] = "transformer"
    """The rung of the ladder."""
    corpus: Literal["ncbi", "wnut17"] = "ncbi"
    """Diseases in abstracts, or names in messages."""
    dropout: float = 0.3
    """Probability of dropping a number of the embeddings and of what each sublayer gives."""
    word_dropout: float = 0.2
    """Probability that a word is made unknown in training; its characters stay."""
    letter_width: int = 32
    """Numbers per character."""
    least: int = 2
    """Words that training has less often are unknown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "letter_width", "least")
        below_1(self, "word_dropout")
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")


PRESETS = {
    "cpu": Config(
        steps=1500,
        batch_size=32,
        learning_rate=2e-3,
        depth=2,
        positions="rotary",
        evaluations=5,
        ema=0.995,
        minutes=10,
    ),
    "smoke": Config(
        steps=4,
        batch_size=8,
        evaluations=1,
        width=16,
        heads=2,
        depth=1,
        letter_width=8,
        synthetic=True,
    ),
    "accelerator": Config(
        steps=4000,
        batch_size=64,
        learning_rate=1e-3,
        width=256,
        heads=8,
        depth=4,
        dropout=0.4,
        positions="rotary",
        evaluations=10,
        ema=0.999,
    ),
}


class Sentence(NamedTuple):
    """Words, and a tag for each."""

    words: list[str]
    tags: list[str]


class Split(NamedTuple):
    """Sentences, and the same as numbers."""

    sentences: list[Sentence]
    words: list[list[int]]
    tags: list[list[int]]


class Data(NamedTuple):
    """What the functions below are given."""

    vocabulary: text.Words
    tags: tuple[str, ...]
    splits: dict[str, Split]


class Batch(NamedTuple):
    """Words ``[B T]``, their bytes ``[B T LETTERS]`` and tags ``[B T]``."""

    words: Any
    letters: Any
    tags: Any


# --- Data.


def parsed(rows: list[str]) -> list[Sentence]:
    """Of lines ``word TAB tag``, sentences between empty ones.

    Raises:
      ValueError: a line that is neither.
    """
    found: list[Sentence] = []
    current = Sentence([], [])
    for number, row in enumerate([*rows, ""], 1):
        if not row.strip():
            if current.words:
                found.append(current)
            current = Sentence([], [])
            continue
        word, _, tag = row.rstrip("\r").partition("\t")
        if tag != "O" and tag[:2] not in ("B-", "I-"):
            raise ValueError(f"line {number} must be a word, a tab and a BIO tag, got {row!r}")
        current.words.append(word)
        current.tags.append(tag)
    return found


def made_up() -> dict[str, list[Sentence]]:
    """Names that begin with a capital X: for ``smoke``, without any file."""
    rng = np.random.default_rng(0)

    def some(n: int) -> list[Sentence]:
        found = []
        for _ in range(n):
            words = [f"w{i}" for i in rng.integers(0, 20, 8)]
            at = int(rng.integers(0, 7))
            words[at : at + 2] = [f"X{rng.integers(50)}", f"y{rng.integers(50)}"]
            tags = ["O"] * 8
            tags[at : at + 2] = ["B-name", "I-name"]
            found.append(Sentence(words, tags))
        return found

    return {"train": some(64), "validation": some(16), "test": some(16)}


def shapes(words: list[str]) -> str:
    """How words are looked up: in lower case, digits as 0, spaces within one left out.

    >>> shapes(["In", "1992", "a\u00a0b"])
    'in 0000 ab'
    """
    plain = ("".join(word.lower().split()) for word in words)
    return " ".join("".join("0" if c.isdigit() else c for c in word) for word in plain)


def data(config: Config) -> Data:
    """The splits, with words and tags of the training split."""
    if config.synthetic:
        found = made_up()
    else:
        found = {name: parsed(lines(file)) for name, file in FILES[config.corpus].items()}
    vocabulary = text.Words.of((shapes(s.words) for s in found["train"]), config.least)
    tags = tuple(sorted({tag for s in found["train"] for tag in s.tags}))
    splits = {}
    for name, sentences in found.items():
        rows = vocabulary.encode_all(shapes(s.words) for s in sentences)
        splits[name] = Split(
            sentences, rows, [[tags.index(tag) for tag in s.tags] for s in sentences]
        )
    return Data(vocabulary, tags, splits)


def letters(words: list[list[str]], length: int, count: int | None = None) -> np.ndarray:
    """Bytes of words, each one more than it is, and 0 after its end: ``[B length LETTERS]``."""
    array = np.zeros((count or len(words), length, LETTERS), np.int32)
    for i, row in enumerate(words):
        for j, word in enumerate(row):
            raw = word.encode()
            if len(raw) > LETTERS:
                raw = raw[: LETTERS // 2] + raw[-LETTERS // 2 :]
            array[i, j, : len(raw)] = np.frombuffer(raw, np.uint8).astype(np.int32) + 1
    return array


# --- Models.


class MostFrequent:
    """The tag that a word mostly has in training."""

    def __init__(self, split: Split) -> None:
        counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for sentence in split.sentences:
            for word, tag in zip(*sentence, strict=True):
                counts[word][tag] += 1
        self.tags = {word: of.most_common(1)[0][0] for word, of in counts.items()}

    def tag(self, words: list[str]) -> list[str]:
        """A tag for each word."""
        return [self.tags.get(word, "O") for word in words]


class Letters(nnx.Module):
    """``max_i relu(conv_3(e(byte_i)))`` of each word: ``[B T LETTERS]`` to ``[B T E]``."""

    def __init__(self, width: int, features: int, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(0.25)
        self.embed = nnx.Embed(257, width, embedding_init=init, rngs=rngs)
        self.convolution = nnx.Conv(width, features, kernel_size=(3,), rngs=rngs)

    def __call__(self, letters: Any) -> jax.Array:
        """Vectors of words from their bytes."""
        x = jnp.where(letters[..., None] > 0, self.embed(letters), 0)
        return jax.nn.relu(self.convolution(x)).max(axis=-2)


class Tagger(nnx.Module):
    """Words and their letters, a network over the sentence, a tag for each word."""

    def __init__(self, config: Config, vocabulary: int, tags: int, rngs: nnx.Rngs) -> None:
        E = config.width
        self.noise = WordDropout(config.word_dropout, rngs=rngs)
        self.embed = Embeddings(
            vocabulary,
            E,
            positions=config.vectors,
            max_length=BUCKETS[-1],
            scale=text_config.EMBEDDING_SCALE,
            rngs=rngs,
        )
        self.letters = Letters(config.letter_width, E, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.gru: Any = nnx.data(None)
        self.stack: Any = nnx.data(None)
        if config.model == "gru":
            self.gru = GRU(
                E, E, config.depth, bidirectional=True, dropout_rate=config.dropout, rngs=rngs
            )
        else:
            self.stack = Stack(text_config.layers(config), causal=False, rngs=rngs)
        self.classify = Linear(E, tags, rngs=rngs)

    def __call__(self, inputs: Any) -> jax.Array:
        """Logits ``[B T tags]`` of words and letters."""
        words, letters = inputs
        real = jnp.asarray(words) != PAD
        x = self.dropout(self.embed(self.noise(words)) + self.letters(letters))
        if self.gru is None:
            x = self.stack(x, real=real)
        else:
            x = self.gru(x, jnp.sum(real, axis=-1, dtype=jnp.int32))
        return self.classify(self.dropout(x))


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Any:
    """The rung."""
    if config.model == "most_frequent":
        return MostFrequent(data.splits["train"])
    return Tagger(config, len(data.vocabulary), len(data.tags), rngs)


# --- The task.


def batches(config: Config, data: Data, step: int) -> Iterator[Batch]:
    """Sentences of about one length together."""
    split = data.splits["train"]
    lengths = np.array([len(row) for row in split.words])
    for index in text.alike(lengths, config.batch_size, config.seed, step):
        length = text.bucket(int(lengths[index].max()), BUCKETS)
        yield Batch(
            text.padded([split.words[i] for i in index], length),
            letters([split.sentences[i].words for i in index], length),
            text.padded([split.tags[i] for i in index], length),
        )


def loss(config: Config, model: Any, batch: Batch) -> Loss:
    """Cross-entropy of the tag of each word."""
    each = cross_entropy(model((batch.words, batch.letters)), batch.tags, config.label_smoothing)
    real = batch.words != PAD
    return Loss(jnp.where(real, each, 0).sum(), real.sum(dtype=jnp.float32))


def tag(model: Any, data: Data, sentences: list[list[str]], size: int = 64) -> list[list[str]]:
    """Tags of sentences. One longer than a model reads is cut into parts, each read by itself."""
    if isinstance(model, MostFrequent):
        return [model.tag(words) for words in sentences]
    most = BUCKETS[-1]
    parts = [
        (i, words[j : j + most])
        for i, words in enumerate(sentences)
        for j in range(0, len(words), most)
    ]
    made: dict[int, list[str]] = {}
    for index in text.covering([len(words) for _, words in parts], size):
        some = [parts[i][1] for i in index]
        length = text.bucket(max(map(len, some)), BUCKETS)
        rows = data.vocabulary.encode_all(shapes(words) for words in some)
        inputs = text.padded(rows, length, size), letters(some, length, size)
        guesses = np.asarray(logits(model, inputs)).argmax(axis=-1)
        for i, words, row in zip(index.tolist(), some, guesses, strict=False):
            made[i] = [data.tags[k] for k in row[: len(words)]]
    found: list[list[str]] = [[] for _ in sentences]
    for i, (sentence, _) in enumerate(parts):
        found[sentence] += made[i]
    return found


def agree(model: Any, data: Data, split: str) -> Agreement:
    """How well a model's spans agree with those of a split."""
    sentences = data.splits[split].sentences
    return agreement([s.tags for s in sentences], tag(model, data, [s.words for s in sentences]))


def evaluate(config: Config, model: Any, data: Data, split: str) -> Metrics:
    """F1, precision and recall of spans over every sentence once; guessed tags repaired."""
    found = agree(model, data, split)
    return {
        "f1": found.f1,
        "precision": found.precision,
        "recall": found.recall,
        "repaired": float(found.repaired),
    }


def words_of(given: str) -> list[str]:
    """A text's words, between spaces."""
    return text.check(given).split()


def sample(config: Config, model: Any, data: Data, given: str | None) -> str:
    """A sentence with its names in brackets; without one, five of the test split that have some."""
    if given is not None:
        sentences = [Sentence(words_of(given), [])]
    else:
        named = [s for s in data.splits["test"].sentences if spans(s.tags)[0]]
        chosen = np.random.default_rng(config.seed).permutation(len(named))[:5]
        sentences = [named[i] for i in chosen]
    said = []
    for sentence, tags in zip(
        sentences, tag(model, data, [s.words for s in sentences]), strict=True
    ):
        said.append(f"model  {bracketed(sentence.words, tags)}")
        if sentence.tags:
            said.append(f"right  {bracketed(sentence.words, sentence.tags)}\n")
    return "\n".join(said)


def bracketed(words: list[str], tags: list[str]) -> str:
    """Words with spans in brackets.

    >>> bracketed(["a", "b", "c"], ["O", "B-x", "I-x"])
    'a [x b c]'
    """
    found = [*words]
    for span in spans(tags)[0]:
        found[span.start] = f"[{span.kind} {found[span.start]}"
        found[span.stop - 1] += "]"
    return " ".join(found)


def look(config: Config, model: Any, data: Data, given: str | None) -> list[AttentionView]:
    """The encoder's attention in one sentence."""
    if config.model != "transformer":
        raise ValueError(f"model {config.model} has no attention to look at: take transformer")
    words = data.splits["test"].sentences[0].words if given is None else words_of(given)
    words = words[: BUCKETS[-1]]
    rows = data.vocabulary.encode_all([shapes(words)])
    inputs = np.array(rows, np.int32), letters([words], len(words))
    _, weights = record_weights(model, inputs)
    return self_attention("encoder", words, weights)


TASK = Task(
    name="ner",
    presets=PRESETS,
    data=data,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="f1",
    larger=True,
    unit="words",
    sample=sample,
    look=look,
)
