"""Llama and families like it: rotary positions, RMS norms, gated feed-forward layers.

They share one way to read and write; a ``Llama`` describes what is different in each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx

from attention_jax.models.decoder import Decoder, DecoderConfig
from attention_jax.models.layers import Layers
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig
from attention_jax.models.pretrained.rope import partial_factor, rope_parameters, rotary
from attention_jax.models.pretrained.tensors import Tensor, block, linear, norm
from attention_jax.nn.linear import names_with_bias

Options = dict[str, Any]

# Hugging Face's defaults of entries that a file may omit.
DEFAULTS: Options = {
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}

# Hugging Face's names of the norms by their position, and ours.
NORMS = {
    "pre": {"input": "attention_norm", "post_attention": "feed_forward_norm"},
    "both": {
        "input": "attention_norm",
        "post_attention": "attention_norm_after",
        "pre_feedforward": "feed_forward_norm",
        "post_feedforward": "feed_forward_norm_after",
    },
    "after": {
        "post_attention": "attention_norm_after",
        "post_feedforward": "feed_forward_norm_after",
    },
}


def _nothing(*_: Any) -> Options:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama:
    """A family of decoders: what it has in common with Llama is not listed.

    Attributes:
      model_type: in ``config.json``.
      name: in the names of Hugging Face's classes.
      defaults: of entries that a file may omit, where they differ from ``DEFAULTS``.
      biases: entries of the file that add biases; in other families they must be false.
      layers: options of ``Layers`` that all models of the family have.
      padding: the token of padding by default, which must be in the vocabulary.
      only: entries that state what always holds, with the values they may have.
      read: reads further entries into options of ``Layers``, given those read before and the
        length of the model.
      read_decoder: reads further entries into options of ``DecoderConfig``, given those of
        ``Layers``.
      write: these entries, from our configuration.
    """

    model_type: str
    name: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ("attention_bias",)
    layers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    padding: int = 0
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    read: Callable[[HFConfig, Options, int], Options] = _nothing
    read_decoder: Callable[[HFConfig, Options], Options] = _nothing
    write: Callable[[DecoderConfig], Options] = _nothing

    PREFIX = "model."
    IGNORED = (r".*rotary_emb\.inv_freq",)

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """The one value of ``model_type``."""
        return (self.model_type,)

    @property
    def COPIES(self) -> Mapping[str, str]:
        """The head, if it is tied."""
        return {"lm_head.weight": "model.embed_tokens.weight"}

    @property
    def RENAMED(self) -> Mapping[str, str]:
        """None."""
        return {}

    def from_hf(self, hf: HFConfig, names: set[str]) -> DecoderConfig:
        """Our configuration from Hugging Face's."""
        defaults = DEFAULTS | dict(self.defaults)
        architecture = f"{self.name}ForCausalLM"
        hf.architecture((architecture,), architecture)
        E, num_heads = hf.number("hidden_size"), hf.number("num_attention_heads")
        longest = hf.number("max_position_embeddings", defaults["max_position_embeddings"])
        kv_heads = or_null(hf, "num_key_value_heads", defaults["num_key_value_heads"])
        layers: Options = {
            "features": E,
            "num_layers": hf.number("num_hidden_layers"),
            "num_heads": num_heads,
            "num_kv_heads": kv_heads or num_heads,
            "head_dim": or_null(hf, "head_dim", defaults["head_dim"]) or E // num_heads,
            "hidden": hf.number("intermediate_size"),
            "gated": True,
            "norm": "rms",
            "norm_epsilon": hf.number("rms_norm_eps", defaults["rms_norm_eps"]),
            "attention_dropout_rate": hf.rate("attention_dropout", 0.0),
        }
        for entry, option in (("attention_bias", "bias"), ("mlp_bias", "feed_forward_bias")):
            layers[option] = entry in self.biases and hf.flag(entry, False)
            hf.only(entry, False, None)
        # How products are split among devices, without effect on the result; an older name.
        hf.only("pretraining_tp", 1, *range(2, 65))
        hf.take("max_sequence_length", None)
        for entry, values in self.only.items():
            hf.only(entry, *values)
        layers |= self.layers
        layers |= self.read(hf, layers, longest)
        if "activation" not in layers:
            layers["activation"] = hf.activation("hidden_act", "silu")
        if "rotary" not in layers:
            layers["rotary"] = rotary(hf, longest, theta=defaults["rope_theta"])
        return DecoderConfig(
            vocabulary=hf.number("vocab_size"),
            layers=Layers(**layers),
            max_length=longest,
            tied=hf.flag("tie_word_embeddings", defaults["tie_word_embeddings"]),
            **self.read_decoder(hf, layers),
        )

    def to_hf(self, config: DecoderConfig) -> Options:
        """Hugging Face's configuration from ours."""
        layers = config.layers
        flags = {"attention_bias": layers.bias, "mlp_bias": layers.feed_forward_bias}
        x = {
            "model_type": self.model_type,
            "architectures": [f"{self.name}ForCausalLM"],
            "vocab_size": config.vocabulary,
            "hidden_size": layers.features,
            "intermediate_size": layers.hidden,
            "num_hidden_layers": layers.num_layers,
            "num_attention_heads": layers.num_heads,
            "num_key_value_heads": layers.num_kv_heads,
            "head_dim": layers.head_dim,
            "max_position_embeddings": config.max_length or 2048,
            "rms_norm_eps": layers.norm_epsilon,
            "tie_word_embeddings": config.tied,
            "attention_dropout": layers.attention_dropout_rate,
            **{entry: flags[entry] for entry in self.biases},
            **self.write(config),
        }
        if "hidden_activation" not in x:
            x["hidden_act"] = ACTIVATION_NAMES[layers.activation]
        if "rope_parameters" not in x:
            x["rope_parameters"] = rope_parameters(layers.rotary)  # type: ignore[arg-type]
        if config.vocabulary <= self.padding:
            x["pad_token_id"] = None
        return x

    def model(self, config: DecoderConfig, rngs: nnx.Rngs) -> Decoder:
        """The model that the configuration describes."""
        return Decoder(config, rngs=rngs)

    def optional(self, config: DecoderConfig) -> tuple[str, ...]:
        """Tensors of heads that this model does not have."""
        return ()

    def tensors(self, config: DecoderConfig) -> Iterator[Tensor]:
        """Every tensor of a checkpoint, and where it belongs in the model."""
        layers, has_bias = config.layers, names_with_bias(config.layers.bias)
        projections = {"q": "query", "k": "key", "v": "value", "o": "out"}
        products = {name: name for name in ("gate", "up", "down")}
        if layers.fused:
            projections = {"qkv": "query_key_value", "o": "out"}
            products = {"gate_up": "gate_up", "down": "down"}
        yield Tensor("model.embed_tokens.weight", ("embed", "tokens"))
        for i in range(layers.num_layers):
            at, paths = f"model.layers.{i}", block(("stack",), i)
            for theirs, ours in projections.items():
                path, bias = (*paths["attention"], ours), has_bias(ours.split("_")[0])
                yield from linear(f"{at}.self_attn.{theirs}_proj", path, bias=bias)
            if layers.query_key_norm:
                for theirs, ours in (("q", "query_norm"), ("k", "key_norm")):
                    path = *paths["attention"], ours
                    yield from norm(f"{at}.self_attn.{theirs}_norm", path, bias=False)
            for theirs, ours in products.items():
                path = *paths["feed_forward"], ours
                yield from linear(f"{at}.mlp.{theirs}_proj", path, bias=layers.feed_forward_bias)
            for theirs, ours in NORMS[layers.order].items():
                yield from norm(f"{at}.{theirs}_layernorm", paths[ours], bias=False)
        yield from norm("model.norm", ("stack", "norm"), bias=False)
        if not config.tied:
            yield from linear("lm_head", ("head",), bias=False)


