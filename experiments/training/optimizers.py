"""The training recipe, made of Optax: AdamW, clipping, schedules, the average of the weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from experiments.training.config import TrainConfig


def make(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW on gradients clipped by their global norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config), b2=config.beta2, weight_decay=config.weight_decay, mask=decay_mask
        ),
    )


def schedule(config: TrainConfig) -> optax.Schedule:
    """The learning rate: a linear warm-up, then a decay::

        cosine         learning_rate * (1 + cos(pi * (step - warmup) / (steps - warmup))) / 2
        inverse_sqrt   learning_rate * sqrt(warmup / step)

    >>> config = TrainConfig(steps=100, learning_rate=1.0, schedule="inverse_sqrt", warmup=0.1)
    >>> rate = schedule(config)
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 40)]
    [0.0, 0.5, 1.0, 0.5]
    """
    warmup = int(config.warmup * config.steps)
    peak = config.learning_rate
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps)
    start = max(warmup, 1)

    def decay(step: Any) -> Any:
        return peak * jnp.sqrt(start / jnp.maximum(step + start, start))

    return optax.join_schedules([optax.linear_schedule(0.0, peak, start), decay], [start])


def decay_mask(parameters: Any) -> Any:
    """Which weights decay: only matrices decay; decaying biases and norms only hurts."""
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, parameters)


def average(old: Any, new: Any, decay: float, step: Any) -> Any:
    """The moving average of the weights after step ``step``, counted from 0.

    The decay starts at ``(1 + step) / (10 + step)`` if that is smaller, so that the initial weights
    are soon forgotten.
    """
    early = (1.0 + step) / (10.0 + step)
    return optax.incremental_update(new, old, 1 - jnp.minimum(decay, early))
