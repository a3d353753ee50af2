"""Questions about a passage, each answered by a span of it.

::

    python -m experiments train qa                                # a Transformer
    python -m experiments train qa --model gru                    # recurrence and attention
    python -m experiments train qa --model overlap                # a rule
    python -m experiments sample runs/qa/transformer-cpu-seed0 \\
        --text "Who wrote it? ||| The poem is old. Nobody knows who wrote it, perhaps Ann Lee."

The ladder: ``overlap`` (in the sentence that shares most words with the question, the new words
nearest to those), ``gru`` (recurrent, with attention to the question), ``transformer`` (question
and passage as one sequence). The trained ones are also told how each word matches the question;
see ``readers``. All learn from these questions alone.

Data: SQuADShifts, J. Miller et al. 2020, "The Effect of Natural Distribution Shift on Question
Answering Models", its new Wikipedia part: 7,938 questions about 1,581 paragraphs of 48 articles,
with some three reference answers each, CC BY 4.0. Five articles are held out to validate and five
to test, the same for every seed. A second test set, ``xquad_``, is the English part of XQuAD, M.
Artetxe et al. 2020, "On the Cross-lingual Transferability of Monolingual Representations": 1,190
questions of 48 other articles with one reference answer each, CC BY-SA 4.0. The score is F1 by the
rules of SQuAD 1.1; see ``answers``.

A passage longer than ``reads`` words is read in windows that overlap, and its answer is the best
span of any. Training reads the windows that hold a whole reference answer; the others are left out.
A reference answer that begins or ends within a word stands for the words that it touches; how many
do is said, and is in the scores. Every question counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.nn import record_weights
from experiments.datasets import text
from experiments.datasets.files import path
from experiments.datasets.text import END, START
from experiments.tasks.qa import answers
from experiments.tasks.qa.answers import LONGEST_QUESTION, Passage, Question, Split, parsed
from experiments.tasks.qa.readers import (
    NEVER,
    Inputs,
    Lexicon,
    Overlap,
    Reader,
    Window,
    inputs_of,
    length_of,
    windows,
)
from experiments.training.config import at_least_1, below_1
from experiments.training.losses import logits
from experiments.training.task import AttentionView, Loss, Metrics, Task, self_attention
from experiments.training.text_config import TextConfig

WIKIPEDIA, XQUAD = "squadshifts/new_wiki_v1.0.json", "xquad_en/xquad.en.json"
BUCKETS = (128, 176, 304, 576)
SEPARATOR = "|||"


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """The options of a reader."""

    model: Literal["overlap", "gru", "transformer"] = "transformer"
    """The rung of the ladder."""
    dropout: float = 0.3
    """Probability of dropping a number of the embeddings and of what each sublayer gives."""
    word_dropout: float = 0.2
    """Probability that a word is made unknown in training; its ending and its matches stay."""
    least: int = 3
    """Words that training has less often are unknown."""
    reads: int = 256
    """Words of a passage that are read at once."""
    stride: int = 128
    """Words from the beginning of one window to that of the next."""
    longest: int = 20
    """Words of an answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "least", "reads", "stride", "longest")
        below_1(self, "word_dropout")
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")
        if self.most > BUCKETS[-1]:
            raise ValueError(
                f"reads must be at most {BUCKETS[-1] - LONGEST_QUESTION - 2}, got {self.reads}"
            )
        if self.stride > self.reads - self.longest + 1:
            raise ValueError(
                f"stride must be at most reads - longest + 1, {self.reads - self.longest + 1}, so "
                f"that each answer is whole in a window, got {self.stride}"
            )

    @property
    def most(self) -> int:
        """Words of question and window together."""
        return LONGEST_QUESTION + 2 + self.reads