# --- Entries of several families.


def or_null(hf: HFConfig, name: str, default: Any) -> Any:
    """A positive number, or None for null; the default only if the entry is missing."""
    return hf.number(name, None) if name in hf.unused else default


def windows_by_layer(
    hf: HFConfig, num_layers: int, window: int | None, default: list[str]
) -> tuple[int | None, ...]:
    """The window of each layer by ``layer_types``.

    Args:
      hf: the entries.
      num_layers: number of layers.
      window: of the layers with ``sliding_attention``; None if there can be none.
      default: the types, if the file omits them.
    """
    types = hf.take("layer_types", None)
    types = default if types is None else types
    names = {"full_attention": None} | ({"sliding_attention": window} if window else {})
    if len(types) != num_layers or not set(types) <= set(names):
        hf.errors.append(f"layer_types must be {num_layers} of {sorted(names)}, got {types}")
        return (None,)
    return tuple(names[t] for t in types)


def sliding(window: int | None, which: list[bool]) -> list[str]:
    """``layer_types``: ``sliding_attention`` for some of the layers if there is a window."""
    return ["sliding_attention" if x and window else "full_attention" for x in which]


def window_entries(layers: Layers) -> Options:
    """The entries that ``windows_by_layer`` reads; ValueError for different windows."""
    (window,) = set(layers.windows) - {None} or {None}
    types = sliding(window, [w is not None for w in layers.windows])
    return {"sliding_window": window, "layer_types": types}


