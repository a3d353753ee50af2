"""``attention`` beside PyTorch's FlexAttention, on random problems in float64.

FlexAttention runs as it is, without a compiler, and has no gradients on a CPU: those are compared
with the formula that it computes, written out, and with PyTorch's own attention where it can. The
two agree with each other first.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn.attention.flex_attention import (  # noqa: E402  there may be no torch
    AuxRequest,
    create_block_mask,
    flex_attention,
)
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from attention_jax import attention, masks, scores  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("x64", "small_blocks"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]
TOLERANCE = 1e-12


def tensor(x):
    return torch.from_numpy(np.array(x))


# --- A mask or a score is a pair: ours, and PyTorch's function of b, h, i, j.


def causal(rng, z):
    offset = int(rng.integers(-2, z["S"]))
    return masks.causal(offset), lambda b, h, i, j: j <= i + offset


def window(rng, z):
    left, right = (int(x) for x in rng.integers(0, 6, 2))
    return masks.window(left, right), lambda b, h, i, j: (i - j <= left) & (j - i <= right)


def prefix(rng, z):
    """Of another length in each example; what comes after is causal."""
    length = rng.integers(0, z["S"], z["B"])
    there = tensor(length)
    mask = masks.prefix(jnp.asarray(length)) | masks.causal()
    return mask, lambda b, h, i, j: (j < there[b]) | (j <= i)


def documents(rng, z):
    queries, keys = (np.sort(rng.integers(0, 3, (z["B"], z[n]))) for n in "TS")
    q, k = tensor(queries), tensor(keys)
    mask = masks.segments(jnp.asarray(queries), jnp.asarray(keys))
    return mask, lambda b, h, i, j: q[b, i] == k[b, j]


def lengths(rng, z):
    queries, keys = (rng.integers(0, z[n] + 1, z["B"]) for n in "TS")
    q, k = tensor(queries), tensor(keys)
    mask = masks.lengths(jnp.asarray(queries), jnp.asarray(keys))
    return mask, lambda b, h, i, j: (i < q[b]) & (j < k[b])


def alibi(rng, z):
    slopes = rng.random(z["N"])
    there = tensor(slopes)
    score = scores.alibi(jnp.asarray(slopes))
    return score, lambda s, b, h, i, j: s - there[h] * (i - j).abs()


def softcap(rng, z):
    cap = float(rng.uniform(0.5, 3))
    return scores.softcap(cap), lambda s, b, h, i, j: cap * torch.tanh(s / cap)


def relative(rng, z):
    """T5's, of so many buckets that each distance has its own."""
    table = rng.normal(size=(64, z["N"]))
    there = tensor(table)
    assert max(z["T"], z["S"]) <= 16
    score = scores.relative_bias(jnp.asarray(table))
    return score, lambda s, b, h, i, j: s + there[(i - j).abs() + 32 * (j > i), h]


def bias(rng, z):
    array = rng.normal(size=(z["B"], z["N"], z["T"], z["S"]))
    there = tensor(array)
    return scores.bias(jnp.asarray(array)), lambda s, b, h, i, j: s + there[b, h, i, j]


MASKS = causal, window, prefix, documents, lengths
SCORES = alibi, softcap, relative, bias


def problem(seed):
    """Sizes, arrays, options of ours, and PyTorch's mask and score."""
    rng = np.random.default_rng(seed)
    K, G = int(rng.choice([1, 2])), int(rng.choice([1, 2, 3]))
    z = {"B": 2, "T": int(rng.choice([3, 7, 11])), "S": int(rng.choice([5, 7, 13])), "N": K * G}
    H, D = int(rng.choice([3, 8])), int(rng.choice([2, 8]))
    shapes = (z["T"], z["N"], H), (z["S"], K, H), (z["S"], K, D), (z["T"], z["N"], D)
    *arrays, weight = (rng.normal(size=(z["B"], *shape)) for shape in shapes)
    some_masks = [f(rng, z) for f in rng.choice(MASKS, rng.integers(0, 3), replace=False)]
    some_scores = [f(rng, z) for f in rng.choice(SCORES, rng.integers(0, 3), replace=False)]

    def visible(b, h, i, j):
        pairs = [f(b, h, i, j) for _, f in some_masks]
        return functools.reduce(operator.and_, pairs, (i == i) & (j == j))

    def changed(s, b, h, i, j):
        return functools.reduce(lambda s, pair: pair[1](s, b, h, i, j), some_scores, s)

    options = {
        "mask": functools.reduce(operator.and_, [m for m, _ in some_masks]) if some_masks else None,
        "score": tuple(score for score, _ in some_scores),
        "scale": float(rng.uniform(-1, 1)),
        "implementation": str(rng.choice(["xla", "blockwise"])),
    }
    return z, arrays, weight, options, visible, changed


