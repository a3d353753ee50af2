"""Requests of continuous batching: what is asked for, and how far each has come."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.core.axes import int_at_least, kind
from attention_jax.models import prompts
from attention_jax.models.generation import row_keys
from attention_jax.models.sampling import (
    Choice,
    as_choice,
    split_numbers,
)

End = Literal["stop", "length", "capacity", "invalid"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
      prompt: tokens, integers, at least one.
      max_new_tokens: largest number of tokens to generate.
      sampling: how tokens are chosen, as for ``generate``.
      key: a key of ``jax.random``, as for ``generate``.
      stop: the token that ends the request, several of them, or None.
    """

    # Not annotated more narrowly: ``submit`` says what is wrong with a request, by name.
    prompt: Any
    max_new_tokens: int
    sampling: Any = None
    key: Any = None
    stop: Any = ()


class Event(NamedTuple):
    """A token of a request.

    Attributes:
      request: its number, from ``submit``.
      token: the token, a stop token included; -1 if none can be chosen, since logits are NaN or
        processors leave none.
      ended: why the request ended with this token, None if it goes on: ``"stop"`` after a stop
        token, ``"length"`` after ``max_new_tokens``, ``"capacity"`` if its row is full,
        ``"invalid"`` if the token is -1.
    """

    request: int
    token: int
    ended: End | None


@dataclasses.dataclass(eq=False)
class Running:
    """A request that waits for a row or has one.

    Attributes:
      number: by which events refer to it.
      prompt: the length of its prompt.
      limit: how many tokens it may generate, ``max_new_tokens`` or fewer if its row is full then.
      at_limit: why it ends there.
      choice, numbers: how its tokens are chosen, see ``sampling.split_numbers``.
      key, impl: the data and kind of its random key; None without a draw.
      stop: tokens that end it.
      tokens: of the prompt and generated, int32; -1 for those that may follow.
      known: how many of these there are.
      read: how many of these the row holds.
      needed: the largest number of pages that it may use.
      begun: whether its row holds its tokens, not those of the request before it.
    """

    number: int
    prompt: int
    limit: int
    at_limit: End
    choice: Choice
    numbers: tuple[float, ...]
    key: np.ndarray | None
    impl: Any
    stop: tuple[int, ...]
    tokens: np.ndarray
    needed: int
    known: int
    read: int = 0
    begun: bool = False

    @property
    def made(self) -> int:
        """How many tokens it has generated."""
        return self.known - self.prompt

    @property
    def last(self) -> int:
        """Its last token."""
        return int(self.tokens[self.known - 1])

    @property
    def kind(self) -> tuple[Choice, Any]:
        """What the program that chooses its tokens depends on."""
        return self.choice, self.impl

    def add(self, token: int) -> None:
        """Adds a generated token."""
        self.tokens[self.known] = token
        self.known += 1


def most_tokens(request: Any, vocabulary: int) -> int:
    """The tokens that a request can leave in a cache; raises as ``checked``."""
    prompt, new = _prompt_and_new(request, vocabulary)
    return len(prompt) + new - 1


def _prompt_and_new(request: Any, vocabulary: int) -> tuple[np.ndarray, int]:
    """The prompt, and the largest number of new tokens."""
    if not isinstance(request, Request):
        raise TypeError(f"request must be a Request, got {kind(request)}")
    prompt = prompts.as_row("prompt", request.prompt, vocabulary)
    return prompt, int_at_least("max_new_tokens", request.max_new_tokens, 1)


def checked(
    request: Any, number: int, *, vocabulary: int, capacity: int, page_size: int
) -> Running:
    """A request that waits to run.

    Args:
      number: by which events refer to it.
      vocabulary: of the model.
      capacity: how many tokens a row holds.
      page_size: tokens per page.

    Raises:
      ValueError, TypeError: it can never run.
    """
    prompt, new = _prompt_and_new(request, vocabulary)
    if len(prompt) > capacity:
        raise ValueError(
            f"prompt must have at most {capacity} tokens, the capacity of a row, got {len(prompt)}"
        )
    choice, numbers = split_numbers(as_choice(request.sampling))
    key = impl = None
    keys = row_keys(choice, request.key, 1)
    if keys is not None:
        if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
            keys = jax.random.wrap_key_data(keys)
        key, impl = np.asarray(jax.random.key_data(keys))[0], jax.random.key_impl(keys)
    limit = min(new, capacity - len(prompt) + 1)
    tokens = np.full(capacity + 1, -1, np.int32)
    tokens[: len(prompt)] = prompt
    return Running(
        number=number,
        prompt=len(prompt),
        limit=limit,
        at_limit="length" if limit == new else "capacity",
        choice=choice,
        numbers=numbers,
        key=key,
        impl=impl,
        stop=prompts.as_stop(request.stop, vocabulary),
        tokens=tokens,
        needed=-(-(len(prompt) + limit - 1) // page_size),
        known=len(prompt),
    )
