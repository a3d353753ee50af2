"""BERT: vectors of tokens with a pooler, logits of tokens, or logits of classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from attention_jax.models.encoder import Encoder, EncoderConfig
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
ARCHITECTURES = {
    "BertModel": None,
    "BertForPreTraining": "tokens",
    "BertForMaskedLM": "tokens",
    "BertForSequenceClassification": "classes",
}


def from_hf(hf: HFConfig, names: set[str]) -> EncoderConfig:
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
    classes = None
    if head == "classes":
        classes = hf.classes()
        dropout_before = hf.take("classifier_dropout", None)
        if dropout_before not in (None, dropout):
            hf.errors.append(f"classifier_dropout = {dropout_before} must be hidden_dropout_prob")
    else:
        hf.take("classifier_dropout", None)
    return EncoderConfig(
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
        head=head,
        classes=classes,
        dropout_rate=dropout,
    )


def _has_pooler(names: set[str]) -> bool:
    return any(name.endswith("pooler.dense.weight") for name in names)


def optional(config: EncoderConfig) -> tuple[str, ...]:
    """Tensors of heads that this model does not have."""
    if config.head == "tokens":
        return (r"bert\.pooler\..*", r"cls\.seq_relationship\..*")
    return (r"cls\..*",) if config.head == "classes" else (r"cls\..*", r"classifier\..*")


def to_hf(config: EncoderConfig) -> dict[str, Any]:
    """Hugging Face's configuration from ours."""
    layers = config.layers
    architecture = {head: name for name, head in ARCHITECTURES.items()}[config.head]
    x: dict[str, Any] = {
        "model_type": "bert",
        "architectures": [architecture],
        "vocab_size": config.vocabulary,
        "hidden_size": layers.features,
        "num_hidden_layers": layers.num_layers,
        "num_attention_heads": layers.num_heads,
        "intermediate_size": layers.hidden,
        "hidden_act": ACTIVATION_NAMES[layers.activation],
        "hidden_dropout_prob": layers.dropout_rate,
        "attention_probs_dropout_prob": layers.attention_dropout_rate,
        "layer_norm_eps": layers.norm_epsilon,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.types,
    }
    return x | labels(config.classes)


def model(config: EncoderConfig, rngs: nnx.Rngs) -> Encoder:
    """The model that the configuration describes."""
    return Encoder(config, rngs=rngs)


def tensors(config: EncoderConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, and where it belongs in the model."""
    start = "" if config.head is None else PREFIX
    at = f"{start}embeddings"
    yield Tensor(f"{at}.word_embeddings.weight", ("embed", "tokens"))
    yield Tensor(f"{at}.position_embeddings.weight", ("embed", "positions"))
    yield Tensor(f"{at}.token_type_embeddings.weight", ("embed", "types"))
    yield from norm(f"{at}.LayerNorm", ("embed", "norm"))
    for i in range(config.layers.num_layers):
        at, paths = f"{start}encoder.layer.{i}", block(("stack",), i)
        for part in ("query", "key", "value"):
            yield from linear(f"{at}.attention.self.{part}", (*paths["attention"], part))
        yield from linear(f"{at}.attention.output.dense", (*paths["attention"], "out"))
        yield from norm(f"{at}.attention.output.LayerNorm", paths["attention_norm"])
        yield from linear(f"{at}.intermediate.dense", (*paths["feed_forward"], "up"))
        yield from linear(f"{at}.output.dense", (*paths["feed_forward"], "down"))
        yield from norm(f"{at}.output.LayerNorm", paths["feed_forward_norm"])
    if config.pooler:
        yield from linear(f"{start}pooler.dense", ("pooler",))
    if config.head == "classes":
        yield from linear("classifier", ("classify",))
    if config.head == "tokens":
        at = "cls.predictions"
        yield from linear(f"{at}.transform.dense", ("transform",))
        yield from norm(f"{at}.transform.LayerNorm", ("transform_norm",))
        yield Tensor(f"{at}.bias", ("token_bias",))
