"""Positions: sinusoidal and learned vectors, rotary angles and their scalings, relative terms.

Positions are explicit integers ``[*B T]``, so packed, padded and cached sequences need nothing
special. Rotary embedding turns pairs of numbers of a query or key by an angle that grows with the
position, so that their product depends on the distance alone::

    angle_i = position * f_i,   f_i = theta ** (-2 i / width)

A ``Scaling`` is a value that changes the frequencies ``f`` for sequences longer than those that a
model was trained on. Slopes and buckets (ALiBi, T5) and Shaw's vectors are scores: see ``scores``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attention_jax.axes import AnyArray, accumulation_dtype, is_array
from attention_jax.scores import Score, alibi, alibi_slopes, relative_bias, relative_embedding

__all__ = [
    "NTK",
    "DynamicNTK",
    "Linear",
    "Llama3",
    "Scaling",
    "YaRN",
    "alibi",
    "alibi_slopes",
    "frequencies",
    "learned",
    "relative_bias",
    "relative_embedding",
    "rotary",
    "sinusoidal",
    "transformer_xl",
]


# --- Vectors that are added to the inputs.


def sinusoidal(
    positions: Any, width: int, *, theta: float = 10_000.0, interleaved: bool = True
) -> Float[Array, "*B T E"]:
    """``sin(position * f_i)`` and ``cos(position * f_i)``, ``f_i = theta ** (-2 i / width)``.

    Args:
      positions: integers ``[*B T]``.
      width: numbers per position (E), even.
      theta: the longest wavelength is ``2 pi theta``.
      interleaved: sine and cosine in turns, as in the paper; else all sines first.

    Returns:
      float32 ``[*B T E]``.

    Raises:
      ValueError: ``width`` is odd or not positive, ``theta`` not positive.
      TypeError: ``positions`` are not integers.

    >>> print(np.asarray(sinusoidal(np.arange(2), 4)).round(2))
    [[0.   1.   0.   1.  ]
     [0.84 0.54 0.01 1.  ]]

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5.
    """
    f, _ = frequencies(width, theta=theta)
    angles = _angles(check_positions(positions), f)
    pair = jnp.sin(angles), jnp.cos(angles)
    if interleaved:
        return jnp.stack(pair, axis=-1).reshape(*angles.shape[:-1], width)
    return jnp.concatenate(pair, axis=-1)


def learned(table: Float[AnyArray, "P E"], positions: Any) -> Float[Array, "*B T E"]:
    """``table[position]``.

    Args:
      table: one vector for each position ``[P E]``, differentiable.
      positions: integers ``[*B T]`` from 0 to ``P - 1``.

    Returns:
      ``[*B T E]``; where positions are known only at run time, NaN for those out of range.

    Raises:
      ValueError: a position known before is out of range.
      TypeError: ``positions`` are not integers.

    >>> learned(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), np.array([1, 0])).tolist()
    [[3.0, 4.0], [1.0, 2.0]]
    """
    positions = check_positions(positions)
    if not isinstance(positions, jax.core.Tracer) and positions.size:
        least, most = int(positions.min()), int(positions.max())
        if least < 0 or most >= table.shape[0]:
            raise ValueError(
                f"positions must be from 0 to {table.shape[0] - 1}, the rows of the table, got "
                f"{least} to {most}"
            )
    # To take(), -1 is the last row: here it is out of range.
    positions = jnp.where(jnp.asarray(positions) < 0, table.shape[0], positions)
    return jnp.take(jnp.asarray(table), positions, axis=0, mode="fill", fill_value=jnp.nan)


def check_positions(positions: Any) -> Any:
    """The argument as an array; raises where it cannot be positions."""
    if not is_array(positions):
        positions = np.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be integers, got {positions.dtype}")
    return positions


def _angles(positions: Any, f: Any) -> jax.Array:
    """``position * f_i`` in float32: ``[*B T, i]``."""
    return jnp.asarray(positions)[..., None].astype(jnp.float32) * f


# --- Rotary.


class Scaling:
    """A change of rotary frequencies. Subclasses give ``scaled``."""

    def scaled(self, f: np.ndarray, width: int, theta: float, length: Any) -> tuple[Any, float]:
        """New frequencies, and what cosine and sine are multiplied by.

        Args:
          f: ``theta ** (-2 i / width)``, float64.
          width, theta: as for ``rotary``.
          length: of the sequence, an int or a traced scalar; None: unknown.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define scaled(f, width, theta, length)"
        )


