"""ModernBERT: local and global attention in turn, two rotary bases, gated feed-forward layers."""

from __future__ import annotations

from typing import Any

from attention_jax.models.encoder import EncoderConfig, Pooler
from attention_jax.models.layers import Layers
from attention_jax.models.pretrained.encoders import EncoderFamily
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig
from attention_jax.models.pretrained.rope import an_object, of_layer_type, rope_parameters
from attention_jax.positions import Rotary

GLOBAL, LOCAL = "full_attention", "sliding_attention"
# The older entry for the base of each kind of layer, and its default.
THETAS = {GLOBAL: ("global_rope_theta", 160_000.0), LOCAL: ("local_rope_theta", 10_000.0)}
PADDING = 50_283
POOLS = {"cls": "first", "mean": "mean"}
POOL_NAMES = {ours: name for name, ours in POOLS.items()}
HEAD = {"head.dense": "pooler", "head.norm": "pooler_norm"}
# Entries about training or other software, and leftovers in published files.
UNREAD = (
    "deterministic_flash_attn",
    "initializer_cutoff_factor",
    "layer_norm_eps",
    "position_embedding_type",
    "reference_compile",
    "repad_logits_with_grad",
    "sparse_pred_ignore_index",
    "sparse_prediction",  # of the loss
)


class _ModernBert(EncoderFamily):
    """Reads and writes the entries of ModernBERT, which are not those of BERT."""

    def encoder_from_hf(self, hf: HFConfig, head: str | None, names: set[str]) -> EncoderConfig:
        num_layers = hf.number("num_hidden_layers")
        longest = hf.number("max_position_embeddings", 8192)
        types = _layer_types(hf, num_layers)
        E, num_heads = hf.number("hidden_size"), hf.number("num_attention_heads")
        rotaries = _rotaries(hf, longest, E // num_heads)
        windows = {GLOBAL: None, LOCAL: 2 * (hf.number("local_attention", 128) // 2) + 1}
        bias, norm_bias = hf.flag("classifier_bias", False), hf.flag("norm_bias", False)
        activation = hf.activation("classifier_activation", "gelu")
        attention_dropout = hf.rate("attention_dropout", 0.0)
        pooling = hf.take("classifier_pooling", "cls")
        if pooling not in POOLS:
            hf.errors.append(f"classifier_pooling must be one of {list(POOLS)}, got {pooling!r}")
        layers = Layers(
            features=E,
            num_layers=num_layers,
            num_heads=num_heads,
            hidden=hf.number("intermediate_size"),
            activation=hf.activation("hidden_activation", "gelu"),
            gated=True,
            fused=True,
            norm_epsilon=hf.number("norm_eps", 1e-5),
            norm_bias=norm_bias,
            first_norm=False,
            bias=hf.flag("attention_bias", False),
            feed_forward_bias=hf.flag("mlp_bias", False),
            rotary=tuple(rotaries[x] for x in types),
            windows=tuple(windows[x] for x in types),
            attention_output_dropout_rate=attention_dropout,
            attention_dropout_rate=attention_dropout,
            feed_forward_dropout_rate=hf.rate("mlp_dropout", 0.0),
        )
        return EncoderConfig(
            vocabulary=hf.number("vocab_size"),
            layers=layers,
            positions=None,
            max_length=longest,
            embedding_norm=True,
            pooler=head in ("classes", "tags", "spans"),
            pooler_config=Pooler(activation, bias=bias, norm=True, tokens=True),
            pool=POOLS.get(pooling, "first"),
            head="tokens" if head == "tokens" else None,
            head_activation=activation,
            head_bias=bias,
            dropout_rate=hf.rate("embedding_dropout", 0.0),
        )

    def encoder_to_hf(self, encoder: EncoderConfig) -> dict[str, Any]:
        layers, pooler = encoder.layers, encoder.pooler_config
        types = [GLOBAL if window is None else LOCAL for window in layers.windows]
        local = [window for window in layers.windows if window is not None]
        rotaries: dict[str, Any] = {kind: Rotary(theta) for kind, (_, theta) in THETAS.items()}
        rotaries |= dict(zip(types, layers.rotaries, strict=True))
        return {
            "vocab_size": encoder.vocabulary,
            # Hugging Face's default must be a token.
            **({} if encoder.vocabulary > PADDING else {"pad_token_id": None}),
            "hidden_size": layers.features,
            "intermediate_size": layers.hidden,
            "num_hidden_layers": layers.num_layers,
            "num_attention_heads": layers.num_heads,
            "hidden_activation": ACTIVATION_NAMES[layers.activation],
            "max_position_embeddings": encoder.max_length,
            "norm_eps": layers.norm_epsilon,
            "norm_bias": layers.norm_bias,
            "attention_bias": layers.bias,
            "attention_dropout": layers.attention_dropout_rate,
            "mlp_bias": layers.feed_forward_bias,
            "mlp_dropout": layers.feed_forward_dropout_rate,
            "embedding_dropout": encoder.dropout_rate,
            "layer_types": types,
            "local_attention": local[0] - 1 if local else 128,
            "rope_parameters": {kind: rope_parameters(x) for kind, x in rotaries.items()},
            "classifier_activation": ACTIVATION_NAMES[pooler.activation],
            "classifier_bias": pooler.bias,
            "classifier_pooling": POOL_NAMES[encoder.pool],
        }


def _layer_types(hf: HFConfig, num_layers: int) -> list[str]:
    """The kind of each layer; by default every third one, the first included, is global."""
    every = hf.number("global_attn_every_n_layers", 3)
    types = hf.take("layer_types", None)
    if types is None:
        return [LOCAL if i % every else GLOBAL for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not set(types) <= set(THETAS):
        hf.errors.append(f"layer_types must be {num_layers} of {list(THETAS)}, got {types!r}")
        return [GLOBAL] * num_layers
    return types


def _rotaries(hf: HFConfig, longest: int, head_dim: int) -> dict[str, Rotary]:
    """Those of each kind of layer; a scaling in the older format applies to both."""
    given, scaling = an_object(hf, "rope_parameters"), an_object(hf, "rope_scaling")
    if not given.keys() <= THETAS.keys():
        hf.errors.append(f"rope_parameters must have entries {list(THETAS)}, got {given!r}")
        given = {}
    found = {}
    for kind, (name, default) in THETAS.items():
        parameters = {"rope_theta": hf.take(name, default), **(given.get(kind) or {}), **scaling}
        found[kind] = of_layer_type(hf, kind, parameters, longest, head_dim)
    return found


MODERNBERT = _ModernBert(
    NAMES={"modernbert": "ModernBert"},
    PREFIX="model.",
    COPIES={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    embeddings={"tok_embeddings": "tokens", "norm": "norm"},
    stack="layers",
    layer={
        "attn_norm": "attention_norm",
        "attn.Wqkv": "attention.query_key_value",
        "attn.Wo": "attention.out",
        "mlp_norm": "feed_forward_norm",
        "mlp.Wi": "feed_forward.gate_up",
        "mlp.Wo": "feed_forward.down",
    },
    after={"final_norm": "norm"},
    heads={
        "tokens": {
            "head.dense": "transform",
            "head.norm": "transform_norm",
            "decoder.bias": "token_bias",
        },
        "classes": {**HEAD, "classifier": "classify"},
        "tags": {**HEAD, "classifier": "classify"},
        "spans": {**HEAD, "classifier": "spans"},
    },
    only={"decoder_bias": (True,)},
    unread=UNREAD,
    head_dropout=dict.fromkeys(("classes", "tags", "spans"), ("classifier_dropout", 0.0)),
)
