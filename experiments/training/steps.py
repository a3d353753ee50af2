"""One step of training: the gradient of a batch, in parts and over devices, and the update.

For one part of a batch on one device it is ``gradient of sum(loss)``; parts and devices are
summed, and the sum is divided by the number of what the loss counts: however a batch is cut, the
gradient is that of its mean.
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
from experiments.training.config import Config

Model = Any  # an nnx.Module, or, fitted by counting, any object
Batch = Any  # a pytree of arrays with an axis of examples first: what the task's loss understands


class Loss(NamedTuple):
    """What ``Task.loss`` returns: a sum, and over how many. Their quotient is made small."""

    total: jax.Array
    number: jax.Array


class State(NamedTuple):
    """What a step changes."""

    parameters: Any
    optimizer: Any
    average: Any
    """Of the parameters; None where none is kept."""

    @property
    def weights(self) -> Any:
        """What is evaluated."""
        return self.parameters if self.average is None else self.average


class Steps(NamedTuple):
    """How a model is trained."""

    first: State
    """Before the first step."""
    put: Callable[[State], State]
    """Onto the devices."""
    update: Callable[[State, Batch, int], tuple[State, jax.Array, jax.Array, jax.Array]]
    """One step: the new state, the loss, what it counts, and the norm of the gradient. The old
    state is used up."""
    model: Callable[[Any], Model]
    """With these weights, ready to be evaluated."""


def steps(loss: Callable[[Any, Model, Batch], Loss], config: Config, model: nnx.Module) -> Steps:
    """Of a loss of configuration, model and batch, and a fresh model."""
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

    return Steps(
        first=State(parameters, optimizer.init(parameters), average),
        put=lambda state: jax.device_put(state, everywhere),
        update=lambda state, batch, step: update(state, jax.device_put(batch, split), step, rest),
        model=evaluated,
    )


def _update(
    loss: Callable[[Any, Model, Batch], Loss],
    config: Config,
    graph: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Callable[[State, Batch, Any, Any], tuple[State, jax.Array, jax.Array, jax.Array]]:
    """See ``Steps.update``; the last argument is what of the model is not trained."""

    def sums(parameters: Any, batch: Batch, place: Any, rest: Any) -> tuple[Any, Any, Any]:
        """Total, count and the total's gradient, of a part of the batch."""

        def total(parameters: Any, move: Any = None) -> tuple[jax.Array, jax.Array]:
            streams = _streams(rest, place)
            parameters, others, cast = _cast((parameters, streams, batch), config.dtype)
            model = nnx.merge(graph, parameters, others)
            model = model if move is None else moved_embeddings(model, move)
            found = loss(config, model, cast)
            return found.total.astype(jnp.float32), found.number.astype(jnp.float32)

        if config.adversarial:
            return adversarial.value_and_grad(total, parameters, config.adversarial)
        (value, count), gradient = jax.value_and_grad(total, has_aux=True)(parameters)
        return value, count, gradient

    def in_turns(parameters: Any, batch: Batch, step: Any, rest: Any) -> tuple[Any, Any, Any]:
        """The sums over all parts that one device computes one after the other."""
        place = step if mesh.size == 1 else jnp.stack([step, jax.lax.axis_index("data")])
        if config.accumulate == 1:
            return sums(parameters, batch, place, rest)
        A = config.accumulate
        parts = jax.tree.map(lambda x: x.reshape(A, x.shape[0] // A, *x.shape[1:]), batch)

        def add(so_far: Any, part: Any) -> tuple[Any, None]:
            i, batch = part
            new = sums(parameters, batch, jnp.append(place, i), rest)
            return jax.tree.map(jnp.add, so_far, new), None

        nothing = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters))
        numbers = jnp.arange(A, dtype=jnp.int32)
        return jax.lax.scan(add, nothing, (numbers, parts))[0]

    def over_devices(parameters: Any, batch: Batch, step: Any, rest: Any) -> tuple[Any, Any, Any]:
        return jax.lax.psum(in_turns(parameters, batch, step, rest), "data")

    gradient_of = in_turns
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


def _streams(rest: Any, place: jax.Array) -> Any:
    """The model's streams of random numbers, each at its own place for this step and part."""
    places = jnp.atleast_1d(place)

    def moved(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        for i in range(places.size):
            x = jax.random.fold_in(x, places[i])
        return x

    return jax.tree.map(moved, rest)


def _cast(tree: Any, dtype: str) -> Any:
    """Floats to the dtype of the computation."""

    def cast(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def _mesh(devices: int) -> Mesh:
    """So many of the devices in a row.

    Raises:
      ValueError: there are fewer.
    """
    if devices > jax.device_count():
        raise ValueError(
            f"devices must be at most {jax.device_count()}, those that JAX sees, got {devices}; "
            f"on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={devices} makes as many"
        )
    return Mesh(np.array(jax.devices()[:devices]), ("data",))
