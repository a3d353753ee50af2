"""What of a model is trained, and how fast: frozen layers, low-rank adapters, rates by layer.

These options are for a model with one encoder, token embeddings and a stack of layers: an
``Encoder``, alone or below a head, an ``EncoderDecoder``, or a model of the same form. What is
neither embeddings nor layers of the encoder, a head or decoder for example, is always trained, at
the full learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from flax import nnx

from attention_jax.models.stack import Stack
from attention_jax.nn import Embeddings, Frozen, low_rank
from experiments.training.config import TrainConfig

ADAPTED = ("query", "value")  # the projections that low_rank adapts, as in the paper

Path = tuple[Any, ...]


class Place(NamedTuple):
    """The encoder in a model."""

    path: Path
    """Attributes that lead to it; empty if it is the model itself."""
    stack: str
    """Its attribute that holds the layers."""
    layers: int

    def depth(self, parameter: Path) -> int:
        """0 for embeddings, 1 for the first layer, ``layers + 1`` for what is above the last."""
        inside = parameter[len(self.path) :] if parameter[: len(self.path)] == self.path else ()
        if inside[:1] == ("embed",):
            return 0
        if inside[:2] == (self.stack, "blocks"):
            return 1 + int(inside[2])
        return self.layers + 1


def place(model: nnx.Module, option: str) -> Place:
    """Finds the encoder.

    Args:
      model: to look into.
      option: that needs it, for the message.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = []
    for path, module in nnx.iter_modules(model):
        if isinstance(getattr(module, "embed", None), Embeddings):
            for name in ("stack", "encoder"):
                if isinstance(stack := getattr(module, name, None), Stack):
                    found.append(Place(tuple(path), name, len(stack.blocks)))
    if len(found) != 1:
        raise ValueError(
            f"{option} needs a model with one encoder, token embeddings and a stack of layers; "
            f"{type(model).__name__} has {len(found) or 'none'}"
        )
    return found[0]


def prepared(model: Any, config: TrainConfig) -> Any:
    """A fresh model as it is trained: with the adapters and the frozen weights of the options.

    Trained weights are ``nnx.Param``; the others become ``Frozen``, which no checkpoint of the run
    holds, since ``init`` makes them again.

    Raises:
      ValueError: ``freeze`` or ``low_rank`` without an encoder, or more frozen layers than it has.
    """
    if not isinstance(model, nnx.Module):
        for name in ("freeze", "low_rank"):
            if getattr(config, name):
                raise ValueError(
                    f"{name} needs a model that is trained, {type(model).__name__} is not"
                )
        return model
    freeze = config.freeze
    if config.low_rank:
        model, freeze = _adapted(model, config), freeze or 0  # embeddings are frozen too
    return model if freeze is None else _frozen(model, freeze)


def _adapted(model: nnx.Module, config: TrainConfig) -> nnx.Module:
    """With adapters in the layers of the encoder, of which nothing else is trained."""
    at = place(model, "low_rank")
    encoder: Any = model
    for name in at.path:
        encoder = getattr(encoder, name)
    rngs = nnx.Rngs(config.seed)
    stack = low_rank(getattr(encoder, at.stack), rank=config.low_rank, where=ADAPTED, rngs=rngs)
    setattr(encoder, at.stack, stack)
    return model


def _frozen(model: nnx.Module, layers: int) -> nnx.Module:
    at = place(model, "freeze")
    if layers > at.layers:
        raise ValueError(
            f"freeze must be at most {at.layers}, the number of layers of the encoder, got {layers}"
        )
    graph, state = nnx.split(model)

    def kept(path: Path, x: Any) -> Any:
        if isinstance(x, nnx.Param) and at.depth(path) <= layers:
            return Frozen.from_metadata(x.get_raw_value(), x.get_metadata())
        return x

    flat = {path: kept(path, x) for path, x in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def rates(model: nnx.Module, layer_decay: float) -> Any:
    """The factor of the learning rate of each trained weight, in the structure of the weights::

        layer_decay ** (layers + 1 - depth)

    Source: Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification";
    Clark et al. 2020, "ELECTRA", for the exponent.

    Raises:
      ValueError: the model has no encoder.
    """
    at = place(model, "layer_decay")
    return nnx.from_flat_state(
        {
            path: x.replace(layer_decay ** (at.layers + 1 - at.depth(path)))
            for path, x in _weights(model)
        }
    )


def matrices_of_layers(model: nnx.Module) -> set[Path]:
    """The paths of the trained weights that are matrices of transformer layers.

    Raises:
      ValueError: there are none.
    """
    stacks = [tuple(path) for path, x in nnx.iter_modules(model) if isinstance(x, Stack)]
    found = {
        path
        for path, x in _weights(model)
        for stack in stacks
        if path[: len(stack) + 1] == (*stack, "blocks") and x.get_value().ndim == 2
    }
    if not found:
        raise ValueError(
            f"optimizer muon needs matrices of transformer layers to train, "
            f"{type(model).__name__} has none: use adamw"
        )
    return found


def _weights(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    yield from nnx.to_flat_state(nnx.state(model, nnx.Param))
