"""JAX's own kernel for TPUs, splash attention: an adapter.

A mask without arrays becomes one of its lazy masks, evaluated block by block while tracing;
segments and lengths become its segment ids. The kernel leaves fully masked rows undefined, so such
queries, keys and values are zeroed before the call, and such rows of the output after it.

Like the kernel, it can be differentiated once, in reverse mode: no ``jvp``, no ``hessian``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from attention_jax import masks
from attention_jax.backends.call import (
    Backend,
    Call,
    Spec,
    positions_refused,
    symbolic_sizes_refused,
)
from attention_jax.backends.heads import kernel_on_each_device
from attention_jax.core.axes import AnyArray, Sizes
from attention_jax.core.closures import uses_arguments
from attention_jax.core.softmax import zero_rows
from attention_jax.masks import And, BlockSparse, Lengths, Mask, Not, Or, Segments, block_map
from attention_jax.masks.base import conjuncts, parts
from attention_jax.masks.grid import Grid
from attention_jax.scores import Softcap

LANES = 128  # lengths and blocks are multiples of this
BLOCKS = (512, 256, 128)
NO_QUERY, NO_KEY = -1, -2  # segment ids of fully masked queries and keys, which match no others
EVALUATED_BLOCK = 512  # while tracing, masks are evaluated in blocks of this size


class SplashMask(NamedTuple):
    """A mask in splash's terms: a pair is visible where all of these hold."""

    static: Mask | None  # holds no arrays
    segments: Segments | None
    lengths: tuple[Lengths, ...]  # with arrays


