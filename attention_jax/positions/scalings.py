"""Rotary frequencies, and scalings of them for longer sequences."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attention_jax.core.axes import same_rank


class Scaling:
    """A change of rotary frequencies. Subclasses give ``scaled``.

    Attributes:
      depends_on_length: whether ``scaled`` needs the length of the sequence. If so, ``original`` is
        the length up to which frequencies stay the same.
    """

    depends_on_length: ClassVar[bool] = False

    def scaled(self, f: np.ndarray, width: int, theta: float, length: Any) -> tuple[Any, float]:
        """New frequencies, and the factor of cosine and sine.

        Args:
          f: ``theta ** (-2 i / width)``, float64.
          width, theta: as for ``rotary``.
          length: of the sequence: an int, or an int array whose axes go before that of ``f``; None
            if unknown.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define scaled(f, width, theta, length)"
        )


@dataclasses.dataclass(frozen=True)
class Linear(Scaling):
    """``f / factor``: positions are interpolated within the trained range.

    Source: Chen et al. 2023, "Extending Context Window of Large Language Models via Positional
    Interpolation".
    """

    factor: float

    def __post_init__(self) -> None:
        _positive(self, "factor")

    def scaled(self, f: np.ndarray, width: int, theta: float, length: Any) -> tuple[Any, float]:
        return f / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class NTK(Scaling):
    """``theta * factor ** (width / (width - 2))``: low frequencies are scaled, high ones hardly.

    Source: bloc97 2023, "NTK-aware scaled RoPE"; Peng et al. 2023 (YaRN), section 3.1.
    """

    factor: float

    def __post_init__(self) -> None:
        _positive(self, "factor")

    def scaled(self, f: np.ndarray, width: int, theta: float, length: Any) -> tuple[Any, float]:
        return _ntk(f, self.factor, width), 1.0


@dataclasses.dataclass(frozen=True)
class DynamicNTK(Scaling):
    """``NTK`` with a factor that grows with the length; no change up to ``original`` tokens.

    With ``L = max(length, original)`` the factor is ``factor * L / original - (factor - 1)``.

    Source: emozilla 2023, "Dynamically scaled RoPE"; Peng et al. 2023 (YaRN), section 3.3.
    """

    factor: float
    original: int
    depends_on_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive(self, "factor", "original")

    def scaled(self, f: np.ndarray, width: int, theta: float, length: Any) -> tuple[Any, float]:
        if length is None:
            raise ValueError("length must be given: DynamicNTK depends on it")
        if isinstance(length, jax.Array):
            longest = jnp.maximum(length, self.original).astype(_widest())
        else:
            longest = max(length, self.original)
        return _ntk(f, self.factor * longest / self.original - (self.factor - 1), width), 1.0


