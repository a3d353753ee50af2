"""Axis letters, array aliases, and shape checks that name the argument.

One alphabet, in annotations, einsums, tests and docs:

=========  ==================================================================
``B``      batch; ``*B`` any number of leading batch axes, also none
``T``      query length
``S``      key-value length
``N``      query heads, ``N = G * K``
``K``      key-value heads; ``K == 1`` is multi-query attention
``G``      query heads per key-value head: query head ``n`` reads key-value
           head ``n // G``
``H``      width of query and key
``D``      width of value and output
=========  ==================================================================

The layout is ``*B T N H``, as in ``jax.nn``.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

AnyArray: TypeAlias = Array | np.ndarray
# An index of a query, a key or a block: static, or known at run time.
Index: TypeAlias = int | np.integer[Any] | Array

# Names of results, for policies of jax.checkpoint.
OUT_NAME, LSE_NAME = "attention_out", "attention_lse"

# Sizes are ints, or the symbolic ones of jax.export.
Size: TypeAlias = Any
Shape: TypeAlias = tuple[Size, ...]

Query = Float[AnyArray, "*B T N H"]
Key = Float[AnyArray, "*B S K H"]
Value = Float[AnyArray, "*B S K D"]
Output = Float[Array, "*B T N D"]
Normalizer = Float[Array, "*B T N"]


@runtime_checkable
class HasDtype(Protocol):
    """An array, its abstract value or a ``jax.ShapeDtypeStruct``."""

    @property
    def dtype(self) -> Any:
        """The dtype of the entries."""


# An int, or one int per example.
PerExample = int | Int[AnyArray, "*B"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the axis letters stand for in one call.

    >>> from attention_jax.core.axes import Sizes
    >>> Sizes(B=(2,), T=5, S=7, K=3, G=2, H=11, D=13).N
    6
    """

    B: Shape
    T: Size
    S: Size
    K: int
    G: int
    H: int
    D: int

    @property
    def N(self) -> int:
        """Query heads."""
        return self.K * self.G

    def of_letters(self) -> dict[str, Size | Shape]:
        """The sizes by letter, for messages."""
        letters = {a: getattr(self, a) for a in ("T", "S", "N", "K", "H", "D")}
        return {"*B": self.B, **letters}

    @property
    def symbolic_batch(self) -> bool:
        """Whether the number of examples is a symbol of ``jax.export``."""
        return any(map(jax.export.is_symbolic_dim, self.B))

    @property
    def symbolic_lengths(self) -> bool:
        """Whether the query or key length is a symbol of ``jax.export``."""
        return any(map(jax.export.is_symbolic_dim, (self.T, self.S)))


