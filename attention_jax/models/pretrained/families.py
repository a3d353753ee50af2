"""All families of checkpoints, and which of them a configuration belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from attention_jax.models.decoder import DecoderConfig
from attention_jax.models.encoder import EncoderConfig
from attention_jax.models.heads import ClassifierConfig
from attention_jax.models.layers import Layers
from attention_jax.models.pretrained import (
    clip,
    clip_towers,
    deepseek,
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    opt,
    phi3,
    qwen,
    smollm3,
    t5,
    vit,
    whisper,
)
from attention_jax.models.pretrained.bert import BERT
from attention_jax.models.pretrained.distilbert import DISTILBERT
from attention_jax.models.pretrained.electra import ELECTRA
from attention_jax.models.pretrained.family import Family
from attention_jax.models.pretrained.hf_config import HFConfig
from attention_jax.models.pretrained.modernbert import MODERNBERT
from attention_jax.models.pretrained.mpnet import MPNET
from attention_jax.models.pretrained.roberta import ROBERTA
from attention_jax.models.vision import VisionConfig

# What ``Family.to_hf`` may raise.
INEXPRESSIBLE = (
    ArithmeticError,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    NotImplementedError,
)
ENCODERS = (BERT, ROBERTA, DISTILBERT, ELECTRA, MPNET, MODERNBERT)
DECODERS: tuple[Family, ...] = (
    gpt2,
    *llama.FAMILIES,
    *mistral.FAMILIES,
    *qwen.FAMILIES,
    *smollm3.FAMILIES,
    *phi3.FAMILIES,
    *deepseek.FAMILIES,
    *granite.FAMILIES,
    *gemma.FAMILIES,
    gpt_neox,
    opt,
)
FAMILIES: tuple[Family, ...] = (*ENCODERS, *DECODERS, t5, whisper, vit, clip, *clip_towers.FAMILIES)


def of_entries(entries: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``.

    Raises:
      ValueError: an unknown ``model_type``.
    """
    model_type = entries.get("model_type")
    for family in FAMILIES:
        if model_type in family.MODEL_TYPES:
            return family
    known = sorted(name for family in FAMILIES for name in family.MODEL_TYPES)
    raise ValueError(
        f"config.json has model_type {model_type!r}, expected one of {known} (config= can set it)"
    )


def of_config(config: Any, more: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of a configuration and its entries, from which ``load`` reads back the same.

    Args:
      config: ours.
      more: entries to add, which must not change the model.

    Raises:
      NotImplementedError: no family can express it.
      ValueError: an entry of ``more`` that would change the model.
    """
    ours = {"dtype": None, "param_dtype": jnp.float32, "implementation": None}
    ours |= {"remat": False, "scan": False}
    plain = with_layers(config, ours)
    for family in FAMILIES:
        try:
            entries = family.to_hf(config)
            again = _read_back(family, config, entries)
        except INEXPRESSIBLE:
            continue  # another class, or something that this family cannot express
        if again == _with_length(plain, again):
            if _read_back(family, config, entries | more) != again:
                raise ValueError(f"config must not change the model, got {more}")
            return family, entries | more
    if isinstance(config, ClassifierConfig) and not config.encoder.pooler:
        encoder = dataclasses.replace(config.encoder, pooler=True)
        try:
            of_config(dataclasses.replace(config, encoder=encoder), {})
        except NotImplementedError:
            pass
        else:
            raise NotImplementedError(
                "checkpoints of this encoder have a pooler below the head of a classifier, which "
                "the model does not: put the head on with classifier(..., pooler=True), or save "
                "nnx.state(model) instead"
            )
    if isinstance(config, ClassifierConfig) and config.encoder.pool != "first":
        raise NotImplementedError(
            f"no checkpoint of Hugging Face's has a classifier of the {config.encoder.pool} of all "
            f"tokens: put a head on the first one, classifier(..., pool='first'), or save "
            f"nnx.state(model) instead"
        )
    raise NotImplementedError(
        f"no family of checkpoints can express this model: {config}. Save its nnx.state instead"
    )


def _read_back(family: Family, config: Any, entries: Mapping[str, Any]) -> Any:
    """The configuration that ``load`` would read from the entries."""
    hf = HFConfig(entries)
    names = {tensor.name for tensor in family.tensors(config)}
    again = family.from_hf(hf, names)
    hf.finish("model")
    return again


def with_layers(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with changes in all its ``Layers``, those of its encoders included."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    new: dict[str, Any] = {
        name: dataclasses.replace(x, **changes)
        for name, x in fields.items()
        if isinstance(x, Layers)
    }
    towers = EncoderConfig, DecoderConfig, VisionConfig
    new |= {name: with_layers(x, changes) for name, x in fields.items() if isinstance(x, towers)}
    return dataclasses.replace(config, **new)


def _with_length(config: Any, other: Any) -> Any:
    """With the ``max_length`` of another, where it is not the size of a table."""
    if isinstance(config, DecoderConfig) and config.positions != "learned":
        return dataclasses.replace(config, max_length=getattr(other, "max_length", None))
    return config
