"""A decoder with its tokenizer and chat template, from the folder of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from attention_jax.models import Decoder
from attention_jax.models.pretrained import Tokenizer, folders, hub, load, load_tokenizer
from attention_jax.models.pretrained.tokenizer import SETTINGS
from experiments.serving.template import Message, Template, load_template, special_tokens

GENERATION = "generation_config.json"
# Without a template: who speaks, and the text before the next one.
SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}
NEXT = "\nUser:"


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """Options of ``load_checkpoint``."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and computation."""
    quantize: Literal["int8"] | None = None
    """Weights as 8-bit integers."""
    revision: str | None = None
    """Branch, tag or commit of a repository of the Hugging Face hub."""


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """What turns texts into texts.

    Attributes:
      name: of the model.
      model: a decoder.
      tokenizer: of its texts.
      template: of conversations, None if the checkpoint has none.
      end: the tokens that end a text.
      max_length: the longest sequence that the model reads, None if there is no limit.
    """

    name: str
    model: Decoder
    tokenizer: Tokenizer
    template: Template | None
    end: tuple[int, ...]
    max_length: int | None

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text to continue, with those that the tokenizer puts before it."""
        return _valid(self.tokenizer.backend.encode(text).ids, self.model.vocabulary)

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the next answer begins.

        Without a template it is a transcript::

            User: What is the capital of France?
            Assistant: Paris.
            User: And of Italy?
            Assistant:
        """
        if self.template is None:
            lines = [f"{SPEAKERS[x['role']]}: {x['content'].strip()}" for x in messages]
            return self.tokens("\n".join([*lines, f"{SPEAKERS['assistant']}:"]))
        ids = self.tokenizer.backend.encode(self.template(messages), add_special_tokens=False).ids
        return _valid(ids, self.model.vocabulary)

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer in a conversation."""
        return (NEXT,) if self.template is None else ()

    def capacity(self, most: int) -> int:
        """Tokens of a row: ``most``, or what the model reads if that is less."""
        return most if self.max_length is None else min(most, self.max_length)


def load_checkpoint(folder: str, options: LoadOptions) -> Checkpoint:
    """Loads a decoder, its tokenizer and its template.

    Args:
      folder: of the checkpoint, or ``org/name`` on the Hugging Face hub.
      options: how.

    Raises:
      FileNotFoundError, ValueError: no such checkpoint, or one that is not a decoder's.
    """
    local, dtype = hub.local(folder, options.revision), jnp.dtype(options.dtype)
    tokenizer = load_tokenizer(local)
    model = load(local, dtype=dtype, param_dtype=dtype, quantize=options.quantize)
    if not isinstance(model, Decoder):
        raise ValueError(f"{folder} must be a decoder, such as a GPT-2, got {type(model).__name__}")
    config, generation, settings = (
        folders.read_json(local / name) if (local / name).exists() else {}
        for name in (folders.CONFIG, GENERATION, SETTINGS)
    )
    end = _end(config, generation, settings, tokenizer)
    limits = [x for x in (model.config.max_length, tokenizer.max_length) if x is not None]
    template = load_template(local)
    name = Path(folder).name if Path(folder).is_dir() else folder
    return Checkpoint(name, model, tokenizer, template, end, min(limits, default=None))


def _end(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    settings: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> tuple[int, ...]:
    """The tokens that end a text, of all files that name some."""
    found: list[Any] = []
    for entries in (generation, config):
        x = entries.get("eos_token_id")
        found += x if isinstance(x, list) else [x]
    name = special_tokens(settings).get("eos_token")
    found.append(None if name is None else tokenizer.backend.token_to_id(name))
    tokens = [x for x in found if isinstance(x, int) and 0 <= x < tokenizer.vocabulary]
    return tuple(dict.fromkeys(tokens))


def _valid(tokens: list[int], vocabulary: int) -> list[int]:
    if not tokens:
        raise ValueError("the text must have at least one token, got an empty one")
    if max(tokens) >= vocabulary:
        raise ValueError(f"the text has token {max(tokens)}, of a vocabulary of {vocabulary}")
    return tokens
