"""Choosing a token from logits: processors are pure functions of one row that compose.

A processor is ``(tokens, logits) -> logits``. ``tokens``, int32 ``[L]``, are those of the row so
far, prompt included, with -1 for empty places; ``logits`` are ``[V]``, where ``-inf`` excludes a
token. Processors of this module are values: equal ones compile once. A function of your own is
compiled once per function object, so define it outside the loop that generates.

>>> import jax.numpy as jnp
>>> from attention_jax.models.sampling import chain, repetition_penalty, top_k
>>> both = chain(repetition_penalty(2.0), top_k(1))
>>> both(jnp.array([1]), jnp.array([2.0, 3.0])).tolist()
[2.0, -inf]
>>> def forbid_repeats(tokens, logits):  # for generate(sampling=(forbid_repeats, top_p(0.9)))
...     last = tokens[jnp.max(jnp.where(tokens >= 0, jnp.arange(len(tokens)), 0))]
...     return logits.at[last].set(-jnp.inf)
>>> forbid_repeats(jnp.array([0, 2, -1]), jnp.array([1.0, 1.0, 1.0])).tolist()
[1.0, 1.0, -inf]
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention_jax.core.axes import as_float, int_at_least

Processor: TypeAlias = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Formula:
    """A processor: a formula and its parameter."""

    formula: Callable[[Any, Any, Any], Any]
    number: Any  # a float or int; None or traced while serving

    def __call__(self, tokens: Any, logits: Any) -> Any:
        return self.formula(self.number, tokens, logits)

    def __repr__(self) -> str:
        return f"{self.formula.__name__.strip('_')}({self.number})"


@dataclasses.dataclass(frozen=True)
class Chain:
    """Processors applied in sequence."""

    processors: tuple[Processor, ...]

    def __call__(self, tokens: Any, logits: Any) -> Any:
        for processor in self.processors:
            shape = logits.shape
            logits = processor(tokens, logits)
            if jnp.shape(logits) != shape:
                raise ValueError(
                    f"a processor must keep the shape of the logits {shape}, got "
                    f"{jnp.shape(logits)} of {processor!r}"
                )
        return logits


# --- Processors.


def temperature(temperature: float) -> Processor:
    """``logits / temperature``: 1 is the model's own distribution, less is sharper.

    Raises:
      ValueError: it is not positive.
      TypeError: it is not a number, or is traced: it is part of the program.

    >>> import jax.numpy as jnp
    >>> from attention_jax.models.sampling import temperature
    >>> temperature(0.5)(jnp.array([-1]), jnp.array([1.0, 2.0])).tolist()
    [2.0, 4.0]
    """
    x = as_float("temperature", temperature)
    if not 0 < x < float("inf"):
        raise ValueError(f"temperature must be positive, got {x}: greedy is sampling=None")
    return Formula(_temperature, x)


def top_k(k: int) -> Processor:
    """Keeps only the ``k`` likeliest tokens; of equal ones the first.

    Raises:
      ValueError: ``k`` is less than 1.
      TypeError: it is not an int.

    >>> import jax.numpy as jnp
    >>> from attention_jax.models.sampling import top_k
    >>> top_k(2)(jnp.array([-1]), jnp.array([1.0, 3.0, 2.0])).tolist()
    [-inf, 3.0, 2.0]

    Source: Fan et al. 2018, "Hierarchical Neural Story Generation".
    """
    return Formula(_top_k, int_at_least("top_k", k, 1))


def top_p(p: float) -> Processor:
    """Keeps only the likeliest tokens that together reach the probability ``p`` (nucleus).

    A token is kept if the likelier ones together have a probability below ``p``.

    Raises:
      ValueError: ``p`` is not in (0, 1].
      TypeError: it is not a number, or is traced.

    >>> import jax.numpy as jnp
    >>> from attention_jax.models.sampling import top_p
    >>> logits = jnp.log(jnp.array([0.5, 0.2, 0.3]))
    >>> jnp.isfinite(top_p(0.6)(jnp.array([-1]), logits)).tolist()
    [True, False, True]

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    x = as_float("top_p", p)
    if not 0 < x <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {x}")
    return Formula(_top_p, x)


def min_p(p: float) -> Processor:
    """Keeps only tokens with at least ``p`` times the probability of the likeliest.

    Raises:
      ValueError: ``p`` is not in [0, 1].
      TypeError: it is not a number, or is traced.

    >>> import jax.numpy as jnp
    >>> from attention_jax.models.sampling import min_p
    >>> logits = jnp.log(jnp.array([0.5, 0.2, 0.3]))
    >>> jnp.isfinite(min_p(0.5)(jnp.array([-1]), logits)).tolist()
    [True, False, True]

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM
    Outputs".
    """
    x = as_float("min_p", p)
    if not 0 <= x <= 1:
        raise ValueError(f"min_p must be in [0, 1], got {x}")
    return Formula(_min_p, x)


