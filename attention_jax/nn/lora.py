"""LoRA: projections with a trainable low-rank change, ``y = x W + x A B``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attention_jax.core.axes import accumulation_dtype, int_at_least
from attention_jax.nn.logical import logical


class Frozen(nnx.Variable[Any]):
    """A parameter that is not trained, since it is not an ``nnx.Param``."""


def low_rank(
    model: nnx.Module,
    *,
    rank: int,
    where: Collection[str] = ("query", "value"),
    train: Collection[str] = (),
    rngs: nnx.Rngs,
) -> Any:
    """Adds low-rank adapters to the projections of a model and freezes everything else::

        y = x W + x A B      W [E F] frozen, A [E R] initially random, B [R F] initially 0

    The adapted model initially computes the same. Trainable parameters are ``nnx.Param`` (``A`` and
    ``B`` are ``nnx.LoRAParam``); all others become ``Frozen``. The layer is Flax's ``nnx.LoRA``,
    without the factor ``alpha / R``, which amounts to another learning rate of the adapters.

    Args:
      model: holds ``nnx.Linear`` modules. It is not changed.
      rank: of each change (R), at least 1.
      where: names of the attributes that hold the ``nnx.Linear`` to adapt. Fused projections are
        adapted if one of them is named: ``"query_key_value"`` for ``"query"``. A shared projection
        is adapted everywhere.
      train: names of attributes, modules or parameters, to train in full: a new head, norms.
      rngs: for ``A``.

    Returns:
      A copy of the model. Its structure differs from that of the original: save it after
      ``merged``, or only its adapters, ``low_rank_state``.

    Raises:
      ValueError: a name that no attribute has; the message lists the names that exist. A rank
        above that of a projection.

    >>> import jax, numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import low_rank, MultiHeadAttention
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
    """Folds the adapters into the projections, ``W + A B``, and makes all parameters trainable.

    Of a ``quantized`` model, only projections with adapters become floating-point numbers again.

    Args:
      model: returned by ``low_rank``, trained or not. It is not changed.

    Returns:
      A model with the structure of the one given to ``low_rank``, which computes the same as
      ``model``.

    Source: Hu et al. 2022, section 4.1.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import low_rank, merged, MultiHeadAttention
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

    def trainable(x: Any) -> Any:
        return _as(nnx.Param, x) if isinstance(x.get_raw_value(), jax.Array) else x

    return _changed(copy, Frozen, trainable)


def low_rank_state(model: nnx.Module) -> dict[str, jax.Array]:
    """The parameters that ``low_rank`` added to a model, to be stored without it.

    Args:
      model: returned by ``low_rank``, trained or not.

    Returns:
      A dict from the path of each parameter, joined by dots, to its array: those of all adapters,
      and those to ``train`` in full.

    Raises:
      ValueError: the model has no adapters.

    >>> from flax import nnx
    >>> from attention_jax.nn import low_rank, low_rank_state, MultiHeadAttention
    >>> module = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> adapted = low_rank(module, rank=1, where=("query",), rngs=nnx.Rngs(1))
    >>> {name: x.shape for name, x in low_rank_state(adapted).items()}
    {'query.lora_a': (8, 1), 'query.lora_b': (1, 8)}
    """
    return {".".join(map(str, path)): x.get_value() for path, x in _added(model).items()}


def with_low_rank(model: nnx.Module, state: Mapping[str, Any]) -> Any:
    """Puts the adapters of ``low_rank_state`` into a copy of a model.

    Args:
      model: returned by ``low_rank`` with the same ``rank``, ``where`` and ``train``. It is not
        changed.
      state: from ``low_rank_state``; arrays are cast to the dtypes of the model's.

    Returns:
      A copy of the model.

    Raises:
      ValueError: the model has no adapters, or names or shapes differ from those of the model; the
        message lists all of them.

    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.nn import low_rank, low_rank_state, MultiHeadAttention, with_low_rank
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
    """The parameters of adapters, frozen or not, and all other trainable ones, by path."""
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    adapters = [x for _, x in nnx.iter_graph(model) if isinstance(x, nnx.LoRA)]
    if not adapters:
        raise ValueError("model must have adapters, which nn.low_rank adds")
    thin = {id(x) for adapter in adapters for x in (adapter.lora_a, adapter.lora_b)}
    return {path: x for path, x in flat.items() if id(x) in thin or isinstance(x, nnx.Param)}


def _adapter(linear: nnx.Linear, rank: int, rngs: nnx.Rngs) -> nnx.LoRA:
    if rank > (most := min(linear.in_features, linear.out_features)):
        raise ValueError(
            f"rank must be at most {most}, the rank of a projection of {linear.in_features} to "
            f"{linear.out_features} features, got {rank}"
        )
    adapter = nnx.LoRA(
        linear.in_features,
        rank,
        linear.out_features,
        base_module=linear,
        dtype=linear.dtype,
        param_dtype=linear.kernel[...].dtype,
        rngs=rngs,
    )
    metadata = linear.kernel.get_metadata()
    rows, columns = metadata.get("out_sharding") or (None, None)
    of_rows, of_columns = metadata.get("units") or (None, None)
    a, b = (
        logical(rows, None, units=(of_rows, None)),
        logical(None, columns, units=(None, of_columns)),
    )
    adapter.lora_a = nnx.LoRAParam(adapter.lora_a[...], **a)
    adapter.lora_b = nnx.LoRAParam(adapter.lora_b[...], **b)
    return adapter


def _folded(adapter: nnx.LoRA, linear: nnx.Linear) -> nnx.Linear:
    """The projection with ``W + A B`` in a new variable, since others may share ``W``."""
    kernel: Any = linear.kernel
    wide = accumulation_dtype(kernel.dtype)
    w, a, b = (x[...].astype(wide) for x in (kernel, adapter.lora_a, adapter.lora_b))
    change = jnp.matmul(a, b, precision="highest")
    linear.kernel = kernel.replace((w + change).astype(kernel.dtype))
    return linear


def _as(kind: type[nnx.Variable[Any]], x: Any) -> Any:
    """The variable as one of another type."""
    return kind.from_metadata(x.get_raw_value(), x.get_metadata())


def _changed(model: nnx.Module, kind: type[Any], change: Callable[[Any], Any]) -> Any:
    """The model with every variable of a kind replaced; shared ones stay shared."""
    graph, state = nnx.split(model)
    flat = {p: change(x) if isinstance(x, kind) else x for p, x in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _attributes(model: nnx.Module) -> Iterator[tuple[Any, str, Any]]:
    """Every module, attribute name and the module or parameter that the attribute holds."""
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Pytree):
            for name, child in vars(module).items():
                if isinstance(child, (nnx.Pytree, nnx.Variable)):
                    yield module, name, child


def _check_names(argument: str, given: Collection[str], known: set[str], there: set[str]) -> None:
    """Raises for a name that is not ``known``; ``there`` are the names that the message lists."""
    if isinstance(given, str):
        raise TypeError(f"{argument} must be a collection of names, got the string {given!r}")
    if unknown := sorted(set(given) - known):
        some = ", ".join(sorted(there)) or "no attribute, since there are none"
        raise ValueError(f"{argument} must name some of {some}; got {', '.join(unknown)}")
