"""``python -m experiments chat FOLDER``: a conversation with a model in the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unicodedata import category

import jax

from attention_jax.models import Batch, Request, Sampling
from experiments.serving.checkpoint import Checkpoint, LoadOptions, load_checkpoint
from experiments.serving.text import TextStream

HELLO = "Ctrl-C ends an answer, Ctrl-D ends the chat."
ENDS = {
    "length": "cut after --max-new-tokens",
    "capacity": "cut: the conversation has no more room, see --context",
    "invalid": "the model's logits are NaN",
    "interrupted": "interrupted",
}


@dataclasses.dataclass(frozen=True)
class Options(LoadOptions):
    """Options of ``chat``."""

    system: str | None = None
    """A message to begin with, which says how to answer."""
    max_new_tokens: int = 512
    """The largest number of tokens of an answer."""
    temperature: float = 0.7
    """Below 1 answers are more likely ones; 0: always the likeliest token."""
    top_p: float | None = None
    """Draw only from the likeliest tokens that together reach this probability."""
    top_k: int | None = None
    """Draw only from so many of the likeliest tokens."""
    min_p: float | None = None
    """Draw only from tokens with this fraction of the likeliest one's probability."""
    repetition_penalty: float | None = None
    """Above 1: tokens that are already there are less likely."""
    seed: int | None = None
    """Of the draws; default another one in every chat."""
    context: int = 4096
    """The largest number of tokens of the conversation that the model sees."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _ = self.sampling  # checks its numbers

    @property
    def sampling(self) -> Sampling | None:
        """How tokens are drawn; None for the likeliest."""
        numbers: dict[str, Any] = {
            name: getattr(self, name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")
        }
        if self.temperature == 0:
            given = [name for name, x in numbers.items() if x is not None]
            if given:
                raise ValueError(f"{given[0]} needs a temperature above 0, since nothing is drawn")
            return None
        return Sampling(temperature=self.temperature, **numbers)


class Chat:
    """A conversation: messages, and a cache that keeps what the model has read of them."""

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self.checkpoint, self.options = checkpoint, options
        self.messages: list[dict[str, str]] = []
        if options.system is not None:
            self.messages.append({"role": "system", "content": options.system})
        # The batch keeps the tokens of the last request, and only reads what differs from them.
        capacity = checkpoint.capacity(options.context)
        self.batch = Batch(checkpoint.model, rows=1, capacity=capacity)
        seed = secrets.randbits(32) if options.seed is None else options.seed
        self._key = jax.random.key(seed)
        self._answers = 0

    def ask(
        self, text: str, *, note: Callable[[str], None], interrupted: Callable[[], bool]
    ) -> Iterator[str]:
        """The pieces of the answer to a message.

        Args:
          text: the message.
          note: is told what the reader should know, such as that the answer was cut.
          interrupted: asked after every token; True ends the answer.

        Raises:
          ValueError: the message is too long, or the template refuses it; the conversation stays
            as it was.
        """
        messages, prompt = self._fitting([*self.messages, {"role": "user", "content": text}], note)
        options, key = self.options, jax.random.fold_in(self._key, self._answers)
        sampling = options.sampling
        number = self.batch.submit(
            Request(
                prompt,
                options.max_new_tokens,
                sampling,
                None if sampling is None else key,
                self.checkpoint.end,
            )
        )
        self._answers += 1
        stream = TextStream(self.checkpoint.tokenizer, prompt, self.checkpoint.stop)
        answer, ended = "", ""
        try:
            while not ended:
                piece = ""
                for event in self.batch.step():
                    ended = event.ended or ""
                    piece = "" if ended in ("stop", "invalid") else stream.add(event.token)
                if not ended and (stream.stopped or interrupted()):
                    ended = "stop" if stream.stopped else "interrupted"
                if ended:
                    piece += stream.finish()
                piece = piece if answer else piece.lstrip()
                answer += piece
                if piece:
                    yield piece
        finally:
            self.batch.cancel(number)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        if ended in ENDS:
            note(ENDS[ended])

    def _fitting(
        self, messages: list[dict[str, str]], note: Callable[[str], None]
    ) -> tuple[list[dict[str, str]], list[int]]:
        """The messages without the first ones that there is no room for, and their tokens."""
        capacity = self.batch.capacity
        most = capacity - min(self.options.max_new_tokens, capacity // 2)  # room for the answer
        first = int(messages[0]["role"] == "system")
        forgotten = 0
        tokens = self.checkpoint.conversation(messages)
        while len(tokens) > most:
            if len(messages) <= first + 1:
                raise ValueError(
                    f"the message has {len(tokens)} tokens with what belongs to it, but at most "
                    f"{most} leave room for an answer, see --context"
                )
            del messages[first : first + 2]  # a message and its answer
            forgotten += 1
            tokens = self.checkpoint.conversation(messages)
        if forgotten:
            note(
                f"the conversation has outgrown the {capacity} tokens that the model sees: the "
                f"first {forgotten} of its messages and their answers are forgotten"
            )
        return messages, tokens


def main(folder: str, options: Options) -> int:
    """Runs the conversation until the input ends."""
    chat = Chat(load_checkpoint(folder, options), options)
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{chat.checkpoint.name}. {HELLO}")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets the line be edited
    for text in _lines(terminal):
        if not text.strip():
            continue
        notes: list[str] = []
        with _interrupts() as interrupted:
            try:
                for piece in chat.ask(text, note=notes.append, interrupted=interrupted):
                    print(_harmless(piece) if terminal else piece, end="", flush=True)
            except ValueError as problem:
                notes.append(str(problem))
                if not terminal:
                    raise
        print(flush=True)
        for x in notes:
            print(f"({x})", file=sys.stderr, flush=True)
    return 0


def _harmless(text: str) -> str:
    """Without control characters, which would be commands to the terminal.

    >>> from experiments.serving.chat import _harmless
    >>> _harmless("one\x1b[2J\\ntwo")
    'one\ufffd[2J\\ntwo'
    """
    return "".join("\ufffd" if x not in "\n\t" and category(x) == "Cc" else x for x in text)


def _lines(terminal: bool) -> Iterable[str]:
    """The messages: one a line, until the input ends."""
    if not terminal:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print(f"\n{HELLO}")
        except EOFError:
            print()
            return


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Within it, the first Ctrl-C is noted, and only the second one raises ``KeyboardInterrupt``.

    An exception in the middle of a step would lose the cache.
    """
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
