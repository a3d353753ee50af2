"""The reference: softmax attention in NumPy and float64, forward and backward.

The whole library is tested against this definition, which is written for clarity, not speed.

    logits  = scale * query . key         how well query t matches key s              [T S]
    logits  = step(logits)                each Softcap or Bias of `score`, in order
    logits  = -inf where mask is False    keys the query may not attend to
    weights = softmax(logits)             probabilities over the keys; a sink takes its share
    out     = dropout(weights) . value    the values, averaged by weight              [T D]

`head` is attention for one head of one example. `head_gradients` is its derivative, line by line in
reverse. `attention` and `attention_gradients` only loop over examples and heads.

Axes: `*B` batch (any number of axes), `T`/`S` query/key length, `N`/`K` query/key-value heads
with `N = G * K`, `H` width of query and key, `D` width of value. `d_x` is the gradient of a
scalar loss with respect to `x`.

A pair is masked where the mask is False or the final logit is -inf. A key that no query may attend
to never affects a result, even if it is NaN, nor does a query that may attend to no key: its out
is 0 and its lse -inf (with a sink: lse = the sink).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Float: TypeAlias = npt.NDArray[np.float64]
Bool: TypeAlias = npt.NDArray[np.bool_]
Rule: TypeAlias = Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.ArrayLike]


@dataclasses.dataclass(frozen=True)
class Softcap:
    """A step on the logits that keeps them between -cap and cap: `cap * tanh(s / cap)`.

    It maps -inf to -cap, so a pair that an earlier Bias masked is visible again.

    Source: Gemma 2 (Gemma Team, 2024).

    >>> import numpy as np
    >>> from attention_jax.reference import Softcap
    >>> Softcap(50.0)(np.array([0.0, 1e6, -np.inf])).tolist()
    [0.0, 50.0, -50.0]
    """

    cap: float

    def __post_init__(self) -> None:
        if not 0.0 < self.cap < math.inf:
            raise ValueError(f"cap must be positive and finite, got {self.cap}")

    def __call__(self, s: Float) -> Float:
        """The step on logits of any shape."""
        return self.cap * np.tanh(s / self.cap)

    def pullback(self, s: Float, d_result: Float) -> tuple[Float, None]:
        """The gradients of `s` and of the step's array (it has none); tanh' = 1 - tanh^2."""
        return d_result * (1.0 - np.tanh(s / self.cap) ** 2), None


@dataclasses.dataclass(frozen=True, eq=False)  # == of arrays is an array, not a bool
class Bias:
    """A step on the logits: `s + array`, with `array` broadcastable to [*B N T S].

    Where `array` is -inf the sum is -inf whatever s is: the pair is masked, and s may be NaN.

    >>> import numpy as np
    >>> from attention_jax.reference import Bias
    >>> Bias(np.array([0.5, -np.inf]))(np.ones((1, 2))).tolist()
    [[1.5, -inf]]
    """

    array: npt.NDArray[Any]

    def __call__(self, s: Float) -> Float:
        """The step on logits that `array` broadcasts to."""
        array = np.asarray(self.array, np.float64)
        return np.where(array == -np.inf, -np.inf, s + array)

    def pullback(self, s: Float, d_result: Float) -> tuple[Float, Float]:
        """The gradients of `s` and of `array`, summed over the axes along which it broadcast."""
        return d_result, _sum_to(np.shape(self.array), d_result)


Step: TypeAlias = Softcap | Bias


class Forward(NamedTuple):
    """What attention returns. From `head` the same, without the axes `*B` and `N`."""

    out: Float  # [*B T N D]
    lse: Float  # [*B T N]   natural log of the softmax denominator, the sink's term included
    weights: Float  # [*B N T S]  before dropout; rows sum to 1, less the sink's share


class Gradients(NamedTuple):
    """The gradient with respect to each argument, in that argument's own shape."""

    query: Float
    key: Float
    value: Float
    score: tuple[Float | None, ...]  # one entry per step: the array's for Bias, else None
    sinks: Float | None  # [N], for one head []; None without sinks
    scale: float


