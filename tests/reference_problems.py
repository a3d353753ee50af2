"""Random problems for the tests of the oracle, and its definition in scalars."""

import math

import numpy as np
import pytest

from attention_jax.reference import Bias, Softcap

B, T, S, K, N, H, D = 2, 5, 7, 3, 6, 11, 13  # distinct, N a multiple of K, the others prime
G = N // K
CAP, RATE = 1.7, 0.3


def inputs(seed=0, batch=(B,)):
    """Query, key, value, d_out, d_lse."""
    rng = np.random.default_rng(seed)
    shapes = [(T, N, H), (S, K, H), (S, K, D), (T, N, D), (T, N)]
    return [rng.normal(size=(*batch, *shape)) for shape in shapes]


def every_option(seed=1, batch=(B,)):
    """All options at once. Every query attends to at least one key."""
    rng = np.random.default_rng(seed)
    mask = rng.random((*batch, N, T, S)) < 0.6
    mask[..., np.arange(T), np.arange(T)] = True
    return {
        "mask": mask,
        "score": (
            Bias(rng.normal(size=(N, 1, S))),
            Softcap(CAP),
            Bias(rng.normal(size=(*batch, 1, T, S))),
        ),
        "sinks": rng.normal(size=N),
        "scale": -0.37,
        "keep": rng.random((*batch, N, T, S)) > RATE,
        "dropout_rate": RATE,
    }


ONE_BY_ONE = {
    "plain": {},
    "mask": {"mask": every_option()["mask"]},
    "mask of one row": {"mask": np.arange(S) % 3 > 0},
    "softcap": {"score": (Softcap(CAP),)},
    "bias": {"score": (every_option()["score"][0],)},
    "softcap, then bias": {"score": every_option()["score"][1:]},
    "bias, then softcap": {"score": every_option()["score"][:2]},
    "sinks": {"sinks": every_option()["sinks"]},
    "scale": {"scale": 0.83},
    "negative scale": {"scale": -0.83},
    "dropout": {"keep": every_option()["keep"], "dropout_rate": RATE},
    "everything": every_option(),
}
each_option = pytest.mark.parametrize("options", ONE_BY_ONE.values(), ids=ONE_BY_ONE.keys())


def literal(query, key, value, options):
    """The definition in scalar loops: `math`, no running maximum, no matrix."""
    *batch, t_len, n_len, width = query.shape
    s_len, kv_len = key.shape[-3:-1]
    full = (*batch, n_len, t_len, s_len)
    mask = np.broadcast_to(options.get("mask", True), full)
    keep = np.broadcast_to(options.get("keep", True), full)
    rate = options.get("dropout_rate", 0.0)
    scale = options.get("scale", width**-0.5)
    out = np.zeros((*batch, t_len, n_len, value.shape[-1]))
    lse, weights = np.zeros((*batch, t_len, n_len)), np.zeros(full)
    for (*b, n, t), _ in np.ndenumerate(weights[..., 0]):
        kv = n // (n_len // kv_len)
        terms = []
        for s in range(s_len):
            logit = scale * sum(query[*b, t, n, h] * key[*b, s, kv, h] for h in range(width))
            for step in options.get("score", ()):
                if isinstance(step, Softcap):
                    logit = step.cap * math.tanh(logit / step.cap)
                else:
                    logit = logit + np.broadcast_to(step.array, full)[*b, n, t, s]
            terms.append(math.exp(logit) if mask[*b, n, t, s] else 0.0)
        sink = math.exp(options["sinks"][n]) if "sinks" in options else 0.0
        lse[*b, t, n] = math.log(sum(terms) + sink)
        for s in range(s_len):
            weights[*b, n, t, s] = terms[s] / (sum(terms) + sink)
            if keep[*b, n, t, s]:
                out[*b, t, n] += weights[*b, n, t, s] / (1 - rate) * value[*b, s, kv]
    return out, lse, weights


def close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def equal(actual, expected):
    np.testing.assert_equal(actual, expected)