def repetition_penalty(penalty: float) -> Processor:
    """For tokens already in the row: positive logits ``/ penalty``, negative ones ``* penalty``.

    A penalty above 1 makes them less likely.

    Raises:
      ValueError: it is not positive.
      TypeError: it is not a number, or is traced.

    >>> import jax.numpy as jnp
    >>> from attention_jax.models.sampling import repetition_penalty
    >>> repetition_penalty(2.0)(jnp.array([0, 2, -1]), jnp.array([1.0, 1.0, -1.0])).tolist()
    [0.5, 1.0, -2.0]

    Source: Keskar et al. 2019, "CTRL", section 4.1.
    """
    x = as_float("repetition_penalty", penalty)
    if not 0 < x < float("inf"):
        raise ValueError(f"repetition_penalty must be positive, got {x}")
    return Formula(_repetition_penalty, x)


def chain(*processors: Processor) -> Processor:
    """One processor that applies several in sequence.

    >>> import jax.numpy as jnp
    >>> from attention_jax.models.sampling import chain, repetition_penalty, top_k
    >>> both = chain(repetition_penalty(2.0), top_k(1))
    >>> both(jnp.array([1]), jnp.array([2.0, 3.0])).tolist()
    [2.0, -inf]
    """
    return Chain(_checked(processors))


def _temperature(temperature: Any, tokens: Any, logits: Float[Array, " V"]) -> Any:
    return logits / temperature


def _top_k(k: int, tokens: Any, logits: Float[Array, " V"]) -> Any:
    if k >= logits.shape[-1]:
        return logits
    likeliest, at = jax.lax.top_k(logits, k)
    return jnp.full_like(logits, -jnp.inf).at[at].set(likeliest)


def _top_p(p: Any, tokens: Any, logits: Float[Array, " V"]) -> Any:
    likeliest, at = jax.lax.top_k(logits, logits.shape[-1])
    probability = jax.nn.softmax(likeliest)
    before = jnp.cumsum(probability) - probability
    return jnp.full_like(logits, -jnp.inf).at[at].set(jnp.where(before < p, likeliest, -jnp.inf))


def _min_p(p: Any, tokens: Any, logits: Float[Array, " V"]) -> Any:
    return jnp.where(jnp.exp(logits - jnp.max(logits)) >= p, logits, -jnp.inf)


def _repetition_penalty(penalty: Any, tokens: Any, logits: Float[Array, " V"]) -> Any:
    V = logits.shape[-1]
    at = jnp.where(tokens < 0, V, tokens)  # out of range: dropped
    present = jnp.zeros(V, bool).at[at].set(True, mode="drop")
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(present, penalized, logits)


# Processors that do not depend on the order of the logits.
ORDER_INDEPENDENT = _temperature, _top_k, _top_p, _min_p