def head(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    mask: npt.ArrayLike | None = None,
    score: Step | Sequence[Step] = (),
    sink: float | None = None,
    scale: float | None = None,
    keep: npt.ArrayLike | None = None,
    dropout_rate: float = 0.0,
) -> Forward:
    """One head of one example: `dropout(softmax(mask(score(scale * q k^T)))) v`.

    Args: q [T H], k [S H], v [S D]; `mask`, `keep` and bias arrays broadcastable to [T S];
        `sink` one number; the rest as in `attention`.
    Returns: Forward, with out [T D], lse [T] and weights [T S].
    Raises: ValueError, as `attention` does.

    >>> from attention_jax.reference import head
    >>> q, k, v = [[2.0]], [[1.0], [1.0], [9.0]], [[3.0], [5.0], [7.0]]
    >>> result = head(q, k, v, mask=[True, True, False])
    >>> result.weights.tolist(), result.out.tolist()
    ([[0.5, 0.5, 0.0]], [[4.0]])
    """
    q, k, v, o = _check(_ONE_HEAD, q, k, v, sink, mask, score, scale, keep, dropout_rate)

    logits, _ = _logits(q, k, o)  # [T S]
    weights, _, lse = _softmax(logits, o.sinks)  # [T S], [T]
    v = _zero_masked(v, keep=np.any(logits != -np.inf, axis=0))
    return Forward(_dropout(weights, o) @ v, lse, weights)


def head_gradients(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    d_out: npt.ArrayLike,
    d_lse: npt.ArrayLike | None = None,
    *,
    mask: npt.ArrayLike | None = None,
    score: Step | Sequence[Step] = (),
    sink: float | None = None,
    scale: float | None = None,
    keep: npt.ArrayLike | None = None,
    dropout_rate: float = 0.0,
) -> Gradients:
    """The derivative of `head`: `d_logits = weights * (d_weights - delta + d_lse)`.

    In a row of weights w, `d w_i / d logit_j = w_i * ([i = j] - w_j)` and `d lse / d logit_j =
    w_j`. The loss depends on logit_j through every w_i and through lse; adding up, `d_logit_j =
    w_j * (d_w_j - delta + d_lse)` with `delta = sum_i w_i * d_w_i`. The sink is one more key,
    whose value is 0: its d_w is 0.

    Args: d_out [T D]; d_lse [T] (None: the loss does not use lse); the rest as in `head`.
    Returns: Gradients, in the shapes of the arguments.
    Raises: ValueError, as `attention` does.

    Source: FlashAttention (Dao et al., 2022), where delta is the row sum of `d_out * out`; the
    two are equal, with dropout and sinks too.

    >>> from attention_jax.reference import head_gradients
    >>> head_gradients([[0.0]], [[1.0], [3.0]], [[2.0], [4.0]], [[1.0]]).query.tolist()
    [[1.0]]
    """
    q, k, v, o = _check(_ONE_HEAD, q, k, v, sink, mask, score, scale, keep, dropout_rate)
    d_out = _expect("d_out [T D]", d_out, o.sizes)
    d_lse = _expect("d_lse [T]", np.zeros(len(q)) if d_lse is None else d_lse, o.sizes)

    logits, stages = _logits(q, k, o)
    weights, sink_share, lse = _softmax(logits, o.sinks)  # [T S], [T], [T]
    visible = logits != -np.inf
    q, d_out = (_zero_masked(x, keep=np.any(visible, axis=1)) for x in (q, d_out))
    k, v = (_zero_masked(x, keep=np.any(visible, axis=0)) for x in (k, v))
    d_lse = _zero_masked(d_lse, keep=lse != -np.inf)

    d_v = _dropout(weights, o).T @ d_out  # [S D]
    d_weights = _dropout(d_out @ v.T, o)  # [T S]
    delta = np.sum(weights * d_weights, axis=1)  # [T]
    d_s = weights * (d_weights - delta[:, None] + d_lse[:, None])  # [T S]
    d_sink = np.asarray(np.sum(sink_share * (0.0 - delta + d_lse)))

    d_score: list[Float | None] = []
    for step, s in zip(reversed(o.score), reversed(stages), strict=True):
        d_s, d_array = step.pullback(np.where(visible, s, 0.0), d_s)
        d_score.insert(0, d_array)

    d_q = o.scale * d_s @ k  # [T H]
    d_k = o.scale * d_s.T @ q  # [S H]
    d_scale = float(np.sum(d_s * (q @ k.T)))
    return Gradients(d_q, d_k, d_v, tuple(d_score), None if sink is None else d_sink, d_scale)


