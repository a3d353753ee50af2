"""Classification: logits of a model, cross-entropy, and the usual scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx

from experiments.training.task import Array


@nnx.jit
def logits(model: Callable[[Any], jax.Array], inputs: Any) -> jax.Array:
    """The model's logits, in float32."""
    return model(inputs).astype(jnp.float32)


def cross_entropy(logits: Array, targets: Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each target, ``[... C]`` and ``[...]`` to ``[...]``, in float32.

    ::

        (1 - smoothing) * -log p_target + smoothing * mean_c(-log p_c)

    >>> float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))[0]) == float(jnp.log(4.0))
    True

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7.
    """
    x = jnp.asarray(logits, jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(x, targets)
    if not smoothing:
        return each
    mean = jax.nn.logsumexp(x, axis=-1) - x.mean(axis=-1)
    return (1 - smoothing) * each + smoothing * mean


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and mean cross-entropy.

    >>> scores(np.log([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]))["accuracy"]
    0.5
    """
    return {
        "accuracy": float(np.mean(logits.argmax(axis=-1) == labels)),
        "cross_entropy": float(cross_entropy(logits, labels).mean()),
    }
