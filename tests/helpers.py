"""What several test files share: random arrays, comparisons, derivatives, marks."""

import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

# --- Random arrays.


def normal(seed, *shape, dtype=np.float32):
    """Normally distributed numbers, in NumPy."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def jax_normal(seed, *shape, dtype=None):
    """Normally distributed numbers as a JAX array: float64 under x64, else float32."""
    return _as_jax(np.random.default_rng(seed).normal(size=shape), dtype)


def _as_jax(x, dtype=None):
    """Converted by NumPy: JAX would compile a program for each new shape."""
    return jnp.asarray(x.astype(jax.dtypes.canonicalize_dtype(x.dtype) if dtype is None else dtype))


def inputs(seed=0, *, B, T, S, N, K, H, D, dtype=None):
    """Query ``[*B T N H]``, key ``[*B S K H]`` and value ``[*B S K D]``, as JAX arrays."""
    rng = np.random.default_rng(seed)
    shapes = (*B, T, N, H), (*B, S, K, H), (*B, S, K, D)
    return [_as_jax(rng.normal(size=shape), dtype) for shape in shapes]


def randomized(module, seed=0):
    """Makes every parameter random, since zeros and ones hide mistakes."""
    state = nnx.state(module, nnx.Param)
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(
        lambda x: _as_jax(np.asarray(x) + 0.3 * rng.normal(size=x.shape), x.dtype), state
    )
    nnx.update(module, moved)
    return module


# --- Comparisons.


def close(a, b, tolerance=2e-5, *, atol=None):
    """Compares trees of arrays; the absolute tolerance equals the relative one unless given."""
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance if atol is None else atol)


def close_to_largest(ours, exact, tolerance):
    """Compares arrays; the tolerance is relative to the largest number, or to 1 if larger."""
    ours, exact = (np.asarray(x, np.float64) for x in (ours, exact))
    largest = max(1, np.abs(exact).max(initial=0))
    np.testing.assert_allclose(ours, exact, rtol=0, atol=tolerance * largest)


# --- Derivatives and formulas.


def value_and_gradients(fn, *arrays, **options):
    """A scalar loss of output (and lse), and its gradients by all arrays; jitted."""

    def loss(*arrays):
        out = fn(*arrays, **options)
        out, lse = out if isinstance(out, tuple) else (out, jnp.zeros(()))
        return jnp.sin(out).sum() + jnp.cos(jnp.where(jnp.isfinite(lse), lse, 0.0)).sum()

    return jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays)))))(*arrays)


def softmax(x):
    """The softmax of one row, in NumPy."""
    e = np.exp(x - x.max())
    return e / e.sum()


def linear(module, x):
    y = x @ np.asarray(module.kernel[...])
    return y if module.bias is None else y + np.asarray(module.bias[...])


# --- Marks.

needs_files = pytest.mark.skipif(
    "ATTENTION_JAX_DATA" not in os.environ, reason="ATTENTION_JAX_DATA names no folder of data sets"
)


def slow(*values):
    """One parameter of a slow test."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mostly_slow(values, quick):
    """Values as parameters of a test; those not in ``quick`` are slow tests."""
    return [pytest.param(x, marks=[] if x in quick else [pytest.mark.slow]) for x in values]
