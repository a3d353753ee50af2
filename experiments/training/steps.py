"""One training step: the gradient of a batch, over microbatches and devices, and the update.

Each microbatch on each device gives the gradient of its summed loss. These are added up and divided
by the number of loss terms, so that however a batch is split, the result is the gradient of its
mean loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attention_jax.nn import moved_embeddings
from experiments.training import adversarial, optimizers
from experiments.training.config import TrainConfig
from experiments.training.task import Batch, Loss, Model


class State(NamedTuple):
    """What a step updates."""

    parameters: Any
    optimizer: Any
    average: Any
    """Moving average of the parameters; None if none is kept."""

    @property
    def weights(self) -> Any:
        """The weights that are evaluated."""
        return self.parameters if self.average is None else self.average


class Trainer(NamedTuple):
    """The functions that train a model."""

    initial: State
    """The state before the first step."""
    put: Callable[[State], State]
    """Puts a state on the devices."""
    update: Callable[[State, Batch, int], tuple[State, jax.Array, jax.Array, jax.Array]]
    """One step: the new state, the loss, the number of its terms, and the norm of the gradient. The
    old state is donated."""
    model: Callable[[Any], Model]
    """The model with these weights, in evaluation mode."""


def trainer(
    loss: Callable[[Any, Model, Batch], Loss], config: TrainConfig, model: nnx.Module
) -> Trainer:
    """The trainer of a fresh model, for a loss of configuration, model and batch."""
    graph, parameters, *others = nnx.split(model, nnx.Param, ...)
    (rest,) = others
    optimizer, mesh = optimizers.make(config), _mesh(config.devices)
    average = jax.tree.map(jnp.copy, parameters) if config.ema else None
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    update = _update(loss, config, graph, optimizer, mesh)
    rest = jax.device_put(rest, everywhere)

    def evaluated(weights: Any) -> Model:
        model = nnx.merge(graph, weights, rest)
        model.eval()
        return model

    return Trainer(
        initial=State(parameters, optimizer.init(parameters), average),
        put=lambda state: jax.device_put(state, everywhere),
        update=lambda state, batch, step: update(state, jax.device_put(batch, split), step, rest),
        model=evaluated,
    )


def _update(
    loss: Callable[[Any, Model, Batch], Loss],
    config: TrainConfig,
    graph: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Callable[[State, Batch, Any, Any], tuple[State, jax.Array, jax.Array, jax.Array]]:
    """``Trainer.update``; its last argument is the part of the model that is not trained."""

    def sums(parameters: Any, batch: Batch, position: Any, rest: Any) -> tuple[Any, Any, Any]:
        """Summed loss, number of terms, and gradient of the sum, for one microbatch."""

        def total(parameters: Any, perturb: Any = None) -> tuple[jax.Array, jax.Array]:
            streams = _streams(rest, position)
            parameters, others, cast = _cast((parameters, streams, batch), config.dtype)
            model = nnx.merge(graph, parameters, others)
            model = model if perturb is None else moved_embeddings(model, perturb)
            found = loss(config, model, cast)
            return found.total.astype(jnp.float32), found.number.astype(jnp.float32)

        if config.adversarial:
            return adversarial.value_and_grad(total, parameters, config.adversarial)
        (value, count), gradient = jax.value_and_grad(total, has_aux=True)(parameters)
        return value, count, gradient

    def over_microbatches(
        parameters: Any, batch: Batch, step: Any, rest: Any
    ) -> tuple[Any, Any, Any]:
        """The sums over the microbatches of one device, computed one after the other."""
        position = step if mesh.size == 1 else jnp.stack([step, jax.lax.axis_index("data")])
        if config.accumulate == 1:
            return sums(parameters, batch, position, rest)
        A = config.accumulate
        microbatches = jax.tree.map(lambda x: x.reshape(A, x.shape[0] // A, *x.shape[1:]), batch)

        def add(so_far: Any, numbered: Any) -> tuple[Any, None]:
            i, batch = numbered
            new = sums(parameters, batch, jnp.append(position, i), rest)
            return jax.tree.map(jnp.add, so_far, new), None

        zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters))
        numbers = jnp.arange(A, dtype=jnp.int32)
        return jax.lax.scan(add, zero, (numbers, microbatches))[0]

    def over_devices(parameters: Any, batch: Batch, step: Any, rest: Any) -> tuple[Any, Any, Any]:
        return jax.lax.psum(over_microbatches(parameters, batch, step, rest), "data")

    gradient_of = over_microbatches
    if mesh.size > 1:
        everywhere, split = PartitionSpec(), PartitionSpec("data")
        gradient_of = jax.shard_map(
            over_devices,
            mesh=mesh,
            in_specs=(everywhere, split, everywhere, everywhere),
            out_specs=everywhere,
            check_vma=False,
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, batch: Batch, step: Any, rest: Any) -> Any:
        step = jnp.asarray(step, jnp.int32)
        total, count, gradient = gradient_of(state.parameters, batch, step, rest)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to the power of an int
            gradient = jax.tree.map(lambda x: x / count, gradient)
            updates, after = optimizer.update(gradient, state.optimizer, state.parameters)
            parameters = optax.apply_updates(state.parameters, updates)
            average = state.average
            if average is not None:
                average = optimizers.average(average, parameters, config.ema, step)
        new = State(parameters, after, average)
        return new, total / count, count, optax.tree.norm(gradient)

    return update


def _streams(rest: Any, position: jax.Array) -> Any:
    """The model's random keys, folded with the step and the number of device and microbatch."""
    numbers = jnp.atleast_1d(position)

    def folded(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        for i in range(numbers.size):
            x = jax.random.fold_in(x, numbers[i])
        return x

    return jax.tree.map(folded, rest)


def _cast(tree: Any, dtype: str) -> Any:
    """Casts floats to the dtype of the computation."""

    def cast(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def _mesh(devices: int) -> Mesh:
    """A mesh of the first devices, with the axis ``data``.

    Raises:
      ValueError: JAX sees fewer devices.
    """
    if devices > jax.device_count():
        raise ValueError(
            f"devices must be at most {jax.device_count()}, what JAX sees, got {devices}; "
            f"on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={devices} makes more"
        )
    return Mesh(np.array(jax.devices()[:devices]), ("data",))
