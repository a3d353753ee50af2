"""A model with few numbers to train: each projection plus a product of two thin matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.core.axes import accumulation_dtype, int_at_least


class Frozen(nnx.Variable[Any]):
    """A parameter that is not trained: what looks for ``nnx.Param`` does not find it."""


def low_rank(
    model: nnx.Module,
    *,
    rank: int,
    where: Collection[str] = ("query", "value"),
    train: Collection[str] = (),
    rngs: nnx.Rngs,
) -> Any:
    """A model that computes the same, and of which only low-rank changes of projections train::

        y = x W + x A B      W [E F] stays, A [E R] begins random, B [R F] at 0

    What trains is in ``nnx.Param`` (``A`` and ``B`` are ``nnx.LoRAParam``), every other parameter
    becomes ``Frozen``. The layer is Flax's ``nnx.LoRA``, which has no ``alpha / R`` before ``A B``:
    that would be another learning rate of the adapters.

    Args:
      model: what holds ``nnx.Linear`` somewhere; it is left as it is.
      rank: of each change (R), at least 1.
      where: names of the attributes that hold the ``nnx.Linear`` to adapt. Projections that are
        fused are adapted where one of them is named: ``"query_key_value"`` for ``"query"``. One
        that is shared is adapted everywhere.
      train: names of attributes, modules or parameters, to train in full: a fresh head, norms.
      rngs: for ``A``.

    Returns:
      A copy of the model. It has another structure: save it after ``merged``, or its adapters
      alone, ``low_rank_state``.

    Raises:
      ValueError: a name that nothing has; the names there are are listed.

    >>> import jax, numpy as np
    >>> from attention_jax.nn import MultiHeadAttention
    >>> module = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> adapted = low_rank(module, rank=1, rngs=nnx.Rngs(1))
    >>> x = np.ones((1, 5, 8), np.float32)
    >>> bool((adapted(x) == module(x)).all())
    True
    >>> count = lambda m: sum(x.size for x in jax.tree.leaves(nnx.state(m, nnx.Param)))
    >>> count(module), count(adapted)
    (288, 32)

    Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    int_at_least("rank", rank, 1)
    copy = nnx.clone(model)
    whole = [(name, child) for _, name, child in _attributes(copy) if name in train]
    there = {name for _, name, _ in _attributes(copy) if not name.isdigit()}
    _check_names("train", train, {name for name, _ in whole}, there)
    below = {id(x) for _, child in whole for _, x in nnx.iter_graph(child)}

    linears = [
        (module, name, child)
        for module, name, child in _attributes(copy)
        if isinstance(child, nnx.Linear) and id(child) not in below
    ]
    parts = {name: {name, *name.split("_")} for _, name, _ in linears}
    _check_names("where", where, set().union(*parts.values()), set(parts))
    adapters = {
        id(linear): _adapter(linear, rank, rngs)
        for _, name, linear in linears
        if parts[name] & set(where)
    }
    for module, name, linear in linears:
        if id(linear) in adapters:
            setattr(module, name, adapters[id(linear)])
    trained = below | {id(x) for a in adapters.values() for x in (a.lora_a, a.lora_b)}

    def frozen(x: Any) -> Any:
        return x if id(x) in trained else _as(Frozen, x)

    return _changed(copy, nnx.Param, frozen)


def merged(model: nnx.Module) -> Any:
    """The model with its adapters in its projections, ``W + A B``, and all parameters trainable.

    Args:
      model: as ``low_rank`` returned it, or that trained; it is left as it is.

    Returns:
      A model of the structure that was given to ``low_rank``, which computes the same.

    >>> import numpy as np
    >>> from attention_jax.nn import MultiHeadAttention
    >>> module = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> adapted = low_rank(module, rank=1, rngs=nnx.Rngs(1))
    >>> adapted.query.lora_b[...] += 1
    >>> x = np.ones((1, 5, 8), np.float32)
    >>> bool(np.allclose(merged(adapted)(x), adapted(x), atol=1e-5))
    True
    """

    copy = nnx.clone(model)
    adapters = [x for x in _attributes(copy) if isinstance(x[2], nnx.LoRA)]
    folded = {
        id(adapter): _folded(adapter, adapter.base_module)
        for adapter in {id(x): x for _, _, x in adapters}.values()
        if isinstance(adapter.base_module, nnx.Linear)
    }
    for module, name, adapter in adapters:
        if id(adapter) in folded:
            setattr(module, name, folded[id(adapter)])
    return _changed(copy, Frozen, lambda x: _as(nnx.Param, x))


def low_rank_state(model: nnx.Module) -> dict[str, jax.Array]:
    """What ``low_rank`` added to a model, to be kept without the model: ``A`` and ``B`` by name.

    Args:
      model: as ``low_rank`` returned it, or that trained.

    Returns:
      For the path to each parameter, joined by dots, its array: of all adapters, and of what was
      to ``train`` in full.

    Raises:
      ValueError: the model has no adapters.

    >>> from attention_jax.nn import MultiHeadAttention
    >>> module = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> adapted = low_rank(module, rank=1, where=("query",), rngs=nnx.Rngs(1))
    >>> {name: x.shape for name, x in low_rank_state(adapted).items()}
    {'query.lora_a': (8, 1), 'query.lora_b': (1, 8)}
    """
    return {".".join(map(str, path)): x.get_value() for path, x in _added(model).items()}


