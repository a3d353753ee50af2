"""From logits to a token: processors, which are pure functions of one row that compose.

A processor is ``(tokens, logits) -> logits``. ``tokens``, int32 ``[L]``, are those of the row so
far, prompt included, and -1 in places where there is none; ``logits`` are ``[V]``, and ``-inf`` is
a token that cannot come. What is made here are values: equal ones compile once. A function of your
own is compiled once for each function object, so define it once, not in the loop that generates.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attention_jax.core.axes import as_float, int_at_least

Processor: TypeAlias = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Formula:
    """A processor: a formula and its number."""

    formula: Callable[[Any, Any, Any], Any]
    number: float

    def __call__(self, tokens: Any, logits: Any) -> Any:
        return self.formula(self.number, tokens, logits)

    def __repr__(self) -> str:
        return f"{self.formula.__name__.strip('_')}({self.number})"


@dataclasses.dataclass(frozen=True)
class Chain:
    """Processors one after the other."""

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
      TypeError: it is no number, or is traced: it is part of the program.

    >>> temperature(0.5)(jnp.array([-1]), jnp.array([1.0, 2.0])).tolist()
    [2.0, 4.0]
    """
    x = as_float("temperature", temperature)
    if not 0 < x < float("inf"):
        raise ValueError(f"temperature must be positive, got {x}: greedy is sampling=None")
    return Formula(_temperature, x)


def top_k(k: int) -> Processor:
    """Only the ``k`` likeliest tokens; of equal ones the first.

    Raises:
      ValueError: ``k`` is less than 1.
      TypeError: it is no int.

    >>> top_k(2)(jnp.array([-1]), jnp.array([1.0, 3.0, 2.0])).tolist()
    [-inf, 3.0, 2.0]

    Source: Fan et al. 2018, "Hierarchical Neural Story Generation".
    """
    return Formula(_top_k, int_at_least("top_k", k, 1))


def top_p(p: float) -> Processor:
    """Only the likeliest tokens that together reach the probability ``p``.

    A token stays where those likelier than it have less than ``p``.

    Raises:
      ValueError: ``p`` is not in (0, 1].
      TypeError: it is no number, or is traced.

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
    """Only tokens whose probability is at least ``p`` times that of the likeliest.

    Raises:
      ValueError: ``p`` is not in [0, 1].
      TypeError: it is no number, or is traced.

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
    """Of tokens that the row has, positive logits ``/ penalty`` and negative ``* penalty``.

    More than 1 makes them less likely, less than 1 more.

    Raises:
      ValueError: it is not positive.
      TypeError: it is no number, or is traced.

    >>> repetition_penalty(2.0)(jnp.array([0, 2, -1]), jnp.array([1.0, 1.0, -1.0])).tolist()
    [0.5, 1.0, -2.0]

    Source: Keskar et al. 2019, "CTRL", section 4.1.
    """
    x = as_float("repetition_penalty", penalty)
    if not 0 < x < float("inf"):
        raise ValueError(f"repetition_penalty must be positive, got {x}")
    return Formula(_repetition_penalty, x)


def chain(*processors: Processor) -> Processor:
    """Processors one after the other, as one.

    >>> both = chain(repetition_penalty(2.0), top_k(1))
    >>> both(jnp.array([1]), jnp.array([2.0, 3.0])).tolist()
    [2.0, -inf]
    """
    return Chain(_checked(processors))


def _temperature(temperature: float, tokens: Any, logits: Float[Array, "V"]) -> Any:
    return logits / temperature


def _top_k(k: int, tokens: Any, logits: Float[Array, "V"]) -> Any:
    if k >= logits.shape[-1]:
        return logits
    likeliest, at = jax.lax.top_k(logits, k)
    return jnp.full_like(logits, -jnp.inf).at[at].set(likeliest)


def _top_p(p: float, tokens: Any, logits: Float[Array, "V"]) -> Any:
    likeliest, at = jax.lax.top_k(logits, logits.shape[-1])
    probability = jax.nn.softmax(likeliest)
    before = jnp.cumsum(probability) - probability
    return jnp.full_like(logits, -jnp.inf).at[at].set(jnp.where(before < p, likeliest, -jnp.inf))


def _min_p(p: float, tokens: Any, logits: Float[Array, "V"]) -> Any:
    return jnp.where(jnp.exp(logits - jnp.max(logits)) >= p, logits, -jnp.inf)