def attention(
    query: npt.ArrayLike,
    key: npt.ArrayLike,
    value: npt.ArrayLike,
    *,
    mask: npt.ArrayLike | Rule | None = None,
    score: Step | Sequence[Step] = (),
    sinks: npt.ArrayLike | None = None,
    scale: float | None = None,
    keep: npt.ArrayLike | None = None,
    dropout_rate: float = 0.0,
    query_positions: npt.ArrayLike | None = None,
    key_positions: npt.ArrayLike | None = None,
) -> Forward:
    """Softmax attention: `head` for every example and head; query head n reads key head n // G.

    Args:
        query: [*B T N H].
        key: [*B S K H].
        value: [*B S K D].
        mask: bool, broadcastable to [*B N T S]; True where the query may attend to the key. Or its
            rule, a function of the positions i [*B 1 T 1] of queries and j [*B 1 1 S] of keys.
        score: a Softcap or Bias step on the logits before the mask, or a sequence, in order.
        sinks: [N], one more logit in each head's denominator, without a value.
        scale: multiplies query . key; 1 / sqrt(H) if None.
        keep: the dropout mask, bool, broadcastable to [*B N T S]; False drops the probability.
        dropout_rate: in [0, 1); probabilities that are kept are divided by 1 - dropout_rate.
        query_positions, key_positions: integers, [*B T] or [T], [*B S] or [S]; 0, 1, 2, ... if
            None. Keys at negative positions are masked.
    Returns: Forward, with out [*B T N D], lse [*B T N] and weights [*B N T S], all float64.
    Raises: ValueError; the message names the argument, what was expected and what was given.

    Source: attention, Bahdanau et al., 2015; by scaled dot products and in heads, Vaswani et
    al., 2017; with fewer key heads, Shazeer, 2019, and Ainslie et al., 2023; sinks, Xiao et al.,
    2023, as a learned logit per head gpt-oss (OpenAI, 2025).

    >>> import numpy as np
    >>> from attention_jax.reference import attention
    >>> query, key = np.zeros((1, 2, 1)), np.zeros((3, 1, 1))  # T = 1, N = 2; S = 3, K = 1
    >>> value = np.array([[[3.0]], [[6.0]], [[9.0]]])
    >>> attention(query, key, value).out.tolist()
    [[[6.0], [6.0]]]
    >>> attention(query, key, value, sinks=[0.0, -np.inf]).weights.sum(axis=-1).tolist()
    [[0.75], [1.0]]
    >>> at = {"query_positions": [5], "key_positions": [6, 4, -1]}
    >>> attention(query, key, value, mask=lambda i, j: j <= i, **at).out.tolist()
    [[[6.0], [6.0]]]
    """
    given = mask, score, scale, keep, dropout_rate, query_positions, key_positions
    query, key, value, o = _check(_ALL_HEADS, query, key, value, sinks, *given)
    out = np.zeros(query.shape[:-1] + value.shape[-1:])
    lse, weights = np.zeros(query.shape[:-1]), np.zeros(o.mask.shape)
    for q, kv, n, options in _heads(o):
        out[q], lse[q], weights[n] = head(query[q], key[kv], value[kv], **options)
    return Forward(out, lse, weights)


def attention_gradients(
    query: npt.ArrayLike,
    key: npt.ArrayLike,
    value: npt.ArrayLike,
    d_out: npt.ArrayLike,
    d_lse: npt.ArrayLike | None = None,
    *,
    mask: npt.ArrayLike | Rule | None = None,
    score: Step | Sequence[Step] = (),
    sinks: npt.ArrayLike | None = None,
    scale: float | None = None,
    keep: npt.ArrayLike | None = None,
    dropout_rate: float = 0.0,
    query_positions: npt.ArrayLike | None = None,
    key_positions: npt.ArrayLike | None = None,
) -> Gradients:
    """The derivative of `attention`: `head_gradients` of every head, summed over what they share.

    Args: d_out [*B T N D]; d_lse [*B T N] (None: the loss does not use lse); the rest as in
        `attention`.
    Returns: Gradients, in the shapes of the arguments.
    Raises: ValueError, as `attention` does.

    Source: FlashAttention (Dao et al., 2022), see `head_gradients`.

    >>> import numpy as np
    >>> from attention_jax.reference import attention_gradients
    >>> query, key, value = np.zeros((1, 2, 1)), np.ones((3, 1, 1)), np.ones((3, 1, 1))
    >>> attention_gradients(query, key, value, d_out=np.full((1, 2, 1), 1.5)).value.tolist()
    [[[1.0]], [[1.0]], [[1.0]]]
    """
    given = mask, score, scale, keep, dropout_rate, query_positions, key_positions
    query, key, value, o = _check(_ALL_HEADS, query, key, value, sinks, *given)
    d_out = _expect("d_out [*B T N D]", d_out, o.sizes)
    d_lse = np.zeros(query.shape[:-1]) if d_lse is None else d_lse
    d_lse = _expect("d_lse [*B T N]", d_lse, o.sizes)

    d_query, d_key, d_value = np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    d_stages = [np.zeros(o.mask.shape) for _ in o.score]  # [*B N T S] each
    d_sinks, d_scale = np.zeros_like(o.sinks), 0.0
    for q, kv, n, options in _heads(o):
        d = head_gradients(query[q], key[kv], value[kv], d_out[q], d_lse[q], **options)
        d_query[q] = d.query
        d_key[kv] += d.key
        d_value[kv] += d.value
        for d_stage, d_array in zip(d_stages, d.score, strict=True):
            d_stage[n] = 0.0 if d_array is None else d_array
        d_sinks[n[-1]] += d.sinks
        d_scale += d.scale

    # A bias is added, so the gradient of its array is that of the logits, summed to its shape.
    d_score = tuple(x.pullback(d, d)[1] for x, d in zip(o.score, d_stages, strict=True))
    return Gradients(d_query, d_key, d_value, d_score, None if sinks is None else d_sinks, d_scale)


