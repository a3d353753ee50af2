"""Adversarial training: each step also trains on perturbed token embeddings.

For one example with token embeddings ``x``, and a perturbation of relative size ``epsilon``::

    g     = gradient of the loss with respect to x
    r     = epsilon * |x| * g / |g|
    loss  = loss(x) + loss(x + r),    r held constant

The perturbation is relative to the norm of the embeddings, so that they cannot escape it by
growing; the paper normalizes them to that end. A model with several embedding look-ups has one
``g``, over all of them. Embeddings without a gradient, those of padding, count in neither norm.

Source: Miyato et al. 2017, "Adversarial Training Methods for Semi-Supervised Text Classification".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Perturb = Callable[[jax.Array], jax.Array]
Total = Callable[[Any, Perturb], tuple[jax.Array, jax.Array]]


def value_and_grad(total: Total, parameters: Any, epsilon: float) -> tuple[Any, Any, Any]:
    """The clean loss, the number of its terms, and the gradient of clean plus adversarial loss.

    Args:
      total: from parameters and a function that is applied to every embedding look-up, to the
        summed loss of a batch and the number of terms. Its examples must be independent.
      parameters: those of the model.
      epsilon: the relative size of the perturbation.
    """
    shapes: list[jax.Array] = []

    def record_shape(x: jax.Array) -> jax.Array:
        shapes.append(x)
        return x

    jax.eval_shape(lambda p: total(p, record_shape), parameters)
    zeros = [jnp.zeros(x.shape, x.dtype) for x in shapes]

    def perturbed(parameters: Any, perturbations: list[jax.Array]) -> tuple[jax.Array, Any]:
        remaining, embeddings = iter(perturbations), []

        def perturb(x: jax.Array) -> jax.Array:
            embeddings.append(x)
            return x + next(remaining)

        value, count = total(parameters, perturb)
        return value, (count, embeddings)

    clean = jax.value_and_grad(perturbed, argnums=(0, 1), has_aux=True)
    (value, (count, embeddings)), (gradient, gradients) = clean(parameters, zeros)
    worst = perturbations(embeddings, gradients, epsilon)
    adversarial, _ = jax.grad(perturbed, has_aux=True)(parameters, worst)
    return value, count, jax.tree.map(jnp.add, gradient, adversarial)


def perturbations(
    embeddings: list[jax.Array], gradients: list[jax.Array], epsilon: float
) -> list[jax.Array]:
    """``r`` for each look-up, ``[B ...]``, from its embeddings and their gradients.

    >>> (r,) = perturbations([jnp.array([[3.0, 4.0]])], [jnp.array([[0.0, 0.1]])], 0.5)
    >>> r.tolist()
    [[0.0, 2.5]]
    """

    def norm(arrays: list[jax.Array]) -> jax.Array:
        squares = [jnp.square(x.astype(jnp.float32)) for x in arrays]
        return jnp.sqrt(sum(jnp.sum(x, axis=tuple(range(1, x.ndim))) for x in squares))

    nonzero = [jnp.any(g != 0, axis=-1, keepdims=True) for g in gradients]
    x_norm = norm([jnp.where(keep, x, 0) for keep, x in zip(nonzero, embeddings, strict=True)])
    g_norm = norm(gradients)
    size = epsilon * x_norm / jnp.where(g_norm > 0, g_norm, 1)
    return [(g * jnp.expand_dims(size, range(1, g.ndim))).astype(g.dtype) for g in gradients]
