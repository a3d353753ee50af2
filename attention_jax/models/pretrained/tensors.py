"""``Tensor``: where a tensor of a checkpoint belongs in a model, and in which layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Path = tuple[str | int, ...]


class Form(NamedTuple):
    """How the layout of a tensor changes between checkpoint and model."""

    into: Callable[[np.ndarray], np.ndarray]
    """From the checkpoint into the model."""
    back: Callable[[Any], Any]
    """From the model into the checkpoint."""


SAME = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(lambda x: x.T, lambda x: x.T)  # torch's Linear has [out, in]


class Tensor(NamedTuple):
    """One tensor of a checkpoint."""

    name: str
    """In the checkpoint."""
    path: Path
    """In the state of the model."""
    form: Form = SAME
    stacked: bool = False
    """Whether tensors of the same path are stacked along a new first axis, in their order."""


def linear(name: str, path: Path, *, bias: bool = True) -> Iterator[Tensor]:
    """A ``torch.nn.Linear``."""
    yield Tensor(f"{name}.weight", (*path, "kernel"), TRANSPOSED)
    if bias:
        yield Tensor(f"{name}.bias", (*path, "bias"))


def expert(name: str, path: Path, i: int) -> Tensor:
    """A ``torch.nn.Linear`` without bias, number ``i`` of those stacked in one parameter."""
    form = Form(TRANSPOSED.into, lambda x: x[i].T)
    return Tensor(f"{name}.weight", path, form, stacked=True)


def norm(name: str, path: Path, *, bias: bool = True) -> Iterator[Tensor]:
    """A norm with its scale, and its bias if it has one."""
    yield Tensor(f"{name}.weight", (*path, "scale"))
    if bias:
        yield Tensor(f"{name}.bias", (*path, "bias"))


def block(path: Path, i: int) -> dict[str, Path]:
    """The paths of the parts of layer ``i`` of the stack at ``path``."""
    at = (*path, "blocks", i)
    parts = {"attention": "attention", "cross": "cross_attention", "feed_forward": "feed_forward"}
    paths = {name: (*at, part, "sublayer") for name, part in parts.items()}
    for name, part in parts.items():
        paths[f"{name}_norm"] = (*at, part, "norm")
        paths[f"{name}_norm_after"] = (*at, part, "norm_after")
    return paths