@dataclasses.dataclass(frozen=True)
class Linear(Scaling):
    """``f / factor``: positions squeezed into the trained range.

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
    """``theta * factor ** (width / (width - 2))``: slow pairs squeezed, fast ones hardly.

    Source: bloc97 2023, "NTK-aware scaled RoPE"; Peng et al. 2023 (YaRN), section 3.1.
    """

    factor: float

    def __post_init__(self) -> None:
        _positive(self, "factor")

    def scaled(self, f: np.ndarray, width: int, theta: float, length: Any) -> tuple[Any, float]:
        return _ntk(f, self.factor, width), 1.0


@dataclasses.dataclass(frozen=True)
class DynamicNTK(Scaling):
    """``NTK`` by as much as the present length needs: nothing up to ``original`` tokens.

    With ``L = max(length, original)`` the factor is ``factor * L / original - (factor - 1)``.

    Source: emozilla 2023, "Dynamically scaled RoPE"; Peng et al. 2023 (YaRN), section 3.3.
    """

    factor: float
    original: int

    def __post_init__(self) -> None:
        _positive(self, "factor", "original")

    def scaled(self, f: np.ndarray, width: int, theta: float, length: Any) -> tuple[Any, float]:
        if length is None:
            raise ValueError("length must be given: DynamicNTK depends on it")
        if isinstance(length, jax.Array):
            longest = jnp.maximum(length, self.original).astype(jnp.float32)
        else:
            longest = max(length, self.original)
        return _ntk(f, self.factor * longest / self.original - (self.factor - 1), width), 1.0


def _ntk(f: np.ndarray, factor: Any, width: int) -> Any:
    """``(theta * g) ** (-2 i / width) = f * g ** (-2 i / width)``."""
    if width == 2:
        return f  # the one pair has i = 0
    power = -2.0 * np.arange(width // 2) / width * (width / (width - 2))
    if isinstance(factor, jax.Array):
        return jnp.asarray(f, jnp.float32) * factor ** jnp.asarray(power, jnp.float32)
    return f * factor**power


@dataclasses.dataclass(frozen=True)
class YaRN(Scaling):
    """Pairs that turn often are kept, those that turn less than once squeezed, between: a ramp.

    A pair turns ``original * f / (2 pi)`` times within ``original`` tokens. Its share of ``f``
    against ``f / factor`` falls linearly in its number from where that is ``fast`` to where it is
    ``slow``. Cosine and sine are multiplied by ``0.1 ln(factor) + 1``, or by ``attention_factor``,
    which makes up for the flatter softmax.

    Source: Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models".
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    """Whether the ends of the ramp are whole numbers of pairs."""

    def __post_init__(self) -> None:
        _positive(self, "factor", "original", "fast", "slow")

    def scaled(self, f: np.ndarray, width: int, theta: float, length: Any) -> tuple[Any, float]:
        def pair(turns: float) -> float:
            return width * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(self.fast), pair(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        span = high - low or 0.001
        squeezed = np.clip((np.arange(width // 2) - low) / span, 0.0, 1.0)
        scale = self.attention_factor
        if scale is None:
            scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return f / self.factor * squeezed + f * (1 - squeezed), scale


@dataclasses.dataclass(frozen=True)
class Llama3(Scaling):
    """Long wavelengths squeezed by ``factor``, short ones kept, between: a ramp.

    With ``turns = original * f / (2 pi)``: kept above ``high``, squeezed below ``low``.

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
        turns = self.original * f / (2 * np.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return f / self.factor * (1 - kept) + f * kept, 1.0


def _positive(value: Any, *names: str) -> None:
    for name in names:
        if not getattr(value, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(value, name)!r}")


def frequencies(
    width: int, *, theta: float = 10_000.0, scaling: Scaling | None = None, length: Any = None
) -> tuple[Float[Array, "h"], float]:
    """Radians per position of each pair, and what cosine and sine are multiplied by.

    Args:
      width: numbers that are turned, even; there are ``h = width / 2`` pairs.
      theta: ``f_i = theta ** (-2 i / width)``.
      scaling: changes them.
      length: of the sequence, for scalings that depend on it; an int or a traced scalar.

    Raises:
      ValueError: ``width`` is odd or not positive, ``theta`` not positive, ``length`` missing.
      TypeError: ``scaling`` is not a ``Scaling``.

    >>> f, scale = frequencies(4, scaling=Linear(2.0))
    >>> print(f, scale)
    [0.5   0.005] 1.0
    """
    if width < 2 or width % 2:
        raise ValueError(f"width must be even and positive, got {width}")
    if not theta > 0:
        raise ValueError(f"theta must be positive, got {theta}")
    f: Any = theta ** (-2.0 * np.arange(width // 2) / width)
    scale = 1.0
    if scaling is not None:
        if not isinstance(scaling, Scaling):
            raise TypeError(f"scaling must be a Scaling or None, got {type(scaling).__name__}")
        f, scale = scaling.scaled(f, width, theta, length)
    return jnp.asarray(f, jnp.float32), scale


def rotary(
    x: Float[AnyArray, "*B T N H"],
    positions: Any,
    *,
    theta: float = 10_000.0,
    width: int | None = None,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    length: Any = None,
) -> Float[Array, "*B T N H"]:
    """Each pair ``(a, b)`` of the first ``width`` numbers turned by ``position * f``::

        (a, b) -> (a cos - b sin, a sin + b cos)

    Args:
      x: queries or keys ``[*B T N H]``, differentiable.
      positions: integers that broadcast to ``[*B T]``.
      theta: ``f_i = theta ** (-2 i / width)``.
      width: how many numbers are turned, even; the rest stays. Default: all (H).
      interleaved: pairs are neighbours ``(0, 1), (2, 3), ...``; else number ``i`` and
        ``i + width / 2``, as in most published checkpoints.
      scaling, length: see ``frequencies``.

    Returns:
      ``[*B T N H]`` in the dtype of ``x``; computed in float32 or wider. In float32 an angle is off
      by up to ``6e-8 * position``.

    Raises:
      ValueError: ``width`` is odd or more than H; ``positions`` do not broadcast to ``[*B T]``.
      TypeError: ``positions`` are not integers.

    >>> x = np.array([[[1.0, 0.0]], [[1.0, 0.0]]], np.float32)  # T = 2, N = 1, H = 2
    >>> print(np.asarray(rotary(x, np.arange(2))).round(2)[:, 0])
    [[1.   0.  ]
     [0.54 0.84]]

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    H = x.shape[-1]
    width = H if width is None else width
    if width > H:
        raise ValueError(f"width must be at most {H}, the width of x (H), got {width}")
    positions = check_positions(positions)
    try:
        fits = np.broadcast_shapes(positions.shape, x.shape[:-2]) == x.shape[:-2]
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"positions must broadcast to {x.shape[:-2]}, the [*B T] of x, got {positions.shape}"
        )
    f, scale = frequencies(width, theta=theta, scaling=scaling, length=length)
    angles = _angles(positions, f)[..., None, :]  # [*B T 1 h]
    dtype = accumulation_dtype(x.dtype)
    cos, sin = ((scale * fn(angles)).astype(dtype) for fn in (jnp.cos, jnp.sin))
    turned = jnp.asarray(x)[..., :width].astype(dtype)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = jnp.split(turned, 2, axis=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., width:]], axis=-1)


# --- Relative terms.


def transformer_xl(
    query: Float[AnyArray, "*B T N H"],
    table: Float[AnyArray, "R N H"],
    *,
    content_bias: Float[AnyArray, "N H"],
    position_bias: Float[AnyArray, "N H"],
    scale: float | None = None,
    offset: Any = 0,
    align: str = "start",
) -> tuple[Float[Array, "*B T N H"], Score]:
    """Transformer-XL's logits as a query and a score, ``r`` the table's row of ``j - i - offset``::

        s_ij = scale * ((q_i + content_bias) . k_j + (q_i + position_bias) . r)

    Args:
      query: ``[*B T N H]``.
      table: ``[R N H]``, rows for distances ``-c .. c``; further ones take the last.
      content_bias: ``u [N H]``.
      position_bias: ``v [N H]``.
      scale: that of the call of ``attention``; default ``1 / sqrt(H)``.
      offset, align: as for ``alibi``.

    Returns:
      What to pass as ``query`` and as ``score``.

    >>> q, zero = np.ones((1, 1, 1), np.float32), np.zeros((1, 1), np.float32)
    >>> table = np.array([1.0, 2.0, 3.0], np.float32)[:, None, None]
    >>> query, score = transformer_xl(q, table, content_bias=zero, position_bias=zero)
    >>> score.score(np.zeros(3, np.float32), 0, 0, 0, np.arange(3)).tolist()
    [2.0, 3.0, 3.0]

    Source: Dai et al. 2019, "Transformer-XL", section 3.3.
    """
    query = jnp.asarray(query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    score = relative_embedding(scale * (query + position_bias), table, offset=offset, align=align)
    return query + content_bias, score
