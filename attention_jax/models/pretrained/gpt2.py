"""GPT-2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from attention_jax.models.decoder import Decoder, DecoderConfig
from attention_jax.models.layers import Layers
from attention_jax.models.pretrained.hf_config import ACTIVATION_NAMES, HFConfig
from attention_jax.models.pretrained.tensors import Tensor, block, linear, norm

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."
RENAMED: dict[str, str] = {}
IGNORED = (r".*\.attn\.(masked_)?bias",)  # masks, in older files
COPIES = {"lm_head.weight": "transformer.wte.weight"}
ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")


def from_hf(hf: HFConfig, names: set[str]) -> DecoderConfig:
    """Our configuration from Hugging Face's."""
    hf.architecture(ARCHITECTURES, "GPT2LMHeadModel")
    E = hf.number("n_embd")
    longest = hf.number("n_positions", 1024)
    hf.only("scale_attn_by_inverse_layer_idx", False)
    hf.flag("reorder_and_upcast_attn", False)  # the softmax is in float32 in any case
    for name in ("type", "use_proj", "activation", "first_dropout", "proj_to_labels"):
        hf.take(f"summary_{name}", None)  # of a head that we do not have
    return DecoderConfig(
        vocabulary=hf.number("vocab_size"),
        layers=Layers(
            features=E,
            num_layers=hf.number("n_layer"),
            num_heads=hf.number("n_head"),
            hidden=hf.number("n_inner", None) or 4 * E,
            activation=hf.activation("activation_function", "gelu_new"),
            norm_epsilon=hf.number("layer_norm_epsilon", 1e-5),
            fused=True,
            scale=None if hf.flag("scale_attn_weights", True) else 1.0,
            dropout_rate=hf.rate("resid_pdrop", 0.1),
            attention_dropout_rate=hf.rate("attn_pdrop", 0.1),
        ),
        positions="learned",
        max_length=longest,
        tied=hf.flag("tie_word_embeddings", True),
        dropout_rate=hf.rate("embd_pdrop", 0.1),
    )


def optional(config: DecoderConfig) -> tuple[str, ...]:
    """Tensors of heads that this model does not have."""
    return (r"multiple_choice_head\..*", r"score\..*")


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Hugging Face's configuration from ours."""
    layers = config.layers
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocabulary,
        "n_positions": config.max_length,
        "n_embd": layers.features,
        "n_layer": layers.num_layers,
        "n_head": layers.num_heads,
        "n_inner": layers.hidden,
        # Both names of the tanh approximation exist; they differ by rounding. GPT-2 uses this one.
        "activation_function": {"gelu_tanh": "gelu_new"}.get(
            layers.activation, ACTIVATION_NAMES[layers.activation]
        ),
        "layer_norm_epsilon": layers.norm_epsilon,
        "scale_attn_weights": layers.scale is None,
        "resid_pdrop": layers.dropout_rate,
        "attn_pdrop": layers.attention_dropout_rate,
        "embd_pdrop": config.dropout_rate,
        "tie_word_embeddings": config.tied,
    }


def model(config: DecoderConfig, rngs: nnx.Rngs) -> Decoder:
    """The model that the configuration describes."""
    return Decoder(config, rngs=rngs)


def tensors(config: DecoderConfig) -> Iterator[Tensor]:
    """All of a checkpoint's tensors. Its projections are ``[in, out]``, as ours."""
    yield Tensor(f"{PREFIX}wte.weight", ("embed", "tokens"))
    yield Tensor(f"{PREFIX}wpe.weight", ("embed", "positions"))
    for i in range(config.layers.num_layers):
        at, paths = f"{PREFIX}h.{i}", block(("stack",), i)
        projections = {
            "attn.c_attn": (*paths["attention"], "query_key_value"),
            "attn.c_proj": (*paths["attention"], "out"),
            "mlp.c_fc": (*paths["feed_forward"], "up"),
            "mlp.c_proj": (*paths["feed_forward"], "down"),
        }
        for name, path in projections.items():
            yield Tensor(f"{at}.{name}.weight", (*path, "kernel"))
            yield Tensor(f"{at}.{name}.bias", (*path, "bias"))
        yield from norm(f"{at}.ln_1", paths["attention_norm"])
        yield from norm(f"{at}.ln_2", paths["feed_forward_norm"])
    yield from norm(f"{PREFIX}ln_f", ("stack", "norm"))
    if not config.tied:
        yield from linear("lm_head", ("head",), bias=False)