def is_array(x: Any) -> bool:
    """True for JAX arrays, tracers and NumPy arrays and scalars."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def kind(x: Any) -> str:
    """A short description of an unexpected argument, for messages.

    >>> from attention_jax import masks
    >>> from attention_jax.core.axes import kind
    >>> kind(masks.causal()), kind(masks.causal), kind(3)
    ('masks.causal(...)', 'the function causal', 'int 3')
    """
    if isinstance(x, type):
        return f"the class {x.__name__}"
    if isinstance(name := getattr(x, "public_name", None), str):  # a mask or a score
        return f"{name}(...)"
    if inspect.isroutine(x):
        return f"the function {x.__name__}"
    if is_array(x):
        return f"an array of dtype {x.dtype}"
    return f"{type(x).__name__} {x!r}" if isinstance(x, (int, float, str)) else type(x).__name__


def brief(x: Any) -> str:
    """An argument or result on one line, with the entries of small arrays only.

    >>> import numpy as np
    >>> from attention_jax.core.axes import brief
    >>> brief(np.arange(3)), brief(np.zeros((2, 9), np.float32))
    ('[0 1 2]', 'float32[2, 9]')
    """
    if is_array(x):
        known = not isinstance(x, jax.core.Tracer) and x.size <= 8 and x.ndim <= 1
        if isinstance(x, jax.Array) and known:
            known = not x.is_deleted() and x.is_fully_addressable
            known = known and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
        return str(np.asarray(x)) if known else f"{x.dtype}{list(x.shape)}"
    if type(x) is tuple and len(x) > 1:
        return f"({brief(x[0])}, and {len(x) - 1} more)"
    return repr(x)


def brief_fields(x: Any, names: Sequence[str]) -> str:
    """A value with these fields on one line, for its ``__repr__``."""
    shown = ", ".join(f"{name}={brief(getattr(x, name))}" for name in names)
    return f"{type(x).__name__}({shown})"


def with_sizes(layout: str, sizes: Mapping[str, Size | Shape]) -> str:
    """The letters of some axes, and the sizes of those that are known.

    >>> from attention_jax.core.axes import with_sizes
    >>> with_sizes("[*B T K H]", {"*B": (2,), "K": 3})
    '[*B T K H] with *B = (2,), K = 3'
    """
    letters = layout.strip("[]").split()
    known = ", ".join(f"{a} = {sizes[a]}" for a in letters if a in sizes)
    return f"{layout} with {known}" if known else layout


def check_float_array(name: str, x: Any) -> None:
    """Raises TypeError unless ``x`` has a shape and a floating dtype.

    A ``jax.ShapeDtypeStruct`` passes too, for ``explain``.
    """
    if not (is_array(x) or isinstance(x, jax.ShapeDtypeStruct)):
        raise TypeError(
            f"{name} must be a JAX or NumPy array, got {kind(x)}: convert it with jnp.asarray"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} must have a floating dtype, got {jnp.dtype(x.dtype).name}: cast it, for "
            f"example with {name}.astype(jnp.float32)"
        )


def check_query_key_value(query: Any, key: Any, value: Any) -> Sizes:
    """The sizes of the three arrays, after a check of their ranks, dtypes and shapes.

    Raises:
      TypeError: not an array, not floating, or three different dtypes.
      ValueError: rank below 3, or axes that do not fit together.

    >>> import numpy as np
    >>> from attention_jax.core.axes import check_query_key_value
    >>> q, k = np.zeros((2, 5, 6, 4), np.float32), np.zeros((2, 7, 3, 4), np.float32)
    >>> check_query_key_value(q, k, k)
    Sizes(B=(2,), T=5, S=7, K=3, G=2, H=4, D=4)
    """
    arrays = {"query": query, "key": key, "value": value}
    layout = {"query": "[*B T N H]", "key": "[*B S K H]", "value": "[*B S K D]"}
    for name, x in arrays.items():
        check_float_array(name, x)
        if len(x.shape) < 3:
            raise ValueError(
                f"{name} must have at least 3 axes {layout[name]}, got shape {tuple(x.shape)}"
            )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            "query, key and value must have one dtype, got "
            + ", ".join(f"{n} {jnp.dtype(x.dtype).name}" for n, x in arrays.items())
            + ": cast them to the one you mean"
        )
    *B, T, N, H = query.shape
    *B_key, S, K, H_key = key.shape
    *B_value, S_value, K_value, D = value.shape
    for name, batch in (("key", B_key), ("value", B_value)):
        if batch != B:
            raise ValueError(
                f"{name} has batch axes {tuple(batch)} (*B) but query has {tuple(B)}: they must "
                f"be equal"
            )
    if H_key != H:
        raise ValueError(f"key has width {H_key} (H) but query has {H}: they must be equal")
    if S_value != S:
        raise ValueError(f"value has length {S_value} (S) but key has {S}: they must be equal")
    if K_value != K:
        raise ValueError(f"value has {K_value} heads (K) but key has {K}: they must be equal")
    if H == 0:
        raise ValueError("query has width 0 (H): it must be at least 1")
    if K == 0 or N % K:
        rule = "N must be a multiple of K" if K else "K must be at least 1"
        raise ValueError(f"key has {K} heads (K) but query has {N} (N): {rule}")
    return Sizes(B=tuple(B), T=T, S=S, K=K, G=N // K, H=H, D=D)


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of softmax, lse and sums: at least float32.

    >>> import jax.numpy as jnp
    >>> from attention_jax.core.axes import accumulation_dtype
    >>> accumulation_dtype(jnp.bfloat16).name
    'float32'
    """
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def broadcasts_to(shape: Shape, full: Shape) -> bool:
    """Whether an array of ``shape`` broadcasts to ``full``; sizes may be symbolic.

    >>> from attention_jax.core.axes import broadcasts_to
    >>> broadcasts_to((3, 1), (2, 3, 4)), broadcasts_to((2, 1, 1), (3, 4))
    (True, False)
    """
    missing = len(full) - len(shape)
    return missing >= 0 and all(a in (1, f) for a, f in zip(shape, full[missing:], strict=True))


