"""BERT: the encoder with its pooler, or with a head of tokens, classes, tags or spans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from attention_jax.models.encoder import Encoder, EncoderConfig
from attention_jax.models.heads import (
    Classifier,
    ClassifierConfig,
    Reader,
    ReaderConfig,
    Tagger,
    TaggerConfig,
)
from attention_jax.models.layers import Layers
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig, labels
from attention_jax.models.pretrained.tensors import Tensor, block, linear, norm

MODEL_TYPES = ("bert",)
PREFIX = "bert."
IGNORED = (r".*embeddings\.position_ids",)
COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# The heads that are read, by Hugging Face's name of the model.
ARCHITECTURES = {
    "BertModel": None,
    "BertForPreTraining": "tokens",
    "BertForMaskedLM": "tokens",
    "BertForSequenceClassification": "classes",
    "BertForTokenClassification": "tags",
    "BertForQuestionAnswering": "spans",
}
HEADLESS = (r"cls\..*", r"classifier\..*", r"qa_outputs\..*")  # tensors of all heads
NAMES = {head: name for name, head in ARCHITECTURES.items()}
HEADS = {ClassifierConfig: "classes", TaggerConfig: "tags", ReaderConfig: "spans"}
MODELS: dict[type, Any] = {
    EncoderConfig: Encoder,
    ClassifierConfig: Classifier,
    TaggerConfig: Tagger,
    ReaderConfig: Reader,
}
Config = EncoderConfig | ClassifierConfig | TaggerConfig | ReaderConfig


def from_hf(hf: HFConfig, names: set[str]) -> Config:
    """Our configuration from Hugging Face's."""
    head = ARCHITECTURES[hf.architecture(ARCHITECTURES, "BertModel")]
    dropout = hf.rate("hidden_dropout_prob", 0.1)
    hf.only("position_embedding_type", "absolute", None)
    hf.only("tie_word_embeddings", True)
    # Entries of the original BERT release, which had only these values.
    hf.only("directionality", "bidi", None)
    hf.only("pooler_type", "first_token_transform", None)
    for name in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head"):
        hf.take(f"pooler_{name}", None)
    before_head = hf.unused.get("classifier_dropout")
    before_head = dropout if before_head is None else hf.rate("classifier_dropout", dropout)
    hf.take("classifier_dropout", None)
    encoder = EncoderConfig(
        vocabulary=hf.number("vocab_size"),
        layers=Layers(
            features=hf.number("hidden_size"),
            num_layers=hf.number("num_hidden_layers"),
            num_heads=hf.number("num_attention_heads"),
            hidden=hf.number("intermediate_size"),
            activation=hf.activation("hidden_act", "gelu"),
            norm_epsilon=hf.number("layer_norm_eps", 1e-12),
            order="post",
            dropout_rate=dropout,
            attention_dropout_rate=hf.rate("attention_probs_dropout_prob", 0.1),
        ),
        max_length=hf.number("max_position_embeddings", 512),
        types=hf.number("type_vocab_size", 2),
        embedding_norm=True,
        pooler=head == "classes" or (head is None and _has_pooler(names)),
        head="tokens" if head == "tokens" else None,
        dropout_rate=dropout,
    )
    if head == "classes":
        return ClassifierConfig(encoder, hf.labels(), before_head)
    if head == "tags":
        return TaggerConfig(encoder, hf.labels(), before_head)
    if head == "spans":
        return ReaderConfig(encoder)
    return encoder


def _has_pooler(names: set[str]) -> bool:
    return any(name.endswith("pooler.dense.weight") for name in names)


def _encoder(config: Config) -> EncoderConfig:
    return config if isinstance(config, EncoderConfig) else config.encoder


def _head(config: Config) -> str | None:
    return config.head if isinstance(config, EncoderConfig) else HEADS[type(config)]


def optional(config: Config) -> tuple[str, ...]:
    """Tensors of heads that this model does not have."""
    others = {
        None: HEADLESS,
        "tokens": (r"bert\.pooler\..*", r"cls\.seq_relationship\..*"),
        "classes": (r"cls\..*", r"qa_outputs\..*"),
        "tags": (r"bert\.pooler\..*", r"cls\..*", r"qa_outputs\..*"),
        "spans": (r"bert\.pooler\..*", r"cls\..*", r"classifier\..*"),
    }
    return others[_head(config)]


def to_hf(config: Config) -> dict[str, Any]:
    """Hugging Face's configuration from ours."""
    encoder, head = _encoder(config), _head(config)
    layers = encoder.layers
    x: dict[str, Any] = {
        "model_type": "bert",
        "architectures": [NAMES[head]],
        "vocab_size": encoder.vocabulary,
        "hidden_size": layers.features,
        "num_hidden_layers": layers.num_layers,
        "num_attention_heads": layers.num_heads,
        "intermediate_size": layers.hidden,
        "hidden_act": ACTIVATION_NAMES[layers.activation],
        "hidden_dropout_prob": layers.dropout_rate,
        "attention_probs_dropout_prob": layers.attention_dropout_rate,
        "layer_norm_eps": layers.norm_epsilon,
        "max_position_embeddings": encoder.max_length,
        "type_vocab_size": encoder.types,
    }
    if isinstance(config, ClassifierConfig | TaggerConfig):
        x |= labels(config.labels)
        if config.dropout_rate != layers.dropout_rate:
            x["classifier_dropout"] = config.dropout_rate
    return x


def model(config: Config, rngs: nnx.Rngs) -> Encoder | Classifier | Tagger | Reader:
    """The model that the configuration describes."""
    return MODELS[type(config)](config, rngs=rngs)


def tensors(config: Config) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, and where it belongs in the model."""
    encoder, head = _encoder(config), _head(config)
    start = "" if head is None else PREFIX
    root: tuple[str, ...] = () if encoder is config else ("encoder",)
    at = f"{start}embeddings"
    yield Tensor(f"{at}.word_embeddings.weight", (*root, "embed", "tokens"))
    yield Tensor(f"{at}.position_embeddings.weight", (*root, "embed", "positions"))
    yield Tensor(f"{at}.token_type_embeddings.weight", (*root, "embed", "types"))
    yield from norm(f"{at}.LayerNorm", (*root, "embed", "norm"))
    for i in range(encoder.layers.num_layers):
        at, paths = f"{start}encoder.layer.{i}", block((*root, "stack"), i)
        for part in ("query", "key", "value"):
            yield from linear(f"{at}.attention.self.{part}", (*paths["attention"], part))
        yield from linear(f"{at}.attention.output.dense", (*paths["attention"], "out"))
        yield from norm(f"{at}.attention.output.LayerNorm", paths["attention_norm"])
        yield from linear(f"{at}.intermediate.dense", (*paths["feed_forward"], "up"))
        yield from linear(f"{at}.output.dense", (*paths["feed_forward"], "down"))
        yield from norm(f"{at}.output.LayerNorm", paths["feed_forward_norm"])
    if encoder.pooler:
        yield from linear(f"{start}pooler.dense", (*root, "pooler"))
    if head in ("classes", "tags"):
        yield from linear("classifier", ("classify",))
    if head == "spans":
        yield from linear("qa_outputs", ("spans",))
    if head == "tokens":
        at = "cls.predictions"
        yield from linear(f"{at}.transform.dense", ("transform",))
        yield from norm(f"{at}.transform.LayerNorm", ("transform_norm",))
        yield Tensor(f"{at}.bias", ("token_bias",))
