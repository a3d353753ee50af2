"""``EncoderFamily``: families of encoders like BERT, each described by what differs.

The encoder stands alone, or with a head of tokens, classes, tags or spans.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from attention_jax.models.encoder import Encoder, EncoderConfig, Pooler
from attention_jax.models.heads import (
    Classifier,
    ClassifierConfig,
    Reader,
    ReaderConfig,
    Tagger,
    TaggerConfig,
)
from attention_jax.models.layers import Layers, Relative
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig, labels
from attention_jax.models.pretrained.tensors import Path, Tensor, block, linear, norm

Config = EncoderConfig | ClassifierConfig | TaggerConfig | ReaderConfig
HEADS = {ClassifierConfig: "classes", TaggerConfig: "tags", ReaderConfig: "spans"}
MODELS: dict[type, Any] = {
    EncoderConfig: Encoder,
    ClassifierConfig: Classifier,
    TaggerConfig: Tagger,
    ReaderConfig: Reader,
}
# The heads, by the end of Hugging Face's name of the model.
ARCHITECTURES: Mapping[str, str | None] = {
    "Model": None,
    "ForMaskedLM": "tokens",
    "ForSequenceClassification": "classes",
    "ForTokenClassification": "tags",
    "ForQuestionAnswering": "spans",
}
ENTRIES: Mapping[str, str] = {
    "vocabulary": "vocab_size",
    "features": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "norm_epsilon": "layer_norm_eps",
    "max_length": "max_position_embeddings",
    "types": "type_vocab_size",
}
EMBEDDINGS: Mapping[str, str] = {
    "word_embeddings": "tokens",
    "position_embeddings": "positions",
    "token_type_embeddings": "types",
    "LayerNorm": "norm",
}
LAYER: Mapping[str, str] = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_forward_norm",
}
CLASSIFIER_DROPOUT: Mapping[str, tuple[str, float | None]] = {
    "classes": ("classifier_dropout", None),
    "tags": ("classifier_dropout", None),
}


PLAIN = Pooler()


def _shared(default: Mapping[str, Any]) -> Any:
    """The default of a field. A dataclass refuses one that is not hashable."""
    return dataclasses.field(default_factory=lambda: default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """A family of encoders like BERT, as ``family.Family`` requires.

    Attributes:
      NAMES: for each ``model_type``, how Hugging Face's names of its models start. Models of all
        types of a family are the same; they are written as the first one.
      PREFIX, IGNORED, COPIES, RENAMED: of ``Family``.
      heads: for each head, its tensors and their places in our model.
      architectures: the heads that are read, by the end of Hugging Face's name of the model.
      entries: the names of sizes and rates in ``config.json``. What has no name is left at its
        default: no types, an epsilon of 1e-12, embeddings of the width of the model.
      stack: the name of the layers.
      layer: the tensors of a layer and their places.
      only: entries with the values that are supported, the first by default.
      unread: entries without an effect on our models.
      left_out: patterns of tensors of heads that no model has.
      pooler: of ``EncoderConfig.pooler_config``.
      attention_output_dropout: whether the output of the attention has dropout.
      head_activation: of the head of tokens; None for that of the layers.
      head_dropout: for each head, the entry for its dropout and the default, None for that of the
        encoder. Without an entry, classes and tags have that of the encoder, spans none.
      padding: the token of padding, by default. Positions count from the next number on. None:
        positions count from 0.
      padding_entry: whether ``pad_token_id`` says which token that is.
      relative: whether there is a relative position bias, T5's with its default sizes.
      embeddings, after: the tensors of the embeddings and those after the layers, and their places.
    """

    NAMES: Mapping[str, str]
    PREFIX: str
    heads: Mapping[str, Mapping[str, str]]
    IGNORED: tuple[str, ...] = (r".*embeddings\.position_ids",)
    COPIES: Mapping[str, str] = _shared({})
    RENAMED: Mapping[str, str] = _shared({})
    architectures: Mapping[str, str | None] = _shared(ARCHITECTURES)
    entries: Mapping[str, str] = _shared(ENTRIES)
    stack: str = "encoder.layer"
    layer: Mapping[str, str] = _shared(LAYER)
    only: Mapping[str, tuple[Any, ...]] = _shared({})
    unread: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    pooler: Pooler = PLAIN
    attention_output_dropout: bool = True
    head_activation: str | None = None
    head_dropout: Mapping[str, tuple[str, float | None]] = _shared(CLASSIFIER_DROPOUT)
    padding: int | None = None
    padding_entry: bool = False
    relative: bool = False
    embeddings: Mapping[str, str] = _shared(EMBEDDINGS)
    after: Mapping[str, str] = _shared({})

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """The values of ``model_type`` that this family reads."""
        return tuple(self.NAMES)

    def headless(self, model_type: str) -> str:
        """Hugging Face's name of the encoder without a head."""
        return f"{self.NAMES[model_type]}Model"

    @property
    def head_tensors(self) -> tuple[str, ...]:
        """Patterns of the tensors of all heads, without the pooler."""
        names = {name for names in self.heads.values() for name in names}
        return tuple(sorted({_of_module(x) for x in names if not x.startswith(self.PREFIX)}))

    def from_hf(self, hf: HFConfig, names: set[str]) -> Config:
        """Our configuration from Hugging Face's."""
        kind = hf.take("model_type", self.MODEL_TYPES[0])
        if kind not in self.NAMES:
            raise ValueError(f"model_type must be one of {list(self.NAMES)}, got {kind!r}")
        known = {x + end: h for x in self.NAMES.values() for end, h in self.architectures.items()}
        head = known[hf.architecture(known, self.headless(kind))]
        hf.only("tie_word_embeddings", True)
        for name, allowed in self.only.items():
            hf.only(name, *allowed)
        for name in self.unread:
            hf.take(name, None)
        encoder = self.encoder_from_hf(hf, head, names)
        rates = self._head_rates(hf, encoder.dropout_rate)
        if head == "classes":
            return ClassifierConfig(encoder, hf.labels(), rates[head])
        if head == "tags":
            return TaggerConfig(encoder, hf.labels(), rates[head])
        if head == "spans":
            return ReaderConfig(encoder, rates[head])
        return encoder

    def encoder_from_hf(self, hf: HFConfig, head: str | None, names: set[str]) -> EncoderConfig:
        """The encoder, with or without a pooler as its head needs it."""
        entries, number = self.entries, self._number
        dropout = hf.rate(entries["dropout"], 0.1)
        hf.only("position_embedding_type", "absolute", None)
        first = self.first_position(hf)
        longest = number(hf, "max_length", 512)
        if longest <= first:
            hf.errors.append(f"{entries['max_length']} must be above {first}, got {longest}")
        return EncoderConfig(
            vocabulary=number(hf, "vocabulary"),
            layers=Layers(
                features=number(hf, "features"),
                num_layers=number(hf, "num_layers"),
                num_heads=number(hf, "num_heads"),
                hidden=number(hf, "hidden"),
                activation=hf.activation(entries["activation"], "gelu"),
                norm_epsilon=number(hf, "norm_epsilon", 1e-12),
                order="post",
                relative=Relative() if self.relative else None,
                dropout_rate=dropout,
                attention_output_dropout_rate=None if self.attention_output_dropout else 0.0,
                attention_dropout_rate=hf.rate(entries["attention_dropout"], 0.1),
            ),
            max_length=max(longest - first, 1),
            first_position=first,
            embedding_features=number(hf, "embedding_features", 128)
            if "embedding_features" in entries
            else None,
            types=number(hf, "types", 2) if "types" in entries else 0,
            embedding_norm=True,
            pooler=head == "classes" or (head is None and _has_pooler(names)),
            pooler_config=self.pooler,
            head=head if head in ("tokens", "replaced") else None,
            head_activation=self.head_activation,
            dropout_rate=dropout,
        )

    def to_hf(self, config: Config) -> dict[str, Any]:
        """Hugging Face's configuration from ours."""
        encoder, head = _encoder(config), _head(config)
        kind, ends = self.MODEL_TYPES[0], {h: end for end, h in self.architectures.items()}
        x: dict[str, Any] = {
            "model_type": kind,
            "architectures": [self.NAMES[kind] + ends[head]],
            **self.encoder_to_hf(encoder),
        }
        if isinstance(config, ClassifierConfig | TaggerConfig):
            x |= labels(config.labels)
        if not isinstance(config, EncoderConfig) and head in self.head_dropout and head:
            name, default = self.head_dropout[head]
            default = encoder.dropout_rate if default is None else default
            if config.dropout_rate != default:
                x[name] = config.dropout_rate
        return x

    def encoder_to_hf(self, encoder: EncoderConfig) -> dict[str, Any]:
        """The entries of the encoder."""
        layers = encoder.layers
        values = {
            "vocabulary": encoder.vocabulary,
            "features": layers.features,
            "num_layers": layers.num_layers,
            "num_heads": layers.num_heads,
            "hidden": layers.hidden,
            "activation": ACTIVATION_NAMES[layers.activation],
            "dropout": layers.dropout_rate,
            "attention_dropout": layers.attention_dropout_rate,
            "norm_epsilon": layers.norm_epsilon,
            "max_length": encoder.max_length + encoder.first_position,  # type: ignore[operator]
            "types": encoder.types,
            "embedding_features": encoder.embedding_features or layers.features,
        }
        x = {name: values[ours] for ours, name in self.entries.items()}
        if self.padding_entry:
            x["pad_token_id"] = encoder.first_position - 1
        return x

    def model(self, config: Config, rngs: nnx.Rngs) -> Encoder | Classifier | Tagger | Reader:
        """The model that the configuration describes."""
        return MODELS[type(config)](config, rngs=rngs)

    def tensors(self, config: Config) -> Iterator[Tensor]:
        """Every tensor of a checkpoint, and where it belongs in the model."""
        encoder, head = _encoder(config), _head(config)
        start = "" if head is None else self.PREFIX
        root: Path = () if encoder is config else ("encoder",)
        part = functools.partial(_part, encoder)
        for name, place in self.embeddings.items():
            if place != "types" or encoder.types:
                yield from part(f"{start}embeddings.{name}", (*root, "embed", place))
        if encoder.embedding_features is not None:
            yield from part(f"{start}embeddings_project", (*root, "project"))
        for i in range(encoder.layers.num_layers):
            paths = block((*root, "stack"), i)
            for name, place in self.layer.items():
                first, *inside = place.split(".")
                if place != "attention_norm" or i > 0 or encoder.layers.first_norm:
                    yield from part(f"{start}{self.stack}.{i}.{name}", (*paths[first], *inside))
        for name, place in self.after.items():
            yield from part(f"{start}{name}", (*root, "stack", place))
        if head is None and encoder.pooler:
            yield from part(f"{start}pooler.dense", (*root, "pooler"))
        for name, place in self.heads.get(head or "", {}).items():
            of_encoder = place in ("pooler", "pooler_norm")
            yield from part(name, (*root, place) if of_encoder else (place,))

    def optional(self, config: Config) -> tuple[str, ...]:
        """Tensors of heads that this model does not have."""
        encoder, head = _encoder(config), _head(config)
        own = {_of_module(tensor.name) for tensor in self.tensors(config)}
        patterns = *(x for x in self.head_tensors if x not in own), *self.left_out
        pooler = rf"({re.escape(self.PREFIX)})?pooler\..*"
        return patterns if head is None or encoder.pooler else (*patterns, pooler)

    def _number(self, hf: HFConfig, name: str, *default: Any) -> Any:
        """A size; the default if this family has no entry for it."""
        return hf.number(self.entries[name], *default) if name in self.entries else default[0]

    def _head_rates(self, hf: HFConfig, dropout: float) -> dict[str, float]:
        """The dropout rate of each head, from all their entries."""
        rates = {"classes": dropout, "tags": dropout, "spans": 0.0}
        given = {name for name, _ in self.head_dropout.values() if hf.unused.get(name) is not None}
        read: dict[str, float] = {}
        for head, (name, default) in self.head_dropout.items():
            default = dropout if default is None else default
            if name not in read:
                read[name] = hf.rate(name, default) if name in given else default
                hf.take(name, None)  # null
            rates[head] = read[name]
        return rates

    def first_position(self, hf: HFConfig) -> int:
        """The row of the table of positions for the first token."""
        if self.padding is None:
            return 0
        token: Any = hf.take("pad_token_id", self.padding) if self.padding_entry else self.padding
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            hf.errors.append(f"pad_token_id must be a token, got {token!r}")
            return 0
        return token + 1