def same_rank(*arrays: ArrayLike) -> tuple[jax.Array, ...]:
    """The arrays with leading axes of size 1, so that all have the same rank.

    Broadcasting adds these axes too, unless ``jax_numpy_rank_promotion`` forbids it.

    >>> import numpy as np
    >>> from attention_jax.core.axes import same_rank
    >>> a, b = same_rank(np.zeros((2, 3)), np.zeros(3))
    >>> a.shape, b.shape
    ((2, 3), (1, 3))
    """
    rank = max(jnp.ndim(x) for x in arrays)
    return tuple(jnp.expand_dims(x, tuple(range(rank - jnp.ndim(x)))) for x in arrays)


def check_broadcastable(name: str, shape: Shape, sizes: Sizes) -> None:
    """Raises ValueError unless ``shape`` broadcasts to ``[*B N T S]``."""
    if not broadcasts_to(shape, (*sizes.B, sizes.N, sizes.T, sizes.S)):
        raise ValueError(
            f"{name} has shape {tuple(shape)}, which does not broadcast to "
            f"{with_sizes('[*B N T S]', sizes.of_letters())}{weights_hint(name, shape, sizes)}"
        )


def weights_hint(name: str, shape: Shape, sizes: Sizes) -> str:
    """The end of an error message for an array that does not broadcast to ``[*B N T S]``.

    >>> from attention_jax.core.axes import Sizes, weights_hint
    >>> weights_hint("mask", (2, 5, 7), Sizes(B=(2,), T=5, S=7, K=3, G=2, H=11, D=13))
    ': it looks like [*B T S], add the head axis with mask[..., None, :, :]'
    """
    if sizes.B and broadcasts_to(shape, (*sizes.B, sizes.T, sizes.S)):
        return f": it looks like [*B T S], add the head axis with {name}[..., None, :, :]"
    if sizes.B and tuple(shape) == (*sizes.B, sizes.S):
        return f": it looks like [*B S], add head and query axes with {name}[..., None, None, :]"
    return ": give it the shape [T S], [N T S] or [*B N T S], in which any axis may have size 1"


# --- Checks of other arguments.


