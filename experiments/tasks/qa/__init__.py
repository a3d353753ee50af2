"""Extractive question answering: the answer is a span of a passage.

::

    python -m experiments train qa                                # a transformer
    python -m experiments train qa --model gru                    # recurrence and attention
    python -m experiments train qa --model overlap                # a rule
    python -m experiments sample runs/qa/transformer-cpu-seed0 \\
        --text "Who wrote it? ||| The poem is old. Nobody knows who wrote it, perhaps Ann Lee."

Models: ``overlap``, a rule that picks the new words nearest to the question's words in the sentence
that shares most with the question; ``gru``, recurrent with attention to the question;
``transformer``, question and passage as one sequence. These two also read features of how each word
matches the question, see ``features``. ``pretrained`` fine-tunes a published encoder, see ``trec``,
without such features.

Data: SQuADShifts, J. Miller et al. 2020, "The Effect of Natural Distribution Shift on Question
Answering Models", its new Wikipedia part: 7,938 questions about 1,581 paragraphs of 48 articles,
with about three reference answers each, CC BY 4.0. Five articles are held out for validation and
five for test, the same for every seed. A second test set, ``xquad_``, is the English part of XQuAD,
M. Artetxe et al. 2020, "On the Cross-lingual Transferability of Monolingual Representations": 1,190
questions about 48 other articles with one reference answer each, CC BY-SA 4.0. The score is F1 by
the rules of SQuAD 1.1, see ``answers``.

A passage longer than ``reads`` words is read in overlapping windows, and the answer is the best
span of all of them. Training uses the windows that contain a reference answer in full. A reference
answer that starts or ends within a word is extended to whole words; the number of such answers is
printed and recorded as ``unaligned``. Every question counts in the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models.pretrained import Tokenizer
from experiments.datasets import text
from experiments.datasets.text import END, PAD, START
from experiments.models import finetuning
from experiments.models.inference import map_by_length, record_weights
from experiments.tasks.common import check_attends, random_indices
from experiments.tasks.qa import answers, finetuned
from experiments.tasks.qa.answers import LONGEST_QUESTION, Passage, Question, Split
from experiments.tasks.qa.config import BUCKETS, CHANGES, PRESETS, SPACES, Config
from experiments.tasks.qa.data import (
    Batch,
    Data,
    Window,
    encode,
    input_length,
    load,
    references,
    windows,
)
from experiments.tasks.qa.finetuned import PretrainedReader
from experiments.tasks.qa.models import MASKED, Overlap, Reader
from experiments.training.losses import logits
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

SEPARATOR = "|||"


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Model:
    """A fresh model, or the rule."""
    if config.model == "overlap":
        return Overlap(data.lexicon.rarity, config.longest)
    if config.model == "pretrained":
        return PretrainedReader(config, rngs)
    return Reader(config, data.lexicon, rngs)


def batches(config: Config, data: Data, step: int, rows: Rows = ALL) -> Iterator[Batch]:
    """Batches of windows of similar length, each with a reference answer."""
    split = data.splits["train"]
    every = windows(split, config.reads, config.stride)
    answerable = [window for window in every if references(config, split, window)]
    questions = len({window.question for window in answerable})
    print(
        f"{len(answerable)} of {len(every)} windows, of {questions} of {len(split.questions)} "
        f"questions, contain a reference answer of up to {config.longest} words"
    )
    if isinstance(data.lexicon, Tokenizer):
        yield from _token_batches(config, data.lexicon, split, answerable, step, rows)
        return
    lengths = np.array([input_length(split, window) for window in answerable])
    for index, length in text.alike(lengths, config.batch_size, config.seed, step, BUCKETS):
        chosen = [answerable[i] for i in rows.of(index)]
        offsets = [_passage_offset(split, window) for window in chosen]
        right = _right(config, split, chosen, offsets, length)
        yield Batch(encode(data.lexicon, split, chosen, length), right)


def _token_batches(
    config: Config,
    tokenizer: Tokenizer,
    split: Split,
    answerable: list[Window],
    step: int,
    rows: Rows,
) -> Iterator[Batch]:
    """``batches`` for a pretrained encoder, of the windows whose answer it reads in full."""
    encoded = finetuned.encode(tokenizer, split, answerable)
    pairs = [
        (window, row)
        for window, row in zip(answerable, encoded, strict=True)
        if row.starts[max(i + more for i, more in references(config, split, window))] >= 0
    ]
    lengths = np.array([len(row.tokens) for _, row in pairs])
    sizes = finetuning.sizes(lengths)
    for index, length in text.bucketed(lengths, config.batch_size, config.seed, step, sizes):
        chosen, inputs = zip(*(pairs[i] for i in rows.of(index)), strict=True)
        right = _right(config, split, chosen, [0] * len(chosen), length)
        yield Batch(finetuned.padded(inputs, length), right)


def _right(
    config: Config, split: Split, chosen: Sequence[Window], offsets: Sequence[int], length: int
) -> np.ndarray:
    """Which spans are reference answers, bool ``[B length longest]``.

    Args:
      config, split, chosen: the windows.
      offsets: where the words of each window start.
      length: number of places for words.
    """
    right = np.zeros((len(chosen), length, config.longest), bool)
    for i, (window, offset) in enumerate(zip(chosen, offsets, strict=True)):
        for first, more in references(config, split, window):
            right[i, offset + first, more] = True
    return right


def real(batch: Batch) -> Array:
    """Which words or tokens are real, ``[B T]``."""
    return batch.inputs[0] != PAD


def _passage_offset(split: Split, window: Window) -> int:
    """Position of the first word of the passage in the input."""
    return input_length(split, window) - (window.stop - window.start)


def loss(config: Config, model: Model, batch: Batch) -> Loss:
    """``-log`` of the total probability of the reference answers, in a softmax over all spans."""
    scores = model(batch.inputs)
    total = jax.nn.logsumexp(scores, axis=(1, 2))
    each = total - jax.nn.logsumexp(jnp.where(batch.right, scores, MASKED), axis=(1, 2))
    if config.label_smoothing:
        valid = scores > MASKED
        mean = jnp.where(valid, scores, 0).sum((1, 2)) / valid.sum((1, 2), dtype=jnp.float32)
        each = (1 - config.label_smoothing) * each + config.label_smoothing * (total - mean)
    return Loss(each.sum(), jnp.float32(each.size))


class Answer(NamedTuple):
    """Words ``first`` to ``last`` of the passage, their score, and the window they come from."""

    first: int
    last: int
    score: float
    window: Window


def answer(config: Config, model: Model, data: Data, split: Split, size: int = 32) -> list[Answer]:
    """The best span for each question, over all windows of its passage."""
    if isinstance(model, Overlap):
        passages = [split.passages[question.passage].words for question in split.questions]
        return [
            Answer(*model.answer(question.words, words), 0.0, Window(i, 0, len(words)))
            for i, (question, words) in enumerate(zip(split.questions, passages, strict=True))
        ]
    every = windows(split, config.reads, config.stride)
    lexicon = data.lexicon
    rows = finetuned.encode(lexicon, split, every) if isinstance(lexicon, Tokenizer) else None
    if rows is None:
        lengths = [input_length(split, window) for window in every]
        offsets = [_passage_offset(split, window) for window in every]
    else:
        lengths, offsets = [len(row.tokens) for row in rows], [0] * len(rows)

    def run(index: np.ndarray) -> Iterator[Answer]:
        chosen = [every[i] for i in index]
        length = text.bucket(max(lengths[i] for i in index), BUCKETS)
        if rows is None:
            inputs: Any = encode(lexicon, split, chosen, length, size)
        else:
            inputs = finetuned.padded([rows[i] for i in index], length, size)
        scores = np.asarray(logits(model, inputs))
        for i, score in zip(index.tolist(), scores, strict=False):
            at, more = np.unravel_index(score.argmax(), score.shape)
            first = every[i].start + int(at) - offsets[i]
            yield Answer(first, first + int(more), float(score.max()), every[i])

    best: dict[int, Answer] = {}
    for candidate in map_by_length(run, lengths, size):
        question = candidate.window.question
        if question not in best or candidate.score > best[question].score:
            best[question] = candidate
    return [best[i] for i in range(len(split.questions))]


def _passage(split: Split, found: Answer) -> Passage:
    return split.passages[split.questions[found.window.question].passage]


def answer_text(split: Split, found: Answer) -> str:
    """An answer as written in its passage."""
    return _passage(split, found).cut(found.first, found.last)


def evaluate(config: Config, model: Model, data: Data, split: str) -> Metrics:
    """F1 and exact match; for the test split also on the second test set, as ``xquad_``."""
    metrics = _scores(config, model, data, data.splits[split])
    if split != "test":
        return metrics
    second = _scores(config, model, data, data.splits["xquad"])
    return {**metrics, **{f"xquad_{name}": x for name, x in second.items()}}


def _scores(config: Config, model: Model, data: Data, split: Split) -> Metrics:
    texts = [answer_text(split, found) for found in answer(config, model, data, split)]
    agreement = answers.agreement(texts, [question.answers for question in split.questions])
    return {**agreement, "unaligned": float(split.unaligned)}


def asked(data: Data, given: str) -> Split:
    """A user's question and passage as a split; without a passage, the first of the test split.

    Raises:
      ValueError: the question or the passage is blank, or the question is too long.
    """
    question, separator, passage = text.check(given).partition(SEPARATOR)
    test = data.splits["test"]
    about = Passage.of(passage) if separator else test.passages[test.questions[0].passage]
    words = Passage.of(question).words
    if not about.words or not 1 <= len(words) <= LONGEST_QUESTION:
        raise ValueError(
            f"text must be a question of up to {LONGEST_QUESTION} words, optionally followed by "
            f"{SEPARATOR} and a passage (default: the first passage of the test split), got "
            f"{given!r}"
        )
    return Split([about], [Question(question.strip(), words, 0, [], [])], 0)


def sample(config: Config, model: Model, data: Data, given: str | None) -> str:
    """The answer to a user's question, or to five questions of the test split."""
    if given is not None:
        split = asked(data, given)
    else:
        split = data.splits["test"]
        chosen = random_indices(len(split.questions), 5, config.seed)
        split = split._replace(questions=[split.questions[i] for i in chosen])
    blocks = []
    for question, found in zip(split.questions, answer(config, model, data, split), strict=True):
        lines = [
            f"question   {question.text}",
            f"passage    {_passage(split, found).around(found.first, found.last)}",
        ]
        if question.answers:
            lines.append(f"reference  {' | '.join(dict.fromkeys(question.answers))}")
        blocks.append("\n".join([*lines, f"model      {answer_text(split, found)}"]))
    return "\n\n".join(blocks)