PRESETS = {
    "cpu": Config(
        steps=700,
        batch_size=16,
        learning_rate=1.5e-3,
        width=128,
        depth=2,
        positions="rotary",
        evaluations=4,
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
        least=1,
        reads=16,
        stride=8,
        longest=4,
        synthetic=True,
    ),
    "accelerator": Config(
        steps=6000,
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


class Data(NamedTuple):
    """What the functions below are given."""

    lexicon: Lexicon
    splits: dict[str, Split]


class Batch(NamedTuple):
    """What is read, and which spans are reference answers, bool ``[B T longest]``."""

    inputs: Inputs
    right: Any


class Answer(NamedTuple):
    """Words ``first`` to ``last`` of the passage, their score, and the window they are of."""

    first: int
    last: int
    score: float
    window: Window


# --- Data.


def made_up(n: int, seed: int) -> list[Any]:
    """Articles of one paragraph: for ``smoke``, without any file."""
    rng = np.random.default_rng(seed)
    articles = []
    for i in range(n):
        things = rng.permutation(8)[:3]
        facts = [(f"{j}th", f"N{rng.integers(99)}") for j in things]
        context = " ".join(f"The {thing} is called {name}." for thing, name in facts)
        thing, name = facts[rng.integers(3)]
        answer = {"text": name, "answer_start": context.index(f"{name}.")}
        asked = {"id": f"{i}", "question": f"What is the {thing} called?", "answers": [answer]}
        articles.append({"paragraphs": [{"context": context, "qas": [asked]}]})
    return articles


def read(config: Config) -> dict[str, list[Any]]:
    """Articles of the splits and of the second test set, the same for every seed."""
    if config.synthetic:
        names = ("train", "validation", "test", "xquad")
        return {name: made_up(64 if name == "train" else 16, i) for i, name in enumerate(names)}
    articles = json.loads(path(WIKIPEDIA).read_text(encoding="utf-8"))["data"]
    order = np.random.default_rng(0).permutation(len(articles))
    tenth = round(len(articles) / 10)
    parts = {
        "test": order[:tenth],
        "validation": order[tenth : 2 * tenth],
        "train": np.sort(order[2 * tenth :]),
    }
    found = {name: [articles[i] for i in index] for name, index in parts.items()}
    return {**found, "xquad": json.loads(path(XQUAD).read_text(encoding="utf-8"))["data"]}


def data(config: Config) -> Data:
    """The splits, with the words of the training split."""
    splits = {name: parsed(articles) for name, articles in read(config).items()}
    for name, split in splits.items():
        if split.unaligned:
            total = sum(len(question.answers) for question in split.questions)
            print(f"{name}: {split.unaligned} of {total} reference answers break a word")
    fit = splits["train"]
    return Data(Lexicon.of(fit.passages, fit.questions, config.least), splits)


def inside(config: Config, split: Split, window: Window) -> list[tuple[int, int]]:
    """The reference answers that are whole in a window and not too long, counted from its start."""
    return [
        (first - window.start, last - first)
        for first, last in split.questions[window.question].spans
        if window.start <= first and last < window.stop and last - first < config.longest
    ]


def batches(config: Config, data: Data, step: int) -> Iterator[Batch]:
    """Windows of about one length together, those that hold a reference answer."""
    split = data.splits["train"]
    every = windows(split, config.reads, config.stride)
    some = [window for window in every if inside(config, split, window)]
    asked = len({window.question for window in some})
    print(
        f"{len(some)} of {len(every)} windows hold a reference answer of up to {config.longest} "
        f"words; {asked} of {len(split.questions)} questions have one"
    )
    lengths = np.array([length_of(split, window) for window in some])
    for index in text.alike(lengths, config.batch_size, config.seed, step):
        chosen = [some[i] for i in index]
        length = text.bucket(int(lengths[index].max()), BUCKETS)
        right = np.zeros((len(chosen), length, config.longest), bool)
        for i, window in enumerate(chosen):
            begin = length_of(split, window) - (window.stop - window.start)
            for first, more in inside(config, split, window):
                right[i, begin + first, more] = True
        yield Batch(inputs_of(data.lexicon, split, chosen, length), right)


# --- The task.


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Any:
    """The rung."""
    if config.model == "overlap":
        return Overlap(data.lexicon.rarity, config.longest)
    return Reader(config, data.lexicon, rngs)


def loss(config: Config, model: Any, batch: Batch) -> Loss:
    """``-log`` of the probability of all reference answers together, among all spans."""
    scores = model(batch.inputs)
    total = jax.nn.logsumexp(scores, axis=(1, 2))
    each = total - jax.nn.logsumexp(jnp.where(batch.right, scores, NEVER), axis=(1, 2))
    if config.label_smoothing:
        are = scores > NEVER
        mean = jnp.where(are, scores, 0).sum((1, 2)) / are.sum((1, 2), dtype=jnp.float32)
        each = (1 - config.label_smoothing) * each + config.label_smoothing * (total - mean)
    return Loss(each.sum(), jnp.float32(each.size))


def answer(config: Config, model: Any, data: Data, split: Split, size: int = 32) -> list[Answer]:
    """The best span for each question, of any window."""
    best: dict[int, Answer] = {}
    if isinstance(model, Overlap):
        for i, question in enumerate(split.questions):
            words = split.passages[question.passage].words
            best[i] = Answer(*model.answer(question.words, words), 0.0, Window(i, 0, len(words)))
        return [best[i] for i in range(len(split.questions))]
    every = windows(split, config.reads, config.stride)
    lengths = [length_of(split, window) for window in every]
    for index in text.covering(lengths, size):
        some = [every[i] for i in index]
        length = text.bucket(max(lengths[i] for i in index), BUCKETS)
        scores = np.asarray(logits(model, inputs_of(data.lexicon, split, some, length, size)))
        for window, score in zip(some, scores, strict=False):
            begin = length_of(split, window) - (window.stop - window.start)
            at, more = np.unravel_index(score.argmax(), score.shape)
            first = window.start + int(at) - begin
            found = Answer(first, first + int(more), float(score.max()), window)
            if window.question not in best or found.score > best[window.question].score:
                best[window.question] = found
    return [best[i] for i in range(len(split.questions))]


def _passage(split: Split, found: Answer) -> Passage:
    return split.passages[split.questions[found.window.question].passage]


def cut(split: Split, found: Answer) -> str:
    """An answer as it is written in its passage."""
    return _passage(split, found).cut(found.first, found.last)


def scores(config: Config, model: Any, data: Data, split: Split) -> Metrics:
    """F1 and exact match over every question; how many reference answers break a word."""
    said = [cut(split, found) for found in answer(config, model, data, split)]
    agreement = answers.agreement(said, [question.answers for question in split.questions])
    return {**agreement, "unaligned": float(split.unaligned)}


def evaluate(config: Config, model: Any, data: Data, split: str) -> Metrics:
    """See ``scores``; with the test split those of the second test set too, as ``xquad_``."""
    found = scores(config, model, data, data.splits[split])
    if split != "test":
        return found
    second = scores(config, model, data, data.splits["xquad"])
    return {**found, **{f"xquad_{name}": x for name, x in second.items()}}


def asked(data: Data, given: str) -> Split:
    """A question of one's own, and the passage it is asked of.

    Raises:
      ValueError: one of them is blank, or the question too long.
    """
    question, separator, passage = text.check(given).partition(SEPARATOR)
    test = data.splits["test"]
    about = Passage.of(passage) if separator else test.passages[test.questions[0].passage]
    words = Passage.of(question).words
    if not about.words or not 1 <= len(words) <= LONGEST_QUESTION:
        raise ValueError(
            f"text must be a question of up to {LONGEST_QUESTION} words, {SEPARATOR} and a "
            f"passage, or a question alone, of the first passage of the test split; got {given!r}"
        )
    return Split([about], [Question(question.strip(), words, 0, [], [])], 0)


def sample(config: Config, model: Any, data: Data, given: str | None) -> str:
    """The answer to a question of one's own; without one, to five of the test split."""
    if given is not None:
        split = asked(data, given)
    else:
        split = data.splits["test"]
        chosen = np.random.default_rng(config.seed).permutation(len(split.questions))[:5]
        split = split._replace(questions=[split.questions[i] for i in chosen])
    said = []
    found = answer(config, model, data, split)
    for question, one in zip(split.questions, found, strict=True):
        lines = [
            f"question   {question.text}",
            f"passage    {_passage(split, one).around(one.first, one.last)}",
        ]
        if question.answers:
            lines.append(f"reference  {' | '.join(dict.fromkeys(question.answers))}")
        said.append("\n".join([*lines, f"model      {cut(split, one)}"]))
    return "\n\n".join(said)


def look(config: Config, model: Any, data: Data, given: str | None) -> list[AttentionView]:
    """Attention in the window that has the answer to the first question of the test split."""
    if config.model == "overlap":
        raise ValueError("model overlap has no attention to look at: take gru or transformer")
    test = data.splits["test"]
    split = test._replace(questions=test.questions[:1]) if given is None else asked(data, given)
    (found,) = answer(config, model, data, split, size=1)
    window, (question,) = found.window, split.questions
    words = split.passages[question.passage].words[window.start : window.stop]
    tokens = [text.SPECIAL[START], *question.words, text.SPECIAL[END], *words]
    inputs = inputs_of(data.lexicon, split, [window], len(tokens))
    _, weights = record_weights(model, inputs)
    if config.model == "transformer":
        views = self_attention("question and passage", tokens, weights)
    else:
        n = len(tokens) - len(words)
        (to_question,) = (np.asarray(w)[..., :n] for w in weights.values())
        views = [AttentionView("all words to the question", tokens, tokens[:n], to_question)]
    return [view._replace(note=f"The answer: {cut(split, found)}") for view in views]


TASK = Task(
    name="qa",
    presets=PRESETS,
    data=data,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="f1",
    larger=True,
    unit="questions",
    sample=sample,
    look=look,
)
