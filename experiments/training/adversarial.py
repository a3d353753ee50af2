"""Adversarial training: each step also learns from the examples made harder.

For one example with the vectors ``x`` of its tokens, and a part ``epsilon`` of their norm::

    g     = gradient of the loss with respect to x
    r     = epsilon * |x| * g / |g|
    loss  = loss(x) + loss(x + r),    r held fixed

The step goes by the norm of the vectors, so that they cannot escape it by growing; the paper makes
them of one size to that end. A model that looks its tokens up more than once has one ``g``, of all
its look-ups together. Vectors without a gradient, those of padding, count for neither norm.

Source: Miyato et al. 2017, "Adversarial Training Methods for Semi-Supervised Text Classification".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Move = Callable[[jax.Array], jax.Array]
Total = Callable[[Any, Move], tuple[jax.Array, jax.Array]]


def value_and_grad(total: Total, parameters: Any, epsilon: float) -> tuple[Any, Any, Any]:
    """The loss without the adversary, what it counts, and the gradient of both losses' sum.

    Args:
      total: of parameters, and of a function that every look-up of tokens goes through: the sum of
        the losses of a batch, whose examples are independent, and their number.
      parameters: of the model.
      epsilon: see above.
    """
    shapes: list[jax.Array] = []

    def note(x: jax.Array) -> jax.Array:
        shapes.append(x)
        return x

    jax.eval_shape(lambda p: total(p, note), parameters)
    nothing = [jnp.zeros(x.shape, x.dtype) for x in shapes]

    def shifted(parameters: Any, shifts: list[jax.Array]) -> tuple[jax.Array, Any]:
        left, seen = iter(shifts), []

        def move(x: jax.Array) -> jax.Array:
            seen.append(x)
            return x + next(left)

        value, count = total(parameters, move)
        return value, (count, seen)

    both = jax.value_and_grad(shifted, argnums=(0, 1), has_aux=True)
    (value, (count, vectors)), (gradient, towards) = both(parameters, nothing)
    worst = steps_up(vectors, towards, epsilon)
    more, _ = jax.grad(shifted, has_aux=True)(parameters, worst)
    return value, count, jax.tree.map(jnp.add, gradient, more)


def steps_up(
    vectors: list[jax.Array], gradients: list[jax.Array], epsilon: float
) -> list[jax.Array]:
    """``r`` of each look-up, ``[B ...]``, from its vectors and their gradients.

    >>> (r,) = steps_up([jnp.array([[3.0, 4.0]])], [jnp.array([[0.0, 0.1]])], 0.5)
    >>> r.tolist()
    [[0.0, 2.5]]
    """

    def norm(arrays: list[jax.Array]) -> jax.Array:
        squares = [jnp.square(x.astype(jnp.float32)) for x in arrays]
        return jnp.sqrt(sum(jnp.sum(x, axis=tuple(range(1, x.ndim))) for x in squares))

    matters = [jnp.any(g != 0, axis=-1, keepdims=True) for g in gradients]
    of = norm([jnp.where(m, x, 0) for m, x in zip(matters, vectors, strict=True)])
    by = norm(gradients)
    size = epsilon * of / jnp.where(by > 0, by, 1)
    return [(g * jnp.expand_dims(size, range(1, g.ndim))).astype(g.dtype) for g in gradients]
