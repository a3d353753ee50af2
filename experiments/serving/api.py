"""Requests and answers of the completions API, as JSON: pure functions, without a network.

Fields are those of OpenAI's completions and chat completions. One that is not supported is refused
by name, unless it has the value that changes nothing.
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax

from attention_jax.models import Request, Sampling
from experiments.serving.checkpoint import Checkpoint

ROLES = ("system", "user", "assistant")
MOST_STOPS, LONGEST_STOP = 4, 200
DEFAULT_NEW = 16  # of completions, as in OpenAI's API


class Limits(NamedTuple):
    """What a request may ask for.

    Attributes:
      body: bytes of its body.
      prompt: tokens of its prompt.
      new: tokens of its answer.
    """

    body: int
    prompt: int
    new: int


class RequestError(Exception):
    """A request that is refused: a status of HTTP, one line, and the field it is about."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


class Wanted(NamedTuple):
    """A request that can be run.

    Attributes:
      prompt: its tokens.
      request: for the batch.
      stop: texts that end the answer.
      stream: whether pieces are sent as they come.
      usage: whether the stream ends with the number of tokens.
    """

    prompt: list[int]
    request: Request
    stop: tuple[str, ...]
    stream: bool
    usage: bool


def refuse(message: str, field: str | None = None, status: int = 400) -> NoReturn:
    raise RequestError(status, message, field)


# --- Values of fields.


def _flag(name: str, x: Any) -> bool:
    return (
        x if isinstance(x, bool) else refuse(f"{name} must be true or false, got {_brief(x)}", name)
    )


def _int(least: int, most: int) -> Callable[[str, Any], int]:
    def check(name: str, x: Any) -> int:
        if isinstance(x, bool) or not isinstance(x, int) or not least <= x <= most:
            refuse(f"{name} must be an integer from {least} to {most}, got {_brief(x)}", name)
        return x

    return check


def _number(least: float, most: float, *, above: bool = False) -> Callable[[str, Any], float]:
    def check(name: str, x: Any) -> float:
        fits = isinstance(x, int | float) and not isinstance(x, bool)
        if not fits or not least <= x <= most or (above and x == least):
            start = "above" if above else "from"
            refuse(f"{name} must be a number {start} {least} to {most}, got {_brief(x)}", name)
        return float(x)

    return check


def _text(name: str, x: Any) -> str:
    if not isinstance(x, str):
        refuse(f"{name} must be a text, got {_brief(x)}", name)
    try:
        x.encode()
    except UnicodeEncodeError:
        refuse(f"{name} must be valid Unicode, got half of a surrogate pair", name)
    return x


def _stops(name: str, x: Any) -> tuple[str, ...]:
    texts = x if isinstance(x, list) else [x]
    if len(texts) > MOST_STOPS:
        refuse(f"{name} must have at most {MOST_STOPS} texts, got {len(texts)}", name)
    found = tuple(_text(name, text) for text in texts)
    if any(not 0 < len(text) <= LONGEST_STOP for text in found):
        refuse(f"{name} must have texts of 1 to {LONGEST_STOP} characters", name)
    return found


def _stream_options(name: str, x: Any) -> bool:
    if not isinstance(x, dict) or x.keys() - {"include_usage"}:
        refuse(f'{name} must be {{"include_usage": true or false}}, got {_brief(x)}', name)
    return _flag(f"{name}.include_usage", x.get("include_usage", False))


def _messages(name: str, x: Any) -> list[dict[str, str]]:
    if not isinstance(x, list) or not x:
        refuse(f"{name} must be a list of at least one message, got {_brief(x)}", name)
    for i, message in enumerate(x):
        at = f"{name}[{i}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            refuse(
                f"{at} must have a role and content, and nothing else, got {_brief(message)}", name
            )
        if message["role"] not in ROLES:
            refuse(
                f"{at}.role must be one of {', '.join(ROLES)}, got {_brief(message['role'])}", name
            )
        _text(f"{at}.content", message["content"])
    return x


def _prompt(name: str, x: Any) -> str | list[int]:
    if isinstance(x, str):
        return _text(name, x)
    ids = isinstance(x, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in x)
    if not ids or not x:
        refuse(f"{name} must be one text, or a list of the tokens of one, got {_brief(x)}", name)
    return list(x)


def _brief(x: Any) -> str:
    try:
        text = json.dumps(x)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 60 else f"{text[:60]}..."


Checks = Mapping[str, Callable[[str, Any], Any]]
COMMON: Checks = {
    "model": _text,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "seed": _int(0, 2**32 - 1),
    "stop": _stops,
    "stream": _flag,
    "stream_options": _stream_options,
    "user": _text,
}
# Fields that are not supported, with the values that change nothing, besides null.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
}