def with_low_rank(model: nnx.Module, state: Mapping[str, Any]) -> Any:
    """A model with the adapters that ``low_rank_state`` took out of one of the same kind.

    Args:
      model: as ``low_rank`` returned it, called with the same ``rank``, ``where`` and ``train``; it
        is left as it is.
      state: its arrays take the dtypes of the model's.

    Returns:
      A copy of the model.

    Raises:
      ValueError: the model has no adapters, or names or shapes are not those of the model; the
        message lists them all.

    >>> import numpy as np
    >>> from attention_jax.nn import MultiHeadAttention
    >>> module = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> trained, fresh = (low_rank(module, rank=1, rngs=nnx.Rngs(i)) for i in (1, 2))
    >>> trained.query.lora_b[...] += 1
    >>> again = with_low_rank(fresh, low_rank_state(trained))
    >>> x = np.ones((1, 5, 8), np.float32)
    >>> bool((again(x) == trained(x)).all())
    True
    """
    added = {".".join(map(str, path)): (path, x) for path, x in _added(model).items()}
    wrong = [f"{name} is missing" for name in added if name not in state]
    for name, array in state.items():
        if name not in added:
            wrong.append(f"{name} is not expected")
        elif tuple(array.shape) != added[name][1].shape:
            expected = added[name][1].shape
            wrong.append(f"{name} has shape {tuple(array.shape)}, expected {expected}")
    if wrong:
        raise ValueError(
            f"the adapters must be those of a model with the same rank, where and train: "
            f"{'; '.join(wrong)}"
        )
    graph, whole = nnx.split(model)
    flat = dict(nnx.to_flat_state(whole))
    for name, (path, x) in added.items():
        flat[path] = x.replace(jnp.asarray(state[name], x.dtype))
    return nnx.merge(graph, nnx.from_flat_state(flat), copy=True)


def _added(model: nnx.Module) -> dict[Any, Any]:
    """By their paths, parameters of adapters, frozen or not, and whatever else trains."""
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    adapters = [x for _, x in nnx.iter_graph(model) if isinstance(x, nnx.LoRA)]
    if not adapters:
        raise ValueError("model must have adapters: nn.low_rank makes a model that has")
    thin = {id(x) for adapter in adapters for x in (adapter.lora_a, adapter.lora_b)}
    return {path: x for path, x in flat.items() if id(x) in thin or isinstance(x, nnx.Param)}


def _adapter(linear: nnx.Linear, rank: int, rngs: nnx.Rngs) -> nnx.LoRA:
    return nnx.LoRA(
        linear.in_features,
        rank,
        linear.out_features,
        base_module=linear,
        dtype=linear.dtype,
        param_dtype=linear.kernel[...].dtype,
        rngs=rngs,
    )


def _folded(adapter: nnx.LoRA, linear: nnx.Linear) -> nnx.Linear:
    """The projection with ``W + A B``, in a new variable: what shared ``W`` was not adapted."""
    kernel: Any = linear.kernel
    wide = accumulation_dtype(kernel.dtype)
    w, a, b = (x[...].astype(wide) for x in (kernel, adapter.lora_a, adapter.lora_b))
    change = jnp.matmul(a, b, precision="highest")
    linear.kernel = kernel.replace((w + change).astype(kernel.dtype))
    return linear


def _as(kind: type[nnx.Variable[Any]], x: Any) -> Any:
    """A variable of another type."""
    return kind.from_metadata(x.get_raw_value(), x.get_metadata())


def _changed(model: nnx.Module, kind: type[Any], change: Callable[[Any], Any]) -> Any:
    """A model with other variables in the places of those of a kind; what is shared stays so."""
    graph, state = nnx.split(model)
    flat = {p: change(x) if isinstance(x, kind) else x for p, x in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _attributes(model: nnx.Module) -> Iterator[tuple[Any, str, Any]]:
    """Each module, and what it holds under each name: modules and parameters."""
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Pytree):
            for name, child in vars(module).items():
                if isinstance(child, (nnx.Pytree, nnx.Variable)):
                    yield module, name, child


def _check_names(argument: str, given: Collection[str], known: set[str], there: set[str]) -> None:
    """Raises where a name is not ``known``; ``there`` are those that could have been meant."""
    if isinstance(given, str):
        raise TypeError(f"{argument} must be a collection of names, got the string {given!r}")
    if unknown := sorted(set(given) - known):
        some = ", ".join(sorted(there)) or "no attribute, for there is none"
        raise ValueError(f"{argument} must name some of {some}; got {', '.join(unknown)}")
