"""Published checkpoints: Hugging Face's folders of BERT, GPT-2, Llama, Mistral, Gemma 2, T5, ViT.

::

    model = load("folder")      config.json and model.safetensors, or its shards and their index
    save(model, "folder")       the same two files, which Hugging Face loads

Nothing is left out silently. An entry of the configuration that would change the result and is not
known here is refused, and so are tensors that are missing, not expected, of another shape, or not
equal to what they should be copies of. Heads of pretraining, which a model without them can do
without, are left out with a warning that names them. ``config=`` replaces entries and ``ignore=``
leaves tensors out where you know better.

Only safetensors are read, never pickles; one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import warnings
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
from attention_jax.models.pretrained import (
    bert,
    folders,
    gpt2,
    llama,
    matching,
    safetensors,
    t5,
    vit,
)
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.lora import load_adapters, save_adapters
from attention_jax.models.pretrained.tensors import Tensor
from attention_jax.nn import Embeddings

__all__ = ["load", "load_adapters", "save", "save_adapters"]

# Each is a module with TYPES (its names as ``model_type``), PREFIX (of the names of a model within
# one with a head), IGNORED (patterns of tensors that are not parameters), COPIES (of which others),
# RENAMED (parts of names, for files of before), and five functions: ``config`` and ``entries`` from
# their configuration to ours and back, ``model``, ``tensors``, and ``without``, patterns of the
# parts that a model does not have and can do without.
FAMILIES: tuple[ModuleType, ...] = (bert, gpt2, llama, t5, vit)


def load(
    folder: str | PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    ignore: Collection[str] = (),
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    implementation: str | tuple[str, ...] | None = None,
    seed: int = 0,
) -> Any:
    """The model of a checkpoint, ready to be called; ``model.train()`` switches dropout on.

    Args:
      folder: with ``config.json`` and ``model.safetensors``, or shards and their index.
      config: entries in the place of those of ``config.json``. None is JSON's null, which also
        makes an unknown entry harmless.
      ignore: regular expressions of the names of tensors, as if the files did not have them.
      dtype: of the computation; default that of the parameters.
      param_dtype: of the parameters, whatever the file has.
      implementation: of attention.
      seed: of dropout.

    Returns:
      An ``Encoder`` (BERT), ``Decoder`` (GPT-2, Llama, Mistral, Gemma 2), ``EncoderDecoder`` (T5)
      or ``VisionTransformer`` (ViT).

    Raises:
      FileNotFoundError: no such folder, no configuration, or no tensors.
      ValueError: an entry of the configuration that is not supported; tensors that are missing,
        not expected, of another shape, or not the copies they should be; a file that is not what it
        should be. The message lists all of them.

    Warns:
      UserWarning: tensors of a head that the model does not have were left out, BERT's of the next
        sentence for example. It names them; listing them in ``ignore`` says that you know.

    >>> import tempfile
    >>> from attention_jax.models import Decoder, DecoderConfig
    >>> layers = Layers(features=8, num_layers=1, num_heads=2, hidden=32, fused=True,
    ...                 activation="gelu_tanh")
    >>> model = Decoder(DecoderConfig(10, layers, positions="learned", max_length=6),
    ...                 rngs=nnx.Rngs(0))
    >>> folder = tempfile.mkdtemp()
    >>> save(model, folder)
    >>> load(folder)(np.array([[3, 1, 4]])).shape
    (1, 3, 10)
    >>> load(folder, config={"attn_pdrop": 0.2}).config.layers.attention_dropout_rate
    0.2
    """
    folder = Path(folder)
    if not jnp.issubdtype(param_dtype, jnp.floating):
        raise ValueError(f"param_dtype must be a floating one, got {param_dtype}")
    if isinstance(ignore, str):
        raise ValueError(f"ignore must be a list of regular expressions, got {ignore!r}")
    described = folders.read_config(folder) | dict(config or {})
    files = folders.weights(folder, described)
    described.pop(folders.NAMED, None)
    family = _family(described)
    found = matching.stored(files, family, ignore)
    copies = matching.redundant(found, family)
    entries, kind = HFConfig(described), str(described["model_type"])
    try:
        ours = family.config(entries, found.keys() - copies)
    except (TypeError, ValueError) as e:  # sizes that do not fit, often after a wrong entry
        raise entries.refusal(kind, str(e)) from e
    entries.finish(kind)
    changes = {"dtype": dtype, "param_dtype": param_dtype, "implementation": implementation}
    ours = _with_layers(ours, changes)

    graph, state = nnx.split(nnx.eval_shape(lambda: family.model(ours, nnx.Rngs(0))))
    leaves = dict(nnx.to_flat_state(state))
    tensors = {tensor.name: tensor for tensor in family.tensors(ours)}
    used, left_out, wrong = matching.match(found, tensors, family, family.without(ours), copies)
    if wrong := wrong + matching.mistakes(used, tensors, leaves):
        raise ValueError(f"the tensors are not those of this {kind}: " + "; ".join(wrong))
    filled = _random_state(leaves, seed)
    for name, (file, theirs) in used.items():
        tensor = tensors[name]
        filled[tensor.path] = _converted(theirs, tensor.form.into(file[theirs]), param_dtype)
    values = {path: x.replace(filled[path]) for path, x in leaves.items()}
    model = nnx.merge(graph, nnx.from_flat_state(values))
    model.eval()
    if left_out:
        warnings.warn(
            f"{folder}: left out {', '.join(left_out)}, of parts that this "
            f"{type(model).__name__} does not have; ignore= leaves them out without this warning",
            stacklevel=2,
        )
    return model


def save(
    model: Any, folder: str | PathLike[str], *, config: Mapping[str, Any] | None = None
) -> None:
    """Writes a model as a folder that Hugging Face, and ``load``, can read.

    It takes the place of a checkpoint that the folder holds, shards and their index included; other
    files, a tokenizer's for example, stay. The change is one rename: after a save that failed or
    was killed at any point, or a power cut, ``load`` gives either the whole old model or the whole
    new one, and so does Hugging Face. What was left lying about, the next save removes. Nothing may
    load from the folder, or save to it, at the same time.

    Args:
      model: of a class that ``load`` returns, and that one of the families can express.
      folder: is made where it does not exist.
      config: more entries of ``config.json``, ``eos_token_id`` for example.

    Raises:
      NotImplementedError: no family has such a model.
      ValueError: the model is not what its ``config`` describes: it has adapters, or other
        parameters; an entry in ``config`` that would make it another model.
      TypeError: not a model of ``attention_jax.models``.

    >>> import tempfile
    >>> from attention_jax.models import VisionConfig, VisionTransformer
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> vision = VisionConfig(image=(4, 4), patch=2, layers=layers, classes=3)
    >>> folder = Path(tempfile.mkdtemp())
    >>> save(VisionTransformer(vision, rngs=nnx.Rngs(0)), folder)
    >>> sorted(path.name for path in folder.iterdir())
    ['config.json', 'model.safetensors']
    """
    if not dataclasses.is_dataclass(getattr(model, "config", None)):
        raise TypeError(f"model must be one of attention_jax.models, got {type(model).__name__}")
    family, described = _described(model.config, dict(config or {}))
    leaves = _checked_leaves(model, family)
    tensors = list(family.tensors(model.config))

    def array(tensor: Tensor) -> Any:
        return tensor.form.back(leaves[tensor.path].get_value())

    shapes = {tensor.name: jax.eval_shape(lambda t=tensor: array(t)) for tensor in tensors}
    dtypes = {np.dtype(x.dtype).name for x in shapes.values()}
    described = {"dtype": dtypes.pop() if len(dtypes) == 1 else "float32"} | described

    def write_weights(path: Path) -> None:
        safetensors.write(path, shapes, (np.asarray(array(t)) for t in tensors))

    folders.replace(Path(folder), described, write_weights)


def _checked_leaves(model: Any, family: ModuleType) -> dict[Any, Any]:
    """The variables of a model by path; raises where they are not those of its ``config``."""
    modules = [module for _, module in nnx.iter_modules(model)]
    if any(isinstance(module, nnx.LoRA) for module in modules):
        raise ValueError("model has adapters of low rank: save nn.merged(model)")
    if any(isinstance(module, Embeddings) and module.moved is not None for module in modules):
        raise ValueError(
            "model has moved embeddings (nn.moved_embeddings), which a checkpoint cannot express: "
            "save the model they were made of"
        )
    plain = nnx.eval_shape(lambda: family.model(model.config, nnx.Rngs(0)))
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    expected = {path: x.get_value().shape for path, x in _parameters(plain)}
    there = {path: x.get_value().shape for path, x in _parameters(model)}
    wrong = [
        f"{'.'.join(map(str, path))}: {there.get(path, 'none')}, expected {x}"
        for path, x in (expected | dict.fromkeys(there.keys() - expected.keys(), "none")).items()
        if there.get(path) != x
    ]
    if wrong:
        raise ValueError(
            "the shapes in model are not those that its config describes: " + "; ".join(wrong)
        )
    return leaves


def _parameters(model: Any) -> list[tuple[Any, Any]]:
    """All but random numbers and what calls leave behind."""
    others = nnx.RngState, nnx.Intermediate, nnx.Cache
    return [(p, x) for p, x in nnx.to_flat_state(nnx.state(model)) if not isinstance(x, others)]


def _converted(name: str, x: np.ndarray, dtype: Any) -> jax.Array:
    with np.errstate(over="ignore"):  # told below, by name
        result = jnp.asarray(x, dtype)
    narrow = jnp.finfo(dtype).bits < 32 and x.dtype != result.dtype
    if narrow and np.isfinite(x).all() and not jnp.isfinite(result).all():
        raise ValueError(f"param_dtype = {result.dtype} cannot hold {name}: it overflows")
    return result


# --- Configurations.


def _family(described: Mapping[str, Any]) -> ModuleType:
    kind = described.get("model_type")
    for family in FAMILIES:
        if kind in family.TYPES:
            return family
    known = sorted(name for family in FAMILIES for name in family.TYPES)
    raise ValueError(
        f"config.json has model_type {kind!r}, expected one of {known} (config= can name it)"
    )


def _described(config: Any, more: dict[str, Any]) -> tuple[ModuleType, dict[str, Any]]:
    """The family of a configuration, and its entries; what they say must be all there is."""
    ours = {"dtype": None, "param_dtype": jnp.float32, "implementation": None}
    ours |= {"remat": False, "scan": False}
    plain = _with_layers(config, ours)
    for family in FAMILIES:
        try:
            described = family.entries(config)
            again = _read_back(family, config, described)
        except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError):
            continue  # of another class, or with what this family has no name for
        if again == _with_length(plain, again):
            if _read_back(family, config, described | more) != again:
                raise ValueError(f"config must not make it another model, got {more}")
            return family, described | more
    raise NotImplementedError(
        f"no family of checkpoints can express this model: {config}. Save its state with "
        f"nnx.state instead"
    )


def _read_back(family: ModuleType, config: Any, described: Mapping[str, Any]) -> Any:
    """What ``load`` would make of the entries, beside the tensors of a configuration."""
    entries = HFConfig(described)
    names = {tensor.name for tensor in family.tensors(config)}
    again = family.config(entries, names)
    entries.finish("model")
    return again


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


def _random_state(leaves: Mapping[Any, Any], seed: int) -> dict[Any, Any]:
    """What the streams of random numbers hold: a key of their own each, and no key taken."""
    filled: dict[Any, Any] = {}
    for i, (path, x) in enumerate(leaves.items()):
        if isinstance(x, nnx.RngKey):
            filled[path] = jax.random.fold_in(jax.random.key(seed), i)
        elif isinstance(x, nnx.RngCount):
            filled[path] = jnp.zeros((), jnp.uint32)
    return filled