def _ntk(f: np.ndarray, factor: Any, width: int) -> Any:
    """``(theta * g) ** (-2 i / width) = f * g ** (-2 i / width)``."""
    if width == 2:
        return f  # the one pair has i = 0
    power = -2.0 * np.arange(width // 2) / width * (width / (width - 2))
    if not isinstance(factor, jax.Array):
        return f * factor**power
    factor, f_, power_ = same_rank(
        factor[..., None], jnp.asarray(f, factor.dtype), jnp.asarray(power, factor.dtype)
    )
    return f_ * factor**power_


def _widest() -> Any:
    """float64 if JAX has it enabled, else float32."""
    return jax.dtypes.canonicalize_dtype(np.float64)


@dataclasses.dataclass(frozen=True)
class YaRN(Scaling):
    """Keeps high frequencies, interpolates low ones, with a linear ramp between the two.

    A pair makes ``original * f / (2 pi)`` rotations within ``original`` tokens. Its frequency is
    ``f`` where these are at least ``fast`` and ``f / factor`` where they are at most ``slow``;
    between, the share of ``f`` falls linearly with the index of the pair. Cosine and sine are
    multiplied by ``attention_factor``, by default ``0.1 ln(factor) + 1``, which makes up for the
    flatter softmax.

    Source: Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models".
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    """Whether the ends of the ramp are rounded to whole pairs."""

    def __post_init__(self) -> None:
        _positive(self, "factor", "original", "fast", "slow")

    def scaled(self, f: np.ndarray, width: int, theta: float, length: Any) -> tuple[Any, float]:
        def pair(rotations: float) -> float:
            ratio = self.original / (rotations * 2 * math.pi)
            return width * math.log(ratio) / (2 * math.log(theta))

        low, high = pair(self.fast), pair(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        span = high - low or 0.001
        interpolated = np.clip((np.arange(width // 2) - low) / span, 0.0, 1.0)
        scale = self.attention_factor
        if scale is None:
            scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return f / self.factor * interpolated + f * (1 - interpolated), scale


@dataclasses.dataclass(frozen=True)
class Llama3(Scaling):
    """Keeps short wavelengths, interpolates long ones by ``factor``, with a ramp between the two.

    By the rotations within ``original`` tokens, ``original * f / (2 pi)``: a frequency is kept
    above ``high`` and divided by ``factor`` below ``low``.

    Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models", and the models' configurations.
    """

    factor: float = 8.0
    original: int = 8192
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        _positive(self, "factor", "original", "low", "high")
        if self.low >= self.high:
            raise ValueError(f"low must be less than high, got {self.low} and {self.high}")

    def scaled(self, f: np.ndarray, width: int, theta: float, length: Any) -> tuple[Any, float]:
        rotations = self.original * f / (2 * np.pi)
        kept = np.clip((rotations - self.low) / (self.high - self.low), 0.0, 1.0)
        return f / self.factor * (1 - kept) + f * kept, 1.0


@dataclasses.dataclass(frozen=True)
class LongRoPE(Scaling):
    """``f_i / short_i`` up to ``original`` tokens, ``f_i / long_i`` in longer sequences.

    The divisors, one for each pair, are results of a search. Cosine and sine are multiplied by
    ``attention_factor``, at every length.

    Source: Ding et al. 2024, "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens".
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    attention_factor: float = 1.0
    depends_on_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive(self, "original", "attention_factor")
        for name in ("short", "long"):
            x = tuple(float(factor) for factor in getattr(self, name))
            if not all(0 < factor < math.inf for factor in x):
                raise ValueError(f"{name} must be positive and finite, got {x}")
            object.__setattr__(self, name, x)
        if len(self.short) != len(self.long):
            raise ValueError(
                f"short and long must have the same length, got {len(self.short)} and "
                f"{len(self.long)}"
            )

    def scaled(self, f: np.ndarray, width: int, theta: float, length: Any) -> tuple[Any, float]:
        if length is None:
            raise ValueError("length must be given: LongRoPE depends on it")
        if len(self.short) != len(f):
            raise ValueError(
                f"short and long must have {len(f)} divisors, one for each pair of {width} "
                f"features, got {len(self.short)}"
            )
        short, long = f / np.array(self.short), f / np.array(self.long)
        if not isinstance(length, jax.Array):
            return (long if length > self.original else short), self.attention_factor
        longer, a, b = same_rank(
            length[..., None] > self.original,
            jnp.asarray(long, _widest()),
            jnp.asarray(short, _widest()),
        )
        return jnp.where(longer, a, b), self.attention_factor


def _positive(value: Any, *names: str) -> None:
    for name in names:
        x = getattr(value, name)
        if not 0 < x < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {x!r}")


def frequencies(
    width: int,
    *,
    theta: float = 10_000.0,
    scaling: Scaling | None = None,
    length: Any = None,
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, "*B h"], float]:
    """Radians per position of each pair, and the factor of cosine and sine.

    Args:
      width: the number of rotated features, even: ``h = width / 2`` pairs.
      theta: ``f_i = theta ** (-2 i / width)``.
      scaling: a change of these frequencies.
      length: of the sequence, for scalings that depend on it; an int, or an int array whose axes go
        before that of the frequencies.
      dtype: of the result; the computation itself is in float64 where it can be.

    Raises:
      ValueError: ``width`` is odd or not positive, ``theta`` not positive, ``length`` missing.
      TypeError: ``scaling`` is not a ``Scaling``.

    >>> from attention_jax.positions import frequencies, Linear
    >>> f, scale = frequencies(4, scaling=Linear(2.0))
    >>> print(f, scale)
    [0.5   0.005] 1.0
    """
    if width < 2 or width % 2:
        raise ValueError(f"width must be even and positive, got {width}")
    if not 0 < theta < math.inf:
        raise ValueError(f"theta must be positive and finite, got {theta}")
    f: Any = theta ** (-2.0 * np.arange(width // 2) / width)
    scale = 1.0
    if scaling is not None:
        if not isinstance(scaling, Scaling):
            raise TypeError(f"scaling must be a Scaling or None, got {type(scaling).__name__}")
        f, scale = scaling.scaled(f, width, theta, length)
    return jnp.asarray(f, dtype), scale


def angles(positions: Any, f: jax.Array) -> jax.Array:
    """``position * f_i`` in the dtype of ``f``: ``[*B T, i]``."""
    at, f = same_rank(jnp.asarray(positions)[..., None].astype(f.dtype), f)
    return at * f