@dataclasses.dataclass(frozen=True)
class Splash(Backend):
    """JAX's splash attention kernel.

    Attributes:
      interpret: run the kernel in Pallas's interpreter, on any platform, to test it.
    """

    STATIC_NUMBERS = True
    interpret: bool = False

    def why_unsupported(self, spec: Spec) -> str | None:
        """Why splash attention does not compute a call exactly, in words; None if it does."""
        dtype = jnp.dtype(spec.dtype)
        if reason := symbolic_sizes_refused(spec.sizes):
            return reason
        if spec.platform != "tpu" and not self.interpret:
            return f"its kernel is for TPUs, the platform is {spec.platform}"
        if spec.partitioned:
            return "XLA cannot partition its kernel over Auto mesh axes: use Explicit or shard_map"
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"{dtype.name}: its kernel supports bfloat16 and float32"
        if spec.dropout:
            return "dropout is not supported by its kernel"
        if reason := positions_refused(spec):
            return reason
        for score in spec.score:
            if not isinstance(score, Softcap):
                return f"score {type(score).__name__}: its kernel supports only softcap"
        if len(spec.score) > 1:
            return "more than one softcap: its kernel applies one"
        if spec.score and spec.return_lse:
            return "lse with softcap: its kernel gives no gradient of the lse"
        kernel_mask = _kernel_mask(spec.mask)
        return kernel_mask if isinstance(kernel_mask, str) else None

    def run(self, call: Call, spec: Spec) -> tuple[jax.Array, jax.Array]:
        def on_shard(call: Call, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
            return self._run(call, spec._replace(sizes=sizes))

        return kernel_on_each_device(on_shard, call, spec.sizes)

    def _run(self, call: Call, spec: Spec) -> tuple[jax.Array, jax.Array]:
        z, kernel_mask = spec.sizes, _kernel_mask(call.mask)
        if isinstance(kernel_mask, str):
            raise NotImplementedError(f"implementation 'splash' cannot: {kernel_mask}")
        one: Callable[..., Any] = functools.partial(
            _example,
            kernel_mask=kernel_mask,
            sizes=z,
            call=call,
            spec=spec,
            interpret=self.interpret,
        )
        ids = _segment_ids(kernel_mask, z)
        B = math.prod(z.B)
        arrays = [x.reshape(B, *x.shape[len(z.B) :]) for x in call[:3]]
        out, lse = jax.vmap(one, in_axes=(0, 0, 0, None if ids is None else 0))(*arrays, ids)
        return out.reshape(*z.B, *out.shape[1:]), lse.reshape(*z.B, *lse.shape[1:])

    def extra_bytes(self, spec: Spec) -> int:
        """Operands and output heads first, at lengths that are multiples of 128."""
        z = spec.sizes
        T, S = _padded(z.T), _padded(z.S)
        entries = T * z.N * (z.H + z.D) + S * z.K * (z.H + z.D)
        return math.prod(z.B) * entries * jnp.dtype(spec.dtype).itemsize

    def block(self, spec: Spec) -> tuple[int, int] | None:
        """Queries and keys per block."""
        return _block(_padded(spec.sizes.T)), _block(_padded(spec.sizes.S))


def _padded(length: int) -> int:
    return -(-length // LANES) * LANES


def _block(length: int) -> int:
    return next(size for size in BLOCKS if length % size == 0)


# --- From our masks to splash's.


def _kernel_mask(mask: Mask | None) -> SplashMask | str:
    """The mask in splash's terms, or why it has none."""
    static: Mask | None = None
    segments: list[Segments] = []
    lengths: list[Lengths] = []
    for part in conjuncts(mask):
        if any(isinstance(p, masks.MaskFn) for p in parts(part)):
            return "mask_fn may depend on the example, but its kernel has one mask for all"
        if not jax.tree.leaves(part):
            if _differs_between_heads(part):
                return (
                    f"mask {type(part).__name__} may depend on the example or head, but its kernel "
                    f"has one mask for all"
                )
            static = part if static is None else static & part
        elif isinstance(part, Segments):
            segments.append(part)
        elif isinstance(part, Lengths):
            lengths.append(part)
        else:
            return (
                f"mask {type(part).__name__} holds arrays, known only at run time, but its kernel "
                f"needs the mask while tracing"
            )
    if len(segments) > 1:
        return f"mask combines {len(segments)} masks.segments, but its kernel takes one"
    return SplashMask(static, segments[0] if segments else None, tuple(lengths))


def _differs_between_heads(mask: Mask) -> bool:
    """Whether the rule of a mask without arrays uses the example or the head."""
    q, k = np.arange(2, dtype=np.int32)[:, None], np.arange(2, dtype=np.int32)[None, :]
    return uses_arguments(lambda b, n: mask.rule(b, n, q, k), np.int32(0), np.int32(0))


class Ids(NamedTuple):
    """Segment ids, known at run time: a query attends to the keys with the same id."""

    query: Int[Array, "*B T"]
    key: Int[Array, "*B S"]


def _segment_ids(kernel_mask: SplashMask, sizes: Sizes) -> Ids | None:
    """Segments and lengths as ids; None if the mask has neither."""
    if kernel_mask.segments is None and not kernel_mask.lengths:
        return None
    T, S = (
        jax.lax.broadcasted_iota(jnp.int32, (*sizes.B, size), len(sizes.B))
        for size in (sizes.T, sizes.S)
    )
    query, key = jnp.zeros_like(T), jnp.zeros_like(S)
    if kernel_mask.segments is not None:
        query, key = (
            jnp.broadcast_to(jnp.asarray(x).astype(jnp.int32), y.shape)
            for x, y in (
                (kernel_mask.segments.query_ids, query),
                (kernel_mask.segments.key_ids, key),
            )
        )
    real_query, real_key = query >= 0, key >= 0

    def before(i: jax.Array, length: Any) -> jax.Array:
        return i < (length if isinstance(length, int) else length[..., None])

    for part in kernel_mask.lengths:
        if part.query is not None:
            real_query &= before(T, part.query)
        if part.key is not None:
            real_key &= before(S, part.key)
    query, key = jnp.where(real_query, query, NO_QUERY), jnp.where(real_key, key, NO_KEY)
    return Ids(query.reshape(-1, sizes.T), key.reshape(-1, sizes.S))


@dataclasses.dataclass(frozen=True)
class StaticMask:
    """A mask without arrays, evaluated in NumPy on intervals of queries and keys."""

    mask: Mask | None
    T: int
    S: int

    def pairs(self, q: slice, k: slice) -> np.ndarray:
        """Bool ``[t s]``; padded queries repeat the last one, padded keys are masked."""
        i = np.minimum(np.arange(q.start, q.stop, dtype=np.int32), self.T - 1)[:, None]
        j = np.arange(k.start, k.stop, dtype=np.int32)[None, :]
        inside = np.broadcast_to(j < self.S, (i.shape[0], j.shape[1]))
        return inside & _in_numpy(self.mask, i, np.minimum(j, self.S - 1))

    def visible(self) -> tuple[np.ndarray, np.ndarray]:
        """Bool ``[T]`` and ``[S]``: the queries and keys that are not fully masked."""
        grid = Grid(self.T, self.S, EVALUATED_BLOCK, EVALUATED_BLOCK)
        kind = block_map.kinds(self.mask, grid, 0, 0)
        queries, keys = np.zeros(self.T, np.bool_), np.zeros(self.S, np.bool_)
        for row, column in zip(*np.nonzero(kind != block_map.EMPTY), strict=True):
            q = slice(row * EVALUATED_BLOCK, min((row + 1) * EVALUATED_BLOCK, self.T))
            k = slice(column * EVALUATED_BLOCK, min((column + 1) * EVALUATED_BLOCK, self.S))
            if queries[q].all() and keys[k].all():
                continue
            pairs = self.pairs(q, k)
            queries[q] |= pairs.any(1)
            keys[k] |= pairs.any(0)
        return queries, keys


def _in_numpy(mask: Mask | None, i: np.ndarray, j: np.ndarray) -> Any:
    """The rule in NumPy, because JAX would compute on a device, and start a backend."""
    if isinstance(mask, And):
        return _in_numpy(mask.left, i, j) & _in_numpy(mask.right, i, j)
    if isinstance(mask, Or):
        return _in_numpy(mask.left, i, j) | _in_numpy(mask.right, i, j)
    if isinstance(mask, Not):
        return ~np.asarray(_in_numpy(mask.mask_, i, j))
    if isinstance(mask, BlockSparse):
        return mask._layout()[i // mask.block_size, j // mask.block_size]
    return np.True_ if mask is None else mask.rule(0, 0, i, j)


def _lazy(mask: StaticMask, T: int, S: int) -> Any:
    """Splash's lazy mask of ``T x S`` pairs, multiples of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    size = _block(T), _block(S)
    kind = np.array(block_map.kinds(mask.mask, Grid(mask.T, mask.S, *size), 0, 0))
    if mask.S < S:  # the last block has padded keys
        kind[:, -1] = np.minimum(kind[:, -1], block_map.PARTIAL)
    uniform = {block_map.EMPTY: np.zeros(size, np.bool_), block_map.FULL: np.ones(size, np.bool_)}

    class Lazy(splash_attention.Mask):
        """Compares equal to another of the same mask, so that heads and layers share blocks."""

        shape = (T, S)
        identity = mask, T, S

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            q, k = (slice(*i.indices(n)[:2]) for i, n in zip(index, self.shape, strict=True))
            (row, q0), (column, k0) = divmod(q.start, size[0]), divmod(k.start, size[1])
            # Splash reads every block several times, and most are empty or full.
            aligned = (q0, k0, q.stop - q.start, k.stop - k.start) == (0, 0, *size)
            found = uniform.get(kind[row, column]) if aligned else None
            return mask.pairs(q, k) if found is None else found

        def __eq__(self, other: object) -> bool:
            return self.identity == getattr(other, "identity", None)

        def __hash__(self) -> int:
            return hash(self.identity)

    return Lazy()


# --- One example.


def _example(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: Ids | None,
    *,
    kernel_mask: SplashMask,
    sizes: Sizes,
    call: Call,
    spec: Spec,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Output ``[T N D]`` and lse ``[T N]``."""
    z, mask = sizes, StaticMask(kernel_mask.static, sizes.T, sizes.S)
    queries, keys = _visible(mask, ids)
    sinks = None if call.sinks is None else call.sinks.astype(jnp.float32)
    if isinstance(queries, np.ndarray) and not queries.any():
        lse = jnp.float32(-jnp.inf) if sinks is None else sinks
        return jnp.zeros((z.T, z.N, z.D), query.dtype), jnp.broadcast_to(lse, (z.T, z.N))
    query = (query.astype(jnp.float32) * call.scale.astype(jnp.float32)).astype(query.dtype)
    T, S = _padded(z.T), _padded(z.S)
    q, k, v = (
        jnp.pad(jnp.swapaxes(_zeroed(rows, x), 0, 1), ((0, 0), (0, n - x.shape[0]), (0, 0)))
        for rows, x, n in ((queries, query, T), (keys, key, S), (keys, value, S))
    )
    if ids is not None:
        pads = zip(ids, (T, S), (NO_QUERY, NO_KEY), strict=True)
        ids = Ids(*(jnp.pad(x, (0, n - x.shape[0]), constant_values=none) for x, n, none in pads))
    cap = spec.score[0].cap if spec.score else None  # type: ignore[attr-defined]
    kernel = functools.partial(_kernel, mask, cap, interpret)
    if spec.return_lse:
        out, lse = _with_lse(kernel)(q, k, v, sinks, ids)
    else:
        out, lse = _without_lse(kernel)(q, k, v, sinks, ids), jnp.zeros((z.N, T), jnp.float32)
    out, lse = jnp.swapaxes(out, 0, 1)[: z.T], lse.T[: z.T]
    fully_masked = jnp.float32(-jnp.inf) if sinks is None else sinks
    return _zeroed(queries, out), jnp.where(jnp.asarray(queries)[:, None], lse, fully_masked)


def _zeroed(rows: AnyArray, x: jax.Array) -> jax.Array:
    """``zero_rows``, which does nothing if all rows are known to be visible."""
    known = isinstance(rows, np.ndarray) and bool(rows.all())
    return zero_rows(None if known else jnp.asarray(rows), x)


def _visible(mask: StaticMask, ids: Ids | None) -> tuple[AnyArray, AnyArray]:
    """Bool ``[T]`` and ``[S]``: the queries and keys that are not fully masked."""
    if ids is None:
        return mask.visible()
    t = math.gcd(_padded(mask.T), EVALUATED_BLOCK)
    count = -(-mask.T // t)
    padded = jnp.pad(ids.query, (0, count * t - mask.T), constant_values=NO_QUERY)
    k = jnp.arange(mask.S, dtype=jnp.int32)[None, :]

    def block(keys: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = i * t + jnp.arange(t, dtype=jnp.int32)
        pairs = padded[q][:, None] == ids.key[None, :]
        if mask.mask is not None:
            pairs &= mask.mask.rule(0, 0, jnp.minimum(q, mask.T - 1)[:, None], k)
        return keys | pairs.any(0), pairs.any(1)

    keys, queries = jax.lax.scan(
        block, jnp.zeros((mask.S,), bool), jnp.arange(count, dtype=jnp.int32)
    )
    return queries.reshape(-1)[: mask.T], keys


def _kernel(
    mask: StaticMask,
    cap: float | None,
    interpret: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array | None,
    ids: Ids | None,
    *,
    residuals: bool = False,
) -> Any:
    """Output ``[N T D]``; with ``residuals`` also the lse ``[N T]``, and neither has a gradient."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    (N, T, _), S = query.shape, key.shape[1]
    bq, bk = _block(T), _block(S)
    sizes = splash_attention.BlockSizes(bq, bk, bk, bq, bk, bk, bq, bk)  # of each pass
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([_lazy(mask, T, S)] * N),
        block_sizes=sizes,
        save_residuals=residuals,
        attn_logits_soft_cap=cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None if ids is None else splash_attention.SegmentIds(*ids)
    out = kernel(query, key, value, segments, sinks)
    return (out[0], out[1][0]) if residuals else out


def _precisely(query: jax.Array) -> Any:
    """Full precision in float32; in bfloat16 the compiler supports only its default."""
    return jax.default_matmul_precision("highest" if query.dtype == jnp.float32 else None)


def _without_lse(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``(query, key, value, sinks, ids) -> out``, with the right precision in both passes.

    Each pass sets it, because JAX traces them after it has left a context around the call.
    """

    @jax.custom_vjp
    def fn(query: Any, key: Any, value: Any, sinks: Any, ids: Any) -> Any:
        with _precisely(query):
            return kernel(query, key, value, sinks, ids)

    def forward(query: Any, key: Any, value: Any, sinks: Any, ids: Any) -> Any:
        with _precisely(query):
            return jax.vjp(lambda *xs: kernel(*xs, ids), query, key, value, sinks)

    def backward(pull: Any, dout: Any) -> Any:
        with _precisely(dout):
            return *pull(dout), None  # ids are integers

    fn.defvjp(forward, backward)
    return fn


def _with_lse(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``(query, key, value, sinks, ids) -> out, lse``; adds the gradient of the lse::

        dquery_i = dlse_i sum_j p_ij key_j,   dkey_j = sum_i p_ij dlse_i query_i
        dsink = sum_i p_sink,i dlse_i

    These are attention with the keys as values, and its gradient.
    """

    @jax.custom_vjp
    def fn(query: Any, key: Any, value: Any, sinks: Any, ids: Any) -> Any:
        with _precisely(query):
            return kernel(query, key, value, sinks, ids, residuals=True)

    def forward(query: Any, key: Any, value: Any, sinks: Any, ids: Any) -> Any:
        out, lse = fn(query, key, value, sinks, ids)
        return (out, lse), (query, key, value, sinks, ids, lse)

    def backward(residuals: Any, cotangents: Any) -> Any:
        (query, key, value, sinks, ids, lse), (dout, dlse) = residuals, cotangents
        plain = _without_lse(kernel)
        _, pull = jax.vjp(lambda *xs: plain(*xs, ids), query, key, value, sinks)
        dquery, dkey, dvalue, dsinks = pull(dout)
        keys, pull = jax.vjp(lambda values: plain(query, key, values, sinks, ids), key)
        dlse = jnp.where(jnp.isfinite(lse), dlse, 0.0)[..., None]
        (more,) = pull((dlse * query.astype(jnp.float32)).astype(query.dtype))
        dquery = dquery + (dlse * keys.astype(jnp.float32)).astype(query.dtype)
        if sinks is not None:
            dsinks = dsinks + (jnp.exp(sinks[:, None] - lse) * dlse[..., 0]).sum(1)
        return dquery, dkey + more, dvalue, dsinks, None  # ids are integers

    fn.defvjp(forward, backward)
    return fn