# The formulas, for one head.


class _Options(NamedTuple):
    """The options, checked and without defaults. Of one head: without the axes `*B` and `N`."""

    sizes: dict[str, Any]  # what each axis letter stands for; a tuple for *B
    sinks: Float  # [N]; no sink is a sink of -inf, whose share of the softmax is 0
    mask: Bool  # [*B N T S]
    score: Sequence[Step]
    scale: float
    keep: Bool  # [*B N T S]
    dropout_rate: float


def _logits(q: Float, k: Float, o: _Options) -> tuple[Float, list[Float]]:
    """The masked logits [T S], and the input of each score step, for its pullback."""
    stages = []
    with np.errstate(all="ignore"):  # masked keys may hold NaN and inf
        s = o.scale * (q @ k.T)
        for step in o.score:
            stages.append(s)
            s = step(s)
    return np.where(o.mask, s, -np.inf), stages


def _softmax(logits: Float, sink: Float) -> tuple[Float, Float, Float]:
    """`exp(logits - lse)`, the same of the sink, and `lse = log(exp(sink) + sum exp(logits))`.

    A sink is one more key. A row of only -inf gives 0, 0 and -inf. The largest logit is subtracted
    first, so that no exponential overflows and the sum is at least 1.
    """
    logits = np.concatenate([logits, np.full((len(logits), 1), sink)], axis=1)  # [T S+1]
    largest = np.max(logits, axis=1, keepdims=True)
    empty = largest == -np.inf
    largest = np.where(empty, 0.0, largest)  # -inf - -inf would be NaN
    e = np.exp(logits - largest)
    total = np.where(empty, 1.0, np.sum(e, axis=1, keepdims=True))
    lse = np.where(empty, -np.inf, largest + np.log(total))
    p = e / total
    return p[:, :-1], p[:, -1], lse[:, 0]


def _dropout(weights: Float, o: _Options) -> Float:
    """Scales up what is kept, which preserves the mean. Linear, and its own transpose."""
    return np.where(o.keep, weights / (1.0 - o.dropout_rate), 0.0)


def _zero_masked(rows: Float, keep: Any) -> Float:
    """Zeros for masked rows, which may hold NaN: 0 * NaN is NaN."""
    return np.where(np.reshape(keep, (-1,) + (1,) * (rows.ndim - 1)), rows, 0.0)


def _sum_to(shape: tuple[int, ...], array: Float) -> Float:
    """The transpose of broadcasting `shape` to the shape of `array`."""
    new = array.ndim - len(shape)
    copied = [new + i for i, size in enumerate(shape) if size == 1]
    return np.reshape(np.sum(array, axis=(*range(new), *copied)), shape)


