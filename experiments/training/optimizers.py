"""The training recipe, made of Optax: AdamW or Muon, clipping, schedules, averaged weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]
from flax import nnx
from optax import contrib

from experiments.training import tuning
from experiments.training.config import TrainConfig

MUON_RMS = 0.2  # root mean square of Muon's updates, about that of AdamW's


def make(config: TrainConfig, model: nnx.Module) -> optax.GradientTransformation:
    """The optimizer of a model, on gradients clipped by their global norm.

    Raises:
      ValueError: an option that the model has no layers for.
    """
    optimizer = optax.adamw(
        schedule(config), b2=config.beta2, weight_decay=config.weight_decay, mask=decay_mask
    )
    if config.optimizer == "muon":
        optimizer = _muon(config, tuning.matrices_of_layers(model))
    parts = [optax.clip_by_global_norm(config.clip), optimizer]
    if config.layer_decay < 1:
        parts.append(_scaled(tuning.rates(model, config.layer_decay)))
    return optax.chain(*parts)


def _muon(config: TrainConfig, matrices: Collection[tuple[Any, ...]]) -> Any:
    """Muon for ``matrices``, AdamW for all other weights, with one schedule and weight decay.

    Muon's updates are scaled by ``MUON_RMS * sqrt(max(rows, columns))``, so that both may have the
    same learning rate.

    Source: Jordan et al. 2024, "Muon"; Liu et al. 2025, "Muon is Scalable for LLM Training", for
    the scale.
    """

    def scaled(updates: Any, _: Any = None) -> Any:
        return jax.tree.map(lambda x: MUON_RMS * max(x.shape) ** 0.5 * x, updates)

    def plain(updates: Any) -> Any:
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), updates)

    muon = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=plain), optax.stateless(scaled)
    )
    return optax.chain(
        _split(matrices, muon, optax.scale_by_adam(b2=config.beta2)),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule(config)),
    )


def _split(
    chosen: Collection[tuple[Any, ...]],
    one: optax.GradientTransformation,
    other: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """``one`` for the weights with these paths, ``other`` for the rest.

    Unlike ``optax.partition``, it leaves no placeholders in the state, where the sharding rules
    expect arrays.
    """

    def parts(tree: Any) -> list[Any]:
        flat = dict(nnx.to_flat_state(tree))
        return [
            nnx.from_flat_state({path: x for path, x in flat.items() if (path in chosen) == is_one})
            for is_one in (True, False)
        ]

    def init(parameters: Any) -> Any:
        first, second = parts(parameters)
        return one.init(first), other.init(second)

    def update(updates: Any, state: Any, parameters: Any = None) -> Any:
        both = zip((one, other), parts(updates), state, parts(parameters), strict=True)
        results = [each.update(*arguments) for each, *arguments in both]
        flat = {path: x for new, _ in results for path, x in nnx.to_flat_state(new)}
        ordered = {path: flat[path] for path, _ in nnx.to_flat_state(updates)}
        return nnx.from_flat_state(ordered), tuple(after for _, after in results)

    return optax.GradientTransformation(init, update)


def _scaled(factors: Any) -> optax.GradientTransformation:
    """Multiplies each update by a factor."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda x, f: x * f, updates, factors))


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