def _repetition_penalty(penalty: float, tokens: Any, logits: Float[Array, "V"]) -> Any:
    V = logits.shape[-1]
    at = jnp.where(tokens < 0, V, tokens)  # out of range: dropped
    seen = jnp.zeros(V, bool).at[at].set(True, mode="drop")
    penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalised, logits)


# They see logits and not whose they are.
OF_ANY_ORDER = _temperature, _top_k, _top_p, _min_p


# --- What chooses.


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: ``softmax(logits / temperature)`` over the likeliest.

    The numbers of the processors of the same names, which are applied in this order:
    ``repetition_penalty``, ``temperature``, ``top_k``, ``top_p``, ``min_p``.

    Attributes:
      temperature: 1 is the model's own distribution, less is sharper.
      top_k: only the ``top_k`` likeliest tokens; None: all.
      top_p: of these only the likeliest that together reach this probability; None: all.
      min_p: of these only those with this part of the likeliest's probability; None: all.
      repetition_penalty: of tokens that the row has; None: none.

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
        """The same as processors."""
        numbers: dict[Callable[[Any], Processor], Any] = {
            repetition_penalty: self.repetition_penalty,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
        }
        return tuple(make(x) for make, x in numbers.items() if x is not None)

    def draw(self, logits: Float[Array, "V"], key: jax.Array, tokens: Any = None) -> Int[Array, ""]:
        """One token, after those of the row so far.

        >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
        >>> int(Sampling(top_p=0.5).draw(logits, jax.random.key(0)))
        1
        """
        tokens = jnp.zeros(0, jnp.int32) if tokens is None else jnp.asarray(tokens)
        left, at = _left(self.processors, tokens, logits)
        drawn = jax.random.categorical(key, left)
        return drawn if at is None else at[drawn]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a token comes from logits: processors, then the likeliest or a draw."""

    processors: tuple[Processor, ...] = ()
    draws: bool = False

    def __call__(self, tokens: Any, logits: Float[Array, "V"], key: Any) -> Int[Array, ""]:
        """The token; -1 where logits are NaN or all are ``-inf``, so that there is none."""
        left, at = _left(self.processors, tokens, logits)
        token = jax.random.categorical(key, left) if self.draws else jnp.argmax(left)
        token = token if at is None else at[token]
        return jnp.where(jnp.max(left) > -jnp.inf, token, -1).astype(jnp.int32)


def likeliest(*processors: Processor) -> Choice:
    """For ``generate(sampling=...)``: no draw, but the likeliest of what the processors leave.

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


def _left(processors: tuple[Processor, ...], tokens: Any, logits: Any) -> tuple[Any, Any]:
    """The logits that processors leave, and of which tokens they are, None for all in their order.

    What comes after ``top_k`` sees its ``k`` alone where it asks for no more: to sort those is
    cheap, and to sort a vocabulary is not.
    """
    for i, top in enumerate(processors):
        after = processors[i + 1 :]
        if _is(top, _top_k) and all(_is(x, *OF_ANY_ORDER) for x in after):
            logits = Chain(processors[:i])(tokens, logits)
            likeliest, at = jax.lax.top_k(logits, min(top.number, logits.shape[-1]))  # type: ignore[attr-defined]
            return Chain(after)(tokens, likeliest), at
    return Chain(processors)(tokens, logits), None


def _is(processor: Processor, *formulas: Callable[[Any, Any, Any], Any]) -> bool:
    return isinstance(processor, Formula) and processor.formula in formulas


def _checked(processors: Sequence[Processor], name: str = "processors") -> tuple[Processor, ...]:
    """Functions that can be part of a program, chains as what they consist of."""
    for x in processors:
        if not callable(x) or isinstance(x, type):
            raise TypeError(
                f"{name} must be functions (tokens, logits) -> logits, top_k(50) say, or a "
                f"Sampling, got {type(x).__name__} {x!r}"
            )
        try:
            hash(x)
        except TypeError:
            raise TypeError(
                f"{name} must be hashable, since they are part of the program, got "
                f"{type(x).__name__}: a frozen dataclass, say, or a function"
            ) from None
    parts = [x.processors if isinstance(x, Chain) else (x,) for x in processors]
    return tuple(itertools.chain(*parts))