def fields(body: bytes, checks: Checks, needed: str) -> dict[str, Any]:
    """The fields of a body, checked; those that are null or change nothing are left out."""
    try:
        given = json.loads(body, parse_constant=lambda name: refuse(f"the body has {name}"))
    except (ValueError, RecursionError) as error:
        refuse(f"the body must be JSON: {str(error) or 'nested too deeply'}")
    if not isinstance(given, dict):
        refuse(f"the body must be a JSON object, got {_brief(given)}")
    found = {}
    for name, x in given.items():
        if name in NEUTRAL:
            if x is not None and not any(x == y and type(x) is type(y) for y in NEUTRAL[name]):
                refuse(
                    f"{name} is not supported: leave it out or give {_brief(NEUTRAL[name][0])}, "
                    f"got {_brief(x)}",
                    name,
                )
        elif name not in checks:
            near = difflib.get_close_matches(name, checks, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            refuse(f"unknown field {_brief(name)}{meant}", name)
        elif x is not None:
            found[name] = checks[name](name, x)
    if needed not in found:
        refuse(f"{needed} must be given", needed)
    return found


# --- Requests.


def completion(body: bytes, checkpoint: Checkpoint, limits: Limits, seed: int) -> Wanted:
    """A request to ``/v1/completions``; ``seed`` is for draws if it has none.

    Raises:
      RequestError: anything about it is wrong.
    """
    new = _int(1, limits.new)
    given = fields(body, {**COMMON, "prompt": _prompt, "max_tokens": new}, "prompt")
    prompt = given["prompt"]
    if isinstance(prompt, str):
        prompt = _tokens(lambda: checkpoint.tokens(given["prompt"]), "prompt")
    wrong = [x for x in prompt if not 0 <= x < checkpoint.model.vocabulary]
    if wrong:
        most = checkpoint.model.vocabulary - 1
        refuse(f"prompt must hold tokens from 0 to {most}, got {_brief(wrong[0])}", "prompt")
    number = given.get("max_tokens", min(DEFAULT_NEW, limits.new))
    return _wanted(given, prompt, number, (), checkpoint, limits, seed, "prompt")


def chat_completion(body: bytes, checkpoint: Checkpoint, limits: Limits, seed: int) -> Wanted:
    """A request to ``/v1/chat/completions``; as ``completion``."""
    new = _int(1, limits.new)
    checks = {**COMMON, "messages": _messages, "max_tokens": new, "max_completion_tokens": new}
    given = fields(body, checks, "messages")
    if {"max_tokens", "max_completion_tokens"} <= given.keys():
        refuse("max_tokens must be left out with max_completion_tokens", "max_tokens")
    number = given.get("max_completion_tokens", given.get("max_tokens", limits.new))
    prompt = _tokens(lambda: checkpoint.conversation(given["messages"]), "messages")
    stop = checkpoint.stop
    return _wanted(given, prompt, number, stop, checkpoint, limits, seed, "messages")


def _tokens(encode: Callable[[], list[int]], field: str) -> list[int]:
    try:
        return encode()
    except ValueError as error:
        refuse(str(error), field)


def _wanted(
    given: Mapping[str, Any],
    prompt: list[int],
    number: int,
    stop: tuple[str, ...],
    checkpoint: Checkpoint,
    limits: Limits,
    seed: int,
    field: str,
) -> Wanted:
    if given.get("model", checkpoint.name) != checkpoint.name:
        message = f"model must be {checkpoint.name!r}, the one served here, got {given['model']!r}"
        refuse(message, "model", 404)
    if len(prompt) > limits.prompt:
        refuse(f"{field} must have at most {limits.prompt} tokens, got {len(prompt)}", field)
    temperature, top_p = given.get("temperature", 1.0), given.get("top_p", 1.0)
    sampling = key = None
    if temperature > 0:
        sampling = Sampling(temperature=temperature, top_p=None if top_p == 1 else top_p)
        key = jax.random.key(given.get("seed", seed))
    request = Request(prompt, number, sampling, key, checkpoint.end)
    streams = given.get("stream", False)
    if "stream_options" in given and not streams:
        refuse("stream_options must be left out without stream", "stream_options")
    stops = (*stop, *given.get("stop", ()))
    return Wanted(prompt, request, stops, streams, given.get("stream_options", False))


# --- Answers.


class Form(NamedTuple):
    """How an answer is written.

    Attributes:
      parse: of a request.
      prefix: of its id.
      whole, chunk: the names of an answer and of a piece of it.
      chat: whether it is a message.
    """

    parse: Callable[[bytes, Checkpoint, Limits, int], Wanted]
    prefix: str
    whole: str
    chunk: str
    chat: bool

    def answer(self, head: Mapping[str, Any], text: str, reason: str, usage: Any) -> dict[str, Any]:
        """The whole answer."""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return {**head, "object": self.whole, "choices": [choice], "usage": usage}

    def piece(
        self, head: Mapping[str, Any], text: str | None, reason: str | None = None
    ) -> dict[str, Any]:
        """A piece of a stream; without a text the first one of a message."""
        content: dict[str, Any] = {"text": text or ""}
        if self.chat:
            delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
            content = {"delta": {} if reason and not text else delta}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return {**head, "object": self.chunk, "choices": [choice]}

    def last(self, head: Mapping[str, Any], usage: Any) -> dict[str, Any]:
        """The end of a stream that was asked for the number of tokens."""
        return {**head, "object": self.chunk, "choices": [], "usage": usage}


COMPLETION = Form(completion, "cmpl", "text_completion", "text_completion", False)
CHAT = Form(chat_completion, "chatcmpl", "chat.completion", "chat.completion.chunk", True)


def head(form: Form, name: str, number: str) -> dict[str, Any]:
    """What all pieces of an answer begin with."""
    return {"id": f"{form.prefix}-{number}", "created": int(time.time()), "model": name}


def usage(prompt: int, new: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def error(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """An error, as clients of the API expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": status}}