# --- Choosing a token.


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling from ``softmax(logits / temperature)``, restricted to the likeliest tokens.

    The parameters of the processors of the same names, which are applied in this order:
    ``repetition_penalty``, ``temperature``, ``top_k``, ``top_p``, ``min_p``.

    Attributes:
      temperature: 1 is the model's own distribution, less is sharper.
      top_k: keep only the ``top_k`` likeliest tokens; None: all.
      top_p: keep only the likeliest tokens that together reach this probability; None: all.
      min_p: keep only tokens with this fraction of the likeliest's probability; None: all.
      repetition_penalty: for tokens already in the row; None: no penalty.

    Source: Fan et al. 2018, "Hierarchical Neural Story Generation" (top-k); Holtzman et al. 2020,
    "The Curious Case of Neural Text Degeneration" (top-p); the others' are with their processors.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        _ = self.processors  # each checks its number

    @property
    def processors(self) -> tuple[Processor, ...]:
        """The equivalent processors."""
        numbers: dict[Callable[[Any], Processor], Any] = {
            repetition_penalty: self.repetition_penalty,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
        }
        return tuple(make(x) for make, x in numbers.items() if x is not None)

    def draw(
        self, logits: Float[Array, " V"], key: jax.Array, tokens: Any = None
    ) -> Int[Array, ""]:
        """Draws one token.

        Args:
          logits: ``[V]``.
          key: a key of ``jax.random``.
          tokens: int32 ``[L]``, those of the row so far, for the repetition penalty.

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from attention_jax.models import Sampling
        >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
        >>> int(Sampling(top_p=0.5).draw(logits, jax.random.key(0)))
        1
        """
        tokens = jnp.zeros(0, jnp.int32) if tokens is None else jnp.asarray(tokens)
        left, at = _processed(self.processors, tokens, logits)
        drawn = jax.random.categorical(key, left)
        return drawn if at is None else at[drawn]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a token is chosen: processors, then the likeliest token or a draw.

    Attributes:
      processors: applied in sequence.
      draws: draw a token, instead of taking the likeliest.
    """

    processors: tuple[Processor, ...] = ()
    draws: bool = False

    def __call__(self, tokens: Any, logits: Float[Array, " V"], key: Any) -> Int[Array, ""]:
        """The token; -1 if there is none to choose, since logits are NaN or all are ``-inf``."""
        left, at = _processed(self.processors, tokens, logits)
        token = jax.random.categorical(key, left) if self.draws else jnp.argmax(left)
        token = token if at is None else at[token]
        return jnp.where(jnp.max(left) > -jnp.inf, token, -1).astype(jnp.int32)

    def probabilities(self, tokens: Any, logits: Float[Array, " V"]) -> Float[Array, " V"]:
        """What a draw is from, ``softmax`` of the processed logits; 0 if there is none to choose.

        >>> import jax.numpy as jnp
        >>> from attention_jax.models.sampling import Choice, top_k
        >>> Choice((top_k(1),), draws=True).probabilities(jnp.array([-1]), jnp.arange(3.0)).tolist()
        [0.0, 0.0, 1.0]
        """
        left = Chain(self.processors)(tokens, logits)
        return jnp.where(jnp.isfinite(jnp.max(left)), jax.nn.softmax(left), 0)


def split_numbers(choice: Choice) -> tuple[Choice, tuple[float, ...]]:
    """A choice without those numbers that need not be part of the program, and the numbers.

    >>> from attention_jax.models.sampling import as_choice, split_numbers, temperature, top_k
    >>> split_numbers(as_choice((top_k(5), temperature(0.7))))
    (Choice(processors=(top_k(5), temperature(None)), draws=True), (0.7,))
    """
    numbers = tuple(x.number for x in choice.processors if _has_number(x))
    rest = tuple(
        dataclasses.replace(x, number=None) if _has_number(x) else x for x in choice.processors
    )
    return dataclasses.replace(choice, processors=rest), numbers


def with_numbers(choice: Choice, numbers: Any) -> Choice:
    """The inverse of ``split_numbers``; numbers may be an array, also a traced one."""
    left = iter(numbers)
    whole = tuple(
        dataclasses.replace(x, number=next(left)) if _has_number(x) else x
        for x in choice.processors
    )
    return dataclasses.replace(choice, processors=whole)


def _has_number(processor: Any) -> TypeGuard[Formula]:
    """Whether a processor has a number that may be traced, which ``top_k`` may not."""
    return isinstance(processor, Formula) and processor.formula is not _top_k


def likeliest(*processors: Processor) -> Choice:
    """For ``generate(sampling=...)``: the likeliest token after the processors, without a draw.

    >>> from attention_jax.models.sampling import likeliest, repetition_penalty
    >>> likeliest(repetition_penalty(1.2))
    Choice(processors=(repetition_penalty(1.2),), draws=False)
    """
    return Choice(_checked(processors))


def as_choice(sampling: Sampling | Choice | Processor | Sequence[Processor] | None) -> Choice:
    """The argument ``sampling`` of ``generate`` as a choice."""
    if sampling is None:
        return Choice()
    if isinstance(sampling, Choice):
        return sampling
    if isinstance(sampling, Sampling):
        return Choice(sampling.processors, draws=True)
    several = isinstance(sampling, Sequence) and not isinstance(sampling, str)
    given: Any = sampling if several else (sampling,)
    return Choice(_checked(given, "sampling"), draws=True)


def _processed(processors: tuple[Processor, ...], tokens: Any, logits: Any) -> tuple[Any, Any]:
    """The processed logits, and the tokens they belong to; None for the whole vocabulary in order.

    Processors after ``top_k`` get only its ``k`` logits if their order does not matter: sorting
    those is cheap, sorting a vocabulary is not.
    """
    for i, top in enumerate(processors):
        after = processors[i + 1 :]
        if _is(top, _top_k) and all(_is(x, *ORDER_INDEPENDENT) for x in after):
            logits = Chain(processors[:i])(tokens, logits)
            likeliest, at = jax.lax.top_k(logits, min(top.number, logits.shape[-1]))  # type: ignore[attr-defined]
            return Chain(after)(tokens, likeliest), at
    return Chain(processors)(tokens, logits), None


def _is(processor: Processor, *formulas: Callable[[Any, Any, Any], Any]) -> bool:
    return isinstance(processor, Formula) and processor.formula in formulas


def _checked(processors: Sequence[Processor], name: str = "processors") -> tuple[Processor, ...]:
    """Checks that processors are hashable functions, and flattens chains."""
    for x in processors:
        if not callable(x) or isinstance(x, type):
            raise TypeError(
                f"{name} must be functions (tokens, logits) -> logits, such as top_k(50), or a "
                f"Sampling, got {type(x).__name__} {x!r}"
            )
        try:
            hash(x)
        except TypeError:
            raise TypeError(
                f"{name} must be hashable, since they are part of the program, got "
                f"{type(x).__name__}: use a function or a frozen dataclass"
            ) from None
    parts = [x.processors if isinstance(x, Chain) else (x,) for x in processors]
    return tuple(itertools.chain(*parts))
