"""Published checkpoints: Hugging Face's folders of BERT, GPT-2, Llama, Mistral, Gemma 2, T5, ViT.

::

    model = load("folder")      config.json and model.safetensors, or its shards and their index
    save(model, "folder")       the same two files, which Hugging Face loads

An entry of the configuration that would change the result and is not known here is refused, and
so are tensors that are missing, not expected or of another shape: nothing is left out silently.
Only safetensors are read, never pickles; one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models.decoder import DecoderConfig
from attention_jax.models.layers import Layers
from attention_jax.models.pretrained import bert, gpt2, llama, safetensors, t5, vit
from attention_jax.models.pretrained.adapters import load_adapters, save_adapters
from attention_jax.models.pretrained.entries import Entries
from attention_jax.models.pretrained.tensors import Tensor

__all__ = ["load", "load_adapters", "save", "save_adapters"]

# Each is a module with TYPES (its names as ``model_type``), PREFIX (of the names of a model within
# one with a head), IGNORED (patterns of tensors that are not parameters), RENAMED (parts of names,
# for files of before), and four functions: ``config`` and ``entries`` from their configuration to
# ours and back, ``model``, and ``tensors``.
FAMILIES: tuple[ModuleType, ...] = (bert, gpt2, llama, t5, vit)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def load(
    folder: str | PathLike[str],
    *,
    ignore: Collection[str] = (),
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    implementation: str | tuple[str, ...] | None = None,
    seed: int = 0,
) -> Any:
    """The model of a checkpoint, ready to be called; ``model.train()`` switches dropout on.

    Args:
      folder: with ``config.json`` and ``model.safetensors``, or shards and their index.
      ignore: regular expressions of the names of tensors to leave out.
      dtype: of the computation; default that of the parameters.
      param_dtype: of the parameters, whatever the file has.
      implementation: of attention.
      seed: of dropout.

    Returns:
      An ``Encoder`` (BERT), ``Decoder`` (GPT-2, Llama, Mistral, Gemma 2), ``EncoderDecoder`` (T5)
      or ``VisionTransformer`` (ViT).

    Raises:
      FileNotFoundError: no configuration, or no tensors.
      ValueError: an entry of the configuration that is not supported; tensors that are missing,
        not expected or of another shape; a file that is not what it should be. The message lists
        all of them.

    >>> import tempfile
    >>> from attention_jax.models import Decoder, DecoderConfig
    >>> layers = Layers(features=8, num_layers=1, num_heads=2, hidden=32, fused=True,
    ...                 activation="gelu_tanh")
    >>> config = DecoderConfig(10, layers, positions="learned", max_length=6)
    >>> folder = tempfile.mkdtemp()
    >>> save(Decoder(config, rngs=nnx.Rngs(0)), folder)
    >>> load(folder)(np.array([[3, 1, 4]])).shape
    (1, 3, 10)
    """
    folder = Path(folder)
    described = _read_json(folder / "config.json")
    files = _files(folder)
    family = _family(described)
    stored = _present_names(files, family)
    entries, kind = Entries(described), str(described["model_type"])
    try:
        config = family.config(entries, set(stored))
    except (TypeError, ValueError) as e:  # sizes that do not fit, often after a wrong entry
        raise entries.refusal(kind, str(e)) from e
    entries.finish(kind)
    changes = {"dtype": dtype, "param_dtype": param_dtype, "implementation": implementation}
    config = _with_layers(config, changes)

    graph, state = nnx.split(nnx.eval_shape(lambda: family.model(config, nnx.Rngs(0))))
    leaves = dict(nnx.to_flat_state(state))
    tensors = {tensor.name: tensor for tensor in family.tensors(config)}
    used = _used(stored, tensors, family.PREFIX, (*family.IGNORED, *ignore))
    _check(kind, used, tensors, leaves)
    filled = _random_state(leaves, seed)
    for name, (file, theirs) in used.items():
        tensor = tensors[name]
        filled[tensor.path] = jnp.asarray(tensor.form.into(file[theirs]), param_dtype)
    values = {path: x.replace(filled[path]) for path, x in leaves.items()}
    model = nnx.merge(graph, nnx.from_flat_state(values))
    model.eval()
    return model


def save(
    model: Any, folder: str | PathLike[str], *, config: Mapping[str, Any] | None = None
) -> None:
    """Writes a model as a folder that Hugging Face, and ``load``, can read.

    Args:
      model: of a class that ``load`` returns, and that one of the families can express.
      folder: is made where it does not exist.
      config: more entries of ``config.json``, ``eos_token_id`` for example.

    Raises:
      NotImplementedError: no family has such a model.

    >>> import tempfile
    >>> from attention_jax.models import VisionConfig, VisionTransformer
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> config = VisionConfig(image=(4, 4), patch=2, layers=layers, classes=3)
    >>> folder = Path(tempfile.mkdtemp())
    >>> save(VisionTransformer(config, rngs=nnx.Rngs(0)), folder)
    >>> sorted(path.name for path in folder.iterdir())
    ['config.json', 'model.safetensors']
    """
    family, described = _described(model.config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    tensors = list(family.tensors(model.config))

    def array(tensor: Tensor) -> Any:
        return tensor.form.back(leaves[tensor.path].get_value())

    shapes = {tensor.name: jax.eval_shape(lambda t=tensor: array(t)) for tensor in tensors}
    dtypes = {np.dtype(x.dtype).name for x in shapes.values()}
    described |= {"dtype": dtypes.pop() if len(dtypes) == 1 else "float32", **(config or {})}
    safetensors.write(folder / WEIGHTS, shapes, (np.asarray(array(t)) for t in tensors))
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


# --- Configurations.


def _family(described: Mapping[str, Any]) -> ModuleType:
    kind = described.get("model_type")
    for family in FAMILIES:
        if kind in family.TYPES:
            return family
    known = sorted(name for family in FAMILIES for name in family.TYPES)
    raise ValueError(f"config.json has model_type {kind!r}, expected one of {known}")


def _described(config: Any) -> tuple[ModuleType, dict[str, Any]]:
    """The family of a configuration, and its entries; what they say must be all there is."""
    ours = {"dtype": None, "param_dtype": jnp.float32, "implementation": None}
    ours |= {"remat": False, "scan": False}
    plain = _with_layers(config, ours)
    names = set() if getattr(config, "tied", True) else {"lm_head.weight"}
    for family in FAMILIES:
        try:
            described = family.entries(config)
            entries = Entries(described)
            again = family.config(entries, names)
            entries.finish("model")
        except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError):
            continue  # of another class, or with what this family has no name for
        if again == _with_length(plain, again):
            return family, described
    raise NotImplementedError(
        f"no family of checkpoints can express this model: {config}. Save its state with "
        f"nnx.state instead"
    )


def _with_layers(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with changes in all its ``Layers``."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    layers = {
        name: dataclasses.replace(x, **changes)
        for name, x in fields.items()
        if isinstance(x, Layers)
    }
    return dataclasses.replace(config, **layers)


def _with_length(config: Any, other: Any) -> Any:
    """With the longest length of another, where that is a remark and no table's size."""
    if isinstance(config, DecoderConfig) and config.positions != "learned":
        return dataclasses.replace(config, max_length=getattr(other, "max_length", None))
    return config


