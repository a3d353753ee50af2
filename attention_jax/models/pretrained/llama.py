"""Llama and families like it: rotary positions, RMS norms, gated feed-forward layers.

They share one way to read and write; a ``Llama`` describes what is different in each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx

from attention_jax.models.decoder import Decoder, DecoderConfig
from attention_jax.models.layers import Experts, Layers
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig
from attention_jax.models.pretrained.rope import rope_parameters, rotary
from attention_jax.models.pretrained.tensors import Form, Path, Tensor, block, expert, linear, norm
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
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
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


GATED = ("gate", "up", "down")


def _nothing(*_: Any) -> Options:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama:
    """A family of decoders, described by its differences from Llama.

    Attributes:
      model_type: in ``config.json``.
      name: in the names of Hugging Face's classes.
      defaults: of entries that a file may omit, where they differ from ``DEFAULTS``.
      biases: entries of the file that add biases; in other families they must be false.
      layers: options of ``Layers`` that all models of the family have.
      experts: the names of a mixture of experts and of each expert's gate, up and down.
      padding: the token of padding by default, which must be in the vocabulary.
      predicts_further: whether files have one more layer, which predicts the token after the next.
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
    experts: tuple[str, str, str, str] = ("mlp", "gate_proj", "up_proj", "down_proj")
    padding: int = 0
    predicts_further: bool = False
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
            "attention_dropout_rate": hf.rate("attention_dropout", defaults["attention_dropout"]),
        }
        for entry, option in (("attention_bias", "bias"), ("mlp_bias", "feed_forward_bias")):
            layers[option] = entry in self.biases and hf.flag(entry, defaults[entry])
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
            layers["rotary"] = rotary(
                hf, longest, theta=defaults["rope_theta"], head_dim=layers["head_dim"]
            )
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
        further = rf"model\.layers\.{config.layers.num_layers}\..*"
        return (further,) if self.predicts_further else ()

    def tensors(self, config: DecoderConfig) -> Iterator[Tensor]:
        """Every tensor of a checkpoint, and where it belongs in the model."""
        layers = config.layers
        yield Tensor("model.embed_tokens.weight", ("embed", "tokens"))
        for i in range(layers.num_layers):
            at, paths = f"model.layers.{i}", block(("stack",), i)
            if layers.latent is None:
                yield from _attention(f"{at}.self_attn", paths["attention"], layers)
            else:
                yield from _latent_attention(f"{at}.self_attn", paths["attention"], layers)
            if layers.experts is not None and i >= layers.experts.dense_layers:
                yield from self._experts(at, paths["feed_forward"], layers.experts)
            else:
                bias = layers.feed_forward_bias
                names = ("gate_up", "down") if layers.fused else ("gate", "up", "down")
                yield from _feed_forward(f"{at}.mlp", paths["feed_forward"], names, bias=bias)
            for theirs, ours in NORMS[layers.order].items():
                yield from norm(f"{at}.{theirs}_layernorm", paths[ours], bias=False)
        yield from norm("model.norm", ("stack", "norm"), bias=False)
        if not config.tied:
            yield from linear("lm_head", ("head",), bias=False)

    def _experts(self, at: str, path: Path, experts: Experts) -> Iterator[Tensor]:
        module, *names = self.experts
        yield from linear(f"{at}.{module}.gate", (*path, "router"), bias=False)
        if experts.gating == "sigmoid":
            yield Tensor(f"{at}.{module}.gate.e_score_correction_bias", (*path, "correction"))
        for theirs, ours in zip(names, GATED, strict=True):
            for i in range(experts.number):
                yield expert(f"{at}.{module}.experts.{i}.{theirs}", (*path, ours), i)
        if experts.shared is not None:
            shared = f"{at}.{module}.shared_experts"
            yield from _feed_forward(shared, (*path, "shared"), GATED, bias=False)


def _attention(at: str, path: Path, layers: Layers) -> Iterator[Tensor]:
    has_bias = names_with_bias(layers.bias)
    projections = {"q": "query", "k": "key", "v": "value", "o": "out"}
    if layers.fused:
        projections = {"qkv": "query_key_value", "o": "out"}
    for theirs, ours in projections.items():
        yield from linear(f"{at}.{theirs}_proj", (*path, ours), bias=has_bias(ours.split("_")[0]))
    if layers.query_key_norm:
        for theirs, ours in (("q", "query_norm"), ("k", "key_norm")):
            yield from norm(f"{at}.{theirs}_norm", (*path, ours), bias=False)


def _latent_attention(at: str, path: Path, layers: Layers) -> Iterator[Tensor]:
    latent: Any = layers.latent
    bias, query = layers.bias is True, f"{at}.q_proj"
    if latent.query_features is not None:
        yield from linear(f"{at}.q_a_proj", (*path, "query_down"), bias=bias)
        yield from norm(f"{at}.q_a_layernorm", (*path, "query_norm"), bias=False)
        query = f"{at}.q_b_proj"
    yield from linear(query, (*path, "query"), bias=False)
    yield from linear(f"{at}.kv_a_proj_with_mqa", (*path, "down"), bias=bias)
    yield from norm(f"{at}.kv_a_layernorm", (*path, "latent_norm"), bias=False)
    up = Form(  # [N (H + D), R] in Hugging Face; in ours [R, N, H + D]
        lambda x: x.reshape(layers.num_heads, -1, x.shape[-1]).transpose(2, 0, 1),
        lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    )
    yield Tensor(f"{at}.kv_b_proj.weight", (*path, "key_value_up"), up)
    yield from linear(f"{at}.o_proj", (*path, "out"), bias=bias)


def _feed_forward(at: str, path: Path, names: tuple[str, ...], *, bias: bool) -> Iterator[Tensor]:
    for name in names:
        yield from linear(f"{at}.{name}_proj", (*path, name), bias=bias)


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


def one_window(config: DecoderConfig) -> Options:
    """The entry of a window that all layers have; ValueError for different ones."""
    (window,) = set(config.layers.windows)
    return {"sliding_window": window}


def read_routing(hf: HFConfig) -> None:
    """Reads entries of a mixture of experts that are about its loss in training."""
    for entry in ("output_router_logits", "router_aux_loss_coef"):
        hf.take(entry, None)


def experts_of(layers: Layers) -> Experts:
    """The mixture of experts; NotImplementedError if there is none."""
    if layers.experts is None:
        raise NotImplementedError("experts must be given")
    return layers.experts


NO = (False, None)
FAMILIES = (
    Llama(
        model_type="llama",
        name="Llama",
        biases=("attention_bias", "mlp_bias"),
        only={"is_llama_config": (True, None), "rope_interleaved": NO},
    ),
    Llama(
        model_type="olmo2",
        name="Olmo2",
        defaults={"rms_norm_eps": 1e-5},
        layers={"order": "after", "query_key_norm": "joint"},
        padding=1,
    ),
)