def is_int(x: Any) -> bool:
    """True for a Python or NumPy int, which a bool is not."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, (bool, np.bool_))


def as_int(name: str, x: Any) -> int:
    """``x`` as an int; raises TypeError unless it is one."""
    if not is_int(x):
        raise TypeError(f"{name} must be an int, got {kind(x)}")
    return int(x)


def int_at_least(name: str, x: Any, least: int) -> int:
    """``x`` as an int; raises unless it is one, and at least ``least``."""
    x = as_int(name, x)
    if x < least:
        raise ValueError(f"{name} must be at least {least}, got {x}")
    return x


def as_float(name: str, x: Any) -> float:
    """``x`` as a float; raises TypeError unless it is a Python or NumPy number, and no bool."""
    if not (is_int(x) or isinstance(x, (float, np.floating))):
        raise TypeError(f"{name} must be a number, got {kind(x)}")
    return float(x)


def positive_float(name: str, x: Any) -> float:
    """``x`` as a float; raises unless it is a number, positive and finite."""
    x = as_float(name, x)
    if not 0.0 < x < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {x}")
    return x


def check_finite(name: str, x: Any) -> None:
    """Raises ValueError if ``x`` is a number that is NaN or infinite; arrays are not checked."""
    if isinstance(x, (float, np.floating)) and not math.isfinite(x):
        raise ValueError(f"{name} must be finite, got {x}")


def int_array(name: str, x: Any, rank: int) -> None:
    """Raises unless ``x`` is a signed integer array of at least ``rank`` axes."""
    if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.signedinteger):
        raise TypeError(f"{name} must be a signed integer array, got {kind(x)}")
    _check_rank(name, x, rank)


def bool_array(name: str, x: Any, rank: int) -> None:
    """Raises unless ``x`` is a bool array of at least ``rank`` axes."""
    if not is_array(x) or x.dtype != np.bool_:
        raise TypeError(f"{name} must be a bool array (True = visible), got {kind(x)}")
    _check_rank(name, x, rank)


def _check_rank(name: str, x: Any, least: int) -> None:
    if x.ndim < least:
        axes = "axis" if least == 1 else "axes"
        raise ValueError(f"{name} must have at least {least} {axes}, got shape {x.shape}")


def float_array(name: str, x: Any, ranks: tuple[int, ...] | None = None) -> None:
    """Raises unless ``x`` is a floating array, of one of these ``ranks`` if they are given."""
    if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating array, got {kind(x)}")
    if ranks is not None and x.ndim not in ranks:
        allowed = " or ".join(map(str, ranks)) + (" axis" if ranks == (1,) else " axes")
        raise ValueError(f"{name} must have {allowed}, got shape {x.shape}")


def per_example(name: str, x: Any, least: int | None = None) -> int | AnyArray:
    """``x`` if it is an int or an int array ``[*B]``; a NumPy scalar becomes an int.

    Args:
      least: the least int that is allowed; arrays are not checked.
    """
    if is_int(x):
        return int(x) if least is None else int_at_least(name, x, least)
    if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.signedinteger):
        raise TypeError(f"{name} must be an int or a signed integer array, got {kind(x)}")
    return x


def checked_align(align: str) -> str:
    """``align``; raises unless it is ``"start"`` or ``"end"``."""
    if align not in ("start", "end"):
        raise ValueError(f'align must be "start" or "end", got {align!r}')
    return align


def check_tokens(name: str, x: Any, layout: str, width: int) -> None:
    """Raises unless ``x`` is a floating array with the axes of ``layout`` and a width.

    Args:
      name: of the argument.
      x: the argument.
      layout: such as ``"[*B T E]"``; at least as many axes as letters other than ``*B``.
      width: of the last axis.
    """
    check_float_array(name, x)
    *axes, last = layout.strip("[]").split()
    rank = len([a for a in axes if a not in ("*B", "...")]) + 1
    if x.ndim < rank or x.shape[-1] != width:
        raise ValueError(f"{name} must have shape {layout} with {last} = {width}, got {x.shape}")


def check_real(real: Any, shape: Shape) -> None:
    """Raises unless ``real`` is a padding mask of the tokens' shape ``[*B T]``: bool."""
    if not is_array(real) or real.dtype != np.bool_:
        raise TypeError(f"real must be a bool array (False for padding), got {kind(real)}")
    if real.shape != shape:
        raise ValueError(f"real must have the tokens' shape [*B T] = {shape}, got {real.shape}")


def check_broadcasts(name: str, x: Any, shape: Shape) -> None:
    """Raises unless the array ``x`` broadcasts to the ``shape`` of the tokens."""
    if not broadcasts_to(x.shape, shape):
        raise ValueError(f"{name} must broadcast to [*B T] = {shape}, got {x.shape}")


def check_positions(positions: Any, name: str = "positions") -> AnyArray:
    """The argument as an array; raises TypeError unless it holds integers."""
    if not is_array(positions):
        positions = np.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {positions.dtype}")
    return positions


def check_position_arrays(query_positions: Any, key_positions: Any) -> None:
    """Raises unless both are signed integer arrays ``[*B T]`` and ``[*B S]`` of one dtype."""
    for name, x in (("query_positions", query_positions), ("key_positions", key_positions)):
        int_array(name, x, 1)
    check_one_dtype("query_positions", query_positions, "key_positions", key_positions)


def check_one_dtype(name: str, x: HasDtype, other_name: str, other: HasDtype) -> None:
    """Raises TypeError unless the two arrays have one dtype."""
    if x.dtype != other.dtype:
        raise TypeError(
            f"{name} and {other_name} must have one dtype, got {x.dtype} and {other.dtype}"
        )


def check_function(fn: Any, arguments: str, arrays: tuple[Any, ...]) -> None:
    """Raises TypeError unless ``fn`` is callable and ``arrays``, its last arguments, are arrays.

    Args:
      arguments: its first ones, such as ``"b, n, q, k"``.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of ({arguments}, *arrays), got {kind(fn)}")
    for x in arrays:
        if not is_array(x):
            raise TypeError(f"arrays must be JAX or NumPy arrays, got {kind(x)}")
