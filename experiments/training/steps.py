"""One training step: the gradient of a batch, over microbatches and devices, and the update.

Each microbatch gives the gradient of its summed loss. These are added up and divided by the number
of loss terms, so that however a batch is split, the result is the gradient of its mean loss. Over a
mesh, the program is that of one device, which XLA partitions by the shardings of its arguments;
processes on CPUs that split only the batch sum the gradients of their devices as one vector
instead, see ``Layout.per_device_gradients``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from attention_jax.core.shards import split_along
from attention_jax.nn import moved_embeddings
from experiments.training import adversarial, optimizers
from experiments.training.config import TrainConfig
from experiments.training.layout import Layout, for_evaluation
from experiments.training.layout import layout as make_layout
from experiments.training.task import Batch, Loss, Model, Rows


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
    batch has the rows of this process; the old state is donated."""
    check: Callable[[State, Batch], None]
    """Traces a step without running it, so that what an option breaks is raised early."""
    model: Callable[[Any], Model]
    """The model with these weights, in evaluation mode."""
    rows: Rows
    """Which rows of every batch this process needs."""


def trainer(
    loss: Callable[[Any, Model, Batch], Loss],
    config: TrainConfig,
    model: nnx.Module,
    layout: Layout | None = None,
) -> Trainer:
    """The trainer of a fresh model, for a loss of configuration, model and batch.

    Args:
      loss, config, model: what is trained.
      layout: how it is split; default ``config.devices`` along the batch.

    Raises:
      ValueError: a batch that cannot be split in this way.
    """
    layout = make_layout(None, fsdp=False, devices=config.devices) if layout is None else layout
    parts = config.accumulate * layout.parts
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of accumulate x data, {parts}, got {config.batch_size}"
        )
    graph, parameters, *others = nnx.split(layout.prepared(model), nnx.Param, ...)
    (rest,) = others
    optimizer = optimizers.make(config, model)

    def start(parameters: Any) -> State:
        average = jax.tree.map(jnp.copy, parameters) if config.ema else None
        return State(parameters, optimizer.init(parameters), average)

    placed = layout.shardings(jax.eval_shape(start, parameters))
    initial = jax.jit(start, out_shardings=placed)(layout.put(parameters))
    update = _update(loss, config, graph, optimizer, layout, placed)
    on_devices = layout.put(rest)

    def evaluated(weights: Any) -> Model:
        model = nnx.merge(graph, *for_evaluation((weights, on_devices)))
        model.eval()
        return model

    def on_mesh() -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(layout.mesh) if layout.mesh.size > 1 else contextlib.nullcontext()

    def step(state: State, batch: Batch, step: int) -> Any:
        with on_mesh():
            return update(state, layout.put_batch(batch), step, on_devices)

    def check(state: State, batch: Batch) -> None:
        with on_mesh():
            update.trace(state, layout.put_batch(batch), 0, on_devices)

    return Trainer(
        initial=initial,
        put=layout.put,
        update=step,
        check=check,
        model=evaluated,
        rows=layout.rows,
    )


def _update(
    loss: Callable[[Any, Model, Batch], Loss],
    config: TrainConfig,
    graph: Any,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    placed: Any,
) -> jax.stages.Wrapped:
    """``Trainer.update``; its last argument is the part of the model that is not trained.

    Args:
      placed: the sharding of each array of the state.
    """
    per_device = layout.per_device_gradients

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
        """The sums over the microbatches, computed one after the other."""
        position = step
        if per_device:
            position = jnp.stack([step, jax.lax.axis_index("data")])
        if config.accumulate == 1:
            return sums(parameters, batch, position, rest)
        A = config.accumulate

        def divided(x: jax.Array) -> jax.Array:  # each microbatch over all devices
            x = x.reshape(A, x.shape[0] // A, *x.shape[1:])
            return split_along(x, 1, "data", "a microbatch")

        microbatches = jax.tree.map(divided, batch)

        def add(so_far: Any, numbered: Any) -> tuple[Any, None]:
            i, batch = numbered
            new = sums(parameters, batch, jnp.append(position, i), rest)
            return jax.tree.map(jnp.add, so_far, new), None

        zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters))
        numbers = jnp.arange(A, dtype=jnp.int32)
        return jax.lax.scan(add, zero, (numbers, microbatches))[0]

    gradient_of = over_microbatches
    if per_device:
        split, same = PartitionSpec("data"), PartitionSpec()
        gradient_of = jax.shard_map(
            lambda *arguments: _summed(over_microbatches(*arguments)),
            mesh=layout.mesh,
            in_specs=(same, split, same, same),
            out_specs=same,
            check_vma=False,
        )

    everywhere = NamedSharding(layout.mesh, PartitionSpec())

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(placed, *[everywhere] * 3))
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


def _summed(sums: Any) -> Any:
    """Sums over all devices, sent as one vector."""
    vector, unravel = ravel_pytree(sums)
    return unravel(jax.lax.psum(vector, "data"))


def _streams(rest: Any, position: jax.Array) -> Any:
    """The model's random keys, folded with the step and the number of the microbatch."""
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
