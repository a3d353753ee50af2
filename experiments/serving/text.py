"""Tokens as text while they come: no half characters, no half stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from attention_jax.models.pretrained import Tokenizer

UNFINISHED = "\ufffd"  # what the bytes of a character decode to before the last of them
CONTEXT = 6  # tokens of the prompt that the first ones are decoded after, for the space between
LONGEST = 8  # tokens of an unfinished character; more are no character


class TextStream:
    """The text of tokens, piece by piece.

    Attributes:
      stopped: whether the text has reached a stop string, which is not part of it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        """No text yet.

        Args:
          tokenizer: of the tokens.
          prompt: the tokens before the first one.
          stop: texts that end the text.
        """
        self.stopped = False
        self._decode, self._stop = tokenizer.decode, tuple(stop)
        self._tokens = list(prompt[-CONTEXT:])
        # The text of tokens from `_start` to `_read` is out; those before only give context.
        self._start, self._read = 0, len(self._tokens)
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The text that the token completes, empty if there is none."""
        self._tokens.append(int(token))
        whole = self._decode(self._tokens[self._start :])
        unfinished = whole.endswith(UNFINISHED) and len(self._tokens) - self._read < LONGEST
        return "" if unfinished else self._out(whole)

    def finish(self) -> str:
        """The rest of the text."""
        text = self._out(self._decode(self._tokens[self._start :]))
        held, self._held = self._held, ""
        return text + held

    def _out(self, whole: str) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        text = whole[len(before) :]
        if text:
            self._start, self._read = self._read, len(self._tokens)
        return self._before_stop(text)

    def _before_stop(self, text: str) -> str:
        """The text up to a stop string, or to where one may begin."""
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [i for i in (text.find(x) for x in self._stop) if i >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max((_overlap(text, x) for x in self._stop), default=0)
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the first ones of a stop string.

    >>> from experiments.serving.text import _overlap
    >>> _overlap("one\\nUs", "\\nUser:")
    3
    """
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
