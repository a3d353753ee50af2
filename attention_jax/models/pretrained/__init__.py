"""Checkpoints in Hugging Face's format: encoders, decoders, speech, vision and others.

BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA, MPNet, ModernBERT; GPT-2, GPT-NeoX, OPT,
Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3 (text), SmolLM2, SmolLM3, Phi-3, OLMo 2, Granite,
Mixtral, Qwen3-MoE, DeepSeek-V2 and V3; T5; Whisper; ViT; CLIP,
whole or one tower.

``load`` reads a folder with ``config.json`` and ``model.safetensors`` (or shards and their index);
``save`` writes one that ``load`` and Hugging Face's ``from_pretrained`` read. Torch is not needed;
the extra ``pretrained`` installs what reads the files:

>>> import tempfile
>>> import numpy as np
>>> from flax import nnx
>>> from attention_jax.models import Decoder, DecoderConfig, Layers, generate, pretrained
>>> from attention_jax.positions import Rotary
>>> llama = Layers(features=8, num_layers=1, num_heads=2, rotary=Rotary(), norm="rms", gated=True,
...                activation="silu", bias=False, feed_forward_bias=False)
>>> folder = tempfile.mkdtemp()  # or the folder of a checkpoint
>>> pretrained.save(Decoder(DecoderConfig(10, llama), rngs=nnx.Rngs(0)), folder)
>>> model = pretrained.load(folder)
>>> generate(model, np.array([[3, 1]]), max_new_tokens=3).tokens.shape
(1, 3)

An encoder with a head is a ``Classifier``, ``Tagger`` or ``Reader``. To fine-tune one with other
labels, or without a head, put a fresh one on it:

>>> from attention_jax.models import Encoder, EncoderConfig, classifier
>>> bert = EncoderConfig(10, Layers(features=8, num_layers=1, num_heads=2, order="post"), types=2,
...                      embedding_norm=True)
>>> pretrained.save(Encoder(bert, rngs=nnx.Rngs(0)), folder)
>>> encoder = pretrained.load(folder, config={"architectures": ["BertModel"]})
>>> model = classifier(encoder, ["ham", "spam"], rngs=nnx.Rngs(0))
>>> pretrained.save(model, folder)
>>> pretrained.load(folder).config.labels
('ham', 'spam')

Nothing is ignored silently. An entry of ``config.json`` that would change the result and is not
supported is refused by name, and so are tensors that are missing, unexpected, of another shape, or
not equal to the tensor they should be a copy of. Tensors of a pretraining head that the model does
not have are left out with a warning that names them. ``config=`` overrides entries and ``ignore=``
leaves tensors out where you know better.

Only safetensors files are read, never pickles, and one tensor at a time. ``save`` replaces the
checkpoint in a folder in one step: after a crash, the folder holds either the old or the new one.

``load("org/name")`` reads a checkpoint of the Hugging Face hub. The package ``huggingface_hub``
downloads it once, into its cache; with ``HF_HUB_OFFLINE=1`` only the cache is read. A local folder
of that name comes first. Nothing else is ever downloaded.

``load_tokenizer`` reads the tokenizer of a checkpoint, and ``load_embedder`` sentence embeddings as
the checkpoint describes them. ``save_adapters`` and ``load_adapters`` store the adapters of
``nn.low_rank`` without the model.

Each family of checkpoints is a module; ``family.Family`` documents their interface.
"""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from attention_jax.models.pretrained import (
    families,
    folders,
    hub,
    matching,
    sentences,
    tensor_files,
)
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.lora import load_adapters, save_adapters
from attention_jax.models.pretrained.sentences import minilm
from attention_jax.models.pretrained.tensors import Tensor
from attention_jax.models.pretrained.tokenizer import (
    Padded,
    Row,
    Tokenized,
    Tokenizer,
    load_tokenizer,
    pad,
)
from attention_jax.models.pretrained.variables import (
    checked_leaves,
    converted,
    on_host,
    random_state,
)
from attention_jax.models.sentences import Embedder, EmbedderConfig
from attention_jax.models.sharding import Rules, shardings
from attention_jax.nn import int8

__all__ = [
    "Padded",
    "Row",
    "Tokenized",
    "Tokenizer",
    "load",
    "load_adapters",
    "load_embedder",
    "load_tokenizer",
    "minilm",
    "pad",
    "save",
    "save_adapters",
]


