"""AdamW with what usually goes around it, all of it Optax's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from experiments.training.config import Config


def make(config: Config) -> optax.GradientTransformation:
    """AdamW on gradients that are clipped by the norm of all of them together."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config), b2=config.beta2, weight_decay=config.weight_decay, mask=decays
        ),
    )


def schedule(config: Config) -> optax.Schedule:
    """The learning rate: up to its highest, then down::

        cosine         learning_rate * (1 + cos(pi * (step - warm) / (steps - warm))) / 2
        inverse_sqrt   learning_rate * sqrt(warm / step)

    >>> rate = schedule(Config(steps=100, warmup=0.1, learning_rate=1.0, schedule="inverse_sqrt"))
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 40)]
    [0.0, 0.5, 1.0, 0.5]
    """
    warm = int(config.warmup * config.steps)
    highest = config.learning_rate
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, highest, warm, config.steps)
    start = max(warm, 1)

    def falling(step: Any) -> Any:
        return highest * jnp.sqrt(start / jnp.maximum(step + start, start))

    return optax.join_schedules([optax.linear_schedule(0.0, highest, start), falling], [start])


def decays(parameters: Any) -> Any:
    """Which weights decay: matrices. A decay of biases and norms only hurts."""
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, parameters)


def average(old: Any, new: Any, decay: float, step: Any) -> Any:
    """The moving average of the weights after step ``step``, counted from 0.

    Early on it forgets faster, ``(1 + step) / (10 + step)``, so that the initial weights are soon
    gone.
    """
    early = (1.0 + step) / (10.0 + step)
    return optax.incremental_update(new, old, 1 - jnp.minimum(decay, early))