def look(config: Config, model: Model, data: Data, given: str | None) -> list[AttentionView]:
    """Attention weights in the window of the answer; default the first test question."""
    check_attends(config, "gru", "transformer", "pretrained")
    test = data.splits["test"]
    split = test._replace(questions=test.questions[:1]) if given is None else asked(data, given)
    (found,) = answer(config, model, data, split, size=1)
    window, (question,) = found.window, split.questions
    words = split.passages[question.passage].words[window.start : window.stop]
    if isinstance(data.lexicon, Tokenizer):
        (row,) = finetuned.encode(data.lexicon, split, [window])
        tokens = data.lexicon.strings(row.tokens)
        _, weights = record_weights(model, finetuned.padded([row], len(tokens)))
        views = self_attention("question and passage", tokens, weights)
        return [view._replace(note=f"The answer: {answer_text(split, found)}") for view in views]
    tokens = [text.SPECIAL[START], *question.words, text.SPECIAL[END], *words]
    inputs = encode(data.lexicon, split, [window], len(tokens))
    _, weights = record_weights(model, inputs)
    if config.model == "transformer":
        views = self_attention("question and passage", tokens, weights)
    else:
        n = len(tokens) - len(words)
        (to_question,) = (np.asarray(w)[..., :n] for w in weights.values())
        views = [AttentionView("all words to the question", tokens, tokens[:n], to_question)]
    return [view._replace(note=f"The answer: {answer_text(split, found)}") for view in views]


TASK = Task(
    name="qa",
    presets=PRESETS,
    spaces=SPACES,
    data=load,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="f1",
    larger=True,
    unit="questions",
    untraced=("overlap", "pretrained"),
    changes=CHANGES,
    real=real,
    sample=sample,
    look=look,
)