def load(
    folder: str | PathLike[str],
    *,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    ignore: Collection[str] = (),
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    quantize: str | None = None,
    implementation: str | tuple[str, ...] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    rules: Rules = (),
) -> Any:
    """Loads a checkpoint as a model in evaluation mode; ``model.train()`` enables dropout.

    Args:
      folder: with ``config.json`` and ``model.safetensors``, or shards and their index; or
        ``"org/name"``, a repository of the Hugging Face hub.
      revision: branch, tag or commit of that repository; default: its main branch.
      config: entries that override those of ``config.json``. None is JSON's null, which also
        makes an unknown entry be ignored.
      ignore: regular expressions; tensors whose names match are treated as if they were absent.
      dtype: of the computation; default that of the parameters.
      param_dtype: of the parameters, whatever the dtype in the file.
      quantize: ``"int8"`` stores projections and token embeddings as 8-bit integers, one tensor
        after the other, as ``nn.quantized`` does; a weight changes by at most 1/254 of the largest
        of its channel, and by the rounding of ``param_dtype``.
      implementation: of attention.
      seed: for dropout.
      mesh: load straight into shards on these devices, one tensor at a time: neither the host nor a
        device ever holds the whole model. With several processes, each calls this function.
      rules: how to shard, from ``sharding.rules``.

    Returns:
      An ``Encoder``, ``Classifier``, ``Tagger`` or ``Reader`` (encoders like BERT), ``Decoder``
      (GPT-2, Llama and the like), ``EncoderDecoder`` (T5), ``SpeechTransformer`` (Whisper),
      ``VisionTransformer`` (ViT), ``DualEncoder`` (CLIP), or its ``TextTower`` or ``ImageTower``.

    Raises:
      FileNotFoundError: no such folder or repository, no configuration, or no tensors.
      ModuleNotFoundError: the package ``safetensors`` is not installed, or for a repository
        ``huggingface_hub``.
      ValueError: an entry of the configuration that is not supported; tensors that are missing,
        unexpected, of another shape, or not the copies they should be; an invalid file. The message
        lists all of them.

    Warns:
      UserWarning: names tensors that were left out because the model does not have their head,
        BERT's next-sentence prediction for example. List them in ``ignore`` to silence it.

    >>> import tempfile
    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Decoder, DecoderConfig, Layers
    >>> from attention_jax.models.pretrained import load, save
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
    if not jnp.issubdtype(param_dtype, jnp.floating):
        raise ValueError(f"param_dtype must be a floating one, got {param_dtype}")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize must be 'int8' or None, got {quantize!r}")
    if rules and mesh is None:
        raise ValueError("mesh must be given with rules: the devices to shard over")
    if isinstance(ignore, str):
        raise ValueError(f"ignore must be a list of regular expressions, got {ignore!r}")
    folder = hub.local(folder, revision)
    entries = folders.read_config(folder) | dict(config or {})
    files = folders.weights(folder, entries)
    entries.pop(folders.NAMED, None)
    family = families.of_entries(entries)
    found = matching.stored(files, family, ignore)
    copies = matching.redundant(found, family)
    hf, model_type = HFConfig(entries), str(entries["model_type"])
    try:
        ours = family.from_hf(hf, found.keys() - copies)
    except (TypeError, ValueError) as e:  # sizes that do not fit, often after a wrong entry
        raise hf.refusal(model_type, str(e)) from e
    hf.finish(model_type)
    changes = {"dtype": dtype, "param_dtype": param_dtype, "implementation": implementation}
    ours = families.with_layers(ours, changes)

    graph, state = nnx.split(nnx.eval_shape(lambda: family.model(ours, nnx.Rngs(0))))
    leaves = dict(nnx.to_flat_state(state))
    tensors = {tensor.name: tensor for tensor in family.tensors(ours)}
    used, left_out, errors = matching.match(found, tensors, family, family.optional(ours), copies)
    architecture = str((entries.get("architectures") or [""])[0])
    if errors := errors + matching.mismatches(used, tensors, leaves, architecture):
        raise ValueError(f"the tensors do not fit this {model_type}: " + "; ".join(errors))
    values = {path: leaves[path].replace(x) for path, x in random_state(leaves, seed).items()}
    placements = None
    if mesh is not None:
        placements = dict(nnx.to_flat_state(shardings(state, mesh, rules)))
        for path, x in values.items():
            placed = jax.device_put(x.get_value(), placements[path].get_value())
            values[path] = x.replace(placed)
    by_path: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        by_path.setdefault(tensor.path, []).append(name)
    for path, together in by_path.items():
        placed = None if placements is None else placements[path].get_value()
        parts = [tensors[name].form.into(used[name][0][used[name][1]]) for name in together]
        x = np.stack(parts) if tensors[together[0]].stacked else parts[0]
        kept = leaves[path].get_value().dtype  # param_dtype, or wider where a model needs that
        array = converted(used[together[0]][1], x, kept, placed)
        values[path] = leaves[path].replace(array)
        if quantize is not None:
            values[path] = int8.in_int8(path, values[path])
    model = nnx.merge(graph, nnx.from_flat_state(values))
    model.eval()
    if left_out:
        warnings.warn(
            f"{folder}: left out {', '.join(left_out)}, of heads that this "
            f"{type(model).__name__} does not have; ignore= silences this warning",
            stacklevel=2,
        )
    return model


def load_embedder(
    folder: str | PathLike[str],
    *,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    ignore: Collection[str] = (),
    **options: Any,
) -> Embedder:
    """Loads sentence embeddings, pooled and normalized as the checkpoint describes.

    Args:
      folder: of the checkpoint of an encoder like BERT, with ``modules.json``, as
        sentence-transformers writes it; or a repository of the hub.
      revision, config, ignore, **options: of ``load``.

    Returns:
      A model in evaluation mode, for ``models.embed``.

    Raises:
      FileNotFoundError: no ``modules.json``, or nothing that ``load`` could read.
      ValueError: another family; another step than pooling by the first token or the mean, and
        normalization; an option that is not supported.

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from flax import nnx
    >>> from attention_jax.models import Encoder, EncoderConfig, Layers
    >>> from attention_jax.models.pretrained import load_embedder, save
    >>> layers = Layers(features=8, num_layers=1, num_heads=2, order="post")
    >>> config = EncoderConfig(10, layers, types=2, embedding_norm=True)
    >>> folder = Path(tempfile.mkdtemp())  # or the folder of a checkpoint
    >>> save(Encoder(config, rngs=nnx.Rngs(0)), folder)
    >>> steps = [{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "1_Pooling"}]
    >>> _ = (folder / "modules.json").write_text(json.dumps(steps))
    >>> (folder / "1_Pooling").mkdir()
    >>> _ = (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    >>> load_embedder(folder)(np.array([[3, 1, 4]])).shape
    (1, 8)
    """
    described = sentences.describe(hub.local(folder, revision))
    entries = folders.read_config(described.encoder) | dict(config or {})
    model_type = entries.get("model_type")
    encoders = {x: family for family in families.ENCODERS for x in family.MODEL_TYPES}
    if model_type not in encoders:
        raise ValueError(
            f"{described.encoder} must have a model_type of {', '.join(encoders)} for sentence "
            f"embeddings, got {model_type!r}"
        )
    family = encoders[model_type]
    overrides = {"architectures": [family.headless(model_type)], **(config or {})}
    heads = (r"pooler\..*", *family.head_tensors)
    encoder = load(described.encoder, config=overrides, ignore=(*ignore, *heads), **options)
    encoder.config = dataclasses.replace(encoder.config, pool=described.pool)
    ours = EmbedderConfig(encoder.config, described.normalize, described.max_length)
    return Embedder(ours, encoder=encoder, rngs=nnx.Rngs(0))


def save(
    model: Any, folder: str | PathLike[str], *, config: Mapping[str, Any] | None = None
) -> None:
    """Writes a model as a folder that ``load`` and Hugging Face can read.

    It replaces the checkpoint in the folder, shards and their index included; other files, such as
    a tokenizer's, stay. The replacement is one rename: if the save fails or is killed at any point,
    or the power is cut, ``load`` and Hugging Face still find either the whole old model or the
    whole new one. The next save removes leftovers. No other process may load from the folder, or
    save to it, at the same time.

    Args:
      model: of a class that ``load`` returns, with a configuration that a family can express. It
        may be sharded, over several processes too: then all of them call this function, and the
        first one writes.
      folder: created if it does not exist.
      config: more entries for ``config.json``, ``eos_token_id`` for example, or the ``model_type``
        of an architecture with several: an XLM-RoBERTa is written as ``"roberta"`` by default.

    Raises:
      NotImplementedError: no family has such a model, for example a classifier of the mean of all
        tokens outside ModernBERT. Save ``nnx.state(model)`` instead.
      ValueError: the model does not match its ``config``, since it has adapters or other
        parameters; an entry in ``config`` that would change the model.
      TypeError: not a model of ``attention_jax.models``.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from flax import nnx
    >>> from attention_jax.models import Layers, VisionConfig, VisionTransformer
    >>> from attention_jax.models.pretrained import save
    >>> layers = Layers(features=8, num_layers=1, num_heads=2)
    >>> vision = VisionConfig(image=(4, 4), patch=2, layers=layers, classes=3)
    >>> folder = Path(tempfile.mkdtemp())
    >>> save(VisionTransformer(vision, rngs=nnx.Rngs(0)), folder)
    >>> sorted(path.name for path in folder.iterdir())
    ['config.json', 'model.safetensors']
    """
    if not dataclasses.is_dataclass(getattr(model, "config", None)):
        raise TypeError(f"model must be one of attention_jax.models, got {type(model).__name__}")
    family, entries = families.of_config(model.config, dict(config or {}))
    leaves = checked_leaves(model, family)
    tensors = list(family.tensors(model.config))

    def arrays() -> Iterator[Any]:  # gathered from their shards, one parameter after the other
        path, whole = None, None
        for tensor in tensors:
            if tensor.path != path:  # experts that are stacked in one parameter follow each other
                path, whole = tensor.path, on_host(leaves[tensor.path].get_value())
            yield tensor.form.back(whole)

    def shape(tensor: Tensor) -> jax.ShapeDtypeStruct:
        x = leaves[tensor.path].get_value()
        return jax.eval_shape(tensor.form.back, jax.ShapeDtypeStruct(x.shape, x.dtype))

    shapes = {tensor.name: shape(tensor) for tensor in tensors}
    dtypes = collections.Counter(np.dtype(x.dtype).name for x in shapes.values())
    entries = {"dtype": dtypes.most_common(1)[0][0]} | entries

    def write_weights(path: Path) -> None:
        tensor_files.write(path, shapes, arrays())

    if jax.process_index() > 0:  # the first process writes, the others send it their shards
        for _ in arrays():
            pass
        return
    folders.replace(Path(folder), entries, write_weights)