# --- Tensors.


def _files(folder: Path) -> list[safetensors.File]:
    if (folder / INDEX).exists():
        places = _read_json(folder / INDEX).get("weight_map")
        names = list(places.values()) if isinstance(places, dict) else []
        if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise ValueError(f"{INDEX} must name files of its own folder, got {names}")
        return [safetensors.File(folder / name) for name in sorted(set(names))]
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(
            f"{folder} must have {WEIGHTS} or {INDEX}: other formats are not read"
        )
    return [safetensors.File(folder / WEIGHTS)]


Stored = dict[str, tuple[safetensors.File, str]]


def _present_names(files: list[safetensors.File], family: ModuleType) -> Stored:
    """For the present name of each tensor, its file and its name there."""
    stored: Stored = {}
    for file in files:
        for name in file:
            new = name
            for old, present in family.RENAMED.items():
                new = new.replace(old, present)
            if new in stored:
                raise ValueError(f"{name} stands twice, in {stored[new][0].path.name} and again")
            stored[new] = file, name
    return stored


def _used(
    stored: Stored, tensors: Mapping[str, Tensor], prefix: str, ignored: Collection[str]
) -> Stored:
    """Without what may be ignored, under the names expected: with or without the prefix."""
    used: Stored = {}
    for name, place in stored.items():
        others = name, prefix + name, name.removeprefix(prefix)
        known = [n for n in others if n in tensors]
        if known:
            if known[0] in used:
                raise ValueError(f"{known[0]} stands twice, as {name} and {used[known[0]][1]}")
            used[known[0]] = place
        elif not any(re.fullmatch(pattern, n) for pattern in ignored for n in others):
            used[name] = place
    return used


def _check(kind: str, used: Stored, tensors: Mapping[str, Tensor], leaves: Any) -> None:
    """Raises where the tensors are not those of the model."""
    wrong = [f"{name} is missing" for name in tensors if name not in used]
    for name, (file, theirs) in used.items():
        if name not in tensors:
            wrong.append(f"{name} is not expected (ignore= leaves tensors out)")
            continue
        tensor, entry = tensors[name], file.entries[theirs]
        expected = jax.eval_shape(tensor.form.back, leaves[tensor.path].get_value()).shape
        if entry.shape != expected:
            wrong.append(f"{name} has shape {list(entry.shape)}, expected {list(expected)}")
        if entry.dtype not in ("F64", "F32", "F16", "BF16"):
            wrong.append(f"{name} has dtype {entry.dtype}, expected a floating one")
    if wrong:
        raise ValueError(f"the tensors are not those of this {kind}: " + "; ".join(wrong))


def _random_state(leaves: Mapping[Any, Any], seed: int) -> dict[Any, Any]:
    """What the streams of random numbers hold: a key of their own each, and no key taken."""
    filled: dict[Any, Any] = {}
    for i, (path, x) in enumerate(leaves.items()):
        if isinstance(x, nnx.RngKey):
            filled[path] = jax.random.fold_in(jax.random.key(seed), i)
        elif isinstance(x, nnx.RngCount):
            filled[path] = jnp.zeros((), jnp.uint32)
    return filled


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} must have {path.name}")
    try:
        x = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path.name} is not JSON: {e}") from None
    if not isinstance(x, dict):
        raise ValueError(f"{path.name} must be an object, got {type(x).__name__}")
    return x