def _heads(o: _Options) -> Iterator[tuple[Any, Any, Any, dict[str, Any]]]:
    """For each head of each example: the indices of its query, key and weights; its options."""
    for b in np.ndindex(o.sizes["*B"]):
        for n in range(o.sizes["N"]):
            group = o.sizes["N"] // o.sizes["K"]
            steps = [
                Bias(np.broadcast_to(s.array, o.mask.shape)[*b, n]) if isinstance(s, Bias) else s
                for s in o.score
            ]
            options = {"mask": o.mask[*b, n], "score": steps, "sink": o.sinks[n]}
            options |= {"scale": o.scale, "keep": o.keep[*b, n], "dropout_rate": o.dropout_rate}
            yield (*b, slice(None), n), (*b, slice(None), n // group), (*b, n), options


# Checks of arguments.

_ONE_HEAD = ("q [T H]", "k [S H]", "v [S D]", "sink []", "[T S]")
_ALL_HEADS = ("query [*B T N H]", "key [*B S K H]", "value [*B S K D]", "sinks [N]", "[*B N T S]")


def _check(expected: tuple[str, ...], *given: Any) -> tuple[Float, Float, Float, _Options]:
    """The arrays in float64 and the options without defaults, or a ValueError."""
    q_axes, k_axes, v_axes, sink_axes, axes = expected
    query, key, value, sinks, mask, score, scale, keep, dropout_rate, *positions = given
    query_positions, key_positions = positions or (None, None)
    sizes: dict[str, Any] = {}
    query = _expect(q_axes, query, sizes)
    key = _expect(k_axes, key, sizes)
    value = _expect(v_axes, value, sizes)
    n, k = sizes.get("N", 1), sizes.get("K", 1)
    if n and (k == 0 or n % k):
        rule = "N must be a multiple of K" if k else "K must be at least 1"
        raise ValueError(f"key has {k} heads (K) but query has {n} (N): {rule}")
    if sizes["H"] == 0:
        raise ValueError("query and key must have a width (H) of at least 1, got 0")
    sinks = np.full(sizes.get("N", ()), -np.inf) if sinks is None else sinks
    sinks = _expect(sink_axes, sinks, sizes)
    scale = 1.0 / math.sqrt(sizes["H"]) if scale is None else scale
    if np.ndim(scale) != 0:
        raise ValueError(f"scale must be one number, got shape {np.shape(scale)}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if dropout_rate > 0.0 and keep is None:
        raise ValueError(f"keep must be given with a dropout_rate of {dropout_rate}, got None")
    score = (score,) if isinstance(score, Softcap | Bias) else score
    if not isinstance(score, Sequence) or not all(isinstance(s, Softcap | Bias) for s in score):
        raise ValueError(f"score must be Softcap or Bias, or a sequence of them, got {score!r}")

    lead = (*sizes["*B"], sizes["N"]) if "N" in sizes else ()
    shape = (*lead, sizes["T"], sizes["S"])

    def like_weights(name: str, x: Any, dtype: Any = None) -> npt.NDArray[Any]:
        x = np.asarray(x)
        if dtype is not None and x.dtype != dtype:
            hint = ": convert a Mask with mask.to_dense(T, S)" if x.dtype == object else ""
            raise ValueError(f"{name} must be bool, got {x.dtype}{hint}")
        try:
            return np.broadcast_to(x, shape)
        except ValueError:
            raise ValueError(f"{name} must broadcast to {axes} = {shape}, got {x.shape}") from None

    for n, step in enumerate(score):
        if isinstance(step, Bias):
            like_weights(f"score[{n}].array", step.array)
    i = _expect_positions("query_positions", query_positions, "T", sizes)[..., :, None]
    j = _expect_positions("key_positions", key_positions, "S", sizes)[..., None, :]
    if lead:  # the axis N
        i, j = np.expand_dims(i, -3), np.expand_dims(j, -3)
    mask = mask(i, j) if callable(mask) else mask
    mask = like_weights("mask", True if mask is None else mask, np.bool_) & (j >= 0)
    keep = like_weights("keep", True if keep is None else keep, np.bool_)
    return query, key, value, _Options(sizes, sinks, mask, score, float(scale), keep, dropout_rate)


def _expect(expected: str, given: npt.ArrayLike, sizes: dict[str, Any]) -> Float:
    """`given` in float64, if its axes are as `expected`; `sizes` collects their sizes."""
    array = np.asarray(given, np.float64)
    name, axes = expected.rstrip("]").split(" [")
    letters = axes.split()
    known = ", ".join(f"{a} = {sizes[a]}" for a in letters if a in sizes)
    found: tuple[Any, ...] = array.shape
    if "*B" in letters and array.ndim >= len(letters) - 1:
        batch = array.ndim - len(letters) + 1
        found = (found[:batch], *found[batch:])
    if len(found) != len(letters) or any(
        sizes.setdefault(a, size) != size for a, size in zip(letters, found, strict=True)
    ):
        known = f" with {known}" if known else ""
        raise ValueError(f"{name} must have shape [{axes}]{known}, got {array.shape}")
    return array


def _expect_positions(
    name: str, given: npt.ArrayLike | None, letter: str, sizes: dict[str, Any]
) -> npt.NDArray[Any]:
    """Positions as integers [*B T] or [*B S]; raises if their shape or dtype does not fit."""
    batch, length = sizes.get("*B", ()), sizes[letter]
    array = np.arange(length) if given is None else np.asarray(given)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    if array.shape not in ((length,), (*batch, length)):
        problem = f"{name} must have shape [{letter}] or [*B {letter}] with {letter} = {length}"
        raise ValueError(f"{problem} and *B = {batch}, got {array.shape}")
    return np.broadcast_to(array, (*batch, length))