# --- Mistral.


def _mistral(hf: HFConfig, layers: Options, longest: int) -> Options:
    window = or_null(hf, "sliding_window", 4096)
    hf.same("sliding_window_size", window)
    return {"windows": (window,)}


def _mistral_entries(config: DecoderConfig) -> Options:
    (window,) = set(config.layers.windows)
    return {"sliding_window": window}


# --- Qwen2 and Qwen3.


def _qwen(hf: HFConfig, layers: Options, longest: int) -> Options:
    window, num_layers = or_null(hf, "sliding_window", 4096), layers["num_layers"]
    window = window if hf.flag("use_sliding_window", False) else None
    first = hf.take("max_window_layers", 28)
    if not isinstance(first, int) or first < 0:
        hf.errors.append(f"max_window_layers must be a number of layers, got {first!r}")
        first = 0
    types = sliding(window, [i >= first for i in range(num_layers)])
    return {"windows": windows_by_layer(hf, num_layers, window, types)}


def _qwen_entries(config: DecoderConfig) -> Options:
    x = window_entries(config.layers)
    return x | {"use_sliding_window": x["sliding_window"] is not None}


# --- SmolLM3.


def _smollm3(hf: HFConfig, layers: Options, longest: int) -> Options:
    num_layers = layers["num_layers"]
    every = hf.number("no_rope_layer_interval", 4)
    given = hf.take("no_rope_layers", None)  # in spite of its name, 1 for rotary positions
    if given is None:
        given = [int((i + 1) % every != 0) for i in range(num_layers)]
    if not isinstance(given, list) or len(given) < num_layers or not set(given) <= {0, 1}:
        hf.errors.append(f"no_rope_layers must be {num_layers} of 0 and 1, got {given!r}")
        given = [1] * num_layers
    window = or_null(hf, "sliding_window", None)
    window = window if hf.flag("use_sliding_window", False) else None
    hf.take("max_window_layers", None)  # in published files; the family does not use it
    types = sliding(window, [not x for x in given[:num_layers]])
    positions = rotary(hf, longest, theta=2_000_000.0)
    return {
        "windows": windows_by_layer(hf, num_layers, window, types),
        "rotary": tuple(positions if x else None for x in given[:num_layers]),
    }


def _smollm3_entries(config: DecoderConfig) -> Options:
    (positions,) = {x for x in config.layers.rotaries if x is not None}
    return {
        **_qwen_entries(config),
        "rope_parameters": rope_parameters(positions),
        "no_rope_layers": [int(x is not None) for x in config.layers.rotaries],
    }