def _of_module(name: str) -> str:
    """A pattern of all tensors of the outermost module that holds this one."""
    return rf"{re.escape(name.split('.')[0])}\..*"


def _part(encoder: EncoderConfig, name: str, path: Path) -> Iterator[Tensor]:
    """A norm, a table or a projection, as its place says; with a bias as the encoder says."""
    place = str(path[-1])
    if place == "token_bias":
        yield Tensor(name, path)
    elif place in ("tokens", "positions", "types", "relative"):
        yield Tensor(f"{name}.weight", path)
    elif "norm" in place:
        yield from norm(name, path, bias=encoder.layers.norm_bias)
    else:
        yield from linear(name, path, bias=_has_bias(encoder, path))


def _has_bias(encoder: EncoderConfig, path: Path) -> bool:
    if "blocks" in path:
        layers = encoder.layers
        return layers.feed_forward_bias if "feed_forward" in path else bool(layers.bias)
    biases = {"pooler": encoder.pooler_config.bias, "transform": encoder.head_bias}
    return biases.get(str(path[-1]), True)


def _has_pooler(names: set[str]) -> bool:
    return any(name.endswith("pooler.dense.weight") for name in names)


def _encoder(config: Config) -> EncoderConfig:
    return config if isinstance(config, EncoderConfig) else config.encoder


def _head(config: Config) -> str | None:
    return config.head if isinstance(config, EncoderConfig) else HEADS[type(config)]