def grid(z):
    """All ``b, h, i, j``, to broadcast."""
    return torch.meshgrid(*(torch.arange(z[n]) for n in "BNTS"), indexing="ij")


def formula(query, key, value, scale, z, visible, changed):
    """Output and lse ``[B N T ...]``; 0 and -inf for a row without visible keys."""
    key, value = (x.repeat_interleave(z["N"] // x.shape[1], 1) for x in (key, value))
    s = changed(scale * query @ key.mT, *grid(z))
    pairs = visible(*grid(z))
    has_key = pairs.any(-1, keepdim=True)
    s = torch.where(pairs, s, torch.where(has_key, -torch.inf, 0.0))
    lse = torch.where(has_key[..., 0], s.logsumexp(-1), -torch.inf)
    return torch.where(has_key, s.softmax(-1), 0.0) @ value, lse


@pytest.mark.parametrize(
    "seed", [pytest.param(i, marks=[pytest.mark.slow] * (i >= 3)) for i in range(60)]
)
def test_flex_attention(seed):
    z, arrays, weight, options, visible, changed = problem(seed)
    scale = options["scale"]
    theirs = [tensor(x).swapaxes(1, 2) for x in arrays]
    out, aux = flex_attention(
        *theirs,
        score_mod=changed,
        block_mask=create_block_mask(visible, *(z[n] for n in "BNTS"), device="cpu"),
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    theirs = [x.requires_grad_() for x in theirs]
    exact, lse = formula(*theirs, scale, z, visible, changed)
    torch.testing.assert_close(out, exact.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(aux.lse, lse.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    # The lse of a row without visible keys has no gradient.
    loss = (exact.swapaxes(1, 2) * tensor(weight)).sum() + lse[lse.isfinite()].sin().sum()
    gradients = torch.autograd.grad(loss, theirs)

    def run(arrays):
        out, lse = attention(*arrays, **options, return_lse=True)
        finite = jnp.isfinite(lse)
        loss = (out * weight).sum() + jnp.where(finite, jnp.sin(jnp.where(finite, lse, 0)), 0).sum()
        return loss, (out, lse)

    ours, (our_out, our_lse) = jax.jit(jax.grad(run, has_aux=True))(
        [jnp.asarray(x) for x in arrays]
    )
    assert our_out.dtype == our_lse.dtype == jnp.float64
    for x, y in zip((our_out, our_lse, *ours), (out, aux.lse, *gradients), strict=True):
        np.testing.assert_allclose(x, y.swapaxes(1, 2).numpy(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "seed", [pytest.param(i, marks=[pytest.mark.slow] * (i >= 1)) for i in range(12)]
)
def test_scaled_dot_product_attention(seed):
    z, arrays, weight, options, visible, _ = problem(100 + seed)
    options["score"] = ()
    theirs = [tensor(x).swapaxes(1, 2).requires_grad_() for x in arrays]
    out = scaled_dot_product_attention(
        *theirs, attn_mask=visible(*grid(z)), scale=options["scale"], enable_gqa=True
    )
    gradients = torch.autograd.grad((out.swapaxes(1, 2) * tensor(weight)).sum(), theirs)

    def run(arrays):
        out = attention(*arrays, **options)
        return (out * weight).sum(), out

    ours, our_out = jax.jit(jax.grad(run, has_aux=True))([jnp.asarray(x) for x in arrays])
    for x, y in zip((our_out, *ours), (out.detach(), *gradients), strict=True):
        np.testing.assert_allclose(x, y.swapaxes(1, 2).numpy(), rtol=TOLERANCE, atol=TOLERANCE)