# --- Phi-3.


def _phi3(hf: HFConfig, layers: Options, longest: int) -> Options:
    return {
        "windows": (or_null(hf, "sliding_window", None),),
        "rotary": rotary(hf, longest, partial=1.0, head_dim=layers["head_dim"]),
        "dropout_rate": hf.rate("resid_pdrop", 0.0),
    }


def _phi3_decoder(hf: HFConfig, layers: Options) -> Options:
    return {"dropout_rate": hf.rate("embd_pdrop", 0.0)}


def _phi3_entries(config: DecoderConfig) -> Options:
    layers = config.layers
    positions: Any = layers.rotary
    partial = {"partial_rotary_factor": partial_factor(positions, layers.head_dim)}  # type: ignore[arg-type]
    return {
        **_mistral_entries(config),
        "rope_parameters": rope_parameters(positions) | partial,
        "resid_pdrop": layers.dropout_rate,
        "embd_pdrop": config.dropout_rate,
    }


# --- Granite.


def _granite(hf: HFConfig, layers: Options, longest: int) -> Options:
    return {
        "scale": float(hf.number("attention_multiplier", 1.0)),
        "residual_scale": float(hf.number("residual_multiplier", 1.0)),
    }


def _granite_decoder(hf: HFConfig, layers: Options) -> Options:
    return {
        "embedding_scale": float(hf.number("embedding_multiplier", 1.0)),
        "head_scale": 1 / hf.number("logits_scaling", 1.0),
    }


def _granite_entries(config: DecoderConfig) -> Options:
    return {
        "attention_multiplier": config.layers.scale,
        "residual_multiplier": config.layers.residual_scale,
        "embedding_multiplier": config.embedding_scale,
        "logits_scaling": _inverse(config.head_scale),
    }


def _inverse(x: float) -> float:
    """The ``y`` with ``1 / y == x``, despite rounding."""
    near = 1 / x
    tries = float(round(near)), near, math.nextafter(near, 0), math.nextafter(near, math.inf)
    return next((y for y in tries if y and 1 / y == x), near)


NO = (False, None)
FAMILIES = (
    Llama(
        model_type="llama",
        name="Llama",
        biases=("attention_bias", "mlp_bias"),
        only={"is_llama_config": (True, None), "rope_interleaved": NO},
    ),
    Llama(
        model_type="mistral",
        name="Mistral",
        defaults={"max_position_embeddings": 131_072, "num_key_value_heads": 8},
        biases=(),
        read=_mistral,
        write=_mistral_entries,
    ),
    Llama(
        model_type="qwen2",
        name="Qwen2",
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 32},
        biases=(),
        layers={"bias": ("query", "key", "value")},
        only={"use_mrope": NO},
        read=_qwen,
        write=_qwen_entries,
    ),
    Llama(
        model_type="qwen3",
        name="Qwen3",
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
        layers={"query_key_norm": True},
        read=_qwen,
        write=_qwen_entries,
    ),
    Llama(
        model_type="smollm3",
        name="SmolLM3",
        defaults={
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        biases=("attention_bias", "mlp_bias"),
        padding=128_004,
        read=_smollm3,
        write=_smollm3_entries,
    ),
    Llama(
        model_type="phi3",
        name="Phi3",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        biases=(),
        layers={"fused": True},
        padding=32_000,
        only={"lm_head_bias": NO, "full_attn_mod": (1, None), "interpolate_factor": (1, None)},
        read=_phi3,
        read_decoder=_phi3_decoder,
        write=_phi3_entries,
    ),
    Llama(
        model_type="olmo2",
        name="Olmo2",
        defaults={"rms_norm_eps": 1e-5},
        layers={"order": "after", "query_key_norm": "joint"},
        padding=1,
    ),
    Llama(
        model_type="granite",
        name="Granite",
        biases=("attention_bias", "mlp_bias"),
        read=_granite,
        read_decoder=_granite_decoder,
        write=_granite_entries,
    ),
)
