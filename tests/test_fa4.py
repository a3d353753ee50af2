"""The adapter to FlashAttention 4: what it asks of the package, what it refuses, what it repairs.

A stand-in with the package's interface records the calls. Its formula is what the package
documents, made worse: NaN in a masked key or value reaches the output.
"""

import dataclasses
import functools
import importlib.machinery
import math
import operator
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jax_normal, slow

import attention_jax
from attention_jax import explain, masks, scores
from attention_jax.backends import FA4, XLA, choose
from attention_jax.backends.arguments import bind
from attention_jax.backends.call import complete, spec_of

BF16, F32 = jnp.bfloat16, jnp.float32
B, T, K, G, H = (2, 3), 10, 2, 3, 8
N = K * G
lengths = np.array([[10, 7, 4], [1, 9, 10]], np.int32)
ids = np.array([[0, 0, 0, 1, 1, 2, 2, -1, -1, -1]], np.int32)


class MaskMod:
    """The package's base of masks: array fields are children, ``static`` ones structure."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)

        def names(fixed):
            return [f.name for f in dataclasses.fields(cls) if f.metadata.get("static") is fixed]

        def flatten(x):
            return tuple(tuple(getattr(x, n) for n in names(fixed)) for fixed in (None, True))

        def unflatten(fixed, arrays):
            x = object.__new__(cls)
            for name, value in zip(names(None) + names(True), (*arrays, *fixed), strict=True):
                object.__setattr__(x, name, value)
            return x

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)


def static(**kwargs):
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclasses.dataclass(frozen=True)
class AndMask(MaskMod):
    masks: tuple

    def __call__(self, b, h, q, k):
        return functools.reduce(operator.and_, (mask(b, h, q, k) for mask in self.masks))


def visible(query, key, window_size, mask_mod):
    (B, T, N, _), S = query.shape, key.shape[1]
    q, k = jnp.arange(T)[:, None], jnp.arange(S)
    distance = k - q - (S - T)
    left, right = window_size
    seen = jnp.ones((B, N, T, S), bool)
    seen &= True if left is None else distance >= -left
    seen &= True if right is None else distance <= right
    if mask_mod is not None:
        b, h = jnp.arange(B)[:, None, None, None], jnp.arange(N)[:, None, None]
        seen &= mask_mod(b, h, q, k)
    return seen


@pytest.fixture
def calls(monkeypatch):
    """Installs the stand-in; the arguments that it was called with."""
    made = []

    def flash_attn(q, k, v, *, causal=False, window_size=None, scale=None, mask_mod=None,
                   return_lse=False, backend=None):  # fmt: skip
        assert not causal
        assert not return_lse
        made.append({"q": q, "k": k, "v": v, "window_size": window_size, "scale": scale,
                     "mask_mod": mask_mod, "backend": backend})  # fmt: skip
        seen = visible(q, k, window_size, mask_mod)
        wide = [x.astype(F32) for x in (q, k, v)]
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in wide[1:])
        s = jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", wide[0], k) * scale, -jnp.inf)
        top = jnp.where(seen.any(-1, keepdims=True), s.max(-1, keepdims=True), 0.0)
        e = jnp.exp(s - jax.lax.stop_gradient(top))
        p = e / jnp.maximum(e.sum(-1, keepdims=True), 1e-30)
        return jnp.einsum("bnts,bsnh->btnh", p, v).astype(q.dtype)

    package = types.ModuleType("fa4_jax")
    package.__spec__ = importlib.machinery.ModuleSpec("fa4_jax", None)
    package.MaskMod, package.static, package.flash_attn = MaskMod, static, flash_attn
    package.and_masks = lambda *xs: AndMask(xs)
    monkeypatch.setitem(sys.modules, "fa4_jax", package)
    monkeypatch.delitem(sys.modules, "attention_jax.backends.fa4_masks", raising=False)
    yield made
    sys.modules.pop("attention_jax.backends.fa4_masks", None)
    vars(attention_jax.backends).pop("fa4_masks", None)


def inputs(T=T, S=None, B=B, dtype=BF16, H=H, D=None):
    S, D = T if S is None else S, H if D is None else D
    return (
        jax_normal(0, *B, T, N, H, dtype=dtype),
        jax_normal(1, *B, S, K, H, dtype=dtype),
        jax_normal(2, *B, S, K, D, dtype=dtype),
    )


def prepared(query, key, value, mask=None, score=(), scale=0.3, sinks=None, **options):
    call = bind(
        query, key, value, mask=mask, score=score, scale=scale, sinks=sinks, static_numbers=True
    )
    call, sizes = complete(call)
    known = scale if isinstance(scale, float) else None
    return call, spec_of(call, sizes, scale=known, platform="gpu")._replace(**options)


def output(*x, backend=FA4(), **options):  # noqa: B008 - frozen
    call, spec = prepared(*x, **options)
    assert backend.why_unsupported(spec) is None
    out, lse = backend.run(call, spec)
    assert out.dtype == x[0].dtype
    assert lse.shape == x[0].shape[:-1]
    return out


# --- What the package is asked for.

OWN = {  # masks that are the kernel's own window
    "none": (None, (None, None)),
    "causal": (masks.causal(), (None, 0)),
    "causal end": (masks.causal(align="end"), (None, 0)),
    "window": (masks.window(3, 1), (3, 1)),
    "left": (masks.window(3, None), (3, None)),
    "right": (masks.window(None, 2), (None, 2)),
    "least of two": (masks.window(5, 2) & masks.causal() & masks.window(3, None), (3, 0)),
    "shifted, with its own position": (masks.window(3, 1, offset=1), (2, 2)),
}


@pytest.mark.parametrize("name", OWN)
def test_windows_are_those_of_the_kernel(name, calls):
    mask, window = OWN[name]
    output(*inputs(), mask=mask)
    (call,) = calls
    assert call["window_size"] == window
    assert call["mask_mod"] is None
    assert call["backend"] == "cute"
    assert call["scale"] == 0.3
    assert call["q"].shape == (6, T, N, H)
    assert call["k"].shape == call["v"].shape == (6, T, K, H)


@pytest.mark.slow
def test_windows_are_aligned_at_the_last_key(calls):
    output(*inputs(S=14), mask=masks.causal(align="end"))
    output(*inputs(S=14), mask=masks.causal(4))
    output(*inputs(S=14), mask=masks.causal())
    assert [call["window_size"] for call in calls] == [(None, 0), (None, 0), (None, None)]
    first, second, third = (call["mask_mod"] for call in calls)
    assert first is second is None
    assert type(third).__name__ == "BandFunction"  # its diagonal starts at the first key
    assert (third.left, third.right, third.offset.tolist()) == (None, 0, [0] * 6)


@pytest.mark.slow
def test_arrays_are_operands_of_the_function(calls):
    mask = masks.causal() & masks.lengths(key=lengths) & masks.segments(ids) & masks.chunked(4)
    output(*inputs(), mask=mask)
    (call,) = calls
    assert call["window_size"] == (None, 0)
    function = call["mask_mod"]
    assert [type(x).__name__ for x in function.masks] == [
        "LengthsFunction", "SegmentsFunction", "ChunkedFunction"
    ]  # fmt: skip
    arrays, structure = jax.tree.flatten(function)
    assert [x.shape for x in arrays] == [(6,), (6,), (6, T), (6, T)]
    assert all(x.dtype == jnp.int32 for x in arrays)
    assert arrays[1].tolist() == lengths.ravel().tolist()
    output(*inputs(), mask=masks.causal() & masks.lengths(key=lengths - 1) & masks.segments(ids)
           & masks.chunked(4))  # fmt: skip
    assert jax.tree.structure(calls[1]["mask_mod"]) == structure  # one kernel for both


# --- Results.

EVERY = {name: mask for name, (mask, _) in OWN.items()} | {
    "offsets": masks.causal(lengths - 5),
    "lengths": masks.lengths(query=lengths, key=lengths[:, ::-1]),
    "length 0": masks.lengths(key=np.array([[0, -3, 4], [1, 9, 11]])),
    "segments": masks.segments(ids),
    "causal segments": masks.segments(ids) & masks.causal(),
    "chunked": masks.chunked(3),
    "dilated": masks.dilated(3) & masks.causal(),
    "dilated, both sides": masks.dilated(4),
    "early": masks.window(2, 0, offset=-4),
    "late": masks.window(0, 2, offset=30),
}


# Some are windows of the kernel only where T = S, and segments here are of self-attention.
LENGTHS = [(name, T) for name in EVERY if name in OWN or "segments" in name]
LENGTHS += [(name, 7) for name in EVERY if (name, T) not in LENGTHS or name == "causal end"]
LONGER = [(name, 14) for name in EVERY if "segments" not in name]


@pytest.mark.parametrize(("name", "S"), [*LENGTHS, *(slow(*x) for x in LONGER)])
def test_equals_the_formula(name, S, calls):
    """With NaN in every query and key that is fully masked; gradients too."""
    mask = EVERY[name]
    query, key, value = inputs(S=S)
    resolved = prepared(query, key, value, mask=mask)[0].mask
    seen = np.ones((6, 1, T, S), bool)
    if resolved is not None:
        seen = np.broadcast_to(np.asarray(resolved.to_dense(T, S, B=6, N=1)), seen.shape)
    seen = seen.reshape(*B, T, S)
    queries, keys = seen.any(-1)[..., None, None], seen.any(-2)[..., None, None]
    planted = (
        jnp.where(queries, query, jnp.nan),
        jnp.where(keys, key, jnp.nan),
        jnp.where(keys, value, jnp.nan),
    )

    def both(fn, x):
        def program(*x):
            out, pull = jax.vjp(lambda *x: fn(*x, mask=mask), *x)
            return [out, *pull(jnp.ones_like(out))]

        return jax.jit(program)(*x)

    def plain(*x, mask):
        call, spec = prepared(*x, mask=mask)
        return XLA().run(call, spec)[0]

    found, expected = both(output, planted), both(plain, (query, key, value))
    for ours, right in zip(found, expected, strict=True):
        ours, right = (np.asarray(x).astype(F32) for x in (ours, right))
        np.testing.assert_allclose(ours, right, rtol=0.03, atol=0.03)
    assert not np.asarray(found[0])[~seen.any(-1)].any()


def test_visible_rows_are_found_block_by_block(calls, monkeypatch):
    from attention_jax.backends import fa4

    mask = masks.window(2, 0, offset=-4) & masks.lengths(query=lengths, key=lengths)
    whole = output(*inputs(), mask=mask)
    monkeypatch.setattr(fa4, "PAIRS", 4 * 60)  # four queries at a time
    np.testing.assert_array_equal(output(*inputs(), mask=mask), whole)


def test_nothing_is_zeroed_where_all_is_visible(calls):
    x = inputs(S=14)
    output(*x, mask=masks.causal(align="end"))
    assert calls[0]["k"].shape == (6, 14, K, H)
    _, spec = prepared(*x, mask=masks.causal(align="end"))
    assert FA4().extra_bytes(spec) == 0
    _, spec = prepared(*x, mask=masks.window(1, 0, align="end"))  # early keys are masked
    assert FA4().extra_bytes(spec) > 0


def test_the_package_interpreted_runs_anywhere(calls):
    out = attention_jax.attention(*inputs(), implementation=FA4(interpret=True))
    assert out.shape == (*B, T, N, H)
    assert calls[0]["backend"] == "reference"


# --- What is refused.

REFUSED = [
    ({"platform": "cpu"}, "NVIDIA GPUs, the platform is cpu"),
    ({"partitioned": True}, "cannot partition its kernel: use shard_map"),
    ({"dtype": F32}, "bfloat16 and float16 only, query is float32"),
    ({"H": 12}, r"multiples of 8, got 12 \(H\) and 12 \(D\)"),
    ({"D": 12}, r"multiples of 8, got 8 \(H\) and 12 \(D\)"),
    ({"H": 136}, r"wider than 128 .* got 136 \(H\)"),
    ({"score": scores.softcap(2.0)}, "score Softcap is not supported"),
    ({"score": [scores.alibi(), scores.softcap(2.0)]}, "score Alibi, Softcap is not supported"),
    ({"sinks": np.zeros(N, np.float32)}, "softmax sinks are not supported"),
    ({"dropout": True}, "dropout is not supported"),
    ({"return_lse": True}, "no gradient of the lse"),
    ({"scale": jnp.float32(0.3)}, "scale is an array"),
    ({"scale": -0.3}, "scale is -0.3, which must be positive"),
    ({"mask": np.ones((T, T), bool)}, "mask Dense is not supported"),
    ({"mask": masks.causal() | masks.prefix(3)}, "mask Or is not supported"),
    ({"mask": masks.causal() & ~masks.prefix(3)}, "mask Not is not supported"),
    ({"mask": masks.mask_fn(lambda b, n, q, k: q == k)}, "mask MaskFn is not supported"),
    ({"mask": masks.global_tokens(np.ones(T, bool))}, "mask GlobalTokens is not supported"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=[r for _, r in REFUSED])
def test_refuses_with_a_reason(options, reason, calls):
    options = dict(options)
    shape = {name: options.pop(name) for name in ("T", "S", "D", "H", "dtype") if name in options}
    call, spec = prepared(*inputs(**shape), **options)
    found = FA4().why_unsupported(spec)
    assert found is not None
    assert re.search(reason, found), found
    assert FA4().extra_bytes(spec) >= 0
    if found.startswith("mask"):
        with pytest.raises(NotImplementedError, match=reason):
            FA4().run(call, spec)
    assert not calls


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_refuses_a_scale_that_is_not_finite(scale, calls):
    _, spec = prepared(*inputs())
    reason = FA4().why_unsupported(spec._replace(scale=scale))
    assert reason.startswith(f"scale is {scale}, which must be positive and finite")


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "fa4_jax", None)
    x = jax.ShapeDtypeStruct((2, 512, 8, 64), "bfloat16")
    reason = explain(x, x, x, platform="gpu").reasons["fa4"]
    assert reason.startswith("cannot: the package fa4-jax is not installed: pip install")


def test_it_is_never_chosen_unasked(calls):
    x = jax.ShapeDtypeStruct((2, 512, 8, 64), "bfloat16")
    documents = masks.segments(np.zeros((2, 512), np.int32))
    for options in ({}, {"mask": masks.causal()}, {"mask": documents}):
        explanation = explain(x, x, x, platform="gpu", **options)
        assert explanation.chosen != "fa4"
        assert list(explanation.reasons)[-1] == "fa4"
        assert explanation.reasons["fa4"].startswith("only if asked for")
        named = explain(x, x, x, platform="gpu", implementation="fa4", **options)
        assert named.chosen == "fa4"
    _, spec = prepared(*inputs(), score=scores.softcap(2.0))
    assert choose(("fa4",), spec).name is None
    with pytest.raises(NotImplementedError, match=r"score Softcap .* These can: blockwise, xla"):
        choose(("fa4",), spec).backend  # noqa: B018


# --- Transformations.


def loss(query, *x, **options):
    return output(query, *x, **options).astype(F32).sum()


@pytest.mark.slow
def test_forward_mode(calls):
    query, key, value = inputs()

    def by(fn):
        return jax.jvp(lambda q: fn(q, key, value, mask=masks.causal()), (query,), (query,))[1]

    def plain(*x, **options):
        call, spec = prepared(*x, **options)
        return XLA().run(call, spec)[0]

    np.testing.assert_allclose(by(output).astype(F32), by(plain).astype(F32), atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    "derivative",
    [jax.hessian(loss), jax.grad(lambda *x: jax.grad(loss)(*x).astype(F32).sum())],
    ids=["hessian", "grad of grad"],
)
def test_second_derivatives_are_refused(derivative, calls):
    with pytest.raises(
        NotImplementedError,
        match=r"'fa4' cannot: it can be differentiated only once. Ask for .*'pallas_gpu'",
    ):
        derivative(*inputs(B=(), T=4))


def test_vmap(calls):
    """Folds into the batch without a function in the kernel, and is refused with one."""
    x = inputs()
    np.testing.assert_array_equal(
        jax.vmap(lambda *x: output(*x, mask=masks.causal()))(*x), output(*x, mask=masks.causal())
    )
    with pytest.raises(NotImplementedError, match=r"'fa4' cannot: its kernel has no vmap .* Ask"):
        jax.vmap(lambda *x: output(*x, mask=masks.chunked(3)))(*x)
